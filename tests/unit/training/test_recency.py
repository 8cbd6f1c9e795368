"""The distance-only fit: what it says of masks whose nature is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_prune_training.recency import auc, calibration_error, draw_pairs, explain, fit_distance, visible_at

from vllm_prune.gates import NEVER

T = 256


def lanes(*expiries: torch.Tensor) -> torch.Tensor:
    """[L, 1, T] of expiries [T]."""
    return torch.stack(expiries)[:, None]


def window(w: int) -> torch.Tensor:
    return torch.arange(T) + w + 1


def by_content(seed: int) -> torch.Tensor:
    """Half of the keys live for ever, half die at once."""
    keep = torch.rand(T, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(keep, NEVER, torch.arange(T) + 1)


def test_a_window_is_recency_and_content_is_not() -> None:
    open_lane = torch.full((T,), NEVER)
    recent = explain(draw_pairs([lanes(window(32), window(100), open_lane)], 20_000))
    assert recent.lanes[2] == [None]
    assert all(fit is not None and fit.auc > 0.999 and 15 < fit.half < 150 for (fit,) in recent.lanes[:2])
    assert recent.mean_auc > 0.999 and recent.verdict.startswith("Recency only")  # type: ignore[operator]
    assert recent.pooled is not None and recent.pooled.auc < 0.9  # the open layer cannot be told by distance
    content = explain(draw_pairs([lanes(by_content(1), by_content(2))], 20_000))
    assert 0.5 <= content.mean_auc < 0.56 and content.verdict.startswith("More than recency")  # type: ignore[operator]
    nothing = explain(draw_pairs([lanes(open_lane)], 1000))
    assert nothing.mean_auc is None and nothing.pooled is None and nothing.verdict.startswith("Nothing to explain")


def test_the_logistic_law_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    distance = torch.randint(1, 1000, (40_000,), generator=generator)
    p = torch.sigmoid(6.0 - 1.5 * distance.double().log())
    fit = fit_distance(distance, torch.rand(len(p), generator=generator) < p)
    assert fit is not None
    assert fit.bias == pytest.approx(6.0, abs=0.3) and fit.slope == pytest.approx(-1.5, abs=0.07)
    assert fit.half == pytest.approx(54.6, rel=0.1) and fit.error < 0.01


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_chance_of_the_right_order(items: list[tuple[int, bool]]) -> None:
    score, label = torch.tensor([s for s, _ in items]).double(), torch.tensor([y for _, y in items])
    if label.all() or not label.any():
        return
    wins = [(a > b) + 0.5 * (a == b) for a in score[label].tolist() for b in score[~label].tolist()]
    assert auc(score, label) == pytest.approx(sum(wins) / len(wins))


def test_calibration_error_of_a_known_bias() -> None:
    p = torch.linspace(0.1, 0.9, 1000).double()
    label = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < p
    assert calibration_error(p, label) < 0.06
    assert calibration_error(p * 0 + 0.9, label) == pytest.approx(0.4, abs=0.05)


def test_pairs_are_even_over_all_past_pairs() -> None:
    pairs = draw_pairs([lanes(window(3))] * 2, 60_000)
    assert pairs.visible.shape == (1, 1, len(pairs.distance)) and pairs.distance.min() == 1
    assert pairs.distance.max() == T - 1
    for d in (1, 100, 200):  # T - d of the T (T - 1) / 2 pairs lie at distance d
        inside = ((pairs.distance >= d) & (pairs.distance < d + 20)).double().mean().item()
        assert inside == pytest.approx(sum(T - x for x in range(d, d + 20)) / (T * (T - 1) / 2), rel=0.1)
    assert torch.equal(pairs.visible[0, 0], pairs.distance <= 3)


def test_visible_at_against_counting() -> None:
    expiries = [lanes(by_content(s), window(20)) for s in (1, 2)]
    found = visible_at(expiries, [1, 20, 21, 255])
    for column, d in enumerate([1, 20, 21, 255]):
        for layer in range(2):
            seen = [int(e[layer, 0, j]) > j + d for e in expiries for j in range(T - d)]
            assert found[layer, column].item() == pytest.approx(sum(seen) / len(seen))
