"""Two tensor parallel ranks on CPU, each a process: together they drop what the trainer's twin drops, and what one rank does.

float32 models, as in ``test_law2_drop_sets``, whose seeds leave no decision within rounding of its threshold. The scheduler runs
in the test's own process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_checkpoints import SAVED
from safetensors.torch import load_file, save_file
from support import (
    FULL,
    RECORD,
    engine,
    expiries_on,
    generate,
    pool_is_whole,
    preempted,
    prompts,
    save_gated,
    scheduler_of,
    tiny_config,
    token_ids,
)
from test_law2_drop_sets import expected, visible_drops

from vllm_prune.attention.step_state import find_state
from vllm_prune.config import GATE_FILE
from vllm_prune.gates import NEVER

pytestmark = pytest.mark.slow

LENGTHS = [1, 2, 31, 32, 33, 100, 257, 64]
TOKENS = 24
GATES: dict[str, dict[str, Any]] = {
    "dcp_kv_head": {"beta": 2.0, "scope": "kv_head"},
    # Gates of whole layers are served on two ranks in test_parallel_serve.py too; dms decides by head, as dcp_kv_head.
    **({"dcp": {"beta": 3.6}, "dms": {"delay": 8}} if FULL else {}),
    # Public DMS checkpoints: a rank's gates are its heads' queries, or tensors cut to its heads.
    **{name: {} for name in (["nvidia", "modelopt", "fastdms"] if FULL else ["nvidia"])},
}
KEYS = ("tokens", "keys_held", "keys_dropped", "kept_fraction", "kept_fraction_least_layer", "kept_pairs")
"""Of what rides on a response, what does not hang on how lanes are packed into blocks."""


def make_lopsided(folder: Path) -> None:
    """The second half of the KV heads keeps more than twice as much: the ranks' needs drift apart."""
    tensors = load_file(folder / GATE_FILE)
    for name, tensor in tensors.items():
        if name.endswith("beta"):
            tensor[len(tensor) // 2 :] += 1.0
    save_file(tensors, folder / GATE_FILE)


@pytest.fixture(scope="module", params=GATES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(name)
    if name in SAVED:
        return SAVED[name](folder)
    heads = 4 if name == "dcp_kv_head" else 2
    method = name.removesuffix("_kv_head")
    save_gated(
        folder, tiny_config("qwen3", layers=3, kv_heads=heads), method, section={"protect": {"sinks": 2}}, **GATES[name]
    )
    if name == "dcp_kv_head":
        make_lopsided(folder)
    return folder


def runs(llm: Any) -> tuple[list[Any], list[Any]]:
    """A mixed batch, chunked; then requests that are all thrown out in the middle, twice."""
    mixed = generate(llm, prompts(LENGTHS, seed=4), tokens=TOKENS)
    again = preempted(llm, prompts([90, 40], seed=5), tokens=20)
    generate(llm, prompts([3]), tokens=2)
    assert pool_is_whole(llm)
    return mixed, again


@pytest.fixture(scope="module")
def alone(model) -> tuple[list[Any], list[Any]]:
    with engine(model, long_prefill_token_threshold=16) as llm:
        return runs(llm)


def drops(name: str, model: Path, llm: Any, outputs: list[Any]) -> None:
    """Both ranks' recorded expiries, joined, against the twin's."""
    for output in outputs:
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids][:-1]
        by_rank = llm.collective_rpc(expiries_on, args=(output.request_id, len(ids)))
        want = expected(model, ids, len(output.prompt_token_ids))
        if name == "dcp":
            np.testing.assert_array_equal(by_rank[0], by_rank[1])
            found = by_rank[0]
        else:
            found = np.concatenate(by_rank, axis=1)
        np.testing.assert_array_equal(visible_drops(found), want)
        if len(ids) > 64:
            assert 0.05 < (want != NEVER).mean() < 0.98, "the test must see drops and survivors"


def test_two_ranks(name, model, alone):
    """Mixed batch and preemption: tokens, drops and what is told of them are those of one rank, and the pool is whole."""
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "long_prefill_token_threshold": 16}
    with engine(model, **options, **RECORD) as llm:
        spec = scheduler_of(llm).kv_cache_config.kv_cache_groups[0].kv_cache_spec
        assert spec.ranks == 2 and spec.num_kv_heads == (2 if name == "dcp_kv_head" else 1)
        found = runs(llm)
        for outputs, others in zip(found, alone, strict=True):
            assert token_ids(outputs) == token_ids(others)
            for output, other in zip(outputs, others, strict=True):
                said, told = (x.kv_transfer_params["vllm_prune"] for x in (output, other))
                assert {key: said[key] for key in KEYS} == {key: pytest.approx(told[key]) for key in KEYS}
            drops(name, model, llm, outputs)
        assert sum(output.kv_transfer_params["vllm_prune"]["blocks_returned"] for output in found[0]) > 0
        if name == "dcp":
            llm.collective_rpc(only_the_first_has_gates)
            drops(name, model, llm, generate(llm, prompts([100], seed=3), tokens=8))


def only_the_first_has_gates(worker: Any) -> None:
    """The second rank's gates say nothing any more: where both decide alike, that must not matter."""
    if worker.rank > 0:
        for layer in find_state(worker.vllm_config).layers:
            torch.nn.init.zeros_(layer.drop_gate.qk.weight)
