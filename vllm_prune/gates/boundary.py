"""Gates that decide at fixed positions, from the attention that keys received (``Reveal.AT_BOUNDARY``): LTP, ACC-style.

At every position m that is a multiple of the grid, before query m attends, keys may be dropped by the attention that
earlier queries gave them; a dropped key has the expiry m. Between boundaries nothing expires, so any chunk can be
attended to segment by segment, and the result does not depend on the chunking.

What a key received from query n is its weight times the number of keys that n saw, so that 1 is a uniform share,
whatever the length; its own query does not count:

    mass_j = sum over n of c_n * mean over query heads of A[n, j],    n = j + 1 .. j + span (span 0: every later query)

Letters: B batch, T tokens, S tokens so far, R queries of a segment, H KV heads, G query heads per KV head, D head size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_prune.gates.base import NEVER, Gate, Protection, Reveal, Scope

LEAST_GRID, MOST_GRID = 8, 1024
"""Tokens between boundaries: fewer would cost a kernel call for every few tokens of a prompt."""


@dataclass(frozen=True)
class BoundaryRule:
    """One layer's decision at a boundary m. Exactly one of ``threshold`` and ``keep`` is given.

    Attributes:
        grid: g, boundaries are its multiples.
        span: w, how many later queries count for a key; 0: all.
        after: a key may go only if ``m - j > after`` (at least w, and at least 1).
        sinks: the first tokens, which never go.
        threshold: judged once, at the first boundary that may: dropped iff mass / w < threshold.
        keep: at every boundary the lowest of mass / (m - 1 - j) go, older ones first among equals, until no more than
            floor(keep * m) live keys are left, or none that may go.
    """

    grid: int
    span: int
    after: int
    sinks: int
    threshold: float | None = None
    keep: float | None = None

    @property
    def level(self) -> float:
        """The threshold or the share."""
        return self.threshold if self.threshold is not None else self.keep  # type: ignore[return-value]

    @property
    def drops(self) -> bool:
        """Whether any key can ever go: otherwise nobody needs to know what keys received."""
        return self.threshold > 0.0 if self.threshold is not None else self.keep != 1.0

    def victims(self, mass: torch.Tensor, live: torch.Tensor, now: int) -> torch.Tensor:
        """Keys that go at a boundary.

        Args:
            mass: float64 [B, S], received by each key.
            live: bool [B, S].
            now: m, at least S.

        Returns:
            bool [B, S].
        """
        pos = torch.arange(mass.shape[-1], device=mass.device)
        age = now - pos
        may = live & (pos >= self.sinks) & (age > self.after)
        if self.threshold is not None:
            return may & (age <= self.after + self.grid) & (mass / self.span < self.threshold)
        assert self.keep is not None
        excess = live.sum(-1) - math.floor(self.keep * now)
        score = torch.where(may, mass / (age - 1).clamp_min(1), math.inf)
        rank = score.argsort(dim=-1, stable=True).argsort(dim=-1)
        return may & (rank < excess[..., None])


class BoundaryGate(Gate):
    """A gate whose decision needs no feature but the attention itself: F = 0. Shared by all heads of the layer.

    Subclasses say by which rule; ``expiry`` and ``log_visibility`` of features do not exist for them, as their
    expiries follow from queries and keys: ``hard_walk``.
    """

    reveal: ClassVar[Reveal] = Reveal.AT_BOUNDARY
    scope: Scope = Scope.LAYER
    watcher: Callable[[torch.Tensor], None] | None = None
    """Told what each key received, [B, T], whenever a masked model has walked a batch (calibration)."""

    @property
    def num_features(self) -> int:
        return 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :0]

    @abstractmethod
    def rule(self, strength: float, protection: Protection) -> BoundaryRule:
        """What is served at a strength (0 drops nothing), with protected keys."""

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        raise TypeError(f"{self.method} decides by attention, not by features: see hard_walk()")

    def log_visibility(self, features: torch.Tensor, **soft: Any) -> torch.Tensor:
        raise TypeError(f"{self.method} decides by attention, not by features: see hard_walk()")


def hard_walk(rule: BoundaryRule, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Expiries of whole sequences: the first of ``walk``'s results."""
    return walk(rule, query, key, scale)[0]


def walk(rule: BoundaryRule, query: torch.Tensor, key: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Expiries and attention received of whole sequences, segment by segment.

    Args:
        rule: of the layer.
        query: [B, H * G, T, D]; key: [B, H, T, D], as attention sees them. Logits are float32 (float64 for float64).
        scale: of the logits.

    Returns:
        int64 [B, 1, T], NEVER where nothing dropped the key, and mass float64 [B, T] while it was there.
    """
    b, heads, t, d = query.shape
    h = key.shape[1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped, keys = query.reshape(b, h, heads // h, t, d).to(wide), key[:, :, None].to(wide)
    pos = torch.arange(t, device=query.device)
    mass = torch.zeros(b, t, dtype=torch.float64, device=query.device)
    live = torch.zeros(b, t, dtype=torch.bool, device=query.device)
    expiry = torch.full((b, t), NEVER, dtype=torch.int64, device=query.device)
    for start in range(0, t, rule.grid):
        stop = min(start + rule.grid, t)
        gone = rule.victims(mass[:, :start], live[:, :start], start)
        expiry[:, :start][gone] = start
        live[:, :start] &= ~gone
        seen = live[:, :start].sum(-1, keepdim=True) + pos[: stop - start] + 1  # c_n, [B, R]
        live[:, start:stop] = True
        distance = pos[start:stop, None] - pos[:stop]  # [R, S]
        logits = grouped[:, :, :, start:stop] @ keys[:, :, :, :stop].transpose(-1, -2) * scale
        hidden = ~live[:, None, :stop] | (distance < 0)  # [B, R, S]
        weights = logits.masked_fill_(hidden[:, None, None], -math.inf).softmax(dim=-1).sum(dim=(1, 2))  # [B, R, S]
        counts = (distance > 0) & (distance <= rule.span) if rule.span else distance > 0
        mass[:, :stop] += (weights.double() * (seen[..., None].double() / heads) * counts).sum(dim=1)
    return expiry[:, None], mass


def naive_walk(rule: BoundaryRule, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """``hard_walk`` as the docstrings say it, query by query and key by key, in float64. For tests."""
    expiries = []
    for q, k in zip(query.double(), key.double(), strict=True):
        heads, t = q.shape[:2]
        expiry = [NEVER] * t
        received: list[dict[int, float]] = [{} for _ in range(t)]  # by query
        for n in range(t):
            live = [j for j in range(n) if expiry[j] == NEVER]
            if n % rule.grid == 0:
                for j in _naive_victims(rule, received, live, n):
                    expiry[j] = n
            seen = [j for j in range(n + 1) if expiry[j] == NEVER]
            for head in range(heads):
                logits = k[head // (heads // k.shape[0]), seen] @ q[head, n] * scale
                for j, weight in zip(seen, logits.softmax(0).tolist(), strict=True):
                    received[j][n] = received[j].get(n, 0.0) + len(seen) * weight / heads
        expiries.append(expiry)
    return torch.tensor(expiries, device=query.device)[:, None]


def _naive_victims(rule: BoundaryRule, received: list[dict[int, float]], live: list[int], now: int) -> list[int]:
    may = [j for j in live if j >= rule.sinks and now - j > rule.after]
    if rule.threshold is not None:
        means = {j: sum(received[j][n] for n in range(j + 1, j + rule.span + 1)) / rule.span for j in may}
        return [j for j in may if now - j <= rule.after + rule.grid and means[j] < rule.threshold]
    assert rule.keep is not None
    scores = {j: sum(received[j][n] for n in range(j + 1, now)) / (now - 1 - j) for j in may}
    return sorted(may, key=lambda j: (scores[j], j))[: max(0, len(live) - math.floor(rule.keep * now))]
