"""Prompt forms of LTP and ACC-style elimination: what the server drops and skips is what the masked twin does.

float32 models and seeds for which no score lies within rounding of its threshold, so that the comparison is exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    EXACT,
    PROMPT_LENGTHS,
    RECORD,
    alone_and_in_a_batch,
    engine,
    generate,
    pool_is_whole,
    preempted,
    prompts,
    recorded,
    save_base,
    state_of,
    tiny_config,
    token_ids,
)
from vllm_prune_training.masked import GatedModel, load_gated

from vllm_prune.checkpoint import add_gates
from vllm_prune.gates import GATES, NEVER, ACCPromptGate, GateShape, LTPPromptGate

LAYERS = 4


def save_prompt_gated(folder: Path, family: str, method: str, strong: float = 1.0, **section: Any) -> Path:
    """A random checkpoint whose gates eliminate a good part of its prompts (none with ``strong`` 0)."""
    config = tiny_config(family, layers=LAYERS)
    save_base(folder, config, torch.float32)
    shape = GateShape(config.hidden_size, config.num_key_value_heads, LAYERS)
    gates = [GATES[method](shape).at_layer(layer) for layer in range(LAYERS)]
    for layer, gate in enumerate(gates):
        if isinstance(gate, LTPPromptGate):
            low, step = (0.95, 0.02) if family == "qwen3" else (0.75, 0.05)  # normed queries and keys attend evenly
            gate.theta.data.fill_(strong * (low + step * layer))
        elif isinstance(gate, ACCPromptGate):
            gate.tune(0.9 - 0.15 * layer, 0.9 if strong else 1e3)
    fields = {"protect": {"sinks": 1, "window": 3}, "dtype": "float32", **section}
    add_gates(folder, gates, fields)
    return folder


@pytest.fixture(scope="module", params=[("qwen3", "ltp_prompt"), ("llama", "ltp_prompt"), ("qwen3", "acc_prompt")],
                ids=lambda x: "-".join(x))  # fmt: skip
def made(request, tmp_path_factory) -> tuple[Path, GatedModel]:
    """A checkpoint and its twin, before any engine."""
    folder = save_prompt_gated(tmp_path_factory.mktemp("gated"), *request.param)
    return folder, load_gated(folder)


def check(made, llm, outputs) -> None:
    """Expiries recorded by the server, and its tokens, are the twin's."""
    for output in outputs:
        ids, found = recorded(llm, output)
        prompt = len(output.prompt_token_ids)
        with torch.no_grad():
            out = made[1](torch.tensor(ids), "hard", prompt=prompt)
        assert out.expiry is not None
        np.testing.assert_array_equal(found, out.expiry.numpy())
        said = list(output.outputs[0].token_ids)
        assert out.logits[-len(said) :].argmax(-1).tolist() == said
        gone = (found[:, 0, :prompt] != NEVER).mean(-1)
        if prompt > 64:
            assert gone[0] == 0 and (np.diff(gone) >= 0).all() and 0.2 < gone[-1] < 0.95


def test_alone_and_in_a_batch(made):
    with engine(made[0], **RECORD) as llm:
        held = alone_and_in_a_batch(llm, lambda outputs: check(made, llm, outputs), LAYERS)
        assert held["blocks_held"] < held["blocks_dense"]


def test_prompts_wait_rather_than_come_in_chunks(made):
    """A budget for a little more than one prompt, and decodes beside it."""
    with engine(made[0], max_model_len=320, max_num_batched_tokens=320, **RECORD) as llm:
        outputs = generate(llm, prompts([300, 280, 150, 140, 290], seed=9), tokens=15)
        check(made, llm, outputs)


def test_after_preemption(made):
    """Every running request is thrown out in the middle; prompt and output are computed again in one step, and the output
    is no part of the prompt."""

    with engine(made[0], **RECORD) as llm:
        check(made, llm, preempted(llm, prompts([90, 40], seed=5), tokens=24))
        assert {epoch for _, epoch in state_of(llm).store.events} >= {3, 4, 5, 6}, "each request has lived three times"


@pytest.mark.parametrize("method", ["ltp_prompt", "acc_prompt"])
def test_open_gates_are_stock_vllm(method, tmp_path):
    """At strength 0, and with gates that run and let everybody through."""
    config = tiny_config("qwen3", layers=LAYERS)
    base = save_base(tmp_path / "base", config, EXACT)
    found = []
    for folder, options in (
        (base, {}),
        (
            save_prompt_gated(tmp_path / "never", "qwen3", method, strong=0.0),
            {"dtype": str(EXACT).removeprefix("torch.")},
        ),
        (
            save_prompt_gated(tmp_path / "zero", "qwen3", method, strength=0.0),
            {"dtype": str(EXACT).removeprefix("torch.")},
        ),
    ):
        with engine(folder, enable_chunked_prefill=False, **options) as llm:
            found.append(token_ids(generate(llm, prompts(PROMPT_LENGTHS, seed=2), tokens=16)))
            assert pool_is_whole(llm)
    assert found[0] == found[1] == found[2]
    assert len({tuple(tokens) for tokens in found[0]}) > 4


def test_one_checkpoint_serves_a_range_of_strengths(tmp_path):
    """Offline tuning: a stronger start keeps less of the same prompt, down to the floor."""
    folder = save_prompt_gated(tmp_path, "qwen3", "acc_prompt")
    kept = []
    for strength in (0.5, 1.0, 2.0, 16.0):
        with engine(folder, additional_config={"vllm_prune": {"strength": strength}}) as llm:
            (output,) = generate(llm, prompts([400], seed=1), tokens=4)
            kept.append(output.kv_transfer_params["vllm_prune"]["kept_fraction"])
    assert kept[0] > kept[1] > kept[2] > kept[3]
    left = [1.0, *(0.9 / 16 * (0.9 - 0.15 * layer) for layer in range(LAYERS - 1))]
    assert kept[3] == pytest.approx(sum(left) / LAYERS, abs=0.01)


def test_prompt_logprobs_are_refused_request_by_request(tmp_path):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError  # HTTP 400

    folder = save_prompt_gated(tmp_path, "qwen3", "ltp_prompt")
    with engine(folder) as llm:
        with pytest.raises(VLLMValidationError, match=r"refused \(prompt-logprobs\).*prune.off"):
            llm.generate(prompts([8]), SamplingParams(prompt_logprobs=1, max_tokens=1), use_tqdm=False)
        plain = SamplingParams(logprobs=2, max_tokens=2, temperature=0, detokenize=False)
        assert llm.generate(prompts([8]), plain, use_tqdm=False)[0].outputs[0].logprobs
    with engine(folder, additional_config={"vllm_prune": {"strength": 0.0}}) as llm:
        params = SamplingParams(prompt_logprobs=1, max_tokens=1, detokenize=False)
        assert llm.generate(prompts([8]), params, use_tqdm=False)[0].prompt_logprobs
