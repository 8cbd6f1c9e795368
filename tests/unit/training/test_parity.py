"""Soft training, hard masks and token-by-token serving are one rule, for every gate of the registry.

A method with a soft form that joins ``GATES`` must join ``SAMPLES`` here, or the first test fails. Those that
route tokens have ``test_routing.py`` and ``test_prompt_pass.py`` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masked import HIDDEN, LAYERS, VOCAB, base
from vllm_prune_training.masked import GatedModel

from vllm_prune.config import DropGateConfig
from vllm_prune.gates import GATES, NEVER, ACCGate, BoundaryGate, FTPGate, Gate, GateShape, Protection, expiry_mask
from vllm_prune.gates.ftp import share_router
from vllm_prune.gates.routing import RoutingGate

SHAPE = GateShape(HIDDEN, 2, LAYERS)
SAMPLES: dict[str, tuple[str, dict[str, Any], float]] = {
    "dcp": ("dcp", {"rank": 4, "beta": 1.5}, 0.3),
    "dcp_kv_head": ("dcp", {"rank": 8, "beta": 1.5, "scope": "kv_head"}, 0.3),
    "dms": ("dms", {"delay": 6}, 0.02),
    "dms_borrowed": ("dms", {"delay": 6, "form": "borrowed"}, 0.02),
    "dms_own": ("dms", {"delay": 6, "about": "own", "offset": 4.0}, 0.02),
    "dms_layer": ("dms", {"delay": 6, "form": "stream", "per": "layer"}, 0.02),
    "window": ("window", {"window": 9}, 0.0),
    "random": ("random", {"keep": 0.5, "delay": 4}, 0.0),
    "ltp": ("ltp", {"span": 6, "grid": 8, "theta": 2.0}, 0.0),
    "ftp": ("ftp", {}, 0.0),
    "acc": ("acc", {"grid": 8, "sinks": 1, "window": 4}, 0.0),
}
"""Method, parameters, and the spread of random weights that drops some keys and keeps some."""

ATTENTIVE = (BoundaryGate, RoutingGate)
FEATURED = [name for name, (method, _, _) in SAMPLES.items() if not issubclass(GATES[method], ATTENTIVE)]
"""Gates that decide by features; what decides by attention is in test_boundary_gates.py and test_routing_gates.py of
tests/unit/gates."""


def sharper(method: str, sharpness: float) -> dict[str, float]:
    """Temperatures that approach the hard rule as sharpness grows."""
    tau = {"tau": 1.0 / sharpness}
    return {"dcp": {"alpha": 1.0 + sharpness}, "dms": tau, "ltp": tau, "ftp": tau}.get(method, {})


def gate_of(name: str, seed: int = 0, layer: int = 0) -> Gate:
    method, params, std = SAMPLES[name]
    generator = torch.Generator().manual_seed(seed * LAYERS + layer)
    gate = GATES[method](SHAPE, **params).at_layer(layer)
    for p in gate.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=std, generator=generator)
    if isinstance(gate, ACCGate):
        gate.profile.fill_(0.5)
    return gate


def ftp_gates() -> list[Gate]:
    """One random router for all layers that skips about half of typical tokens where it is asked to."""
    torch.manual_seed(5)
    gates = [FTPGate(SHAPE) for _ in range(LAYERS)]
    for gate in gates[1:]:
        gate.sparsity.fill_(0.6)
    share_router(gates)
    with torch.no_grad():
        for weight in gates[0].router.parameters():
            weight.normal_(std=2.0 if weight.ndim == 2 else 0.5)
        facts = torch.stack([torch.rand(500) * 30, (torch.randn(500) / 8).exp(), torch.rand(500)], dim=-1)
        run, skip = gates[0].logits(facts, torch.tensor(0.6)).unbind(-1)
        gates[0].router[2].bias[0] += (skip - run).median()  # type: ignore[index,operator]
    return list(gates)


def features_of(gate: Gate, t: int, seed: int) -> torch.Tensor:
    with torch.no_grad():
        return gate(torch.randn(t, HIDDEN, generator=torch.Generator().manual_seed(seed)))


def gated(name: str, visibility: Literal["lean", "naive"] = "lean") -> GatedModel:
    method, params, _ = SAMPLES[name]
    section = DropGateConfig(method=method, params=params, num_layers=LAYERS, num_kv_heads=2, hidden_size=HIDDEN)
    gates = ftp_gates() if method == "ftp" else [gate_of(name, layer=layer) for layer in range(LAYERS)]
    return GatedModel(base("llama"), gates, section, visibility=visibility, rows=7).eval()


names = pytest.mark.parametrize("name", list(SAMPLES))
sequences = st.tuples(st.sampled_from(FEATURED), st.integers(0, 1000), st.integers(2, 40))
protections = st.builds(Protection, st.integers(0, 4), st.integers(0, 9))


def test_every_method_is_here() -> None:
    assert {method for method, _, _ in SAMPLES.values()} == {
        name for name, gate in GATES.items() if gate.softens and (name == "ftp" or not gate.routes)
    }


@pytest.mark.parametrize("name", FEATURED)
def test_the_samples_drop_some_and_keep_some(name: str) -> None:
    gate = gate_of(name)
    expiry = gate.expiry(features_of(gate, 40, 1), 1.0, Protection())
    live = expiry_mask(expiry)[:, torch.ones(40, 40, dtype=torch.bool).tril(-1)].float().mean()
    assert 0.02 < live < 0.98


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sequences)
def test_the_hard_limit_of_soft_visibility_is_the_expiry_mask(sequence: tuple[str, int, int]) -> None:
    name, seed, t = sequence
    gate = gate_of(name, seed)
    features = features_of(gate, t, seed)
    hard = expiry_mask(gate.expiry(features, 1.0, Protection())).double()
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    far = []
    with torch.no_grad():
        for sharpness in (1.0, 1e7):
            soft = gate.log_visibility(features[None].double(), **sharper(gate.method, sharpness))[0].exp()
            assert ((soft >= 0) & (soft <= 1)).all()
            far.append(((soft - hard).abs() * causal).max().item())
    assert far[1] < 1e-9
    if gate.method in ("dcp", "dms") and t > 20:
        assert far[0] > 1e-3  # soft is soft


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sequences, st.sampled_from([0.5, 1.0, 3.0]), protections)
def test_prefill_is_token_by_token(sequence: tuple[str, int, int], strength: float, protection: Protection) -> None:
    """The expiry of a key is the first query that cannot see it when the sequence has just grown to that query."""
    name, seed, t = sequence
    gate = gate_of(name, seed)
    features = features_of(gate, t, seed)
    whole = gate.expiry(features, strength, protection)
    grown = torch.full_like(whole, NEVER)
    for n in range(1, t):
        seen = expiry_mask(gate.expiry(features[: n + 1], strength, protection))[:, n]  # of query n, [E, n + 1]
        gone = torch.zeros_like(grown, dtype=torch.bool)
        gone[:, : n + 1] = ~seen
        grown = torch.where(gone & (grown == NEVER), n, grown)
        assert (grown[:, :n][seen[:, :n]] == NEVER).all(), "a dropped key came back"
    assert torch.equal(grown, torch.where(whole < t, whole, NEVER))


@names
@torch.no_grad()
def test_a_prefix_of_a_hard_model_is_the_model_of_the_prefix(name: str) -> None:
    model = gated(name)
    ids = torch.randint(0, VOCAB, (1, 30), generator=torch.Generator().manual_seed(5))
    whole = model(ids, "hard")
    assert whole.expiry is not None
    for n in (1, 2, 9, 17):
        prefix = model(ids[:, :n], "hard")
        assert prefix.expiry is not None
        torch.testing.assert_close(prefix.logits, whole.logits[:, :n], rtol=1e-4, atol=1e-5)
        known = whole.expiry[..., :n]
        assert torch.equal(torch.where(prefix.expiry < n, prefix.expiry, NEVER), torch.where(known < n, known, NEVER))


@names
@pytest.mark.parametrize("how", ["hard", "lean", "naive"])
@torch.no_grad()
def test_a_token_changes_no_logits_before_it(name: str, how: str) -> None:
    model = gated(name, "naive" if how == "naive" else "lean")
    run: Callable[[torch.Tensor], torch.Tensor] = (
        (lambda x: model(x, "hard").logits)
        if how == "hard"
        else (lambda x: model(x, "soft", **sharper(SAMPLES[name][0], 1.5)).logits)
    )
    ids = torch.randint(0, VOCAB, (1, 30), generator=torch.Generator().manual_seed(6))
    before = run(ids)
    for m in (1, 7, 8, 21, 29):  # 7 and 21 begin blocks of rows
        changed = ids.clone()
        changed[0, m] = (ids[0, m] + 1) % VOCAB
        after = run(changed)
        torch.testing.assert_close(after[:, :m], before[:, :m], rtol=1e-5, atol=1e-5)
        assert (after[:, m:] - before[:, m:]).abs().max() > 1e-3


@names
@torch.no_grad()
def test_soft_models_become_the_hard_model(name: str) -> None:
    model = gated(name)
    ids = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(7))
    hard = model(ids, "hard").logits
    soft = model(ids, "soft", **sharper(SAMPLES[name][0], 1e6)).logits
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-5)
    assert (hard - model(ids, "open").logits).abs().max() > 1e-3
