"""The calibration table of a gated checkpoint: what each strength keeps and costs, and how to read between its rows.

Measured by ``vllm-prune calibrate`` on held-out text with the hard mask that the server applies, stored in config.json as
``drop_gate.calibration``. Kept is the share of past pairs (key before query) that stay visible (DCP, arXiv 2305.15805;
one minus its sparsity), a mean over layers and heads; live is the share of keys that the last query still sees.

Both fall as the strength grows, whatever the method (``decision_shift``); noise of the measurement is taken out by
isotonic regression. Between rows everything is linear in s / (1 + s), which is finite for every strength and behaves
like the shift of the decision: 0 at open gates, 1/2 as trained.

What is kept falls with the length too. Gates are causal, so that what a window's first tokens kept among themselves is known
from the same run: tables have it at shorter lengths, between which kept is linear in the logarithm of the length.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

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
        shorter: kept among the first tokens of each window, for each of the table's ``lengths``.
    """

    strength: float = Field(ge=0.0, le=16.0)
    kept: float = Field(ge=0.0, le=1.0)
    live: float = Field(ge=0.0, le=1.0)
    ppl: float = Field(gt=0.0)
    kl: float = Field(ge=0.0)
    length: int = Field(gt=1)
    shorter: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = ()


class Calibration(_Strict):
    """``drop_gate.calibration``.

    Attributes:
        version: of this table; only 1 exists.
        length: T, tokens of each window: the kept fraction depends on it.
        lengths: shorter ones that rows speak of too, growing. Empty in older tables, and where gates decide at the prompt's end.
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
    lengths: tuple[Annotated[int, Field(gt=1)], ...] = ()
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
            if any(b > a for a, b in zip((before.kept, *before.shorter), (after.kept, *after.shorter), strict=False)):
                raise ValueError("kept fractions must not grow with strength")
        if any(b <= a for a, b in pairwise((*self.lengths, self.length))):
            raise ValueError("lengths must grow, up to the table's own")
        if any(len(row.shorter) != len(self.lengths) for row in self.rows):
            raise ValueError("all rows must speak of the table's lengths")
        if any(kept != 1.0 for kept in self.rows[0].shorter):
            raise ValueError("the first row must keep everything at every length")
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

    def kept_of(self, tokens: int | None = None) -> list[float]:
        """Kept fraction of each row, among that many tokens; beyond the table's own length, or without one, at that length.

        A table that knows no shorter lengths says the same of all. A single token keeps everything.
        """
        if tokens is None or tokens >= self.length or not self.lengths:
            return [row.kept for row in self.rows]
        lengths = (1, *self.lengths, self.length)
        right = bisect_right(lengths, max(tokens, 1))
        a, b = lengths[right - 1], lengths[right]
        share = math.log(max(tokens, 1) / a) / math.log(b / a)
        found = []
        for row in self.rows:
            kept = (1.0, *row.shorter, row.kept)
            found.append(kept[right - 1] + share * (kept[right] - kept[right - 1]))
        return found

    def keep_at(self, strength: float, tokens: int | None = None) -> float:
        """Kept fraction at a strength, interpolated; beyond the strongest row it is that row's.

        Args:
            tokens: see ``kept_of``.

        Returns:
            In ``LEAST_KEEP``..1.
        """
        kept, at = self.kept_of(tokens), [_coordinate(row.strength) for row in self.rows]
        x = _coordinate(strength)
        right = bisect_right(at, x)
        if right == len(at):
            return max(LEAST_KEEP, kept[-1])
        share = (x - at[right - 1]) / (at[right] - at[right - 1])
        return max(LEAST_KEEP, kept[right - 1] + share * (kept[right] - kept[right - 1]))

    def strength_at(self, keep: float, tokens: int | None = None) -> float:
        """The weakest strength that keeps no more than ``keep``: inverse of ``keep_at`` within ``keep_range``.

        Args:
            tokens: see ``kept_of``. Where not even the strongest row keeps so little among so few, it is that row's.

        Raises:
            ValueError: keep lies outside of ``keep_range``.
        """
        low, high = self.keep_range
        if not low <= keep <= high:
            raise ValueError(f"kept fraction {keep:g} lies outside of the measured range {low:g}..{high:g}")
        kept = self.kept_of(tokens)
        for (a, before), (b, after) in pairwise(zip(kept, self.rows, strict=True)):
            if keep >= a:
                return before.strength
            if keep == b:
                return after.strength
            if keep > b:
                x, y = _coordinate(before.strength), _coordinate(after.strength)
                return min(after.strength, _strength(x + (a - keep) / (a - b) * (y - x)))
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
