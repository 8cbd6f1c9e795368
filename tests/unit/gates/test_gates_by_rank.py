"""A gate cut down to a tensor parallel rank's heads decides about them what the whole gate does."""

from __future__ import annotations

import pytest
import torch

from vllm_prune.gates import (
    DCPGate,
    DMSGate,
    Gate,
    GateShape,
    Protection,
    RandomGate,
    ShadowGate,
    WindowGate,
)

SHAPE = GateShape(hidden_size=16, num_kv_heads=4, num_layers=3)
PROTECTION = Protection(sinks=1, window=2)
SPLIT = {
    "dcp_kv_head": lambda: DCPGate(SHAPE, rank=12, beta=1.0, scope="kv_head"),
    "dms": lambda: DMSGate(SHAPE, delay=5),
    "dms_borrowed": lambda: DMSGate(SHAPE, delay=5, form="borrowed"),
    "random": lambda: RandomGate(SHAPE, delay=3, seed=5).at_layer(1),
}
WHOLE = {"dcp": lambda: DCPGate(SHAPE, rank=4), "window": lambda: WindowGate(SHAPE, window=7)}


def made(build) -> Gate:
    torch.manual_seed(2)
    gate = build()
    for weight in gate.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return gate


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SPLIT)
def test_together_ranks_decide_what_the_gate_decides(name, ranks):
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = made(SPLIT[name])
        want = whole.expiry(whole(x), 1.0, PROTECTION)
        parts = [made(SPLIT[name]).at_rank(rank, ranks) for rank in range(ranks)]
        assert all(part.num_features * ranks == whole.num_features for part in parts)
        assert all(part.num_units == part.shape.num_kv_heads == 4 // ranks for part in parts)
        assert all(part.num_remembered * ranks == whole.num_remembered for part in parts)
        found = torch.cat([part.expiry(part(x), 1.0, PROTECTION) for part in parts])
    assert torch.equal(found, want)
    assert len({tuple(row) for row in want.tolist()}) > 1, "heads that all decide alike prove nothing"


@pytest.mark.parametrize("name", SPLIT)
def test_a_fresh_part_takes_the_state_of_a_loaded_one(name):
    """As the server does: the parameters are there before weights are loaded."""
    fresh, loaded = SPLIT[name]().at_rank(1, 2), made(SPLIT[name]).at_rank(1, 2)
    fresh.load_state_dict(loaded.state_dict())
    for mine, theirs in zip(fresh.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    if fresh.projection is not None:
        assert fresh.projection.weight.shape[0] == fresh.projection.out_features == fresh.num_features


@pytest.mark.parametrize("name", WHOLE)
def test_a_decision_of_all_heads_stays_whole(name):
    gate = made(WHOLE[name])
    before = {key: tensor.clone() for key, tensor in gate.state_dict().items()}
    assert gate.at_rank(1, 2) is gate and gate.shape == SHAPE and gate.num_units == 1
    assert all(torch.equal(before[key], tensor) for key, tensor in gate.state_dict().items())


def test_one_rank_keeps_everything():
    gate = made(SPLIT["dms"])
    assert gate.at_rank(0, 1) is gate and gate.num_units == 4


def test_what_cannot_be_split_says_so():
    with pytest.raises(NotImplementedError, match="shadow gates"):
        ShadowGate(SHAPE, query_heads=4, width=16).at_rank(0, 2)
    with pytest.raises(ValueError, match="4 KV heads do not divide among 3 ranks"):
        made(SPLIT["dms"]).at_rank(0, 3)
