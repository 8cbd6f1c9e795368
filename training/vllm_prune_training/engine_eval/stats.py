"""Intervals: Wilson's for shares, a paired one for perplexity ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson(share: float, number: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (Wilson 1927) of a share.

    Args:
        share: mean of ``number`` scores, each in 0..1. For scores between 0 and 1 the interval is wider than needed,
            since their variance is at most that of a yes or no with the same mean.
        number: of samples; 0 gives (0, 1).
        z: normal quantile.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a share lies in 0..1, got {share}")
    if number <= 0:
        return 0.0, 1.0
    scale = 1.0 + z * z / number
    middle = share + z * z / (2 * number)
    half = z * math.sqrt(share * (1.0 - share) / number + z * z / (4 * number * number))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood a token; nll in nats and tokens predicted, by window."""
    return math.exp(sum(nll) / sum(tokens))


def perplexity_ratio(
    nll: Sequence[float], base: Sequence[float], tokens: Sequence[int], z: float = Z95
) -> tuple[float, tuple[float, float] | None]:
    """Perplexity over a base's on the same windows, and its interval over windows (paired, normal, in the log).

    Args:
        nll, base: sums in nats, by window.
        tokens: predicted, by window; windows count by their tokens.
        z: normal quantile.

    Returns:
        The ratio, and its interval; None for a single window, which says nothing of the spread.
    """
    total = sum(tokens)
    mean = sum(a - b for a, b in zip(nll, base, strict=True)) / total
    if len(tokens) < 2:
        return math.exp(mean), None
    n = len(tokens)
    residuals = [a - b - mean * t for a, b, t in zip(nll, base, tokens, strict=True)]
    error = math.sqrt(n / (n - 1) * sum(r * r for r in residuals)) / total
    return math.exp(mean), (math.exp(mean - z * error), math.exp(mean + z * error))
