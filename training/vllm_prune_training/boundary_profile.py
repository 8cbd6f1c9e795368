"""What ACC-style eviction needs before it is trained: the profile over depth, and the coefficient for a budget.

Coverage R_l: the share of the keys, most attended to first, that hold a fraction of the attention received in layer l
(a key's score is its mean of A[n, j] * c_n over later queries, so that old keys have no advantage). The profile P_l is its
mean or median over sequences, made non-increasing in depth. How many keys a budget leaves follows from counting alone.
Letters: B batch, N windows, T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_prune.gates import ACCGate, BoundaryRule, Protection

from .acc_profile import layer_flops, number_holding, profile_of, solve_coefficient
from .boundary_recipe import Boundaries
from .masked import GatedModel

YOUNGEST = 32
"""Keys with fewer later queries than this have too noisy a score to be counted."""
FLOOR = "sinks, window and gate.params.least are kept in every layer"


def coverage(scores: torch.Tensor, fraction: float) -> torch.Tensor:
    """Share of the keys, best first, that hold ``fraction`` of the sum of each row of scores: float64 [B] of [B, P]."""
    return number_holding(scores, fraction) / scores.shape[-1]


def kept_share(rule: BoundaryRule, tokens: int) -> float:
    """Share of past pairs that a budget leaves of T tokens: the counts do not depend on which keys go."""
    assert rule.keep is not None
    live = pairs = 0
    for m in range(0, tokens, rule.grid):
        young = min(max(m - rule.sinks, 0), rule.after)
        may = max(0, live - young - min(rule.sinks, m))
        live -= min(max(0, live - int(rule.keep * m)), may)
        r = min(rule.grid, tokens - m)
        pairs += r * live + r * (r - 1) // 2
        live += r
    return pairs / max(1, tokens * (tokens - 1) // 2)


@torch.no_grad()
def measure_coverage(gated: GatedModel, ids: torch.Tensor, told: Boundaries) -> torch.Tensor:
    """Coverage of windows under open gates: float64 [N, L].

    Args:
        gated: with ACC-style gates.
        ids: int64 [N, T].
    """
    gates: list[Any] = list(gated.gates)
    t = ids.shape[1]
    last = max(2, t - YOUNGEST)
    age = torch.arange(t - 1, t - 1 - last, -1).clamp_min(1)
    rows: list[list[torch.Tensor]] = [[] for _ in gates]
    try:
        for gate, row in zip(gates, rows, strict=True):
            gate.watcher = lambda mass, row=row: row.append(coverage(mass[:, :last].cpu() / age, told.coverage))
        for one in ids:
            gated(one[None], "hard", strength=0.0, collect=False)
    finally:
        for gate in gates:
            gate.watcher = None
    return torch.stack([torch.cat(row) for row in rows], dim=1)


def set_budget(gates: Sequence[ACCGate], profile: Sequence[float], keep: float, share: Callable[[], float]) -> float:
    """Set the profile and the coefficient for a budget in gates; ``share`` of them as they stand. Returns the coefficient."""

    def tuned(coefficient: float) -> float:
        for gate, p in zip(gates, profile, strict=True):
            gate.profile.fill_(p)
            gate.coefficient.fill_(coefficient)
        return share()

    coefficient = solve_coefficient(tuned, keep, FLOOR)
    tuned(coefficient)
    return coefficient


@torch.no_grad()
def tune_boundaries(gated: GatedModel, ids: torch.Tensor, told: Boundaries, keep: float) -> dict[str, Any]:
    """Measure the profile of the base and set it, with the coefficient for a budget, in its gates.

    Args:
        gated: with ACC-style gates.
        ids: int64 [N, T], of the longest T.
        told: of the recipe.
        keep: the budget, a share.

    Returns:
        For the record: ``coverage`` and ``profile`` [L], ``coefficient``, ``keep`` [L] of the layers, ``kept`` of past pairs.
    """
    gates: list[Any] = list(gated.gates)
    protection: Protection = gated.section.protection
    t = ids.shape[1]
    device = next(gated.parameters()).device
    table = measure_coverage(gated, ids.to(device), told)
    profile = [1.0] * len(gates) if told.profile == "uniform" else profile_of(table, told.statistic)
    token, pair = layer_flops(gated.config, t) if told.budget == "flops" else (0.0, 1.0)

    def kept() -> float:
        return sum(kept_share(gate.rule(1.0, protection), t) for gate in gates) / len(gates)

    coefficient = set_budget(gates, profile, keep, lambda: (token + pair * kept()) / (token + pair))
    return {"coverage": table.mean(0).tolist(), "profile": profile, "coefficient": coefficient,
            "keep": [gate.keep_at(1.0) for gate in gates], "kept": kept(), "windows": len(ids)}  # fmt: skip
