"""What every gate promises: soft limits, monotone visibility, causality, strength and protection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_prune.gates import NEVER, DCPGate, DMSGate, Gate, GateShape, Protection, decision_shift, expiry_mask

SHAPE = GateShape(hidden_size=16, num_kv_heads=2, num_layers=3)
OPEN = Protection()
METHODS = ["dcp", "dcp_kv_head", "dms", "dms_borrowed", "dms_own"]
sequences = st.tuples(st.sampled_from(METHODS), st.integers(0, 10_000), st.integers(2, 48))


def make(method: str, seed: int, t: int) -> tuple[Gate, torch.Tensor]:
    """A gate with random weights, and features [T, F] that drop some keys and keep some."""
    generator = torch.Generator().manual_seed(seed)
    gate: Gate = {
        "dcp": lambda: DCPGate(SHAPE, rank=4, beta=1.0),
        "dcp_kv_head": lambda: DCPGate(SHAPE, rank=6, beta=1.0, scope="kv_head"),
        "dms": lambda: DMSGate(SHAPE, delay=5),
        "dms_own": lambda: DMSGate(SHAPE, delay=5, about="own"),
        "dms_borrowed": lambda: DMSGate(SHAPE, delay=5, form="borrowed"),
    }[method]()
    if isinstance(gate, DMSGate):
        for p in gate.gate.parameters():
            torch.nn.init.normal_(p, std=0.03, generator=generator)
    else:
        torch.nn.init.normal_(gate.qk.weight, std=0.2, generator=generator)
    with torch.no_grad():
        return gate, gate(torch.randn(t, SHAPE.hidden_size, generator=generator))


def visible(gate: Gate, features: torch.Tensor, strength: float = 1.0, protection: Protection = OPEN) -> torch.Tensor:
    """bool [E, T, T] (query, key)."""
    return expiry_mask(gate.expiry(features, strength, protection))


def sharp(gate: Gate, features: torch.Tensor) -> torch.Tensor:
    """Soft log visibility [E, T, T] at a temperature of about zero."""
    soft = {"alpha": 1e7} if isinstance(gate, DCPGate) else {"tau": 1e-6}
    return gate.log_visibility(features[None], **soft)[0]


@given(sequences)
def test_the_soft_twin_becomes_the_expiry_mask(sequence: tuple[str, int, int]) -> None:
    gate, features = make(*sequence)
    causal = torch.ones(features.shape[0], features.shape[0], dtype=torch.bool).tril()
    soft = sharp(gate, features)
    assert torch.equal((soft > -0.1) & causal, visible(gate, features))
    assert (soft[visible(gate, features)] == 0).all()


@given(sequences, st.sampled_from([1.1, 2.0, 4.0, 8.0]))
def test_visibility_only_falls(sequence: tuple[str, int, int], alpha: float) -> None:
    gate, features = make(*sequence)
    soft = {"alpha": alpha} if isinstance(gate, DCPGate) else {"tau": 1.0 / alpha}
    log_v = gate.log_visibility(features[None], **soft)
    t = features.shape[0]
    assert log_v.shape == (1, gate.num_units, t, t) and log_v.dtype == torch.float32
    assert (log_v <= 0).all() and torch.isfinite(log_v).all()
    assert (log_v.diff(dim=2) <= 1e-6).all()
    assert (log_v[..., ~torch.ones(t, t, dtype=torch.bool).tril(-1)] == 0).all()


@given(sequences, st.data())
def test_a_token_changes_nothing_before_it(sequence: tuple[str, int, int], data: st.DataObject) -> None:
    gate, features = make(*sequence)
    t = features.shape[0]
    m = data.draw(st.integers(0, t - 1))
    changed = features.clone()
    changed[m:] = make(sequence[0], sequence[1] + 1, t)[1][m:]
    assert torch.equal(visible(gate, features)[:, :m], visible(gate, changed)[:, :m])
    soft = {"alpha": 2.0} if isinstance(gate, DCPGate) else {"tau": 0.5}
    before, after = (gate.log_visibility(x[None], **soft)[:, :, :m] for x in (features, changed))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


@given(sequences)
def test_a_prefix_has_the_same_decisions(sequence: tuple[str, int, int]) -> None:
    gate, features = make(*sequence)
    half = features.shape[0] // 2 + 1
    assert torch.equal(visible(gate, features)[:, :half, :half], visible(gate, features[:half]))


@given(sequences)
def test_strength_zero_opens(sequence: tuple[str, int, int]) -> None:
    gate, features = make(*sequence)
    assert (gate.expiry(features, 0.0, OPEN) == NEVER).all()


@given(sequences, st.floats(0, 16), st.floats(0, 16))
def test_more_strength_never_keeps_more(sequence: tuple[str, int, int], one: float, other: float) -> None:
    gate, features = make(*sequence)
    weak, strong = (gate.expiry(features, strength, OPEN) for strength in sorted((one, other)))
    assert (strong <= weak).all()


@given(sequences, st.integers(0, 6), st.integers(0, 12))
def test_protected_keys_stay(sequence: tuple[str, int, int], sinks: int, window: int) -> None:
    gate, features = make(*sequence)
    t = features.shape[0]
    protection = Protection(sinks, window)
    free, held = gate.expiry(features, 16.0, OPEN), gate.expiry(features, 16.0, protection)
    assert (held[:, :sinks] == NEVER).all()
    assert (held > torch.arange(t) + window).all()
    assert (held >= free).all()
    late = free > torch.arange(t) + window
    late[:, :sinks] = False
    assert torch.equal(held[late], free[late])


@given(sequences)
def test_no_token_drops_itself(sequence: tuple[str, int, int]) -> None:
    gate, features = make(*sequence)
    assert visible(gate, features, 16.0).diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_samples_drop_some_and_keep_some(method: str) -> None:
    """Otherwise the tests above would test nothing."""
    kept = torch.cat(
        [gate.expiry(x, 1.0, OPEN).flatten() == NEVER for gate, x in (make(method, i, 40) for i in range(9))]
    )
    assert 0.05 < kept.float().mean() < 0.95


def test_dcp_expiry_is_the_first_query_that_rejects_the_key() -> None:
    gate, features = make("dcp", 3, 300)  # more than one chunk of queries
    scores = gate.scores(features)[0]
    expiry = gate.expiry(features, 1.0, OPEN)[0]
    for j in range(0, 300, 7):
        rejecting = [n for n in range(j + 1, 300) if scores[n, j] <= 0]
        assert expiry[j] == (rejecting[0] if rejecting else NEVER)


def test_dcp_soft_visibility_is_the_product_of_keep_probabilities() -> None:
    gate, features = make("dcp", 5, 12)
    p = torch.sigmoid(gate.scores(features)[0])
    log_v = gate.log_visibility(features[None], alpha=1.0)[0, 0]
    for n in range(12):
        for j in range(n + 1):
            expected = p[j + 1 : n + 1, j].log().sum().clamp_min(-30.0)
            torch.testing.assert_close(log_v[n, j], expected, rtol=1e-4, atol=1e-5)


def test_dcp_heads_decide_for_themselves() -> None:
    """A gate of H heads is H gates of one head, on the rows of its projection that are theirs."""
    gate, features = make("dcp_kv_head", 2, 60)
    assert gate.num_units == SHAPE.num_kv_heads == 2 and gate.beta.shape == (2,)
    with torch.no_grad():
        gate.beta += torch.tensor([0.0, 0.4])
    together = gate.expiry(features, 1.0, OPEN)
    assert not torch.equal(together[0], together[1])
    for head in range(2):
        alone = DCPGate(SHAPE, rank=3)
        with torch.no_grad():
            alone.beta.copy_(gate.beta[head])
        mine = features.unflatten(-1, (2, 2, 3))[:, :, head].flatten(-2)  # (q' or k', head, numbers)
        assert torch.equal(alone.expiry(mine, 1.0, OPEN)[0], together[head])
        soft = gate.log_visibility(features[None], alpha=1.5)[:, head]
        torch.testing.assert_close(alone.log_visibility(mine[None], alpha=1.5)[:, 0], soft)


@pytest.mark.parametrize("wrong", [{"rank": 5, "scope": "kv_head"}, {"scope": "head"}, {"rank": 0}])
def test_dcp_refuses_what_it_cannot_be(wrong: dict[str, int | str]) -> None:
    with pytest.raises(ValueError, match=r"rank|scope"):
        DCPGate(SHAPE, **wrong)  # type: ignore[arg-type]


def test_dms_refuses_what_it_cannot_be() -> None:
    for wrong in ({"delay": -1}, {"form": "shared"}):
        with pytest.raises(ValueError, match=r"delay|form"):
            DMSGate(SHAPE, **wrong)  # type: ignore[arg-type]


def test_the_layer_gate_keeps_the_names_and_shapes_of_its_tensors() -> None:
    """Checkpoints are out there."""
    shapes = {name: tuple(x.shape) for name, x in DCPGate(SHAPE, rank=4).state_dict().items()}
    assert shapes == {"qk.weight": (8, 16), "beta": ()}
    shapes = {name: tuple(x.shape) for name, x in DMSGate(SHAPE).state_dict().items()}
    assert shapes == {"norm.weight": (16,), "gate.weight": (2, 16)}


def test_dcp_gradients_are_finite() -> None:
    gate, features = make("dcp", 1, 64)
    for alpha in (1.0, 1.2, 2.0, 8.0):
        x = (3.0 * features[None]).requires_grad_()
        gate.log_visibility(x, alpha=alpha).exp().mean().backward()
        assert x.grad is not None and torch.isfinite(x.grad).all()


def test_dms_expiry_follows_the_next_token() -> None:
    gate, _ = make("dms", 0, 2)
    logits = torch.full((20, 2), -5.0)
    logits[4, 0] = 1.0  # decides about key 3 of head 0
    logits[19, 1] = 1.0
    expiry = gate.expiry(logits, 1.0, OPEN)
    expected = torch.full((2, 20), NEVER)
    expected[0, 3] = 3 + 5 + 1
    expected[1, 18] = 18 + 5 + 1
    assert torch.equal(expiry, expected)


def test_a_fresh_dms_gate_keeps_everything() -> None:
    gate = DMSGate(SHAPE)
    with torch.no_grad():
        features = gate(torch.randn(30, SHAPE.hidden_size))
    assert (features == -5.0).all()
    assert (gate.expiry(features, 1.0, OPEN) == NEVER).all()


def test_shift() -> None:
    assert decision_shift(1.0) == 0.0
    assert decision_shift(0.0) == float("inf")
    assert -1.0 < decision_shift(16.0) < 0.0
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="strength"):
            decision_shift(wrong)
