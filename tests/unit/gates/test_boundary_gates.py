"""LTP and ACC-style: rules spelled out, soft limits, causality, strength, protection, padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import (
    NEVER,
    ACCGate,
    BoundaryGate,
    BoundaryRule,
    GateShape,
    LTPGate,
    Protection,
    Reveal,
    expiry_mask,
)
from vllm_prune.gates.boundary import hard_walk, naive_walk

SHAPE = GateShape(hidden_size=16, num_kv_heads=2, num_layers=3)
OPEN = Protection()
H, G, D, SCALE = 2, 2, 8, 0.5
METHODS = ["ltp", "acc"]


def gate_of(method: str, layer: int = 1) -> BoundaryGate:
    if method == "ltp":
        gate = LTPGate(SHAPE, span=10, grid=8).at_layer(layer)
        gate.theta.data.fill_(0.9)
        return gate
    acc = ACCGate(SHAPE, grid=8, sinks=1, window=5)
    acc.profile.fill_(0.7 - 0.2 * layer)
    acc.coefficient.fill_(0.8)
    return acc


def heads_of(seed: int, t: int, b: int = 1, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys that attend unevenly."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(b, n, t, D, generator=generator, dtype=torch.float64) for n in (H * G, H))
    return query.to(dtype), (key * 1.5).to(dtype)


def expiry_of(gate: BoundaryGate, seed: int, t: int, strength: float = 1.0, protection: Protection = OPEN) -> Any:
    return hard_walk(gate.rule(strength, protection), *heads_of(seed, t), SCALE)[0]


samples = st.tuples(st.sampled_from(METHODS), st.integers(0, 1000), st.integers(2, 60))
protections = st.builds(Protection, st.integers(0, 5), st.integers(0, 20))


@given(samples, st.sampled_from([0.5, 1.0, 1.5]), protections)
def test_the_walk_is_the_definition(sample: tuple[str, int, int], strength: float, protection: Protection) -> None:
    method, seed, t = sample
    rule = gate_of(method).rule(strength, protection)
    query, key = heads_of(seed, t, b=2)
    assert torch.equal(hard_walk(rule, query, key, SCALE), naive_walk(rule, query, key, SCALE))


@given(samples, protections)
def test_dropped_at_boundaries_and_never_if_protected(sample: tuple[str, int, int], protection: Protection) -> None:
    method, seed, t = sample
    gate = gate_of(method)
    expiry = expiry_of(gate, seed, t, 1.5, protection)[0]
    dropped = expiry < NEVER
    assert (expiry[dropped] % 8 == 0).all()
    assert (expiry > torch.arange(t) + max(protection.window, 1)).all()
    assert not dropped[: protection.sinks].any()
    if method == "ltp":  # judged once, at the first boundary that may
        after = max(10, protection.window)
        assert torch.equal(expiry[dropped], (torch.arange(t) + after + 8)[dropped] // 8 * 8)


@given(samples)
def test_strength_zero_opens(sample: tuple[str, int, int]) -> None:
    method, seed, t = sample
    assert (expiry_of(gate_of(method), seed, t, 0.0) == NEVER).all()


@given(samples, st.data())
def test_a_token_changes_nothing_before_it(sample: tuple[str, int, int], data: st.DataObject) -> None:
    method, seed, t = sample
    m = data.draw(st.integers(0, t - 1))
    rule = gate_of(method).rule(1.0, OPEN)
    query, key = heads_of(seed, t)
    other_query, other_key = heads_of(seed + 1, t)
    changed = [torch.cat([x[:, :, :m], y[:, :, m:]], dim=2) for x, y in ((query, other_query), (key, other_key))]
    before, after = (expiry_mask(hard_walk(rule, q, k, SCALE)[0])[:, :m] for q, k in ((query, key), changed))
    assert torch.equal(before, after)


@given(samples)
def test_a_prefix_has_the_same_decisions(sample: tuple[str, int, int]) -> None:
    """Which is also padding at the end: what follows a text decides nothing about it."""
    method, seed, t = sample
    rule, half = gate_of(method).rule(1.0, OPEN), t // 2 + 1
    query, key = heads_of(seed, t)
    whole = hard_walk(rule, query, key, SCALE)[0]
    prefix = hard_walk(rule, query[:, :, :half], key[:, :, :half], SCALE)[0]
    assert torch.equal(expiry_mask(whole)[:, :half, :half], expiry_mask(prefix))


@pytest.mark.parametrize("method", METHODS)
def test_the_samples_drop_some_and_keep_some(method: str) -> None:
    kept = torch.cat([expiry_of(gate_of(method), seed, 60).flatten() == NEVER for seed in range(9)])
    assert 0.05 < kept.float().mean() < 0.95


def test_uniform_attention_scores_one_whatever_the_length() -> None:
    """Just below a threshold of 1 nothing goes, just above everything that may."""
    query, key = torch.zeros(1, 4, 200, D), torch.randn(1, 2, 200, D)
    for threshold, share in ((0.999, 0.0), (1.001, 1.0)):
        rule = BoundaryRule(grid=8, span=10, after=10, sinks=0, threshold=threshold)
        expiry = hard_walk(rule, query, key, SCALE)[0, 0]
        assert (expiry[:180] < NEVER).float().mean() == share


@given(st.integers(0, 1000), st.sampled_from([0.3, 1.0, 3.0]))
def test_acc_holds_its_budget(seed: int, strength: float) -> None:
    gate = gate_of("acc")
    keep = gate.keep_at(strength)  # type: ignore[attr-defined]
    expiry = expiry_of(gate, seed, 90, strength)[0]
    for m in range(8, 90, 8):
        live = int((expiry[:m] > m).sum())
        assert live <= max(math.floor(keep * m), 1 + 5)
        before = int((expiry[:m] > m - 8).sum())
        assert live >= min(before, math.floor(keep * m)), "no more is dropped than the budget asks for"


@given(st.integers(0, 1000), st.integers(2, 60), protections)
def test_ltp_soft_becomes_hard(seed: int, t: int, protection: Protection) -> None:
    gate = gate_of("ltp")
    assert isinstance(gate, LTPGate)
    query, key = heads_of(seed, t, b=2, dtype=torch.float64)
    value = torch.randn(2, H, t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expiry = hard_walk(gate.rule(1.0, protection), query, key, SCALE)
    with torch.no_grad():
        out, kept, log_v = gate.soft_walk(query, key, value, SCALE, 1e-9, protection)
    mask = torch.stack([expiry_mask(row) for row in expiry])
    whole = log_v.repeat_interleave(8, dim=1)[:, None, :t]  # of every query
    past = torch.ones(t, t, dtype=torch.bool).tril(-1)
    assert torch.equal((whole > -1.0) & past, mask & past)
    logits = query @ key.repeat_interleave(G, 1).transpose(-1, -2) * SCALE
    want = logits.masked_fill(~mask, -math.inf).softmax(-1) @ value.repeat_interleave(G, 1)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(kept, (mask & past).double().mean((0, 1)).sum() / max(1, t * (t - 1) // 2))


def test_ltp_soft_visibility_only_falls_and_teaches() -> None:
    gate = gate_of("ltp")
    assert isinstance(gate, LTPGate)
    query, key = (x.requires_grad_() for x in heads_of(3, 50, dtype=torch.float64))
    value = torch.randn(1, H, 50, D, dtype=torch.float64)
    out, kept, log_v = gate.soft_walk(query, key, value, SCALE, 0.2, OPEN)
    assert (log_v <= 0).all() and (log_v.diff(dim=1) <= 0).all() and 0 < kept < 1
    for what in (out.square().mean(), kept):
        found = torch.autograd.grad(what, [gate.theta, query, key], retain_graph=True)
        assert all(torch.isfinite(x).all() and x.abs().sum() > 0 for x in found)

    def kept_at(theta: float) -> float:
        gate.theta.data.fill_(theta)
        with torch.no_grad():
            return gate.soft_walk(query, key, value, SCALE, 0.2, OPEN)[1].item()

    assert torch.autograd.grad(kept, gate.theta)[0] < 0 and kept_at(1.2) < kept_at(0.6)


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_knows_whether_it_can_drop(method: str) -> None:
    gate = gate_of(method)
    assert gate.rule(1.0, OPEN).drops and not gate.rule(0.0, OPEN).drops
    opened = LTPGate(SHAPE).at_layer(0) if method == "ltp" else ACCGate(SHAPE)
    assert not opened.rule(1.0, OPEN).drops
    assert (hard_walk(opened.rule(1.0, OPEN), *heads_of(1, 150), SCALE) == NEVER).all()


def test_thresholds_rise_with_depth() -> None:
    found = [float(LTPGate(SHAPE, theta=0.3).at_layer(layer).theta) for layer in range(3)]
    assert found == pytest.approx([0.0, 0.1, 0.2])


def section(method: str, **params: Any) -> DropGateConfig:
    return DropGateConfig(method=method, params=params, num_layers=3, num_kv_heads=2, hidden_size=16)


@pytest.mark.parametrize(
    "method,params",
    [("ltp", {"span": 0}), ("ltp", {"grid": 4}), ("ltp", {"grid": 2048}), ("ltp", {"theta": -0.1}), ("ltp", {"window": 3}),
     ("acc", {"grid": 7}), ("acc", {"sinks": -1}), ("acc", {"window": -1}), ("acc", {"least": 1.5}), ("acc", {"span": 3})],
)  # fmt: skip
def test_wrong_parameters_are_refused(method: str, params: dict[str, Any]) -> None:
    with pytest.raises(PruneError, match="params"):
        section(method, **params).build_gate()


@pytest.mark.parametrize("method", METHODS)
def test_declared_as_known_at_boundaries_from_no_features(method: str) -> None:
    gate = section(method).build_gate()
    assert gate.reveal is Reveal.AT_BOUNDARY and gate.num_features == gate.num_remembered == 0 and gate.num_units == 1
    assert gate(torch.randn(7, 16)).shape == (7, 0)
    with pytest.raises(TypeError, match="attention"):
        gate.expiry(torch.empty(7, 0), 1.0, OPEN)
    with pytest.raises(TypeError, match="attention"):
        gate.log_visibility(torch.empty(1, 7, 0))


@pytest.mark.parametrize("wrong", [{"profile": 0.0}, {"profile": 1.1}, {"coefficient": 0.0}, {"coefficient": -2.0}])
def test_acc_names_a_bad_state(wrong: dict[str, float]) -> None:
    state = {name: torch.tensor(value) for name, value in {"profile": 0.5, "coefficient": 1.0, **wrong}.items()}
    assert next(iter(wrong)) in str(ACCGate.state_problem(state))
