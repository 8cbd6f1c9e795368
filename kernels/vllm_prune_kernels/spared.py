"""Keys that no gate may drop: a request's first ``sinks``, and those whose bit is set in its row of ``Lanes.spared``.

A request without such bits (``Lanes.n_spared`` 0) costs one load. ``spared_naive`` is the twin.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lanes import Lanes


@triton.jit
def is_spared(words, n_spared, slot, p, sinks, mask, WORDS: tl.constexpr):
    """Whether keys at positions p (where ``mask``) of a slot's request may not go."""
    keep = p < sinks
    if tl.load(n_spared + slot) > 0:
        word = tl.load(words + slot * WORDS + p // 32, mask=mask & (p >= 0), other=0)
        keep = keep | (((word >> (p % 32)) & 1) != 0)
    return keep


def spared_naive(lanes: Lanes, slot: int, p: int, sinks: int) -> bool:
    """``is_spared`` of one key."""
    return p < sinks or bool(int(lanes.n_spared[slot]) and int(lanes.spared[slot, p // 32]) >> (p % 32) & 1)
