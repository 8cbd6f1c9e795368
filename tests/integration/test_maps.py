"""``prune.map``: the answer says what the trainer's twin drops, of the requests that ask and of no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import engine, generate, pool_is_whole, preempted, prompts, scheduler_of, state_of, token_ids
from test_law2_drop_sets import METHODS, expected
from test_request_strength import folder_of, greedy
from vllm.exceptions import VLLMValidationError

from vllm_prune import lifetimes
from vllm_prune.gates import NEVER
from vllm_prune.lifetimes import unpack

MAPS: dict[str, Any] = {"additional_config": {"vllm_prune": {"maps": True}}}
ASKED = {"prune.map": True}


def check(folder: Path, output: Any, strength: float | None = None) -> float:
    """The answer's map is the twin's; which share of its keys went."""
    told = output.kv_transfer_params["vllm_prune"]
    tokens, prompt = told["tokens"], len(output.prompt_token_ids)
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    assert tokens == len(ids) - 2, "all that was computed before the last step"
    found = unpack(told["map"])
    want = expected(folder, ids[:tokens], prompt, strength)
    np.testing.assert_array_equal(found, want)
    # A delayed key may be dropped one query before that is seen; one of a query still to come is held in a map.
    assert 0 <= told["keys_dropped"] - int((found != NEVER).sum()) <= found.shape[0] * found.shape[1]
    assert told["map"]["prompt_tokens"] == prompt
    return float((found != NEVER).mean())


def forgotten(llm: Any) -> None:
    """Nothing of a map is left in the engine, and nothing is recorded of steps that nobody asks about."""
    generate(llm, prompts([40]), tokens=4)
    store = state_of(llm).store
    assert scheduler_of(llm).connector._lifetimes == {}
    assert store.lanes.store.events_cap == 0 and int(store.lanes.n_events[0]) == 0 and store.events == {}
    assert all(state.drops is None for state in store.slots.values())
    assert pool_is_whole(llm) or store.slots


@pytest.mark.parametrize("method", [*METHODS, "ltp_prompt"])
def test_a_map_is_the_twins(method, tmp_path):
    """In one batch: who asks and who does not, strengths, chunks beside decodes."""
    folder = folder_of(method, tmp_path)
    batch = prompts([130, 33, 64, 100], seed=3)
    asked: list[dict[str, Any] | None] = [
        {"prune.map": True}, {"prune.map": 1, "prune.off": True}, {"prune.map": False}, {"prune.map": 1, "prune.strength": 0.5},
    ]  # fmt: skip
    chunk = 0 if method == "ltp_prompt" else 48
    with engine(folder, long_prefill_token_threshold=chunk, **MAPS) as llm:
        outputs = llm.generate(batch, [greedy(wish, tokens=20) for wish in asked], use_tqdm=False)
        assert 0.05 < check(folder, outputs[0]) < 0.98
        assert check(folder, outputs[1], 0.0) == 0.0
        assert "map" not in outputs[2].kv_transfer_params["vllm_prune"]
        check(folder, outputs[3], 0.5)
        forgotten(llm)


@pytest.mark.parametrize("method", ["dcp", "dms"])
def test_a_request_that_lived_three_times(method, tmp_path):
    folder = folder_of(method, tmp_path)
    with engine(folder, long_prefill_token_threshold=16, **MAPS) as llm:
        for output in preempted(llm, prompts([90, 40], seed=5), tokens=30, extra_args=ASKED):
            check(folder, output)
        forgotten(llm)


def test_beside_a_record(tmp_path):
    """``record`` keeps all drops of all requests, in whatever order the two are asked for."""
    folder = folder_of("dcp", tmp_path)
    with engine(folder, additional_config={"vllm_prune": {"maps": True, "record": True}}) as llm:
        asking, silent = llm.generate(
            prompts([80, 70], seed=9), [greedy(ASKED, tokens=12), greedy(tokens=12)], use_tqdm=False
        )
        check(folder, asking)
        store = state_of(llm).store
        for output in (asking, silent):
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids][:-1]
            (name,) = {key for key, _ in store.events if key.split("-")[0] == output.request_id.split("-")[0]}
            found = store.expiries(name, len(ids))
            np.testing.assert_array_equal(
                np.where(found < len(ids), found, NEVER), expected(folder, ids, len(output.prompt_token_ids))
            )


def test_asking_changes_nothing_else(tmp_path):
    folder = folder_of("dcp", tmp_path)
    with engine(folder, **MAPS) as llm:
        plain = llm.generate(prompts([90, 30]), greedy(), use_tqdm=False)
        asking = llm.generate(prompts([90, 30]), greedy(ASKED), use_tqdm=False)
    assert token_ids(plain) == token_ids(asking)
    for one, other in zip(plain, asking, strict=True):
        told = dict(other.kv_transfer_params["vllm_prune"])
        told.pop("map")
        assert told == one.kv_transfer_params["vllm_prune"]


def test_refusals(tmp_path, monkeypatch):
    folder = folder_of("dcp", tmp_path)
    with engine(folder) as llm:
        with pytest.raises(VLLMValidationError, match=r"prune\.map is switched off .*\"maps\": true") as caught:
            llm.generate(prompts([8]), greedy(ASKED), use_tqdm=False)
        assert caught.value.parameter == "prune.map"
        assert llm.generate(prompts([8]), greedy({"prune.map": False}), use_tqdm=False)
    with engine(folder, **MAPS) as llm:
        for wrong in ("yes", 2, 0.5, None):
            with pytest.raises(VLLMValidationError, match=r"prune\.map must be true or false"):
                llm.generate(prompts([8]), greedy({"prune.map": wrong}), use_tqdm=False)
        with pytest.raises(VLLMValidationError, match=r"refused \(map-of-several\): prune\.map maps one"):
            llm.generate(prompts([8]), greedy(ASKED, n=2, temperature=0.5), use_tqdm=False)
        monkeypatch.setattr(lifetimes, "CELLS", 3 * 60)
        (fits,) = llm.generate(prompts([50]), greedy(ASKED, tokens=12), use_tqdm=False)
        check(folder, fits)
        (large,) = llm.generate(prompts([50]), greedy(ASKED, tokens=13), use_tqdm=False)
        told = large.kv_transfer_params["vllm_prune"]
        assert told["keys_dropped"] > 0 and "183 keys is too large, 180 is the most" in told["map"]["refused"]
        # One token: vLLM asks for the request's words before its only report.
        (short,) = llm.generate(prompts([50]), greedy(ASKED, tokens=1), use_tqdm=False)
        assert short.kv_transfer_params is None
        forgotten(llm)
