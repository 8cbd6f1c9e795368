"""ShadowLLM's request form: what closes, when, and what is refused. It has no soft twin, so no part in the generic tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER, GateShape, Protection, Reveal, ShadowGate, expiry_mask
from vllm_prune.gates.shadow import close_lowest, closed_expiry, scaled, share_at

SHAPE = GateShape(hidden_size=16, num_kv_heads=2, num_layers=5)
WIDTH = 4 * 8


def gate(seed: int = 0, **params: float) -> ShadowGate:
    torch.manual_seed(seed)
    made = ShadowGate(SHAPE, 4, WIDTH, **{"hidden": 16, "closed": 0.5, **params}).at_layer(0)  # type: ignore[arg-type]
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    return made


def attended(seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.integers(0, 10), st.integers(0, 2), st.integers(1, 6), st.integers(1, 4))
def test_the_lowest_close_and_each_layer_keeps_its_best(seed, count, least, layers, heads):
    """By definition: going up from the lowest score, a lane closes unless its layer would fall below ``least``."""
    least = min(least, heads)
    scores = torch.randint(-3, 4, (layers, heads), generator=torch.Generator().manual_seed(seed)).float()
    found = close_lowest(scores, count, least)
    lanes = sorted((float(scores[i, h]), i, h) for i in range(layers) for h in range(heads))
    want = torch.zeros(layers, heads, dtype=torch.bool)
    for _, layer, head in lanes:
        if want.sum() < count and heads - want[layer].sum() > least:
            want[layer, head] = True
    assert torch.equal(found, want)


@given(st.integers(0, 99), st.integers(0, 99), st.floats(0, 16), st.floats(0, 16), st.integers(0, 2))
def test_strength_zero_opens_and_more_closes_more(seed, text, one, other, least):
    made = gate(seed, least=least)
    with torch.no_grad():
        weak, strong = (made.close(attended(text), strength) for strength in sorted((one, other)))
        assert not made.close(attended(text), 0.0).any()
        assert made.close(attended(text), 1.0).sum() == min(4, 4 * (2 - least)), "half of four layers of two KV heads"
    assert (strong >= weak).all() and not strong[0].any()


def test_the_share_is_as_configured_at_one():
    assert [share_at(0.3, s) for s in (0.0, 1.0)] == [0.0, pytest.approx(0.3)]
    assert 0.3 < share_at(0.3, 2.0) < share_at(0.3, 16.0) < 1.0
    assert share_at(1.0, 0.5) == 1.0
    with pytest.raises(ValueError, match="strength"):
        share_at(0.3, -1.0)


def test_other_texts_close_other_lanes_and_scale_does_not_matter():
    made = gate(closed=0.4)
    with torch.no_grad():
        choices = {tuple(made.close(attended(i), 1.0).flatten().tolist()) for i in range(20)}
        assert len(choices) > 2
        assert torch.equal(made.scores(attended(1)), made.scores(4.0 * attended(1)))
    assert torch.equal(scaled(torch.ones(3)), torch.zeros(3))


@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 20))
def test_a_closed_lane_is_seen_by_the_prompt_and_by_nobody_after(seed, prompt, tokens):
    closed = torch.rand(2, generator=torch.Generator().manual_seed(seed)) < 0.5
    expiry = closed_expiry(closed, prompt, tokens)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    seen = expiry_mask(expiry)
    for head in range(2):
        want = causal.clone()
        if closed[head]:
            want[prompt:] = False
        assert torch.equal(seen[head], want)


def test_the_contract():
    made = gate()
    assert made.reveal is Reveal.PER_REQUEST and made.num_features == 0 and made.num_units == 2
    assert not made.softens and not made.protects
    assert (made.expiry(torch.zeros(5, 0), 1.0, Protection()) == NEVER).all(), "no key expires before the prompt's end"
    with pytest.raises(NotImplementedError):
        made.log_visibility(torch.zeros(1, 5, 0))
    other = ShadowGate(SHAPE, 4, WIDTH).at_layer(1)
    assert not other.state_dict() and set(made.state_dict()) == {
        f"predictor.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")
    }
    with pytest.raises(ValueError, match="layer 0"):
        other.scores(attended(0))


@pytest.mark.parametrize(
    "wrong",
    [{"query_heads": 3}, {"width": 33}, {"hidden": 0}, {"closed": 1.5}, {"closed": float("nan")}, {"least": 3},
     {"least": -1}, {"hidden": 1.5}, {"query_heads": None}],
)  # fmt: skip
def test_wrong_parameters_are_refused(wrong):
    params = {name: value for name, value in {"query_heads": 4, "width": WIDTH, **wrong}.items() if value is not None}
    section = DropGateConfig(method="shadow", params=params, num_layers=5, num_kv_heads=2, hidden_size=16)
    with pytest.raises(PruneError, match="params"):
        section.build_gate()


def test_a_base_of_other_heads_does_not_fit():
    fits = SimpleNamespace(num_attention_heads=4, hidden_size=32, head_dim=8)
    assert gate().misfit(fits) is None
    assert gate().misfit(SimpleNamespace(num_attention_heads=4, hidden_size=32)) is None
    assert "attention heads" in str(gate().misfit(SimpleNamespace(num_attention_heads=8, hidden_size=32, head_dim=4)))
    assert "numbers" in str(gate().misfit(SimpleNamespace(num_attention_heads=4, hidden_size=32, head_dim=16)))
