"""Law 2: what the trainer masked is what the server drops, whatever the chunking, batching, preemption or compilation.

float32 models, so that a decision can only differ where a score lies within rounding of its threshold; the seeds are
chosen such that none does, and the comparison is exact.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from support import (
    FULL,
    RECORD,
    engine,
    generate,
    pool_is_whole,
    preempted,
    prompts,
    random_gates,
    recorded,
    save_base,
    save_gated,
    scheduler_of,
    state_of,
    tiny_config,
)
from transformers import AutoModelForCausalLM
from vllm_prune_training.masked import load_gated

from vllm_prune.checkpoint import add_gates
from vllm_prune.gates import GATES, NEVER
from vllm_prune.gates.borrowed import borrow

METHODS = {
    "dcp": {"beta": 3.6},
    "dcp_kv_head": {"beta": 3.6, "scope": "kv_head"},
    "dms": {"delay": 8},
    "window": {"window": 40},
    "random": {"keep": 0.4, "delay": 8, "seed": 3},
    "ftp": {},
    "shadow": {"query_heads": 4, "width": 256, "hidden": 32, "closed": 0.5},
    "ltp": {"span": 20, "grid": 16, "theta": 0.98},
    "acc": {"grid": 16, "sinks": 2, "window": 8},
}


@pytest.fixture(scope="module", params=METHODS, ids=list(METHODS))
def gated(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_config("qwen3", layers=3)
    method = request.param.removesuffix("_kv_head")
    section = {"protect": {"sinks": 2}} if GATES[method].protects else {}
    return save_gated(folder, config, method, section=section, **METHODS[request.param])


def expected(gated, ids: list[int], prompt: int, strength: float | None = None) -> np.ndarray:
    """Hard expiries of the masked Hugging Face twin, restricted to drops that happened by the last computed query."""
    with torch.no_grad():
        found = load_gated(gated)(torch.tensor(ids), mode="hard", prompt=prompt, strength=strength).expiry.numpy()
    return np.where(found <= len(ids) - 1, found, NEVER)


def visible_drops(expiry: np.ndarray) -> np.ndarray:
    # A delayed expiry may be carried out one query before it matters: nobody saw the key in between.
    tokens = expiry.shape[-1]
    return np.where(expiry <= tokens - 1, expiry, NEVER)


def check(gated, llm, outputs, least: float = 0.05) -> None:
    for output in outputs:
        ids, found = recorded(llm, output)
        want = expected(gated, ids, len(output.prompt_token_ids))
        np.testing.assert_array_equal(visible_drops(found), want)
        if len(ids) > 64:
            assert least < (want != NEVER).mean() < 0.98, "the test must see drops and survivors"


def in_every_way(gated, **options) -> None:
    """Alone in chunks of 1, of 16 and whole; in mixed batches, around page and block borders; thrown out in the middle."""
    with engine(gated, **options, **RECORD) as llm:
        config = scheduler_of(llm).scheduler_config
        for chunk in (1, 16, 0):
            config.long_prefill_token_threshold = chunk
            check(gated, llm, generate(llm, prompts([130], seed=3), tokens=20))
        for chunk in (16, 0):  # prefill chunks and decodes in one step
            config.long_prefill_token_threshold = chunk
            check(gated, llm, generate(llm, prompts([1, 2, 31, 32, 33, 100, 257, 64], seed=4), tokens=40))
        config.long_prefill_token_threshold = 16
        before = set(state_of(llm).store.events)
        check(gated, llm, preempted(llm, prompts([90, 40], seed=5), tokens=30))
        lives = Counter(name for name, _ in set(state_of(llm).store.events) - before)
        assert len(lives) == 2 and min(lives.values()) >= 3, "each request has lived three times"
        generate(llm, prompts([3]), tokens=2)
        assert pool_is_whole(llm)


COMPILED = ("dcp", "dms", "ftp")
"""Of each way in which a gate reaches the compiled graph one; all with VLLM_PRUNE_FULL=1."""


def test_drop_sets(gated):
    method = gated.name.rstrip("0123456789")
    in_every_way(gated, enforce_eager=method not in COMPILED and not FULL)


def test_eager(tmp_path):
    in_every_way(save_gated(tmp_path, tiny_config("qwen3", layers=3), "dcp", **METHODS["dcp"]), enforce_eager=True)


def test_a_borrowed_neuron(tmp_path):
    """Llama has no q_norm, so DMS may borrow: server and twin read it before RoPE and ignore it after."""
    config = tiny_config("llama", layers=3)
    save_base(tmp_path, config, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    gates = random_gates(config, "dms", form="borrowed")
    borrow([layer.self_attn for layer in model.model.layers], gates, keep=0.02)
    model.save_pretrained(tmp_path)
    add_gates(tmp_path, gates, {"params": {"delay": 8, "form": "borrowed"}})
    outputs = prompts([130, 33], seed=3)
    with torch.no_grad():
        plain = model(torch.tensor([outputs[0]["prompt_token_ids"]])).logits
        twin = load_gated(tmp_path)
        ids = torch.tensor([outputs[0]["prompt_token_ids"]])
        assert (twin(ids, "open").logits - plain).abs().max() > 1e-3, "RoPE's share of the neuron must matter here"
    with engine(tmp_path, long_prefill_token_threshold=16, **RECORD) as llm:
        check(tmp_path, llm, generate(llm, outputs, tokens=20))
