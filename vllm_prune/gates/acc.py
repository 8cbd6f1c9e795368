"""ACC-style elimination (after Kachuee & Sharifkhani, arXiv 2201.03327): a budget of keys per layer, filled by attention.

The published method eliminates word vectors of an encoder, as many per layer as a statistic of the layer's attention
("ACC") suggests. Its exact formula is not public, so everything here is ours, and named "ACC-style":

    R_l = expected share of keys, most attended to first, that hold a share rho of the attention received  (calibration set)
    P_l = min over l' <= l of R_l'                                                                         the profile
    keep_l = clip(a * P_l / strength, least, 1)                                                            a: coefficient

At every position m that is a multiple of the grid the keys with the lowest mean of A[n, j] * c_n over the queries n that saw
them go, until no more than keep_l * m are left. Sinks and the newest keys are protected by the gate itself. Nothing is
trained but the base, under this mask; the coefficient may be changed afterwards ("offline tuning"): strength divides it.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_prune.gates.base import GateShape, Protection
from vllm_prune.gates.boundary import LEAST_GRID, MOST_GRID, BoundaryGate, BoundaryRule


class ACCGate(BoundaryGate):
    """An ACC-style budget for one layer.

    Args:
        shape: of the base model.
        grid: tokens between positions at which keys are dropped.
        sinks: first tokens that are kept, at least those of ``protect``.
        window: tokens for which a key is kept, at least that of ``protect``.
        least: smallest share of keys to keep in a layer, whatever the coefficient. In [0, 1].

    ``profile``, the layer's share P_l in (0, 1], and ``coefficient``, the model's a > 0, come from calibration; both are
    1 before: everything is kept.
    """

    method: ClassVar[str] = "acc"

    profile: torch.Tensor
    coefficient: torch.Tensor

    def __init__(self, shape: GateShape, grid: int = 32, sinks: int = 4, window: int = 32, least: float = 0.02) -> None:
        super().__init__()
        if not LEAST_GRID <= grid <= MOST_GRID:
            raise ValueError(f"grid must be between {LEAST_GRID} and {MOST_GRID}, got {grid}")
        if sinks < 0 or window < 0:
            raise ValueError(f"sinks and window must be >= 0, got {sinks} and {window}")
        if not 0.0 <= least <= 1.0:
            raise ValueError(f"least must be a share between 0 and 1, got {least}")
        self.shape = shape
        self.grid = grid
        self.sinks = sinks
        self.window = window
        self.least = float(least)
        self.register_buffer("profile", torch.tensor(1.0))
        self.register_buffer("coefficient", torch.tensor(1.0))

    @classmethod
    def state_problem(cls, state: dict[str, torch.Tensor]) -> str | None:
        profile, coefficient = float(state["profile"]), float(state["coefficient"])
        if not 0.0 < profile <= 1.0:
            return f"profile is {profile:g}, no share between 0 and 1"
        return None if coefficient > 0.0 else f"coefficient is {coefficient:g}, not above 0"

    def keep_at(self, strength: float) -> float:
        """Share of the keys that the layer may hold; 1 at strength 0."""
        if strength == 0.0:
            return 1.0
        return min(1.0, max(self.least, float(self.coefficient) * float(self.profile) / strength))

    def rule(self, strength: float, protection: Protection) -> BoundaryRule:
        after = max(self.window, protection.window, 1)  # what no query has seen yet has no score
        return BoundaryRule(self.grid, 0, after, max(self.sinks, protection.sinks), keep=self.keep_at(strength))
