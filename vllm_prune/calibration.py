"""The calibration table of a gated checkpoint: what each strength keeps and costs, and how to read between its rows.

Measured by ``vllm-prune calibrate`` on held-out text with the hard mask that the server applies, stored in config.json as
``drop_gate.calibration``. Kept is the share of past pairs (key before query) that stay visible (DCP, arXiv 2305.15805;
one minus its sparsity), a mean over layers and heads; live is the share of keys that the last query still sees.

Both fall as the strength grows, whatever the method (``decision_shift``); noise of the measurement is taken out by
isotonic regression. Between rows everything is linear in s / (1 + s), which is finite for every strength and behaves
like the shift of the decision: 0 at open gates, 1/2 as trained.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LEAST_KEEP = 1e-3
"""Least fraction that admission plans with: 0 would promise that a prompt needs no memory."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CalibrationRow(_Strict):
    """One strength, measured.

    Attributes:
        strength: see ``decision_shift``.
        kept: share of past pairs still visible, 0..1.
        live: share of keys that the last query of a window still sees, 0..1.
        ppl: perplexity a token of the gated model.
        kl: mean KL(open gates || gated) a position, nats.
        length: T, tokens of each window.
    """

    strength: float = Field(ge=0.0, le=16.0)
    kept: float = Field(ge=0.0, le=1.0)
    live: float = Field(ge=0.0, le=1.0)
    ppl: float = Field(gt=0.0)
    kl: float = Field(ge=0.0)
    length: int = Field(gt=1)


class Calibration(_Strict):
    """``drop_gate.calibration``.

    Attributes:
        version: of this table; only 1 exists.
        length: T, tokens of each window: the kept fraction depends on it.
        tokens: measured at each strength.
        data_sha256: of the token ids that were measured.
        gates_sha256: of the gates that were measured (``gates_digest``); a table of other gates is refused.
        dtype: of the base weights while measured.
        max_rise: perplexity rise that still counts as safe, a fraction.
        safe_strength: see ``safe_strength``.
        noise: largest change that isotonic regression made to a measured fraction.
        rows: by strength, the first at strength 0.
    """

    version: Literal[1] = 1
    length: int = Field(gt=1)
    tokens: int = Field(gt=0)
    data_sha256: str
    gates_sha256: str
    dtype: str = "auto"
    max_rise: float = Field(0.01, ge=0.0)
    safe_strength: float = Field(ge=0.0, le=16.0)
    noise: float = Field(0.0, ge=0.0)
    rows: tuple[CalibrationRow, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _ordered(self) -> Calibration:
        if self.rows[0].strength != 0.0 or self.rows[0].kept != 1.0:
            raise ValueError("the first row must be strength 0, kept 1")
        for before, after in zip(self.rows, self.rows[1:], strict=False):
            if not after.strength > before.strength:
                raise ValueError("strengths must grow from row to row")
            if after.kept > before.kept:
                raise ValueError("kept fractions must not grow with strength")
        if any(row.length != self.length for row in self.rows):
            raise ValueError("all rows must be of the table's length")
        return self

    @property
    def keep_range(self) -> tuple[float, float]:
        """Least and largest kept fraction that was measured."""
        return self.rows[-1].kept, self.rows[0].kept

    @property
    def strongest(self) -> float:
        """Largest strength that was measured."""
        return self.rows[-1].strength

    def keep_at(self, strength: float) -> float:
        """Kept fraction at a strength, interpolated; beyond the strongest row it is that row's.

        Returns:
            In ``LEAST_KEEP``..1.
        """
        at = [_coordinate(row.strength) for row in self.rows]
        x = _coordinate(strength)
        right = bisect_right(at, x)
        if right == len(at):
            return max(LEAST_KEEP, self.rows[-1].kept)
        a, b = self.rows[right - 1].kept, self.rows[right].kept
        share = (x - at[right - 1]) / (at[right] - at[right - 1])
        return max(LEAST_KEEP, a + share * (b - a))

    def strength_at(self, keep: float) -> float:
        """The weakest strength that keeps no more than ``keep``: inverse of ``keep_at`` within ``keep_range``.

        Raises:
            ValueError: keep lies outside of ``keep_range``.
        """
        low, high = self.keep_range
        if not low <= keep <= high:
            raise ValueError(f"kept fraction {keep:g} lies outside of the measured range {low:g}..{high:g}")
        for before, after in zip(self.rows, self.rows[1:], strict=False):
            if keep >= before.kept:
                return before.strength
            if keep == after.kept:
                return after.strength
            if keep > after.kept:
                share = (before.kept - keep) / (before.kept - after.kept)
                a, b = _coordinate(before.strength), _coordinate(after.strength)
                return min(after.strength, _strength(a + share * (b - a)))
        return self.strongest


def _coordinate(strength: float) -> float:
    return strength / (1.0 + strength)


def _strength(coordinate: float) -> float:
    return coordinate / (1.0 - coordinate)


def middle_strength(a: float, b: float) -> float:
    """The strength half-way between two on the scale that tables are interpolated on."""
    return _strength((_coordinate(a) + _coordinate(b)) / 2)


def non_increasing(values: Sequence[float]) -> list[float]:
    """Isotonic regression: the non-increasing sequence nearest to ``values`` in squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean, count
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] < mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def safe_strength(strengths: Sequence[float], ppl: Sequence[float], max_rise: float) -> float:
    """The largest strength up to which no measured one costs more than ``max_rise`` of perplexity.

    Compared with open gates, or with a weaker strength where that is better: a base that was trained together with its
    gates can be at its best with them, and open gates would then excuse too much.

    Args:
        strengths: growing, the first 0.
        ppl: of each.
        max_rise: a fraction, 0.01 for 1 %.
    """
    best, safe = ppl[0], strengths[0]
    for strength, value in zip(strengths, ppl, strict=True):
        best = min(best, value)
        if value > best * (1.0 + max_rise):
            break
        safe = strength
    return safe


def gates_digest(gate_file: str | Path, section: dict[str, Any]) -> str:
    """What decides which keys drop at a strength, as one sha256: the gate file and the fields that go with it.

    Args:
        gate_file: path of ``drop_gate.safetensors``.
        section: ``DropGateConfig.model_dump()``.
    """
    digest = hashlib.sha256(Path(gate_file).read_bytes())
    fields = {name: section[name] for name in ("method", "params", "protect", "dtype")}
    digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()
