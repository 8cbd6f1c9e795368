"""How long each key of one request was seen: gathered in the engine core, carried by the answer, read by whoever asked.

A request asks with ``prune.map`` (``requests.py``); its worker then lists single drops in its reports. No process keeps them
once the answer is sent. Letters: L layers, E eviction units a layer, T tokens.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_prune.cache.grants import LaneReport
from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import GATES, NEVER

CELLS = 2**22
"""Most keys of a map, L x E x T: the engine core packs them between two steps, some 0.1 s for as many."""
HELD = -1
"""In place of an expiry: seen by the last query."""


@dataclass
class Lifetimes:
    """Drops of a running request's present life, as its worker reports them. Lives in the engine core.

    Attributes:
        layers, units: L, E.
        reveal: value of ``gates.Reveal``: when the method decides.
        epoch: of the life; a preempted request begins another and drops again.
        drops: int32 [n, 3] a report, of layer * E + unit, key, first query that did not see it.
    """

    layers: int
    units: int
    reveal: str
    epoch: int = 0
    drops: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, section: DropGateConfig, units: int) -> Lifetimes:
        return cls(section.num_layers, units, GATES[section.method].reveal.value)

    def add(self, report: LaneReport) -> None:
        """Take in what a report lists; one of an earlier life changes nothing."""
        if report.epoch < self.epoch:
            return
        if report.epoch > self.epoch:
            self.epoch, self.drops = report.epoch, []
        if self._problem(report.covered):
            self.drops = []
        elif report.drops is not None and len(report.drops):
            self.drops.append(report.drops)

    def _problem(self, tokens: int) -> str | None:
        cells = self.layers * self.units * tokens
        if cells <= CELLS:
            return None
        return f"a map of {cells:,} keys is too large, {CELLS:,} is the most"

    def answer(self, prompt: int, tokens: int) -> dict[str, Any]:
        """The answer's field ``map``.

        Args:
            prompt: tokens of it.
            tokens: T, computed and reported of.
        """
        problem = self._problem(tokens)
        if problem is not None:
            return {"refused": problem}
        expiry = np.full((self.layers * self.units, tokens), NEVER, np.int64)
        for rows in self.drops:
            expiry[rows[:, 0], rows[:, 1]] = rows[:, 2]
        return pack(expiry.reshape(self.layers, self.units, tokens), min(prompt, tokens), self.reveal)


def pack(expiry: np.ndarray, prompt: int, reveal: str) -> dict[str, Any]:
    """A map as JSON carries it: ``layers`` L, ``units`` E, ``tokens`` T, ``prompt_tokens``, ``reveal``, and ``expiry``: base64
    of zlib of little-endian int32 [L, E, T], the first query that did not see the key, ``HELD`` where the last one did.

    Args:
        expiry: int64 [L, E, T]; anything from T on means held.
        prompt: tokens of it.
        reveal: value of ``gates.Reveal``.
    """
    layers, units, tokens = expiry.shape
    numbers = np.where(expiry >= tokens, HELD, expiry).astype("<i4")
    packed = base64.b64encode(zlib.compress(numbers.tobytes(), 1)).decode("ascii")
    return {
        "layers": layers,
        "units": units,
        "tokens": tokens,
        "prompt_tokens": prompt,
        "reveal": reveal,
        "expiry": packed,
    }


def unpack(answer: dict[str, Any]) -> np.ndarray:
    """Expiries int64 [L, E, T] of an answer's ``map``, NEVER where the key was held to the end. Runs in a client.

    Raises:
        PruneError: there is no map in it, with the server's reason, or it is damaged.
    """
    if "refused" in answer:
        raise PruneError(f"the server made no map: {answer['refused']}.", "Ask with a shorter prompt.")
    again = "Ask again, with the same version of vllm-prune at both ends."
    try:
        shape = tuple(int(answer[name]) for name in ("layers", "units", "tokens"))
        size = 4 * math.prod(shape)  # NumPy's product wraps, and a size of 0 would unpack without end
        if min(shape) < 1 or size > 4 * CELLS:
            raise ValueError(f"its shape is {list(shape)}")
        unzip = zlib.decompressobj()
        numbers = unzip.decompress(base64.b64decode(answer["expiry"], validate=True), size)
        if len(numbers) != size or not unzip.eof:
            raise ValueError(f"it does not hold {size} bytes")
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error, zlib.error) as error:
        raise PruneError(f"the map is damaged: {error!r}.", again) from None
    expiry = np.frombuffer(numbers, "<i4").reshape(shape).astype(np.int64)
    return np.where(expiry == HELD, NEVER, expiry)
