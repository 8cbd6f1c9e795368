"""Window and random: definitions spelled out, nesting in strength, protection, refusals, and the hard mask as a bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER, Gate, GateShape, Protection, RandomGate, Reveal, WindowGate, expiry_mask
from vllm_prune.gates.dcp import LOG_FLOOR

SHAPE = GateShape(hidden_size=16, num_kv_heads=2, num_layers=3)
OPEN = Protection()
M = 2**32


def features(t: int, b: int | None = None) -> torch.Tensor:
    return torch.empty((t, 0) if b is None else (b, t, 0))


def random_gate(layer: int = 1, **params: float) -> RandomGate:
    return RandomGate(SHAPE, **params).at_layer(layer)  # type: ignore[arg-type]


gates = st.one_of(
    st.builds(WindowGate, st.just(SHAPE), st.integers(0, 30)),
    st.builds(lambda keep, delay, seed, layer: random_gate(layer, keep=keep, delay=delay, seed=seed),
              st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(0, 30), st.integers(0, 2**30), st.integers(0, 2)),
)  # fmt: skip
protections = st.builds(Protection, st.integers(0, 6), st.integers(0, 12))


def python_mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % M
    x ^= x >> 15
    x = x * 0x846CA68B % M
    return x ^ x >> 16


@given(st.integers(0, 30), st.sampled_from([0.5, 1.0, 1.7, 4.0]), protections, st.integers(1, 60))
def test_window_is_what_its_docstring_says(window: int, strength: float, protection: Protection, t: int) -> None:
    found = WindowGate(SHAPE, window).expiry(features(t), strength, protection)
    width = max(int(window / strength), protection.window)
    assert found.tolist() == [[NEVER if j < protection.sinks else j + width + 1 for j in range(t)]]


@given(st.integers(0, 2**30), st.sampled_from([0.0, 0.3, 0.8, 1.0]), st.sampled_from([0.5, 1.0, 3.0]), protections)
def test_random_is_what_its_docstring_says(seed: int, keep: float, strength: float, protection: Protection) -> None:
    """In Python's unbounded integers: the tensor version relies on products that wrap."""
    t, delay, layer = 40, 5, 2
    found = random_gate(layer, keep=keep, delay=delay, seed=seed).expiry(features(t), strength, protection)
    for head in range(2):
        salt = python_mix(python_mix(python_mix(seed) ^ (layer + 1)) ^ (head + 1))
        for j in range(t):
            survives = python_mix(python_mix(j) ^ salt) < round(keep**strength * M)
            protected = j < protection.sinks
            assert found[head, j] == (NEVER if survives or protected else j + max(delay, protection.window) + 1)


@given(gates, protections, st.integers(1, 50))
def test_strength_zero_opens(gate: Gate, protection: Protection, t: int) -> None:
    assert (gate.expiry(features(t), 0.0, protection) == NEVER).all()


@given(gates, st.floats(0, 16), st.floats(0, 16), protections)
def test_more_strength_never_keeps_more(gate: Gate, one: float, other: float, protection: Protection) -> None:
    weak, strong = (gate.expiry(features(60), strength, protection) for strength in sorted((one, other)))
    assert (strong <= weak).all()


@given(gates, st.integers(1, 60))
def test_a_prefix_has_the_same_decisions(gate: Gate, t: int) -> None:
    assert torch.equal(gate.expiry(features(80), 1.0, OPEN)[:, :t], gate.expiry(features(t), 1.0, OPEN))


@given(gates, protections, st.sampled_from([0.5, 1.0, 2.0]))
def test_the_bias_is_the_mask(gate: Gate, protection: Protection, strength: float) -> None:
    t = 40
    soft = {"sinks": protection.sinks, "window": protection.window, "strength": strength, "alpha": 3.0, "tau": 0.2}
    log_v = gate.log_visibility(features(t, 2), **soft)
    assert log_v.shape == (2, gate.num_units, t, t) and log_v.dtype == torch.float32
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    seen = expiry_mask(gate.expiry(features(t), strength, protection))
    for row in log_v:
        assert torch.equal(row[:, ~causal], torch.zeros_like(row[:, ~causal]))
        assert torch.equal((row == 0) & causal, seen) and set(row.unique().tolist()) <= {0.0, LOG_FLOOR}
    rows, carry = gate.visibility_rows(features(t, 2), 13, None, **soft)
    assert carry is None and torch.equal(rows, log_v[:, :, 13:])


def test_survivors_are_a_share_and_differ_by_layer_head_and_seed() -> None:
    t = 20_000
    found = {
        (seed, layer, head): row == NEVER
        for seed in (0, 1)
        for layer in range(3)
        for head, row in enumerate(random_gate(layer, keep=0.3, delay=4, seed=seed).expiry(features(t), 1.0, OPEN))
    }
    for name, survivors in found.items():
        assert abs(survivors.double().mean() - 0.3) < 0.015, name  # 4.6 standard deviations
        for other, theirs in found.items():
            if other > name:  # independent: 0.09 survive in both
                assert abs((survivors & theirs).double().mean() - 0.09) < 0.01, (name, other)
                assert abs((survivors[1:] & theirs[:-1]).double().mean() - 0.09) < 0.01, (name, other)


@pytest.mark.parametrize("method,params", [("window", {"window": 5}), ("random", {"keep": 0.2})])
def test_declared_as_known_at_write_and_without_weights(method: str, params: dict[str, float]) -> None:
    sizes = {"num_layers": 3, "num_kv_heads": 2, "hidden_size": 16}
    gate = DropGateConfig.model_validate({"method": method, "params": params, **sizes}).build_gate()
    assert gate.reveal is Reveal.AT_WRITE and gate.num_features == gate.num_remembered == 0
    assert not list(gate.parameters())
    assert gate(torch.randn(7, 16)).shape == (7, 0)


def test_a_random_gate_must_know_its_layer() -> None:
    with pytest.raises(ValueError, match="layer"):
        RandomGate(SHAPE).expiry(features(4), 1.0, OPEN)
    with pytest.raises(ValueError, match="layer"):
        RandomGate(SHAPE).at_layer(3).salts()
    assert [int(gate.layer) for gate in section("random", keep=0.5).build_gates()] == [0, 1, 2]  # type: ignore[arg-type]


def test_the_layer_survives_bfloat16() -> None:
    deep = GateShape(hidden_size=16, num_kv_heads=2, num_layers=256)
    gate = RandomGate(deep, seed=3).at_layer(255)
    want = gate.salts()
    assert torch.equal(gate.to(torch.bfloat16).salts(), want)
    with pytest.raises(ValueError, match="256 layers"):
        RandomGate(GateShape(hidden_size=16, num_kv_heads=2, num_layers=257))


def section(method: str, **params: float) -> DropGateConfig:
    return DropGateConfig(method=method, params=params, num_layers=3, num_kv_heads=2, hidden_size=16)


@pytest.mark.parametrize(
    "method,params",
    [("window", {"window": -1}), ("window", {"window": 2.5}), ("window", {"size": 3}), ("random", {"keep": 1.5}),
     ("random", {"keep": float("nan")}), ("random", {"delay": -1}), ("random", {"seed": -1}), ("random", {"layer": 1})],
)  # fmt: skip
def test_wrong_parameters_are_refused(method: str, params: dict[str, float]) -> None:
    with pytest.raises(PruneError, match="params"):
        section(method, **params).build_gate()


def test_a_window_has_no_size_when_open() -> None:
    with pytest.raises(ValueError, match="strength"):
        WindowGate(SHAPE, 4).window_at(0.0)
    assert WindowGate(SHAPE, 2**30).window_at(1e-6) == 2**30  # still fits int32 with a position
