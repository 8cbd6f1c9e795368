"""Strength by pressure: gates stay open while the block pool is roomy and come to their full strength as it fills.

A server option, ``--additional-config '{"vllm_prune": {"pressure": {"start": 0.5, "full": 0.9}}}'``. What a request asks for,
or the server's own strength, is then its ceiling. Decided once a step for all requests, in the engine core, which tells the
worker each one's strength (``StepGrant.strength``). Keys dropped stay dropped. What a roomy pool kept DCP can still drop later;
gates that decide about a key once cannot: with these a request too long for a roomy pool has its full strength at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_prune.errors import PruneError

LEVELS = 8
"""Strengths between none and full: each is a rule of its own in the worker."""


class PressureOptions(BaseModel):
    """The option's fields, as shares of the pool's blocks in use.

    Attributes:
        start: up to which every gate is open.
        full: from which on every gate has its full strength.
        slack: how far use must fall below the point at which strength rose for it to fall again.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    start: float = Field(0.5, ge=0.0, lt=1.0)
    full: float = Field(0.9, gt=0.0, le=1.0)
    slack: float = Field(0.05, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _in_order(self) -> PressureOptions:
        if self.start >= self.full:
            raise ValueError(f"start ({self.start:g}) must lie below full ({self.full:g})")
        return self


def pressure_options(options: Mapping[str, Any]) -> PressureOptions | None:
    """Of the server's options; None where strength does not follow the pool. ``true`` takes all values as they are by default.

    Raises:
        PruneError: a bad value.
    """
    value = options.get("pressure")
    if value is None or value is False:
        return None
    try:
        return PressureOptions.model_validate({} if value is True else value)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'pressure'}: {e['msg']}" for e in error.errors())
        raise PruneError(
            f"additional_config.vllm_prune.pressure is wrong: {told}.",
            'Give true, or an object such as {"start": 0.5, "full": 0.9, "slack": 0.05}.',
        ) from None


class Pressure:
    """How full the pool is, in levels of 0 to ``LEVELS``. See the module."""

    def __init__(self, options: PressureOptions) -> None:
        self.options = options
        self.level = 0

    def observe(self, use: float) -> None:
        """Before a step. ``use``: share of the pool's blocks in use."""
        rise = self._level_at(use)
        # Rises at once; falls to where it would not have risen even with so much more in use.
        self.level = rise if rise > self.level else min(self.level, self._level_at(use + self.options.slack))

    def strength(self, ceiling: float) -> float:
        """Of a request's gates now."""
        return ceiling * self.level / LEVELS

    def too_long(self, blocks: int, pool: int) -> bool:
        """Whether a request of so many dense blocks would by itself fill the pool beyond ``start``."""
        return blocks > self.options.start * pool

    def _level_at(self, use: float) -> int:
        start, full = self.options.start, self.options.full
        return min(max(math.ceil(LEVELS * (use - start) / (full - start)), 0), LEVELS)


@dataclass
class Applied:
    """Strengths that one request's tokens were computed at."""

    tokens: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = 0.0

    def add(self, strength: float, tokens: int) -> None:
        self.tokens += tokens
        self.total += strength * tokens
        self.least, self.most = min(self.least, strength), max(self.most, strength)

    def told(self) -> dict[str, float]:
        """What the response says: least, most and mean over tokens (those computed again included)."""
        return {"least": self.least, "mean": self.total / self.tokens, "most": self.most}
