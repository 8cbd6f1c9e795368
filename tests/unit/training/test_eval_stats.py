"""Intervals against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_prune_training.engine_eval.stats import Z95, perplexity, perplexity_ratio, wilson


def naive_wilson(share: float, number: int) -> tuple[float, float]:
    """The definition: all p whose score test does not reject the share, by bisection from the share outwards."""

    def accepted(p: float) -> bool:
        return abs(share - p) <= Z95 * math.sqrt(p * (1 - p) / number)

    ends = []
    for far in (0.0, 1.0):
        inside, outside = share, far
        for _ in range(100):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if accepted(middle) else (inside, middle)
        ends.append(inside)
    return ends[0], ends[1]


@given(number=st.integers(1, 400), data=st.data())
def test_wilson_is_the_inverted_score_test(number: int, data: st.DataObject) -> None:
    share = data.draw(st.integers(0, number)) / number
    low, high = wilson(share, number)
    assert 0.0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1.0
    assert (low, high) == pytest.approx(naive_wilson(share, number), abs=1e-9)


def test_wilson_by_hand_and_at_the_edges() -> None:
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 16)[0] == 0.0 and 0.0 < wilson(0.0, 16)[1] < 0.25
    assert wilson(0.5, 0) == (0.0, 1.0)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"0\.\.1"):
            wilson(wrong, 4)


@given(st.lists(st.tuples(st.floats(0, 5000), st.floats(0, 5000)), min_size=2, max_size=20))
def test_equal_windows_give_the_paired_normal_interval(pairs: list[tuple[float, float]]) -> None:
    length = 1000
    gated, base = (np.array(side) for side in zip(*pairs, strict=True))
    differences = (gated - base) / length
    middle, half = differences.mean(), Z95 * differences.std(ddof=1) / math.sqrt(len(pairs))
    ratio, interval = perplexity_ratio(list(gated), list(base), [length] * len(pairs))
    assert interval is not None
    assert ratio == pytest.approx(math.exp(middle))
    assert interval == pytest.approx((math.exp(middle - half), math.exp(middle + half)))
    tokens = [length] * len(pairs)
    assert ratio == pytest.approx(perplexity(list(gated), tokens) / perplexity(list(base), tokens))


def test_one_window_has_no_interval() -> None:
    assert perplexity_ratio([20.0], [10.0], [10]) == (pytest.approx(math.e), None)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        base = rng.normal(2000, 300, 30)
        _, interval = perplexity_ratio(list(base + rng.normal(10, 20, 30)), list(base), [1000] * 30)
        assert interval is not None
        covered += interval[0] <= math.exp(0.01) <= interval[1]
    assert 0.90 <= covered / 400 <= 0.98
