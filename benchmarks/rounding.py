"""Whether two runs of one greedy request differ by rounding alone.

Batches of other sizes add in other orders. That may decide a score that lies on its limit, or two logits that are as good as
equal; from there on both runs are right and differ. So only the first difference is judged, by the trainer's twin, which is
made to drop what both runs dropped before it. Needs float32 and gates by query or delayed; others must agree to the last key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_prune.gates import NEVER

NEAR = 1e-4
"""Relative change of strength that would have reversed a decision which rounding may reverse."""
TIE = 1e-3
"""Gap of two logits that rounding may close."""


@dataclass(frozen=True)
class Run:
    """A finished request. ``ids``: prompt and output; ``expiry``: int64 [L, E, T] of its map, where there is one."""

    ids: list[int]
    prompt: int
    strength: float
    expiry: np.ndarray | None


def first_token(a: Run, b: Run) -> int | None:
    """Position of the first token that differs."""
    return next((i for i, pair in enumerate(zip(a.ids, b.ids, strict=True)) if pair[0] != pair[1]), None)


def first_drop(a: Run, b: Run) -> tuple[int, int, int, int] | None:
    """Query, layer, unit and key of the first decision that differs."""
    if a.expiry is None or b.expiry is None:
        return None
    layer, unit, key = np.nonzero(a.expiry != b.expiry)
    if not len(key):
        return None
    query = np.minimum(a.expiry, b.expiry)[layer, unit, key]
    first = np.lexsort((layer, query))[0]
    return int(query[first]), int(layer[first]), int(unit[first]), int(key[first])


class Judge:
    """Args: folder of the gated checkpoint, or None for stock vLLM."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.twin: Any = None

    def rounding(self, alone: Run, loaded: Run) -> bool:
        """Whether rounding explains that these differ; ``alone`` must have a map."""
        token, drop = first_token(alone, loaded), first_drop(alone, loaded)
        if self.folder is None or alone.expiry is None:
            return False
        if drop is not None and (token is None or drop[0] < token):
            return self._near(alone, *drop)
        return token is not None and self._tied(alone, loaded, token)

    def _forced(self, run: Run, tokens: int) -> Any:
        """The twin's output of the first tokens, with the drops of the run."""
        if self.twin is None:
            from vllm_prune_training.masked import load_gated

            self.twin = load_gated(self.folder)  # type: ignore[arg-type]
        assert run.expiry is not None
        for gate, told in zip(self.twin.gates, torch.from_numpy(run.expiry), strict=True):
            gate.expiry = lambda features, *_, told=told, gate=gate: self._told(gate, features, told, run.strength)
        with torch.no_grad():
            found = self.twin(torch.tensor(run.ids[:tokens]), mode="hard", strength=run.strength)
        for gate in self.twin.gates:
            del gate.expiry
        return found

    def _told(self, gate: Any, features: torch.Tensor, told: torch.Tensor, strength: float) -> torch.Tensor:
        """Expiries [E, T] of a run, and the gate's own where a map, which is a step short, does not reach."""
        known = min(told.shape[1], features.shape[0])
        own = type(gate).expiry(gate, features, strength, self.twin.section.protection).clamp_min(told.shape[1])
        own[:, :known] = torch.where(told[:, :known] < NEVER, told[:, :known], own[:, :known])
        return own

    def _near(self, run: Run, query: int, layer: int, unit: int, key: int) -> bool:
        features = self._forced(run, query + 1).features[layer][0]
        gate = self.twin.gates[layer]
        weak, strong = (
            gate.expiry(features, run.strength * (1.0 + sign * NEAR), self.twin.section.protection)[unit, key].item()
            for sign in (-1, 1)
        )
        return bool(strong <= query < weak)

    def _tied(self, alone: Run, loaded: Run, token: int) -> bool:
        logits = self._forced(alone, token).logits[-1]
        return bool((logits[alone.ids[token]] - logits[loaded.ids[token]]).abs() < TIE)
