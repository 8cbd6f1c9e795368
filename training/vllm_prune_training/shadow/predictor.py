"""Regression of predictors on criteria: scaled targets, a seeded split, MSE, AdamW, cosine; quality by rank correlation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import mse_loss

from vllm_prune.gates.shadow import Predictor

Scale = Literal["layer", "global"]


def scaled_targets(scores: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Scores [B, L, S] of each sample stretched to [0, 1], over each layer or over the network."""
    dims = (2,) if scale == "layer" else (1, 2)
    low, high = scores.amin(dims, keepdim=True), scores.amax(dims, keepdim=True)
    return (scores - low) / (high - low).clamp_min(1e-12)


def split(samples: int, held_out: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to learn from and rows to measure on, a random division that only the seed decides."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    kept = round(samples * held_out)
    return order[kept:], order[:kept]


def ranks(x: torch.Tensor) -> torch.Tensor:
    """float64 [..., n], each value's rank among its row's; equal values share the mean of theirs."""
    order = x.argsort(-1)
    place = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    place.scatter_(-1, order, torch.arange(x.shape[-1], dtype=torch.float64, device=x.device).expand(x.shape))
    out = torch.empty_like(place)
    for row, values, places in zip(
        out.view(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]), place.view(-1, x.shape[-1]), strict=True
    ):
        _, group, count = values.unique(return_inverse=True, return_counts=True)
        mean = torch.zeros(len(count), dtype=torch.float64).index_add_(0, group, places) / count
        row.copy_(mean[group])
    return out


def spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over rows [B, n] of Spearman's rank correlation; rows without any spread are left out, nan if all are."""
    a, b = (r - r.mean(-1, keepdim=True) for r in (ranks(x), ranks(y)))
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    rho = (a * b).sum(-1)[scale > 0] / scale[scale > 0]
    return float(rho.mean()) if len(rho) else math.nan


@dataclass(frozen=True)
class Fit:
    """A predictor and how well it ranks, on rows that it learned from and on the others.

    Attributes:
        static: rank correlation of the mean target of the rows learned from, the same for every text.
    """

    predictor: Predictor
    loss: float
    rho_train: float
    rho: float
    static: float


def fit(
    x: torch.Tensor,
    y: torch.Tensor,
    hidden: int,
    rows: tuple[torch.Tensor, torch.Tensor],
    *,
    epochs: int,
    batch: int,
    lr: float,
    weight_decay: float,
    seed: int,
    since: int = 0,
) -> Fit:
    """Regress.

    Args:
        x: float32 [B, width], as the served predictor reads it (it scales by itself).
        y: float32 [B, n], targets.
        rows: of ``split``.
        since: first output that is ranked by correlation (layer 0 is never chosen).

    Raises:
        FloatingPointError: the loss is no number.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = Predictor(x.shape[1], hidden, y.shape[1])
    learn, measure = rows
    steps = epochs * math.ceil(len(learn) / batch)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.zeros(())
    for _ in range(epochs):
        order = learn[torch.randperm(len(learn), generator=generator)]
        for part in order.split(batch):
            loss = mse_loss(predictor(x[part]), y[part])
            if not torch.isfinite(loss):
                raise FloatingPointError("the predictor's loss is no number")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    predictor.requires_grad_(False)
    static = y[learn].mean(0, keepdim=True)
    return Fit(
        predictor, float(loss.detach()), spearman(predictor(x[learn])[:, since:], y[learn][:, since:]),
        spearman(predictor(x[measure])[:, since:], y[measure][:, since:]),
        spearman(static.expand(len(measure), -1)[:, since:], y[measure][:, since:]),
    )  # fmt: skip
