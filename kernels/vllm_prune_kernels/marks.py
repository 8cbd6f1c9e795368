"""Expiries known without scores: decisions of the next token (DMS), and those made at write (window, random).

DMS: token j + 1 decides about key j; its expiry is then j + 1 + delay. The first token of a step decides about the newest key in
the lanes, the others about the step's own. With ``own`` token j itself decides about key j.

Window and random: position + 1 + delay unless a hash of the position lets the key live.

``*_naive`` are the twins. Letters as in ``lanes``; R rows, T tokens, C of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import NEVER, Lanes
from .rows import Rows
from .spared import is_spared, spared_naive

TILE = 128


@triton.jit
def _mix(x):
    """32 well mixed bits of 32, as ``gates/random_drop.py`` has them."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["layer"])
def _delayed(
    table, length, position, expiry, row_slot, first, row_start, features, chunk, shift, delays, spared, n_spared, sinks, layer,
    stride, lanes, W, total, PER_LAYER: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, NEVER: tl.constexpr,
    WORDS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    row, unit = tl.program_id(0), tl.program_id(1)
    slot = tl.load(row_slot + row).to(tl.int64)
    if slot < 0:
        return
    begin = tl.load(first + row)
    count = tl.load(first + row + 1) - begin
    start = tl.load(row_start + row)
    threshold, delay = tl.load(shift + slot), tl.load(delays + slot)
    if (OWN == 0) & (tl.program_id(2) == 0):
        lane = slot * lanes + layer * PER_LAYER + unit
        newest = tl.load(length + lane) - 1
        if newest >= 0:
            evicts = tl.load(features + begin.to(tl.int64) * stride + unit).to(tl.float32) > threshold
            at = tl.load(table + lane * W + newest // N).to(tl.int64) * N + newest % N
            evicts = evicts & ~is_spared(spared, n_spared, slot, tl.load(position + at), sinks, evicts, WORDS)
            tl.store(expiry + at, start + delay, mask=evicts)
    i = tl.program_id(2) * TILE + tl.arange(0, TILE)
    by = i if OWN else i + 1  # the token of the row that decides
    says = tl.load(features + (begin.to(tl.int64) + by) * stride + unit, mask=by < count, other=0.0).to(tl.float32)
    evicts = (by < count) & (says > threshold)
    evicts = evicts & ~is_spared(spared, n_spared, slot, start + i, sinks, evicts, WORDS)
    tl.store(chunk + unit * total + begin + i, tl.where(evicts, start + i + 1 + delay, NEVER), mask=i < count)


@triton.jit
def _at_write(
    row_slot, first, row_start, chunk, salts, limits, delays, spared, n_spared, sinks, total, TILE: tl.constexpr,
    NEVER: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row, unit = tl.program_id(0), tl.program_id(1)
    slot = tl.load(row_slot + row).to(tl.int64)
    if slot < 0:
        return
    limit, delay = tl.load(limits + slot), tl.load(delays + slot)
    begin = tl.load(first + row)
    count = tl.load(first + row + 1) - begin
    i = tl.program_id(2) * TILE + tl.arange(0, TILE)
    p = tl.load(row_start + row) + i
    salt = tl.load(salts + unit).to(tl.uint32)
    hashed = _mix(_mix(p.to(tl.uint32)) ^ salt)
    lives = is_spared(spared, n_spared, slot, p, sinks, i < count, WORDS) | (hashed.to(tl.int64) < limit)
    tl.store(chunk + unit * total + begin + i, tl.where(lives, NEVER, p + 1 + delay), mask=i < count)


def delayed(
    lanes: Lanes, rows: Rows, layer: int, features: torch.Tensor, chunk: torch.Tensor, sinks: int, most_tokens: int,
    own: bool = False,
) -> None:  # fmt: skip
    """DMS's decisions of a step: a logit above the request's ``shift`` evicts, after its ``delay``.

    Args:
        rows: of the step; ``layer``: 0 to L - 1.
        features: [T, F], the first E of which are logits.
        chunk: int32 [E, T], filled for tokens of rows.
        sinks: protected keys.
        most_tokens: the most tokens a row has.
        own: tokens decide about their own keys.
    """
    s = lanes.sizes
    if rows.count:
        _delayed[(rows.count, s.units, triton.cdiv(most_tokens, TILE))](
            lanes.table, lanes.length, lanes.position, lanes.expiry, rows.slot, rows.first, rows.start, features, chunk,
            lanes.shift, lanes.delay, lanes.spared, lanes.n_spared, sinks, layer, features.stride(0), s.lanes, s.width,
            chunk.shape[1], PER_LAYER=s.per_layer, N=s.page_tokens, TILE=TILE, NEVER=NEVER, WORDS=s.words, OWN=own,
        )  # fmt: skip


def at_write(
    lanes: Lanes, rows: Rows, chunk: torch.Tensor, salts: torch.Tensor, sinks: int, most_tokens: int
) -> None:  # fmt: skip
    """Expiries of the step's own keys, known when they are written: after the request's ``delay``, but for hashes below its
    ``limit`` (0 lets every key expire, 2^32 none). salts: int64 [E]. Others as for ``delayed``."""
    if rows.count:
        _at_write[(rows.count, lanes.sizes.units, triton.cdiv(most_tokens, TILE))](
            rows.slot, rows.first, rows.start, chunk, salts, lanes.limit, lanes.delay, lanes.spared, lanes.n_spared, sinks,
            chunk.shape[1], TILE=TILE, NEVER=NEVER, WORDS=lanes.sizes.words,
        )  # fmt: skip


def mix_naive(x: int) -> int:
    """``_mix`` of a Python integer."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def delayed_naive(
    lanes: Lanes, rows: Rows, layer: int, features: torch.Tensor, chunk: torch.Tensor, sinks: int, own: bool = False
) -> None:
    """``delayed``, token by token."""
    s = lanes.sizes
    for row, slot in enumerate(rows.slot.tolist()):
        if slot < 0:
            continue
        begin, end, start = int(rows.first[row]), int(rows.first[row + 1]), int(rows.start[row])
        threshold, delay = float(lanes.shift[slot]), int(lanes.delay[slot])
        for unit in range(s.units):
            lane = layer * s.per_layer + unit
            newest = int(lanes.length[slot, lane]) - 1
            if not own and newest >= 0 and float(features[begin, unit]) > threshold:
                at = (int(lanes.table[slot, lane, newest // s.page_tokens]), newest % s.page_tokens)
                if not spared_naive(lanes, slot, int(lanes.position[at]), sinks):
                    lanes.expiry[at] = start + delay
            for i in range(end - begin):
                by = i if own else i + 1
                says = by < end - begin and float(features[begin + by, unit]) > threshold
                says = says and not spared_naive(lanes, slot, start + i, sinks)
                chunk[unit, begin + i] = start + i + 1 + delay if says else NEVER


def at_write_naive(lanes: Lanes, rows: Rows, chunk: torch.Tensor, salts: torch.Tensor, sinks: int) -> None:
    """``at_write``, token by token."""
    for row, slot in enumerate(rows.slot.tolist()):
        if slot < 0:
            continue
        begin, end, start = int(rows.first[row]), int(rows.first[row + 1]), int(rows.start[row])
        limit, delay = int(lanes.limit[slot]), int(lanes.delay[slot])
        for unit in range(lanes.sizes.units):
            for i in range(end - begin):
                p = start + i
                lives = spared_naive(lanes, slot, p, sinks) or mix_naive(mix_naive(p) ^ int(salts[unit])) < limit
                chunk[unit, begin + i] = NEVER if lives else p + 1 + delay
