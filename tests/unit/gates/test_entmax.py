"""sigma_alpha against bisection in float64, its gradient against finite differences, and its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_prune.gates.entmax import LOG_P_FLOOR, log_sigma_alpha, sigma_alpha

ALPHAS = [1.0, 1.0 + 1e-8, 1.0005, 1.001, 1.01, 1.0199, 1.02, 1.1, 1.19, 1.5, 1.9, 2.0, 2.5, 3.0, 4.0, 8.0, 16.0]


def bisect(s: torch.Tensor, alpha: float) -> torch.Tensor:
    """p by bisection of p^a - (1-p)^a = a s, float64; by way of expm1, as the powers are close to 1 for small a."""
    if alpha == 1.0:
        return torch.sigmoid(s.double())
    a, s = alpha - 1.0, s.double()
    low, high = torch.zeros_like(s), torch.ones_like(s)
    for _ in range(100):
        middle = (low + high) / 2
        below = torch.expm1(a * middle.log()) - torch.expm1(a * torch.log1p(-middle)) < a * s
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    p = (low + high) / 2
    return torch.where(a * s >= 1, 1.0, torch.where(a * s <= -1, 0.0, p))


def band(alpha: float) -> float:
    """Half-width of the scores that are neither dropped nor kept for certain."""
    return 10.0 if alpha < 1.02 else 1.0 / (alpha - 1.0)  # close to 1 the true edge lies where p is 0 anyway


@pytest.mark.parametrize("alpha", ALPHAS)
def test_matches_bisection(alpha: float) -> None:
    s = torch.linspace(-1.2, 1.2, 4001, dtype=torch.float64) * band(alpha)
    expected = bisect(s, alpha)
    assert (sigma_alpha(s, alpha) - expected).abs().max() < 1e-9
    assert (sigma_alpha(s.float(), alpha).double() - bisect(s.float(), alpha)).abs().max() < 3e-6


@pytest.mark.parametrize("alpha", ALPHAS)
def test_log_matches_the_log_of_bisection(alpha: float) -> None:
    s = torch.linspace(-0.999, 1.2, 1001, dtype=torch.float64) * band(alpha)
    expected = bisect(s, alpha).log().clamp_min(LOG_P_FLOOR)
    assert (log_sigma_alpha(s, alpha) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_matches_finite_differences(alpha: float) -> None:
    s = (torch.linspace(-0.95, 0.95, 201, dtype=torch.float64) * band(alpha)).requires_grad_()
    log_sigma_alpha(s, alpha).sum().backward()
    step = 1e-7 * band(alpha)
    expected = (bisect(s.detach() + step, alpha).log() - bisect(s.detach() - step, alpha).log()) / (2 * step)
    resolved = bisect(s.detach(), alpha) > 1e-9  # close to alpha = 1 the edge is p = 0 for every practical purpose
    assert s.grad is not None and resolved.sum() > 100
    torch.testing.assert_close(s.grad[resolved], expected[resolved], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_is_finite_at_the_edges_and_zero_outside(alpha: float, dtype: torch.dtype) -> None:
    near = torch.tensor([1 - 1e-7, 1 - 1e-5, 1 - 1e-3, 1.0, 1 + 1e-5, 3.0], dtype=dtype)
    edge = 10.0 if alpha == 1.0 else 1.0 / (alpha - 1.0)
    s = (torch.cat([-near, near, near.new_zeros(1)]) * edge).requires_grad_()
    log_p = log_sigma_alpha(s, alpha)
    log_p.sum().backward()
    assert s.grad is not None and torch.isfinite(s.grad).all() and (s.grad >= 0).all()
    assert torch.isfinite(log_p).all() and (log_p <= 0).all() and (log_p >= LOG_P_FLOOR).all()
    if alpha > 1.0:
        outside = s.detach().abs() > edge
        assert (s.grad[outside] == 0).all()
        p = sigma_alpha(s.detach(), alpha)[outside]
        assert torch.equal(p, (s.detach()[outside] > 0).to(dtype))


@given(st.floats(-3, 3), st.floats(1.0, 16.0))
def test_symmetric_and_between_zero_and_one(score: float, alpha: float) -> None:
    s = torch.tensor([score, -score], dtype=torch.float64)
    p = sigma_alpha(s, alpha)
    assert ((p >= 0) & (p <= 1)).all()
    assert abs(p.sum().item() - 1.0) < 1e-9


@given(st.floats(1.0, 16.0))
def test_non_decreasing_in_the_score(alpha: float) -> None:
    p = sigma_alpha(torch.linspace(-1.5, 1.5, 401, dtype=torch.float64) * min(10.0, band(max(alpha, 1.01))), alpha)
    assert (p.diff() >= -1e-12).all()


def test_large_alpha_is_the_step_function() -> None:
    s = torch.tensor([-1.0, -1e-3, 1e-3, 1.0])
    assert torch.equal(sigma_alpha(s, 1e5), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(log_sigma_alpha(s, 1e5), torch.tensor([LOG_P_FLOOR, LOG_P_FLOOR, 0.0, 0.0]))


@pytest.mark.parametrize("alpha", [alpha for alpha in ALPHAS if alpha >= 1.02])
def test_a_tensor_alpha_is_the_same(alpha: float) -> None:
    s = torch.linspace(-2, 2, 101)
    assert torch.allclose(log_sigma_alpha(s, alpha), log_sigma_alpha(s, torch.tensor(alpha)), rtol=1e-4, atol=1e-5)


def test_alpha_below_one_is_refused() -> None:
    for wrong in (0.5, float("nan"), torch.tensor(1.01)):
        for function in (sigma_alpha, log_sigma_alpha):
            with pytest.raises(ValueError, match="alpha"):
                function(torch.zeros(1), wrong)


@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.0199])
def test_far_scores_close_to_one_are_finite_and_right(alpha: float) -> None:
    s = torch.tensor([-2000.0, -990.0, -45.0, -20.0, 20.0, 45.0, 990.0, 2000.0], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        x = s.to(dtype).clone().requires_grad_()
        log_p = log_sigma_alpha(x, alpha)
        log_p.sum().backward()
        assert torch.isfinite(log_p).all() and torch.isfinite(x.grad).all() and (x.grad >= 0).all()  # type: ignore[union-attr]
        expected = bisect(s, alpha).clamp_min(1e-300).log().clamp_min(LOG_P_FLOOR)
        torch.testing.assert_close(log_p.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_leak_is_the_gradient_above_the_band_and_changes_nothing_else() -> None:
    plain, leaky = (torch.linspace(-0.5, 0.5, 101, dtype=torch.float64).requires_grad_() for _ in range(2))
    expected, found = log_sigma_alpha(plain, 4.0), log_sigma_alpha(leaky, 4.0, 0.03)
    assert torch.equal(found, expected)
    expected.sum().backward()
    found.sum().backward()
    above = plain.detach() > 1 / 3
    assert leaky.grad is not None and plain.grad is not None and above.any()
    assert torch.allclose(leaky.grad[above], torch.tensor(0.03, dtype=torch.float64), rtol=1e-6)
    assert torch.equal(leaky.grad[~above], plain.grad[~above])
