"""sigma_alpha: the first coordinate of alpha-entmax on (s, 0), with its own gradient.

For |s| < 1/(alpha - 1), p solves p^(a-1) - (1-p)^(a-1) = (a-1) s; outside, p is exactly 0 or 1. alpha -> 1 is the
logistic sigmoid, alpha = 2 is clip((1 + s)/2, 0, 1), alpha -> inf the step function. Inside,
dp/ds = 1 / (p^(a-2) + (1-p)^(a-2)); zero outside. (Peters et al. 2019, arXiv 1905.05702, for alpha-entmax.)

Below, a = alpha - 1, p <= 1/2 <= q = 1 - p, u = p^a, w = q^a and t = a |s|, so that w - u = t. By symmetry
p(-s) = 1 - p(s), hence only the smaller of the two is solved for, by Newton's method in w (a >= 1) or in u (a < 1):
there the residual is concave with a slope between 1 and 2, and three steps reach float32 precision. As a -> 0 both
powers tend to 1, so for a < 0.02 the unknown is the logit of p instead (``_solve_near_one``), down to the sigmoid itself.
"""

from __future__ import annotations

from typing import Any

import torch

_NEAR_ONE = 0.02
"""Below this a the powers are too close to 1 to be told apart, and ``_solve_near_one`` takes over."""
_TINY = 1e-37
LOG_P_FLOOR = -30.0
"""log p where p is exactly 0."""

Alpha = float | torch.Tensor
"""A tensor (0-dim, >= 1.02) has no branches on its value: for compiled training with a changing alpha. Smaller ones are
refused where that costs nothing (on a CPU, not compiled)."""


def _solve(s: torch.Tensor, alpha: Alpha, iterations: int) -> tuple[torch.Tensor, ...]:
    """p <= 1/2, q, u, w as above for each s. Where |s| >= 1/a, p and u are about 0 and no better defined."""
    a = torch.as_tensor(alpha, dtype=s.dtype, device=s.device) - 1.0
    t = (a * s.abs()).clamp(max=1.0)
    high = a >= 1.0  # x, y = q, w there, else p, u; the others are xc, yc
    sign = torch.where(high, 1.0, -1.0).to(s.dtype)
    half = torch.exp2(-a)
    low_end, high_end = torch.where(high, half, 0.0), torch.where(high, 1.0, half)
    y = torch.where(high, torch.maximum(t, half), torch.minimum(1.0 - t, half))
    for _ in range(iterations):
        y = y.clamp_min(_TINY)
        x = torch.exp(torch.log(y) / a)
        xc = (1.0 - x).clamp_min(1e-12)
        yc = torch.exp(a * torch.log(xc))
        y = y - (y - yc - sign * t) / (1.0 + (yc * x) / (xc * y))
        y = torch.minimum(torch.maximum(y, low_end), high_end)
    y = y.clamp_min(_TINY)
    log_x = torch.log(y) / a
    x, xc = torch.exp(log_x), -torch.expm1(log_x)
    yc = torch.exp(a * torch.log(xc.clamp_min(_TINY)))
    p, q, u, w = torch.where(high, xc, x), torch.where(high, x, xc), torch.where(high, yc, y), torch.where(high, y, yc)
    return p, q, u, w


def _iterations(s: torch.Tensor) -> int:
    return 3 if s.dtype == torch.float32 else 5


def _is_near_one(alpha: Alpha) -> bool:
    if isinstance(alpha, torch.Tensor):
        if not torch.compiler.is_compiling() and alpha.device.type == "cpu" and alpha < 1.0 + _NEAR_ONE * 0.999:
            raise ValueError(f"alpha as a tensor must be >= {1.0 + _NEAR_ONE}, got {alpha.item()}: give a number")
        return False
    if not alpha >= 1.0:
        raise ValueError(f"alpha must be >= 1, got {alpha}")
    return alpha - 1.0 < _NEAR_ONE


def _solve_near_one(s: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logit z of p and dz/ds for alpha in [1, 1.02): Newton on (p^a - q^a) / a = s by way of expm1, from z = s.

    Beyond s = 0 the residual curves away from it, so that the steps approach the root from one side.
    """
    a = max(alpha - 1.0, 1e-12)
    limit = 1.0 / a
    s = s.clamp(-limit, limit)
    z = s
    for _ in range(8):
        up, down = a * torch.nn.functional.logsigmoid(z), a * torch.nn.functional.logsigmoid(-z)
        slope = torch.exp(up) * torch.sigmoid(-z) + torch.exp(down) * torch.sigmoid(z)
        z = (z - ((torch.expm1(up) - torch.expm1(down)) / a - s) / slope).clamp(-300.0, 300.0)
    up, down = a * torch.nn.functional.logsigmoid(z), a * torch.nn.functional.logsigmoid(-z)
    return z, 1.0 / (torch.exp(up) * torch.sigmoid(-z) + torch.exp(down) * torch.sigmoid(z))


def sigma_alpha(s: torch.Tensor, alpha: Alpha) -> torch.Tensor:
    """Keep probability, no gradient. s: any shape, float32 or float64; alpha >= 1. Same shape and dtype."""
    inside = s.abs() * (alpha - 1.0) < 1.0
    if _is_near_one(alpha):
        p = torch.sigmoid(_solve_near_one(s, float(alpha))[0])
        return torch.where(inside, p, (s > 0).to(s.dtype))
    p, q, _, _ = _solve(s, alpha, _iterations(s))
    return torch.where(s > 0, torch.where(inside, q, 1.0), torch.where(inside, p, 0.0))


class _LogSigmaAlpha(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: torch.Tensor, alpha: Alpha, leak: Alpha) -> torch.Tensor:  # type: ignore[override]
        inside = s.abs() * (alpha - 1.0) < 1.0
        if _is_near_one(alpha):
            z, dz = _solve_near_one(s, float(alpha))
            slope, log_p = torch.sigmoid(-z) * dz, torch.nn.functional.logsigmoid(z).clamp_min(LOG_P_FLOOR)
        else:
            p, q, u, w = _solve(s, alpha, _iterations(s))
            # d log p / ds = (1/p) / (p^(a-1) + q^(a-1)) = 1 / (u + w p/q), and with p, q (u, w) swapped for s > 0
            slope = torch.where(s > 0, 1.0 / (w + u * q / p.clamp_min(_TINY)), 1.0 / (u + w * p / q).clamp_min(_TINY))
            log_p = torch.where(s > 0, torch.log1p(-p), torch.log(p.clamp_min(_TINY)).clamp_min(LOG_P_FLOOR))
        ctx.save_for_backward(torch.where(inside, slope, torch.where(s > 0, leak, 0.0)))
        return torch.where(inside, log_p, torch.where(s > 0, 0.0, LOG_P_FLOOR))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None


def log_sigma_alpha(s: torch.Tensor, alpha: Alpha, leak: Alpha = 0.0) -> torch.Tensor:
    """log sigma_alpha(s), clamped at LOG_P_FLOOR, differentiable in s. Same shape; float32 or float64.

    ``leak`` (ours) is handed on as d log p / ds where p is exactly 1, instead of 0: without it a key whose scores have
    all left the band upwards is never looked at again, however little it is needed.
    """
    return _LogSigmaAlpha.apply(s, alpha, leak)  # type: ignore[no-any-return]
