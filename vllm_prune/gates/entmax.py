"""sigma_alpha: the first coordinate of alpha-entmax on (s, 0), solved in p-space, with its own gradient.

For |s| < 1/(alpha - 1), p solves p^(a-1) - (1-p)^(a-1) = (a-1) s; outside, p is exactly 0 or 1. alpha -> 1 is the
logistic sigmoid, alpha = 2 is clip((1 + s)/2, 0, 1), alpha -> inf the step function. Inside,
dp/ds = 1 / (p^(a-2) + (1-p)^(a-2)); zero outside. (Peters et al. 2019, arXiv 1905.05702, for alpha-entmax.)
"""

from __future__ import annotations

import torch

_NEAR_ONE = 1e-3
LOG_P_FLOOR = -30.0
"""log p where p is exactly 0."""


def sigma_alpha(s: torch.Tensor, alpha: float, iterations: int = 24) -> torch.Tensor:
    """Keep probability, no gradient. s: any shape, float32 or float64; alpha >= 1. Same shape and dtype."""
    if alpha < 1.0:
        raise ValueError(f"alpha must be >= 1, got {alpha}")
    if alpha - 1.0 < _NEAR_ONE:
        return torch.sigmoid(s)
    a = alpha - 1.0
    if abs(a - 1.0) < 1e-6:
        return ((1.0 + s) / 2.0).clamp(0.0, 1.0)
    target = (a * s).clamp(-1.0, 1.0)
    # By symmetry p(-s) = 1 - p(s): solve for s <= 0, where p in [0, 1/2] and small p keeps its relative precision.
    t = target.abs()
    lo, hi = torch.zeros_like(t), torch.full_like(t, 0.5)
    p = (1.0 - t) * 0.5
    for _ in range(iterations):  # Newton on the monotone residual, kept in its bracket by bisection
        f = (1.0 - p).pow(a) - p.pow(a) - t
        hi = torch.where(f < 0, p, hi)
        lo = torch.where(f >= 0, p, lo)
        slope = a * ((1.0 - p).pow(a - 1.0) + p.clamp_min(1e-30).pow(a - 1.0))
        step = p + f / slope
        inside = (step > lo) & (step < hi) & torch.isfinite(step)
        p = torch.where(inside, step, 0.5 * (lo + hi))
    p = torch.where(t >= 1.0, torch.zeros_like(p), p)
    return torch.where(target <= 0, p, 1.0 - p)


class _LogSigmaAlpha(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s: torch.Tensor, alpha: float) -> torch.Tensor:  # type: ignore[override]
        p = sigma_alpha(s, alpha)
        ctx.save_for_backward(p)
        ctx.alpha = alpha
        return p.log().clamp_min(LOG_P_FLOOR)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):  # type: ignore[override]
        (p,) = ctx.saved_tensors
        if ctx.alpha - 1.0 < _NEAR_ONE:
            return grads[0] * (1.0 - p), None
        inside = (p > 0) & (p < 1)
        safe = torch.where(inside, p, torch.full_like(p, 0.5))
        # d log p / ds = (1 / p) / (p^(a-2) + (1-p)^(a-2))
        slope = safe * (safe.pow(ctx.alpha - 2.0) + (1.0 - safe).pow(ctx.alpha - 2.0))
        return torch.where(inside, grads[0] / slope, torch.zeros_like(p)), None


def log_sigma_alpha(s: torch.Tensor, alpha: float) -> torch.Tensor:
    """log sigma_alpha(s), clamped at LOG_P_FLOOR, differentiable in s. Same shape; float32 or float64."""
    if alpha - 1.0 < _NEAR_ONE:
        return torch.nn.functional.logsigmoid(s).clamp_min(LOG_P_FLOOR)
    return _LogSigmaAlpha.apply(s, alpha)  # type: ignore[no-any-return]
