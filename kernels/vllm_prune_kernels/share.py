"""Pages of a snapshot in which nothing changes any more, and requests that begin with them.

Where a key that has no expiry once a later token is there will never get one (DMS, random, open gates; docs/adr/0006),
``sort_lanes`` makes a snapshot whose lanes begin with such keys and says how many pages are full of them, ``settled``. ``share``
gives these pages to a request that starts there, before ``plan`` gives it its own; ``copy_lanes`` copies the rest.
``sort_lanes_naive`` and ``share_naive`` are the twins. Letters as in ``lanes``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import NEVER, Lanes

TILE = 128


@triton.jit
def _share(rows, table, held, settled, shared, lanes, W, TILE: tl.constexpr):
    row = rows + 2 * tl.program_id(0)
    origin, slot = tl.load(row).to(tl.int64), tl.load(row + 1).to(tl.int64)
    lane = tl.program_id(1)
    count = tl.load(settled + origin * lanes + lane)
    for at in range(0, count, TILE):
        i = at + tl.arange(0, TILE)
        page = tl.load(table + (origin * lanes + lane) * W + i, mask=i < count, other=0)
        tl.store(table + (slot * lanes + lane) * W + i, page, mask=i < count)
    tl.store(held + slot * lanes + lane, count)
    tl.store(shared + slot * lanes + lane, count)


@triton.jit
def _stays(table, position, expiry, row, begin, tokens, before, N: tl.constexpr, NEVER: tl.constexpr):
    """Of a lane's tokens from ``begin``, the first of a page: which there are, which will not be dropped, position and expiry."""
    n = tl.arange(0, N)
    ok = begin + n < tokens
    at = tl.load(table + row + begin // N).to(tl.int64) * N + n
    born = tl.load(position + at, mask=ok, other=0)
    dies = tl.load(expiry + at, mask=ok, other=0)
    return ok, ok & (dies == NEVER) & (born < before), born, dies


@triton.jit(do_not_specialize=["layer"])
def _sort(
    rows, table, length, position, expiry, settled, kv, dropped, recorded, layer, layers, lanes, W, most,
    H: tl.constexpr, E: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, X: tl.constexpr, NEVER: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    row = rows + 3 * tl.program_id(0)
    origin, slot, before = tl.load(row).to(tl.int64), tl.load(row + 1).to(tl.int64), tl.load(row + 2)
    lane = layer * H + tl.program_id(1)
    h, at_layer = lane % H, lane // H
    from_row, to_row = (origin * lanes + lane) * W, (slot * lanes + lane) * W
    marks = (
        origin * lanes + at_layer * H + (0 if E == 1 else h)
    ) * W  # the lane that has its unit's positions and expiries
    tokens = tl.load(length + origin * lanes + lane)
    n, x = tl.arange(0, N), tl.arange(0, X)
    total = 0
    for begin in range(0, tokens, N):
        _, stays, _, _ = _stays(table, position, expiry, marks, begin, tokens, before, N, NEVER)
        total += tl.sum(stays.to(tl.int32), 0)
    stay, go = 0, total
    for begin in range(0, tokens, N):
        ok, stays, born, dies = _stays(table, position, expiry, marks, begin, tokens, before, N, NEVER)
        goes = (ok & (stays == 0)).to(tl.int32)
        kept = stays.to(tl.int32)
        to = tl.where(stays, stay + tl.cumsum(kept, 0) - 1, go + tl.cumsum(goes, 0) - 1)
        page = tl.load(table + to_row + to // N, mask=ok, other=0).to(tl.int64)
        source = tl.load(table + from_row + begin // N).to(tl.int64) * (N * WIDE)
        mask = ok[:, None] & (x < WIDE)[None, :]
        moved = tl.load(kv + source + (n * WIDE)[:, None] + x[None, :], mask=mask, other=0.0)
        tl.store(kv + (page * N * WIDE + (to % N) * WIDE)[:, None] + x[None, :], moved, mask=mask)
        if h < E:
            tl.store(position + page * N + to % N, born, mask=ok)
            tl.store(expiry + page * N + to % N, dies, mask=ok)
        stay += tl.sum(kept, 0)
        go += tl.sum(goes, 0)
    tl.store(settled + slot * lanes + lane, total // N)
    tl.store(length + slot * lanes + lane, tokens)
    if h < E:
        unit = at_layer * E + h
        tl.store(dropped + slot * layers * E + unit, tl.load(dropped + origin * layers * E + unit))
        for at in range(0, most, COPY):
            c = at + tl.arange(0, COPY)
            told = tl.load(recorded + (origin * layers * E + unit) * most + c, mask=c < most, other=0)
            tl.store(recorded + (slot * layers * E + unit) * most + c, told, mask=c < most)


def share(lanes: Lanes, rows: torch.Tensor) -> None:
    """Requests that begin take over settled pages of the snapshots that they start from.

    Args:
        rows: int32 [n, 2]: slot of the snapshot, slot of the request, which has no pages yet.
    """
    if len(rows):
        s = lanes.sizes
        _share[(len(rows), s.lanes)](
            rows, lanes.table, lanes.held, lanes.settled, lanes.shared, s.lanes, s.width, TILE=TILE
        )


def sort_lanes(lanes: Lanes, kv: torch.Tensor, rows: torch.Tensor, layer: int | None = None) -> None:
    """Copy lanes into pages that ``plan`` has given to snapshots, keys that stay first, otherwise in their order.

    Args:
        kv: [P, 2 N D], the cache.
        rows: int32 [n, 3]: slot from which, slot to which, and below which position a key without expiry stays.
        layer: 0 to L - 1, or None for all of them.

    Raises:
        ValueError: there are gate keys: gates that remember may drop any key.
    """
    s = lanes.sizes
    if s.gate_rank:
        raise ValueError("keys of gates that remember never settle")
    if len(rows) == 0:
        return
    _sort[(len(rows), s.lanes if layer is None else s.heads)](
        rows, lanes.table, lanes.length, lanes.position, lanes.expiry, lanes.settled, kv, lanes.dropped, lanes.recorded,
        layer or 0, s.layers, s.lanes, s.width, lanes.record_tokens, H=s.heads, E=s.units, N=s.page_tokens,
        WIDE=2 * s.head_size, X=triton.next_power_of_2(2 * s.head_size), NEVER=NEVER, COPY=256,
    )  # fmt: skip


def share_naive(lanes: Lanes, rows: torch.Tensor) -> None:
    """``share``, lane by lane."""
    for origin, slot in rows.tolist():
        for lane in range(lanes.sizes.lanes):
            count = int(lanes.settled[origin, lane])
            lanes.table[slot, lane, :count] = lanes.table[origin, lane, :count]
            lanes.held[slot, lane] = lanes.shared[slot, lane] = count


def sort_lanes_naive(lanes: Lanes, kv: torch.Tensor, rows: torch.Tensor, layer: int | None = None) -> None:
    """``sort_lanes``, token by token."""
    s = lanes.sizes
    size, wide = s.page_tokens, 2 * s.head_size
    for origin, slot, before in rows.tolist():
        for lane in range(s.lanes):
            at_layer, h = divmod(lane, s.heads)
            if layer is not None and at_layer != layer:
                continue
            tokens = int(lanes.length[origin, lane])

            def place(slot: int, lane: int, j: int) -> tuple[int, int]:
                return int(lanes.table[slot, lane, j // size]), j % size

            marks = [place(origin, at_layer * s.heads + (0 if s.units == 1 else h), j) for j in range(tokens)]
            stays = [int(lanes.expiry[at]) == NEVER and int(lanes.position[at]) < before for at in marks]
            order = [j for j in range(tokens) if stays[j]] + [j for j in range(tokens) if not stays[j]]
            for to, j in enumerate(order):
                (page, at), (source, was) = place(slot, lane, to), place(origin, lane, j)
                kv[page, at * wide : (at + 1) * wide] = kv[source, was * wide : (was + 1) * wide]
                if h < s.units:
                    lanes.position[page, at], lanes.expiry[page, at] = lanes.position[marks[j]], lanes.expiry[marks[j]]
            lanes.settled[slot, lane] = sum(stays) // size
            lanes.length[slot, lane] = tokens
            if h < s.units:
                lanes.dropped[slot, at_layer, h] = lanes.dropped[origin, at_layer, h]
                if lanes.record_tokens:
                    lanes.recorded[slot, at_layer, h] = lanes.recorded[origin, at_layer, h]
