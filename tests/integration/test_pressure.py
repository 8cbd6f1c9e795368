"""Strength that follows the pool: open while there is room, full as it fills; drops are what the strengths of the steps say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import RECORD, engine, pool_is_whole, prompts, recorded, save_gated, scheduler_of, tiny_config, token_ids
from test_law2_drop_sets import METHODS, visible_drops
from test_request_strength import greedy
from vllm_prune_training.masked import load_gated

from vllm_prune.errors import PruneError
from vllm_prune.gates import GATES, NEVER, Reveal
from vllm_prune.gates.base import decision_shift, protected_from
from vllm_prune.pressure import LEVELS, Applied, Pressure, PressureOptions, pressure_options

ADAPTIVE = ("dcp", "dcp_kv_head", "dms", "window", "random")
SMALL = {"kv_cache_memory_bytes": 1 << 20, "max_model_len": 256}


def options(**pressure: float) -> dict[str, Any]:
    record = RECORD["additional_config"]["vllm_prune"]
    return {"additional_config": {"vllm_prune": {**record, "pressure": pressure or True}}}


def expiry_by_query(gate: Any, features: torch.Tensor, strengths: list[float], protection: Any) -> torch.Tensor:
    """``Gate.expiry`` where query n has a strength of its own: [E, T]."""
    t = len(features)
    if gate.reveal is Reveal.BY_QUERY:
        shifts = torch.tensor([decision_shift(s) * gate.unit for s in strengths[:t]])
        drop = gate.scores(features) + shifts[:, None] <= 0
        drop &= torch.arange(t)[:, None] >= protected_from(protection, t, features.device).maximum(torch.arange(t) + 1)
        return torch.where(drop.any(-2), drop.to(torch.int8).argmax(-2), NEVER)
    late = gate.reveal is Reveal.DELAYED  # decided with the token after the key
    each = {s: type(gate).expiry(gate, features, s, protection) for s in set(strengths)}
    rows = [each[strengths[min(j + late, t - 1)]][:, j] for j in range(t)]
    return torch.stack(rows, dim=1)


def twin_drops(folder: Any, ids: list[int], strengths: list[float]) -> np.ndarray:
    """What the trainer's twin drops at each query's strength."""
    twin = load_gated(folder)
    for gate in twin.gates:
        # The twin asks its gates for expiries at one strength: here each query has one.
        gate.expiry = lambda features, _, protection, gate=gate: expiry_by_query(gate, features, strengths, protection)
    with torch.no_grad():
        found = twin(torch.tensor(ids), mode="hard").expiry.numpy()
    return np.where(found <= len(ids) - 1, found, NEVER)


class Watch:
    """Strengths of every request's queries, as its worker was told them."""

    def __init__(self, llm: Any) -> None:
        self.told: dict[str, list[float]] = {}
        connector = scheduler_of(llm).connector
        real = connector.build_connector_meta

        def build(output: Any) -> Any:
            meta = real(output)
            for req_id, grant in meta.grants.items():
                row = self.told.setdefault(req_id, [])
                del row[grant.covered - grant.tokens :]
                row.extend([grant.strength] * grant.tokens)
            return meta

        connector.build_connector_meta = build

    def of(self, output: Any) -> list[float]:
        (name,) = [name for name in self.told if name.startswith(f"{output.request_id}-") or name == output.request_id]
        return self.told[name]


def check_pressure(llm: Any, folder: Any, lengths: list[int]) -> None:
    """Prompts of these lengths drop what the strengths of their steps say, which must differ."""
    watch = Watch(llm)
    outputs = llm.generate(prompts(lengths, seed=3), greedy(tokens=30), use_tqdm=False)
    seen = set()
    for output in outputs:
        ids, found = recorded(llm, output)
        strengths = watch.of(output)
        seen |= set(strengths)
        np.testing.assert_array_equal(visible_drops(found), twin_drops(folder, ids, strengths))
        told = output.kv_transfer_params["vllm_prune"]
        assert told["strength"] == 1.0
        applied = told["strength_applied"]  # of a step in flight too
        assert applied["most"] == max(strengths) and applied["least"] == min(strengths)
        assert applied["mean"] == pytest.approx(sum(strengths) / len(strengths))
    assert 0.0 in seen and len(seen) > 2, f"pressure must have moved: {seen}"
    llm.generate(prompts([3]), greedy(tokens=2), use_tqdm=False)
    assert pool_is_whole(llm)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_drops_follow_the_strength_of_each_step(tmp_path, method):
    """Requests come into a small pool: strength rises from 0 with its use, in the middle of prompts and of answers."""
    name = method.removesuffix("_kv_head")
    section: dict[str, Any] = {"protect": {"sinks": 2}} if GATES[name].protects else {}
    folder = save_gated(tmp_path, tiny_config("qwen3", layers=2), name, section=section, **METHODS[method])
    more = {**SMALL, "kv_cache_memory_bytes": 3 << 20}
    with engine(folder, long_prefill_token_threshold=24, **options(start=0.3, full=0.8), **more) as llm:
        check_pressure(llm, folder, [90, 60, 110, 75, 40, 100])


def test_a_roomy_pool_drops_nothing(tmp_path):
    """As with open gates; a request's own ceiling counts; without the option the same prompts drop keys."""
    folder = save_gated(tmp_path, tiny_config("qwen3", layers=2), "dcp", **METHODS["dcp"])
    batch = prompts([90, 60], seed=3)
    with engine(folder) as llm:
        opened = llm.generate(batch, greedy({"prune.off": True}), use_tqdm=False)
        full = llm.generate(batch, greedy(), use_tqdm=False)
    assert token_ids(opened) != token_ids(full)
    with engine(folder, **options()) as llm:
        roomy = llm.generate(batch, greedy(), use_tqdm=False)
        for output in roomy:
            told = output.kv_transfer_params["vllm_prune"]
            assert told["keys_dropped"] == 0
            assert told["strength_applied"] == {"least": 0.0, "mean": 0.0, "most": 0.0}
    assert token_ids(roomy) == token_ids(opened)
    with engine(folder, **options(start=0.0, full=1e-6)) as llm:  # always full: a ceiling each
        asked = [greedy(), greedy({"prune.strength": 0.5}), greedy({"prune.off": True})]
        outputs = llm.generate([batch[0]] * 3, asked, use_tqdm=False)
        most = [output.kv_transfer_params["vllm_prune"]["strength_applied"]["most"] for output in outputs]
        assert most == [1.0, 0.5, 0.0]
        assert token_ids(outputs[:1]) == token_ids(full[:1])


def test_a_request_too_long_for_a_roomy_pool_starts_at_full_strength(tmp_path):
    """Gates that decide once could not make up for what they kept at first."""
    folder = save_gated(tmp_path, tiny_config("qwen3", layers=2), "window", window=20)
    with engine(folder, long_prefill_token_threshold=32, **options(start=0.3), **SMALL) as llm:
        blocks = scheduler_of(llm).kv_cache_manager.block_pool.num_gpu_blocks
        geometry = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers[0].geometry
        assert geometry.dense_blocks(240) > 0.3 * blocks > geometry.dense_blocks(60), "what the test is about"
        long, short = (llm.generate(prompts([n]), greedy(tokens=8), use_tqdm=False)[0] for n in (232, 50))
        assert long.kv_transfer_params["vllm_prune"]["strength_applied"]["least"] == 1.0
        assert short.kv_transfer_params["vllm_prune"]["strength_applied"]["most"] == 0.0


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        ("ltp", {}, "refused \\(pressure\\): ltp decides by what happened"),
        ("shadow", {}, "refused \\(pressure\\)"),
        ("ftp", {}, "refused \\(pressure\\)"),
        ("dcp", {"strength": 0.0}, "gates are open"),
        ("dcp", {"pressure": {"start": 0.9, "full": 0.5}}, "start \\(0.9\\) must lie below full"),
        ("dcp", {"pressure": {"begin": 0.5}}, "pressure is wrong: begin"),
        ("dcp", {"pressure": {"start": "0.5"}}, "pressure is wrong: start"),
        ("dcp", {"pressure": 0.5}, "pressure is wrong"),
    ],
)
def test_refusals(tmp_path, method, more, words):
    folder = save_gated(tmp_path, tiny_config("qwen3", layers=2), method, **METHODS[method])
    with pytest.raises(Exception, match=words):  # noqa: SIM117
        with engine(folder, additional_config={"vllm_prune": {"pressure": True, **more}}):
            pass


SHARES = st.floats(0.0, 1.0)


@given(st.lists(SHARES, max_size=40))
def test_hysteresis(uses):
    """A level is never below what use calls for, nor above what use and slack together would; full is full, start is none."""
    pressure = Pressure(PressureOptions(start=0.4, full=0.8, slack=0.1))
    fresh = Pressure(pressure.options)
    for use in uses:
        before = pressure.level
        pressure.observe(use)
        least, most = fresh._level_at(use), fresh._level_at(use + 0.1)
        assert least <= pressure.level <= max(most, least)
        assert pressure.level in (before, least, most)
        if use >= 0.8:
            assert pressure.strength(2.0) == 2.0
        if use <= 0.3:
            assert pressure.strength(2.0) == 0.0


def test_little_swings_change_nothing():
    pressure = Pressure(PressureOptions(start=0.0, full=0.8, slack=0.1))
    pressure.observe(0.55)
    level = pressure.level
    for use in (0.5, 0.54, 0.48, 0.55):
        pressure.observe(use)
        assert pressure.level == level
    pressure.observe(0.3)
    assert pressure.level < level


def test_options():
    assert pressure_options({}) is None and pressure_options({"pressure": False}) is None
    assert pressure_options({"pressure": True}) == PressureOptions()
    assert pressure_options(json.loads('{"pressure": {"start": 0, "full": 1}}')) == PressureOptions(start=0, full=1)
    with pytest.raises(PruneError, match="Give true"):
        pressure_options({"pressure": [0.5]})


def test_applied():
    applied = Applied()
    applied.add(0.0, 3)
    applied.add(1.0, 1)
    assert applied.told() == {"least": 0.0, "mean": 0.25, "most": 1.0}
    assert LEVELS > 1
