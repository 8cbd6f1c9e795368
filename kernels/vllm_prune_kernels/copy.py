"""What one slot holds goes into the pages of another, which ``plan`` has given it: snapshots of prefixes, and starts from them,
where pages that are shared (``share``) need no copy.

``copy_lanes_naive`` is the twin. Letters as in ``lanes``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import Lanes
from .plan import page_tokens_of

PROGRAMS = 8
"""That share the pages of a lane."""


@triton.jit(do_not_specialize=["layer"])
def _copy(
    rows, columns, table, shared, length, position, expiry, kv, dropped, recorded, layer, layers, lanes, W, most,
    PER_LAYER: tl.constexpr, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr, NG: tl.constexpr, PAGE: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    row = rows + columns * tl.program_id(0)
    origin, slot = tl.load(row).to(tl.int64), tl.load(row + 1).to(tl.int64)
    lane = layer * PER_LAYER + tl.program_id(1)
    h, at_layer = lane % PER_LAYER, lane // PER_LAYER
    tokens = tl.load(length + origin * lanes + lane)
    size = tl.where(h < H, N, NG)
    n, c = tl.arange(0, N), tl.arange(0, COPY)
    begin = tl.load(shared + slot * lanes + lane) + tl.program_id(2)
    for index in range(begin, (tokens + size - 1) // size, tl.num_programs(2)):
        source = tl.load(table + (origin * lanes + lane) * W + index).to(tl.int64)
        target = tl.load(table + (slot * lanes + lane) * W + index).to(tl.int64)
        for at in range(0, PAGE, COPY):
            ok = at + c < PAGE
            tl.store(kv + target * PAGE + at + c, tl.load(kv + source * PAGE + at + c, mask=ok), mask=ok)
        if h < E:
            tl.store(position + target * N + n, tl.load(position + source * N + n))
            tl.store(expiry + target * N + n, tl.load(expiry + source * N + n))
    if tl.program_id(2) == 0:
        tl.store(length + slot * lanes + lane, tokens)
        if h < E:
            unit = at_layer * E + h
            tl.store(dropped + slot * layers * E + unit, tl.load(dropped + origin * layers * E + unit))
            for at in range(0, most, COPY):
                ok = at + c < most
                tl.store(
                    recorded + (slot * layers * E + unit) * most + at + c,
                    tl.load(recorded + (origin * layers * E + unit) * most + at + c, mask=ok),
                    mask=ok,
                )


def copy_lanes(lanes: Lanes, kv: torch.Tensor, rows: torch.Tensor, layer: int | None = None) -> None:
    """Copy.

    Args:
        kv: [P, 2 N D], the cache.
        rows: int32 [n, 2 or more]: slot from which, slot to which. No slot is on both sides.
        layer: 0 to L - 1, or None for all of them.
    """
    if len(rows) == 0:
        return
    s = lanes.sizes
    _copy[(len(rows), s.lanes if layer is None else s.per_layer, PROGRAMS)](
        rows, rows.stride(0), lanes.table, lanes.shared, lanes.length, lanes.position, lanes.expiry, kv, lanes.dropped,
        lanes.recorded, layer or 0, s.layers, s.lanes, s.width, lanes.record_tokens, PER_LAYER=s.per_layer, H=s.heads, E=s.units,
        N=s.page_tokens, NG=s.gate_page_tokens, PAGE=s.page_numbers, COPY=min(1024, triton.next_power_of_2(s.page_numbers)),
    )  # fmt: skip


def copy_lanes_naive(lanes: Lanes, kv: torch.Tensor, rows: torch.Tensor, layer: int | None = None) -> None:
    """``copy_lanes``, page by page."""
    s = lanes.sizes
    for origin, slot in rows[:, :2].tolist():
        for lane in range(s.lanes):
            at, h = lane // s.per_layer, lane % s.per_layer
            if layer is not None and at != layer:
                continue
            tokens = int(lanes.length[origin, lane])
            for index in range(int(lanes.shared[slot, lane]), -(-tokens // page_tokens_of(lanes, lane))):
                source, target = int(lanes.table[origin, lane, index]), int(lanes.table[slot, lane, index])
                kv[target] = kv[source]
                if h < s.units:
                    lanes.position[target], lanes.expiry[target] = lanes.position[source], lanes.expiry[source]
            lanes.length[slot, lane] = tokens
            if h < s.units:
                lanes.dropped[slot, at, h] = lanes.dropped[origin, at, h]
                if lanes.record_tokens:
                    lanes.recorded[slot, at, h] = lanes.recorded[origin, at, h]
