"""The ``boundaries`` section of a recipe: how gates that decide at boundaries are trained (``gates/boundary.py``)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

BOUNDARY_METHODS = ("ltp", "acc")
OWNERS = {"hard_from": "ltp"} | dict.fromkeys(
    ("strengths", "coverage", "statistic", "profile", "budget", "calibration_tokens"), "acc"
)


class Boundaries(BaseModel):
    """See the module.

    Attributes:
        hard_from: LTP: share of the run from which thresholds stay and the base is trained under the hard mask; 1 never.
        strengths: ACC-style: of each step, between these, log-uniformly; None is 1, one coefficient.
        coverage: ACC-style: share of the attention received that the profile's keys hold.
        statistic: ACC-style: of the coverage over sequences.
        profile: ACC-style: ``measured``, or ``uniform``, the same budget in all layers, for comparison.
        budget: ACC-style: what ``objective.keep`` is a share of: past pairs, or the model's FLOPs, both at the longest T.
        calibration_tokens: ACC-style: tokens of the training text that the profile is measured on.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    hard_from: Annotated[float, Field(ge=0.0, le=1.0)] = 0.7
    strengths: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    statistic: Literal["mean", "median"] = "mean"
    profile: Literal["measured", "uniform"] = "measured"
    budget: Literal["kv", "flops"] = "kv"
    calibration_tokens: Annotated[int, Field(ge=1)] = 16384

    @model_validator(mode="after")
    def _check(self) -> Boundaries:
        if self.strengths is not None and not 0.0 < self.strengths[0] <= self.strengths[1] <= 16.0:
            raise ValueError("strengths must be [low, high], above 0, up to 16")
        return self

    def check(self, method: str) -> None:
        """Raises ValueError when a field belongs to another method."""
        if method not in BOUNDARY_METHODS:
            raise ValueError(f"boundaries belongs to {' and '.join(BOUNDARY_METHODS)}, not to {method}")
        for name, owner in OWNERS.items():
            if owner != method and name in self.model_fields_set:
                raise ValueError(f"boundaries.{name} belongs to {owner}, not to {method}")

    def check_run(self, gate: Any, training: Any, launch: Any) -> None:
        """Raises ValueError when sections of the recipe do not go with its method."""
        if training.compile:
            raise ValueError(
                f"training.compile is not supported with method {gate.method}, whose masks follow from attention"
            )
        if gate.method == "ltp" and self.hard_from < 1.0:
            if launch.workers > 1:
                raise ValueError("launch.workers must be 1 with method ltp, whose thresholds have no gradient in the hard "
                                 "stage; or set boundaries.hard_from 1")  # fmt: skip
            if not gate.train_base:
                raise ValueError(
                    "train_base false leaves nothing to train in the hard stage: set boundaries.hard_from 1"
                )

    def strength_at(self, seed: int, step: int) -> float:
        """ACC-style: strength of a step, the same after a resume and on any number of processes."""
        if self.strengths is None:
            return 1.0
        low, high = map(math.log, self.strengths)
        return math.exp(low + (high - low) * float(np.random.default_rng([seed, 78, step]).random()))
