"""Prompt gates: scores against their definition, who survives, and the soft form's limit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_prune.gates import GATES, NEVER, ACCPromptGate, GateShape, LTPPromptGate, PromptGate, Protection
from vllm_prune.gates.prompt import TILE, larger_share, larger_share_naive, received, received_naive

SHAPE = GateShape(32, 2, 4)
METHODS = [method for method, gate in GATES.items() if issubclass(gate, PromptGate)]


def make(method: str) -> PromptGate:
    if method == "ltp_prompt":
        ltp = LTPPromptGate(SHAPE, theta=1.2).at_layer(3)
        return ltp
    acc = ACCPromptGate(SHAPE)
    acc.tune(0.8, 0.5)
    return acc


def heads(n: int, seed: int = 0, h: int = 2, group: int = 3, d: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, h * group, d, generator=g), torch.randn(n, h, d, generator=g)


@pytest.mark.parametrize("n", [1, 2, 17, TILE - 1, TILE, TILE + 1, 3 * TILE + 5])
def test_tiled_scores_are_the_definition(n: int) -> None:
    q, k = heads(n)
    naive = received_naive(q.double(), k.double(), 0.7)
    torch.testing.assert_close(received(q, k, 0.7).double(), naive, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(received(q.double(), k.double(), 0.7), naive, rtol=1e-9, atol=1e-12)
    assert naive[-1] == 0.0


@given(st.integers(1, 2 * TILE + 9), st.integers(1, 40), st.integers(0, 50))
def test_tiled_scores_of_some_queries_over_all_keys(m: int, apart: int, seed: int) -> None:
    """Some tokens ask, their keys and those of the others are there; against a loop over pairs where it is short."""
    q, k = heads(m, seed)
    own = torch.randperm(m, generator=torch.Generator().manual_seed(seed))[: 1 + m // apart].sort().values
    naive = received_naive(q[own].double(), k.double(), 0.7, own)
    torch.testing.assert_close(received(q[own], k, 0.7, own).double(), naive, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(received(q[own].double(), k.double(), 0.7, own), naive, rtol=1e-9, atol=1e-12)
    if m <= 12:
        for i, j in enumerate(own.tolist()):
            given_by = [
                float((q[n, h].double() @ k[: n + 1, h // 3].double().T * 0.7).softmax(-1)[j]) * (n + 1)
                for n in own.tolist() if n > j for h in range(6)
            ]  # fmt: skip
            assert float(naive[i]) == pytest.approx(sum(given_by) / max(1, len(given_by)), rel=1e-6)


@given(st.integers(1, 40), st.integers(0, 200), st.sampled_from([1.0, 0.5]))
def test_ranks_are_counts_of_larger_scores(t: int, seed: int, share: float) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = (torch.rand(3, t, generator=g) * 9).round() / 9  # with ties
    among = torch.rand(3, t, generator=g) < share
    among[:, -1] = True
    found = larger_share(scores, among)
    assert torch.equal(found, larger_share_naive(scores, among))
    assert torch.equal(larger_share(scores[0], among[0]), found[0])
    assert (found[scores.masked_fill(~among, -1) == scores.masked_fill(~among, -1).amax(-1, keepdim=True)] == 0).all()


@given(st.integers(1, 60), st.integers(0, 50))
def test_uniform_attention_scores_one_at_any_length(n: int, seed: int) -> None:
    _, k = heads(n, seed)
    scores = received(torch.zeros(n, 6, 8), k, 1.0)
    torch.testing.assert_close(scores[:-1], torch.ones(n - 1))


def test_mean_weighted_by_shares_is_what_attention_left_over() -> None:
    """All that a query gives goes to itself or to the past: a brute-force loop over pairs."""
    q, k = heads(9, h=1, group=1)
    weights = torch.stack([
        torch.cat([(q[n, 0] @ k[: n + 1, 0].T).softmax(-1), torch.zeros(8 - n)]) for n in range(9)
    ])  # fmt: skip
    for j in range(8):
        expected = sum(weights[n, j] * (n + 1) for n in range(j + 1, 9)) / (8 - j)
        torch.testing.assert_close(received_naive(q, k, 1.0)[j], expected)


@pytest.mark.parametrize("method", METHODS)
def test_protected_tokens_survive_and_strength_0_opens(method: str) -> None:
    gate = make(method)
    scores = torch.zeros(40)
    positions = torch.arange(0, 80, 2)
    left = gate.survives(scores, positions, 80, 1.0, Protection(sinks=5, window=7))
    protected = (positions < 5) | (positions >= 72)
    assert left[protected].all()
    if method == "ltp_prompt":
        assert torch.equal(left, protected)
    assert gate.survives(scores, positions, 80, 0.0, Protection()).all()
    assert gate.survives(scores, torch.arange(40), 40, 16.0, Protection())[-1]


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 100), n=st.integers(1, 50), low=st.sampled_from([0.0, 0.3, 1.0]))
def test_more_strength_keeps_a_subset(method: str, seed: int, n: int, low: float) -> None:
    gate = make(method)
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 2
    less, more = (gate.survives(scores, torch.arange(n), n, s, Protection(1, 2)) for s in (low, 2 * low + 0.1))
    assert not (more & ~less).any()


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 100), n=st.integers(2, 50))
def test_the_hard_limit_of_soft_visibility_is_the_expiry(method: str, seed: int, n: int) -> None:
    """For all who still query: a token that is gone does not, so its row and its own key are no matter."""
    gate = make(method)
    scores = (torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) * 2).double()
    expiry = gate.expiry(scores, 1.0, Protection())
    assert set(expiry[0][expiry[0] != NEVER].tolist()) <= set(range(n - 1))
    with torch.no_grad():
        soft = gate.log_visibility(scores[None], tau=1e-9)[0, 0].exp()
    hard = (expiry == NEVER).expand(n, n)
    past = torch.ones(n, n, dtype=torch.bool).tril(-1)
    assert ((soft - hard.double()).abs()[past] < 1e-9).all()
    assert (soft[~past] == 1.0).all()


def test_ltp_starts_with_the_papers_thresholds_and_learns_them() -> None:
    gates = [LTPPromptGate(SHAPE, theta=0.8).at_layer(layer) for layer in range(4)]
    assert [round(float(gate.theta), 6) for gate in gates] == [0.0, 0.2, 0.4, 0.6]
    scores = torch.tensor([[0.1, 0.5, 0.9]], requires_grad=True)
    log_s = gates[2].log_survival(scores, tau=0.1)
    torch.testing.assert_close(log_s, torch.nn.functional.logsigmoid((scores - 0.4) / 0.1))
    log_s.sum().backward()
    assert float(gates[2].theta.grad) < 0 and (scores.grad > 0).all()


def test_acc_keeps_the_best_and_no_fewer_than_it_says() -> None:
    gate = ACCPromptGate(SHAPE, least=0.1)
    gate.tune(0.6, 0.5)  # 0.3 of the prompt
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5, 0.0])
    left = gate.survives(scores, torch.arange(10), 10, 1.0, Protection())
    assert left.nonzero()[:, 0].tolist() == [1, 3, 9]
    assert gate.keep_at(1.0) == pytest.approx(0.3) and gate.keep_at(100.0) == 0.1 and gate.keep_at(0.1) == 1.0
    ties = gate.survives(torch.ones(10), torch.arange(10), 10, 1.0, Protection(sinks=1))
    assert ties.nonzero()[:, 0].tolist() == [0, 1, 9]


def test_wrong_parameters_are_refused() -> None:
    for theta in (-1.0, float("nan"), 1e9):
        with pytest.raises(ValueError, match="theta"):
            LTPPromptGate(SHAPE, theta=theta)
    for least in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="least"):
            ACCPromptGate(SHAPE, least=least)


def states(profile: list[float], coefficient: list[float]) -> list[dict[str, torch.Tensor]]:
    return [{"profile": torch.tensor(p), "coefficient": torch.tensor(a)} for p, a in zip(profile, coefficient)]  # noqa: B905


@pytest.mark.parametrize(
    ("profile", "coefficient", "said"),
    [
        ([0.5, 0.6], [1.0, 1.0], "not increase"),
        ([1.5, 0.6], [1.0, 1.0], "shares"),
        ([0.5, 0.0], [1.0, 1.0], "shares"),
        ([0.5, 0.5], [1.0, 2.0], "same in all"),
        ([0.5, 0.5], [0.0, 0.0], "above 0"),
    ],
)
def test_wrong_tensors_are_named(profile: list[float], coefficient: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ACCPromptGate.check_states(states(profile, coefficient))
    ACCPromptGate.check_states(states([0.9, 0.9], [0.3, 0.3]))
    with pytest.raises(ValueError, match="beyond"):
        LTPPromptGate.check_states([{"theta": torch.tensor(1e7)}])
