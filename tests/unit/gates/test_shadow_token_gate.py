"""ShadowLLM's token form: what a token runs on, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER, GateShape, Protection, Reveal, ShadowTokenGate

SHAPE = GateShape(hidden_size=16, num_kv_heads=2, num_layers=4)
SIZES = {"query_heads": 4, "width": 32, "neurons": 10}


def gate(seed: int = 0, **params: float) -> ShadowTokenGate:
    torch.manual_seed(seed)
    made = ShadowTokenGate(SHAPE, **SIZES, **{"hidden": 16, "neuron_hidden": 12, **params}).at_layer(0)  # type: ignore[arg-type]
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    return made


def attended(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1), st.floats(0, 8), st.floats(0, 8))
def test_shares_and_strength(seed, closed, closed_neurons, one, other):
    made = gate(seed, closed=closed, closed_neurons=closed_neurons)
    x = attended(3, seed)
    weak, strong = (made.choose(x, strength) for strength in sorted((one, other)))
    for few, many in zip(strong, weak, strict=True):
        assert (few <= many).all() and few[:, 0].all() and many[:, 0].all()
    groups, neurons = made.choose(x, 1.0)
    assert (~groups).flatten(1).sum(1).tolist() == [int(closed * 6 + 1e-6)] * 3
    assert (~neurons[:, 1:]).sum(-1).eq(int(closed_neurons * 10 + 1e-6)).all()
    assert all(part.all() for part in made.choose(x, 0.0))


def test_the_highest_scores_are_chosen_and_tokens_choose_alone():
    made, x = gate(closed_neurons=0.3), attended(4, 1)
    assert made.neuron_predictor is not None
    with torch.no_grad():
        scores = made.neuron_predictor(x).unflatten(-1, (3, 10))
    _, neurons = made.choose(x, 1.0)
    want = torch.ones(4, 3, 10, dtype=torch.bool).scatter(-1, scores.argsort(-1)[..., :3], False)
    assert torch.equal(neurons[:, 1:], want)
    for row in range(4):
        assert torch.equal(made.choose(x[row : row + 1], 1.0)[1][0], neurons[row])


def test_the_contract():
    made = gate()
    assert made.reveal is Reveal.NONE and made.num_features == 0 and made.num_units == 1
    assert (made.expiry(torch.zeros(5, 0), 16.0, Protection()) == NEVER).all()
    with pytest.raises(NotImplementedError):
        made.log_visibility(torch.zeros(1, 5, 0))
    other = ShadowTokenGate(SHAPE, **SIZES).at_layer(2)
    assert not other.state_dict()
    with pytest.raises(ValueError, match="layer 0"):
        other.choose(attended(1, 0), 1.0)


@pytest.mark.parametrize(
    "wrong", [{"query_heads": 3}, {"width": 33}, {"neurons": 0}, {"neuron_hidden": 0}, {"closed": -1.0},
              {"closed_neurons": 1.1}, {"least": 3}]
)  # fmt: skip
def test_wrong_parameters_are_refused(wrong):
    section = DropGateConfig(
        method="shadow_token", params={**SIZES, **wrong}, num_layers=4, num_kv_heads=2, hidden_size=16
    )
    with pytest.raises(PruneError, match="params"):
        section.build_gate()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"intermediate_size": 12}, "neurons is 10"), ({"hidden_act": "gelu"}, "silu"), ({"mlp_bias": True}, "biases"),
     ({"num_experts": 8}, "experts"), ({"num_attention_heads": 8}, "attention heads")],
)  # fmt: skip
def test_bases_that_do_not_fit(change, said):
    fits = {"num_attention_heads": 4, "hidden_size": 32, "head_dim": 8, "intermediate_size": 10, "hidden_act": "silu"}
    assert gate().misfit(SimpleNamespace(**fits)) is None
    assert said in str(gate().misfit(SimpleNamespace(**{**fits, **change})))
