"""Gates that decide at fixed positions from the attention that keys received (LTP, ACC-style): which keys go.

At every multiple m of the grid, before the query at m attends, keys get the expiry m: with a threshold those of which this is the
first boundary that may judge them and whose mass / span lies below it; with a share, the lowest by mass / (age - 1), older ones
first among equals, until no more than floor(share m) are left. Rows begin at boundaries or lie between them (``parts_of``).
The k-th lowest is found by its bits, a byte at a time: floats that are not negative are ordered as whole numbers are.
``judge_naive`` is the twin. Letters as in ``lanes``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .crossing import place
from .lanes import Lanes
from .narrow import gate_view
from .received import nothing_goes
from .rows import Rows

SCAN = 1024
"""Keys looked at together."""


@dataclass(frozen=True)
class Boundaries:
    """A model's rule; each request's and layer's threshold or share is in ``Lanes.level``. As ``gates.BoundaryRule`` has it.

    Attributes:
        grid: boundaries are its multiples.
        span: later queries that count for a key; 0: all.
        after: a key may go only if it is older than that, >= 1.
        sinks: first tokens, which never go.
        keep: the level is a share of the keys to keep, not a threshold.
    """

    grid: int
    span: int
    after: int
    sinks: int
    keep: bool


@triton.jit
def _look(table, position, masses, base, j, tokens, now, sinks, after, W, H: tl.constexpr, N: tl.constexpr,
          NG: tl.constexpr, GATE_PAGE: tl.constexpr):  # fmt: skip
    """Of keys j of a layer's lanes: where they lie, position, whether they may go, mass."""
    ok = j < tokens
    at = tl.load(table + base * W + j // N, mask=ok, other=0).to(tl.int64) * N + j % N
    born = tl.load(position + at, mask=ok, other=0)
    may = ok & (born >= sinks) & (now - born > after)
    page = tl.load(table + (base + H) * W + j // NG, mask=may, other=0).to(tl.int64)
    return at, born, may, tl.load(masses + page * GATE_PAGE + j % NG, mask=may, other=0.0)


@triton.jit
def _bits(mass, now, born):
    """Scores as whole numbers of the same order."""
    age = tl.maximum(now - born - 1, 1).to(tl.float64)
    return (mass / age).to(tl.int64, bitcast=True)


@triton.jit
def _digit(counts, rank):
    """Of ``counts`` [256] by byte: the byte of the ``rank``-th, its rank among those that share it, and how many these are."""
    b = tl.arange(0, 256)
    digit = tl.sum((tl.cumsum(counts, 0) < rank).to(tl.int32), 0)
    return digit, rank - tl.sum(tl.where(b < digit, counts, 0), 0), tl.sum(tl.where(b == digit, counts, 0), 0)


@triton.jit(do_not_specialize=["layer", "layers", "grid", "span", "after", "sinks"])
def _judge(
    table, length, position, expiry, masses, level, row_slot, row_start, grid, span, after, sinks, layer, layers, lanes, W,
    PER_LAYER: tl.constexpr, H: tl.constexpr, N: tl.constexpr, NG: tl.constexpr, GATE_PAGE: tl.constexpr, KEEP: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(row_slot + row).to(tl.int64)
    now = tl.load(row_start + row)
    if (slot < 0) | (now % grid != 0):
        return
    base = slot * lanes + layer * PER_LAYER
    tokens = tl.load(length + base)
    says = tl.load(level + slot * layers + layer)
    o = tl.arange(0, SCAN)
    if KEEP == 0:
        for begin in range(0, tokens, SCAN):
            at, born, may, mass = _look(
                table, position, masses, base, begin + o, tokens, now, sinks, after, W, H, N, NG, GATE_PAGE
            )
            gone = may & (now - born <= after + grid) & (mass / span.to(tl.float64) < says)
            tl.store(expiry + at, now + tl.zeros_like(born), mask=gone)
    else:
        excess = tokens - tl.floor(says * now.to(tl.float64)).to(tl.int32)
        if (excess > 0) & (says < 1.0):
            candidates = 0
            for begin in range(0, tokens, SCAN):
                at, born, may, mass = _look(
                    table, position, masses, base, begin + o, tokens, now, sinks, after, W, H, N, NG, GATE_PAGE
                )
                candidates += tl.sum(may.to(tl.int32), 0)
            # The score of the last that goes, all its bits, and among those that share it the position.
            score, rank, equals = tl.zeros([1], tl.int64), tl.minimum(excess, candidates), candidates
            for step in range(0, 8):
                shift = 56 - 8 * step
                counts = tl.zeros([256], tl.int32)
                for begin in range(0, tokens, SCAN):
                    at, born, may, mass = _look(
                        table, position, masses, base, begin + o, tokens, now, sinks, after, W, H, N, NG, GATE_PAGE
                    )
                    bits = _bits(mass, now, born)
                    # Two shifts: one by 64 bits means nothing.
                    same = may & (((bits >> shift) >> 8) == score)
                    counts += tl.histogram(((bits >> shift) & 255).to(tl.int32), 256, mask=same)
                digit, rank, equals = _digit(counts, rank)
                score = score * 256 + digit
            last = tl.zeros([1], tl.int32) + 2147483647
            if equals > rank:
                last = tl.zeros([1], tl.int32)
                for step in range(0, 4):
                    shift = 24 - 8 * step
                    counts = tl.zeros([256], tl.int32)
                    for begin in range(0, tokens, SCAN):
                        at, born, may, mass = _look(
                            table, position, masses, base, begin + o, tokens, now, sinks, after, W, H, N, NG, GATE_PAGE
                        )
                        same = may & (_bits(mass, now, born) == score) & (((born >> shift) >> 8) == last)
                        counts += tl.histogram((born >> shift) & 255, 256, mask=same)
                    digit, rank, _ = _digit(counts, rank)
                    last = last * 256 + digit
            for begin in range(0, tokens, SCAN):
                at, born, may, mass = _look(
                    table, position, masses, base, begin + o, tokens, now, sinks, after, W, H, N, NG, GATE_PAGE
                )
                bits = _bits(mass, now, born)
                gone = may & ((bits < score) | ((bits == score) & (born <= last)))
                tl.store(expiry + at, now + tl.zeros_like(born), mask=gone)


def judge(lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, rule: Boundaries) -> None:
    """Give expiries to the keys that go, in rows that begin at a boundary; ``settle`` or ``single`` drops them.

    Args:
        kv: [P, 2 N D], the cache, whose gate keys are masses (``received``).
        rows: of the step, none of which has a boundary inside; ``layer``: 0 to L - 1; rule: of the model.
    """
    s = lanes.sizes
    if rows.count == 0:
        return
    masses, _ = gate_view(s, kv, torch.float64)
    _judge[(rows.count,)](
        lanes.table, lanes.length, lanes.position, lanes.expiry, masses, lanes.level, rows.slot, rows.start, rule.grid,
        rule.span, rule.after, rule.sinks, layer, s.layers, s.lanes, s.width, PER_LAYER=s.per_layer, H=s.heads, N=s.page_tokens,
        NG=s.gate_page_tokens, GATE_PAGE=masses.shape[1], KEEP=rule.keep, SCAN=SCAN, num_warps=8,
    )  # fmt: skip


def judge_naive(lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, rule: Boundaries) -> None:
    """``judge``, key by key, in the words of its module."""
    s = lanes.sizes
    masses, _ = gate_view(s, kv, torch.float64)
    for row, slot in enumerate(rows.slot.tolist()):
        now = int(rows.start[row])
        if slot < 0 or now % rule.grid:
            continue
        lane, level = layer * s.per_layer, float(lanes.level[slot, layer])
        tokens = int(lanes.length[slot, lane])
        found = []
        for j in range(tokens):
            at = place(lanes, slot, lane, j)
            born, page = int(lanes.position[at]), lanes.table[slot, lane + s.heads, j // s.gate_page_tokens]
            if born >= rule.sinks and now - born > rule.after:
                found.append((float(masses[int(page), j % s.gate_page_tokens]), born, at))
        if rule.keep:
            excess = 0 if nothing_goes(level, True) else max(0, tokens - math.floor(level * now))
            gone = sorted((mass / (now - born - 1), born, at) for mass, born, at in found)[:excess]
        else:
            gone = [one for one in found if now - one[1] <= rule.after + rule.grid and one[0] / rule.span < level]
        for _, _, at in gone:
            lanes.expiry[at] = now
