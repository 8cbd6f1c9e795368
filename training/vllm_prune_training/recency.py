"""Has a gate learnt more than recency? A logistic fit of what is kept on distance alone (the falsifier of DCP's claim).

For pairs (n, j), j < n, drawn evenly: visible or not, against log(n - j), per layer and head ("lane"). An AUC near 1 says
that "distance > k" explains the mask; 1/2 says that distance tells nothing. Lanes that keep or drop everything have no
AUC. Dimension letters: L layers, E eviction units of a layer, T tokens, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

RECENCY_ONLY = 0.95
"""AUC above which the mask counts as recency."""

LEAST = 20
"""Visible pairs, and dropped ones, that a fit needs."""

BINS = 10


@dataclass(frozen=True)
class Pairs:
    """Distances int64 [P] and visibility bool [L, E, P] of pairs drawn evenly over all past pairs."""

    distance: torch.Tensor
    visible: torch.Tensor


@dataclass(frozen=True)
class Fit:
    """p(visible) = sigmoid(bias + slope * log(distance)).

    Attributes:
        auc: area under the ROC curve of the fit, 1/2 to 1.
        error: expected calibration error, mean |p - observed| over tenths of the pairs by p.
        half: distance at which the fit says 1/2, in tokens; inf where it never does.
    """

    bias: float
    slope: float
    auc: float
    error: float
    half: float


@dataclass(frozen=True)
class Recency:
    """Fits of each lane (None where nothing, or everything, is dropped), and one for all lanes together.

    ``mean_auc`` is the mean over lanes that have a fit: the number that decides. ``pooled`` is one rule for the whole
    model, which can only be worse for knowing no lanes.
    """

    lanes: list[list[Fit | None]]
    pooled: Fit | None

    @property
    def mean_auc(self) -> float | None:
        found = [fit.auc for row in self.lanes for fit in row if fit is not None]
        return sum(found) / len(found) if found else None

    @property
    def verdict(self) -> str:
        """In words, for a card."""
        fits = [fit for row in self.lanes for fit in row if fit is not None]
        if not fits:
            return "Nothing to explain: every layer and head keeps all of its past, or drops all of it."
        above = sum(fit.auc > RECENCY_ONLY for fit in fits)
        rule = f"mean AUC {self.mean_auc:.3f} over the {len(fits)} layers and heads that drop some and keep some"
        each = f"{above} of them lie above {RECENCY_ONLY:g}"
        if self.mean_auc > RECENCY_ONLY:  # type: ignore[operator]
            return f"Recency only: distance alone explains what is kept ({rule}; {each}). A window would do as well."
        return f"More than recency: distance alone does not explain what is kept ({rule}; {each})."


def draw_pairs(expiries: Sequence[torch.Tensor], count: int, seed: int = 0) -> Pairs:
    """About ``count`` past pairs, spread over windows.

    Args:
        expiries: int [L, E, T] of each window.
        count: P; no more than a window's pairs are drawn of it, with repeats.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    distances, visible = [], []
    each = max(1, math.ceil(count / len(expiries)))
    for expiry in expiries:
        t = expiry.shape[-1]
        a = torch.randint(0, t, (each,), generator=generator)
        b = (a + torch.randint(1, t, (each,), generator=generator)) % t  # another position: pairs are even
        j, n = torch.minimum(a, b), torch.maximum(a, b)
        distances.append(n - j)
        visible.append(n < expiry[..., j])
    return Pairs(torch.cat(distances), torch.cat(visible, dim=-1))


def auc(score: torch.Tensor, label: torch.Tensor) -> float:
    """Chance that a labelled item scores above another one, ties counting half (Mann-Whitney).

    Args:
        score: [P].
        label: bool [P], both kinds present.
    """
    _, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2.0).double()  # mean rank of a value, from 1
    positive = label.sum().double()
    found = (rank[inverse][label].sum() - positive * (positive + 1) / 2) / (positive * (len(label) - positive))
    return float(found)


def calibration_error(p: torch.Tensor, label: torch.Tensor) -> float:
    """Mean |mean p - share of labels| over ``BINS`` equal parts of the items in order of p [P]."""
    order = p.argsort(stable=True)
    parts = zip(p[order].chunk(BINS), label[order].double().chunk(BINS), strict=True)
    return float(sum((q.mean() - y.mean()).abs() * len(q) for q, y in parts) / len(p))


def fit_distance(distance: torch.Tensor, visible: torch.Tensor) -> Fit | None:
    """Logistic regression by Newton's method; None where one kind has fewer than ``LEAST`` pairs.

    Args:
        distance: int64 [P], at least 1.
        visible: bool [P].
    """
    if min(int(visible.sum()), int((~visible).sum())) < LEAST:
        return None
    x = distance.double().log()
    centre, spread = x.mean(), x.std().clamp_min(1e-9)
    design = torch.stack([torch.ones_like(x), (x - centre) / spread], dim=1)  # [P, 2]
    y = visible.double()
    ridge = torch.tensor([0.0, 1e-4], dtype=torch.float64) * len(y)  # separable data would run away
    weight = torch.tensor([math.log(y.mean() / (1 - y.mean())), 0.0], dtype=torch.float64)

    def objective(w: torch.Tensor) -> float:
        z = design @ w
        return float((torch.nn.functional.softplus(z) - y * z).sum() + (ridge * w * w).sum() / 2)

    for _ in range(50):
        p = torch.sigmoid(design @ weight)
        gradient = design.T @ (p - y) + ridge * weight
        hessian = (design * (p * (1 - p))[:, None]).T @ design + torch.diag(ridge + 1e-9)
        step = torch.linalg.solve(hessian, gradient)
        size, before = 1.0, objective(weight)
        while size > 1e-4 and objective(weight - size * step) > before:
            size /= 2
        weight = weight - size * step
        if float((size * step).abs().max()) < 1e-8:
            break
    slope = float(weight[1] / spread)
    bias = float(weight[0] - weight[1] * centre / spread)
    p = torch.sigmoid(design @ weight)
    at = -bias / slope if slope != 0.0 else math.inf
    half = math.exp(at) if slope < 0.0 and at < 50 else math.inf
    return Fit(bias, slope, auc(p, visible), calibration_error(p, visible), half)


def explain(pairs: Pairs) -> Recency:
    """Fit every lane, and all of them together."""
    lanes = [[fit_distance(pairs.distance, row) for row in layer] for layer in pairs.visible]
    flat = pairs.visible.flatten(0, 1)
    return Recency(lanes, fit_distance(pairs.distance.repeat(len(flat)), flat.flatten()))


def visible_at(expiries: Sequence[torch.Tensor], distances: Sequence[int]) -> torch.Tensor:
    """Share of keys that the query at each distance still sees, of all keys that have such a query.

    Args:
        expiries: int [L, E, T] of each window.
        distances: D of them, 1 to T - 1.

    Returns:
        float64 [L, D], means over windows and units.
    """
    t = expiries[0].shape[-1]
    pos = torch.arange(t)
    rows = [
        torch.stack([(expiry[..., : t - d] > pos[: t - d] + d).double().mean(dim=(1, 2)) for d in distances], dim=1)
        for expiry in expiries
    ]
    return torch.stack(rows).mean(0)
