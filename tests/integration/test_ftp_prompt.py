"""FTP's prompt mode: what the server bypasses is what the twin bypasses, alone, in a batch, after preemption.

float32 models and seeds for which no decision lies within rounding of the other, so that the comparison is exact.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import (
    EXACT,
    RECORD,
    alone_and_in_a_batch,
    engine,
    ftp_gates,
    generate,
    pool_is_whole,
    preempted,
    prompts,
    save_base,
    state_of,
    tiny_config,
    token_ids,
)
from vllm_prune_training.masked import GatedModel, load_gated

from vllm_prune.checkpoint import add_gates
from vllm_prune.gates import NEVER, GateShape

LAYERS = 4


def save_ftp(folder: Path, family: str, dtype: torch.dtype, layers: int, bias: float = 0.0, **params: str) -> Path:
    """A random checkpoint in prompt mode. Requirements differ from block to block, or a skipped token, whose facts stand
    still, would be skipped in all later ones. A large ``bias`` lets everybody run."""
    config = tiny_config(family, layers=layers)
    save_base(folder, config, dtype)
    gates = ftp_gates(GateShape(config.hidden_size, config.num_key_value_heads, layers), form="prompt", **params)
    for gate, wanted in zip(gates[1:], (0.8, 0.3, 0.6), strict=False):
        gate.sparsity.fill_(wanted)
    with torch.no_grad():
        gates[0].router[2].bias[0] += bias
    protect = {"sinks": 1, "window": 3}
    add_gates(folder, gates, {"params": {"form": "prompt", **params}, "protect": protect, "dtype": "float32"})
    return folder


@pytest.fixture(scope="module", params=[("qwen3", "skip"), ("llama", "keep"), ("llama", "skip")], ids="-".join)
def made(request, tmp_path_factory) -> tuple[Path, GatedModel]:
    """A checkpoint and its twin, before any engine."""
    family, kv = request.param
    torch.manual_seed(2)
    folder = save_ftp(tmp_path_factory.mktemp(family), family, torch.float32, LAYERS, kv=kv)
    return folder, load_gated(folder)


def check(made, llm, outputs) -> None:
    """Tokens bypassed by the server, its expiries, and its text, are the twin's."""
    store = state_of(llm).store
    keeps = made[1].gates[0].keeps_kv
    for output in outputs:
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids][:-1]
        prompt = len(output.prompt_token_ids)
        (req_id,) = {key for key, _ in store.events if key.split("-")[0] == output.request_id.split("-")[0]}
        with torch.no_grad():
            out = made[1](torch.tensor(ids), "hard", prompt=prompt)
        ran = torch.stack(out.runs).numpy() > 0
        found = store.expiries(req_id, len(ids))
        np.testing.assert_array_equal(found, out.expiry.numpy())
        np.testing.assert_array_equal(store.passed_by(req_id, len(ids)) if keeps else found[:, 0] != NEVER, ~ran)
        said = list(output.outputs[0].token_ids)
        assert out.logits[-len(said) :].argmax(-1).tolist() == said
        assert ran[:, prompt - 1 :].all() and ran[0].all()
        if prompt > 64:
            assert 0.1 < ran[1:, :prompt].mean() < 0.9
            assert (ran[2:] & ~ran[1:-1]).any(), "no cascade: skipped tokens run again"


def test_alone_and_in_a_batch(made):
    with engine(made[0], **RECORD) as llm:
        alone_and_in_a_batch(llm, lambda outputs: check(made, llm, outputs), LAYERS)


def test_after_preemption(made):
    """Prompt and output are computed again in one step, and the output is no part of the prompt."""
    with engine(made[0], **RECORD) as llm:
        check(made, llm, preempted(llm, prompts([90, 40], seed=5), tokens=24))


def test_a_router_that_never_skips_is_stock_vllm(tmp_path):
    """And what the checkpoint refuses: prompts in chunks, log-probabilities of the prompt."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMValidationError

    stock = save_base(tmp_path / "base", tiny_config("qwen3", layers=3), EXACT)
    folder = save_ftp(tmp_path / "gated", "qwen3", EXACT, 3, bias=1e4)
    batch, found = prompts([1, 31, 64, 150], seed=2), []
    for path in (stock, folder):
        with engine(path, enable_chunked_prefill=False) as llm:
            found.append(token_ids(generate(llm, batch)))
            assert pool_is_whole(llm)
            if path == folder:
                with pytest.raises(VLLMValidationError, match=r"refused \(prompt-logprobs\).*prune.off"):
                    llm.generate(prompts([8]), SamplingParams(prompt_logprobs=1, max_tokens=1), use_tqdm=False)
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=r"ftp \(form prompt\) gates need each prompt in one step"):
        EngineArgs(str(folder), skip_tokenizer_init=True, max_model_len=256, max_num_batched_tokens=200, max_num_seqs=4,
                   kv_cache_memory_bytes=16 << 20).create_engine_config()  # fmt: skip
