"""Steps of single tokens: decide, drop and write in one kernel, so that a decode step has one launch a layer for it.

What ``crossing`` or ``marks`` and ``settle`` do for any step. Programs share a unit's lane and list the tokens that die; the last
that arrives pairs holes with survivors, moves them, and appends the row's own token, which always lives. Its twins are theirs,
one after another. Letters as in ``lanes``; R rows, of one token each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .lanes import INTERPRETED, NEVER, Lanes
from .marks import _mix
from .narrow import gate_view, narrow
from .rows import Rows
from .settle import pair_up
from .spared import is_spared

OPEN, QUERY, DELAYED, WRITE, OWN = 0, 1, 2, 3, 4
"""How a key's expiry becomes known: never; by a later query (DCP); from the next token (DMS); when written, by its position
(window, random) or by its own token (DMS about own keys)."""
KEYS = 128
LISTED = 64
"""Deaths of a unit in one step that are listed; past that the lane is searched."""


@dataclass(frozen=True)
class Decision:
    """One layer's rule.

    Attributes:
        kind: one of the above.
        constants: biases float32 [E], or salts int64 [E]; anything where neither is wanted.
        scale: of the dot products.
        sinks, window: protected keys. As for ``crossing`` and ``marks``; the rest is each request's own (``Lanes.shift``).
    """

    kind: int
    constants: torch.Tensor
    scale: float = 0.0
    sinks: int = 0
    window: int = 0


@dataclass
class Meeting:
    """Where programs meet: int32 [R, E] arrivals and deaths, zero between launches, and the dead [R, E, ``LISTED``]."""

    arrivals: torch.Tensor
    deaths: torch.Tensor
    dead: torch.Tensor

    @classmethod
    def make(cls, rows: int, units: int, device: torch.device | str) -> Meeting:
        counts = torch.zeros(2, rows, units, dtype=torch.int32, device=device)
        return cls(counts[0], counts[1], torch.zeros(rows, units, LISTED, dtype=torch.int32, device=device))


@triton.jit
def _pair_listed(
    table, position, expiry, link, record, dead, lane, old, left, W, most, N: tl.constexpr, LISTED: tl.constexpr
):
    """``pair_up`` from a list of the dead in any order."""
    c = tl.arange(0, LISTED)
    count = old - left
    gone = tl.load(dead + c, mask=c < count, other=2147483647)
    if most > 0:
        at = tl.load(table + lane * W + gone // N, mask=c < count, other=0).to(tl.int64) * N + gone % N
        key = tl.load(position + at, mask=c < count, other=0)
        tl.store(record + key, tl.load(expiry + at, mask=c < count, other=0), mask=c < count)
    tail = left + c
    stays = (c < count) & (tl.sum((gone[None, :] == tail[:, None]).to(tl.int32), 1) == 0)
    hole = gone < left
    rank = tl.sum(((gone[None, :] < gone[:, None]) & hole[None, :]).to(tl.int32), 1)
    order = tl.where(hole, rank, -1)
    number = tl.where(stays, tl.cumsum(stays.to(tl.int32), 0) - 1, -2)
    to = tl.sum(tl.where(order[None, :] == number[:, None], gone[None, :], 0), 1)
    at = tl.load(table + lane * W + tail // N, mask=c < count, other=0).to(tl.int64) * N + tail % N
    where = tl.load(table + lane * W + to // N, mask=stays, other=0).to(tl.int64) * N + to % N
    born = tl.load(position + at, mask=stays, other=0)
    dies = tl.load(expiry + at, mask=stays, other=0)
    tl.debug_barrier()  # what was recorded has been read
    tl.store(link + at, tl.where(stays, to, -1), mask=c < count)
    tl.store(position + where, born, mask=stays)
    tl.store(expiry + where, dies, mask=stays)


@triton.jit(do_not_specialize=["layer", "layers", "most"])
def _single(
    table, length, position, expiry, link, dropped, recorded, kv, gates, row_slot, first, row_start, key, value, features,
    k_scale, v_scale, constants, shift, limits, delays, spared, n_spared, arrivals, deaths, dead, scale, sinks, window, layer,
    layers, lanes, W, most, key_stride, value_stride, feature_stride,
    KIND: tl.constexpr, PER_LAYER: tl.constexpr, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr, NG: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    GATE_PAGE: tl.constexpr, LANES: tl.constexpr, KEYS: tl.constexpr, LISTED: tl.constexpr, SPLITS: tl.constexpr,
    NEVER: tl.constexpr, WORDS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row, unit, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(row_slot + row).to(tl.int64)
    if slot < 0:
        return
    token = tl.load(first + row).to(tl.int64)
    start = tl.load(row_start + row)
    first_lane = slot * lanes + layer * PER_LAYER
    lane = first_lane + unit
    old = tl.load(length + lane)
    cell = row * E + unit
    x, o = tl.arange(0, RANK), tl.arange(0, KEYS)
    if KIND == 1:
        q = tl.load(features + token * feature_stride + unit * R + x, mask=x < R, other=0.0).to(tl.float32)
        bias = tl.load(constants + unit) + tl.load(shift + slot)
    if (KIND == 2) | (KIND == 4):
        says = tl.load(features + token * feature_stride + unit).to(tl.float32)
        threshold, delay = tl.load(shift + slot), tl.load(delays + slot)
    for tile in range(split, (old + KEYS - 1) // KEYS, SPLITS):
        j = tile * KEYS + o
        ok = j < old
        at = tl.load(table + lane * W + j // N, mask=ok, other=0).to(tl.int64) * N + j % N
        dies = tl.load(expiry + at, mask=ok, other=NEVER)
        if KIND == 1:
            page = tl.load(table + (first_lane + H + unit) * W + j // NG, mask=ok, other=0).to(tl.int64)
            k = tl.load(
                gates + (page * GATE_PAGE + (j % NG) * R)[:, None] + x[None, :],
                mask=ok[:, None] & (x < R)[None, :],
                other=0.0,
            )
            score = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale + bias
            born = tl.load(position + at, mask=ok, other=0)
            drops = (score <= 0.0) & (start - born > window) & ok & (dies > start)
            drops = drops & ~is_spared(spared, n_spared, slot, born, sinks, drops, WORDS)
            dies = tl.where(drops, start, dies)
            tl.store(expiry + at, dies, mask=drops)
        if KIND == 2:
            newest = j == old - 1
            marked = newest & (tl.where(newest, says, threshold) > threshold)
            born = tl.load(position + at, mask=marked, other=0)
            marked = marked & ~is_spared(spared, n_spared, slot, born, sinks, marked, WORDS)
            dies = tl.where(marked, start + delay, dies)
            tl.store(expiry + at, dies, mask=marked)
        gone = ok & (dies <= start)
        count = tl.sum(gone.to(tl.int32), 0)
        if count > 0:
            place = tl.atomic_add(deaths + cell, count) + tl.cumsum(gone.to(tl.int32), 0) - 1
            tl.store(dead + cell * LISTED + place, j, mask=gone & (place < LISTED))
    tl.debug_barrier()
    if tl.atomic_add(arrivals + cell, 1) == SPLITS - 1:
        count = tl.load(deaths + cell)
        left = old - count
        tl.debug_barrier()
        tl.store(deaths + cell, 0)
        tl.store(arrivals + cell, 0)
        record = recorded + ((slot * layers + layer) * E + unit) * most
        if count > LISTED:
            pair_up(table, position, expiry, link, record, lane, old, start, W, most, N, 256, 16)
        elif count > 0:
            _pair_listed(
                table, position, expiry, link, record, dead + cell * LISTED, lane, old, left, W, most, N, LISTED
            )
        tl.debug_barrier()
        n, w = tl.arange(0, LANES), tl.arange(0, WIDE)
        h = n if E == 1 else unit + n * H
        has = h < PER_LAYER
        is_kv = h < H
        size = tl.where(is_kv, N, NG)
        wide = tl.where(is_kv, 2 * D, SPAN)
        pages = table + (first_lane + h) * W
        whole = has[:, None] & (w[None, :] < wide[:, None])
        for j in range(left, old):
            at = tl.load(table + lane * W + j // N).to(tl.int64) * N + j % N
            to = tl.load(link + at)
            if to >= 0:
                source = tl.load(pages + j // size, mask=has, other=0).to(tl.int64) * PAGE + (j % size) * wide
                target = tl.load(pages + to // size, mask=has, other=0).to(tl.int64) * PAGE + (to % size) * wide
                moved = tl.load(kv + source[:, None] + w[None, :], mask=whole, other=0.0)
                tl.store(kv + target[:, None] + w[None, :], moved, mask=whole)
        tl.debug_barrier()  # what is appended lies where a mover came from
        page = tl.load(pages + left // size, mask=has, other=0).to(tl.int64)
        target = page * PAGE + (left % size) * wide
        into = kv + target[:, None] + w[None, :]
        is_key = (has & is_kv)[:, None] & (w < D)[None, :]
        is_value = (has & is_kv)[:, None] & (w >= D)[None, :] & (w < 2 * D)[None, :]
        k = tl.load(key + token * key_stride + h[:, None] * D + w[None, :], mask=is_key, other=0.0)
        v = tl.load(value + token * value_stride + h[:, None] * D + w[None, :] - D, mask=is_value, other=0.0)
        tl.store(into, narrow(k, kv.dtype.element_ty, k_scale, INTERPRETED), mask=is_key)
        tl.store(into, narrow(v, kv.dtype.element_ty, v_scale, INTERPRETED), mask=is_value)
        if PER_LAYER > H:
            is_gate = (has & (h >= H))[:, None] & (w < R)[None, :]
            g = tl.load(
                features + token * feature_stride + (E + unit) * R + w[None, :] + 0 * h[:, None],
                mask=is_gate,
                other=0.0,
            )
            target = page * GATE_PAGE + (left % size) * R
            tl.store(gates + target[:, None] + w[None, :], g, mask=is_gate)
        dies = NEVER
        if KIND == 3:
            salt, limit = tl.load(constants + unit).to(tl.uint32), tl.load(limits + slot)
            lives = is_spared(spared, n_spared, slot, start, sinks, start >= 0, WORDS) | (
                _mix(_mix(start.to(tl.uint32)) ^ salt).to(tl.int64) < limit
            )
            dies = tl.where(lives, NEVER, start + 1 + tl.load(delays + slot))
        if KIND == 4:
            marked = says > threshold
            marked = marked & ~is_spared(spared, n_spared, slot, start, sinks, marked, WORDS)
            dies = tl.where(marked, start + 1 + delay, NEVER)
        at = tl.load(table + lane * W + left // N).to(tl.int64) * N + left % N
        tl.store(position + at, start)
        tl.store(expiry + at, dies)
        tl.store(length + first_lane + h, left + 1, mask=has)
        gone_before = tl.load(dropped + (slot * layers + layer) * E + unit)
        tl.debug_barrier()
        tl.store(dropped + (slot * layers + layer) * E + unit, gone_before + count)


def single(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, rule: Decision, key: torch.Tensor, value: torch.Tensor,
    features: torch.Tensor | None, meeting: Meeting, splits: int, k_scale: float = 1.0, v_scale: float = 1.0,
) -> None:  # fmt: skip
    """Decide, drop and write for rows of one token each (or padding).

    Args:
        kv: [P, 2 N D], the cache.
        rows: of the step; ``layer``: 0 to L - 1; rule: of the layer.
        key, value: [T, H, D], heads dense; features: [T, F] as ``crossing`` or ``delayed`` and ``settle`` want them, or None.
        meeting: scratch of at least as many rows.
        splits: programs a row and unit.
        k_scale, v_scale: of an FP8 cache: what is stored is divided by them.
    """
    s = lanes.sizes
    if rows.count == 0:
        return
    if (rule.kind in (QUERY, DELAYED, OWN) or s.gate_rank) and (features is None or features.stride(-1) != 1):
        raise ValueError("features are needed, with dense rows")
    gate = key if features is None else features
    gates, rank = gate_view(s, kv, gate.dtype)
    _single[(rows.count, s.units, splits)](
        lanes.table, lanes.length, lanes.position, lanes.expiry, lanes.link, lanes.dropped, lanes.recorded, kv,
        gates, rows.slot, rows.first, rows.start, key, value, gate, k_scale, v_scale, rule.constants,
        lanes.shift, lanes.limit, lanes.delay, lanes.spared, lanes.n_spared, meeting.arrivals, meeting.deaths,
        meeting.dead, rule.scale, rule.sinks, rule.window, layer, s.layers, s.lanes, s.width, lanes.record_tokens,
        key.stride(0), value.stride(0), gate.stride(0),
        KIND=rule.kind, PER_LAYER=s.per_layer, H=s.heads, E=s.units, N=s.page_tokens, NG=s.gate_page_tokens, D=s.head_size,
        R=rank, SPAN=s.gate_rank, GATE_PAGE=gates.shape[1], RANK=max(16, triton.next_power_of_2(rank)),
        WIDE=triton.next_power_of_2(max(2 * s.head_size, s.gate_rank)), PAGE=s.page_numbers,
        LANES=triton.next_power_of_2(s.per_layer // (1 if s.units == 1 else s.heads)), KEYS=KEYS, LISTED=LISTED, SPLITS=splits,
        NEVER=NEVER, WORDS=s.words, INTERPRETED=INTERPRETED,
    )  # fmt: skip
