"""Drop what has expired and write what stays: lanes are dense again after it, and no page changes hands.

A key is dead at ``expiry <= d``; d is the row's own position when it has one token (which sees the lanes after this), else the
position after its last token (the chunk was attended to before). ``retire`` pairs the holes among the survivors' places with the
survivors beyond them, k-th with k-th, moves positions and expiries, and counts; ``settle`` moves K, V and gate keys along the
pairs and appends the step's tokens that live. ``settle_naive`` is the twin of both. Letters as in ``lanes``; R rows, T tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import INTERPRETED, Lanes
from .narrow import gate_pages, gate_view, narrow, narrow_naive
from .rows import Rows

HEAD = 256
"""Places searched for holes at a time."""


@triton.jit
def _alive(table, expiry, lane, j, count, dead, W, N: tl.constexpr):
    """Where the tokens j of a lane lie, and whether they live on."""
    at = tl.load(table + lane * W + j // N, mask=j < count, other=0).to(tl.int64) * N + j % N
    return at, tl.load(expiry + at, mask=j < count, other=-2147483648) > dead


@triton.jit
def pair_up(
    table, position, expiry, link, record, lane, old, dead, W, most, N: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Pair the holes of a lane with the survivors beyond them, and move positions and expiries; returns how many survive."""
    h, t, slots = tl.arange(0, HEAD), tl.arange(0, TAIL), tl.arange(0, TAIL)
    left = 0
    for begin_at in range(0, old, HEAD):
        at, alive = _alive(table, expiry, lane, begin_at + h, old, dead, W, N)
        left += tl.sum(alive.to(tl.int32), 0)
        if most > 0:
            gone = (begin_at + h < old) & (alive == 0)
            key = tl.load(position + at, mask=gone, other=0)
            tl.store(record + key, tl.load(expiry + at, mask=gone, other=0), mask=gone)
    cursor = 0
    for begin_at in range(left, old, TAIL):
        at, alive = _alive(table, expiry, lane, begin_at + t, old, dead, W, N)
        movers = tl.sum(alive.to(tl.int32), 0)
        holes = tl.zeros([TAIL], dtype=tl.int32)
        got = 0
        while got < movers:
            _, lives = _alive(table, expiry, lane, cursor + h, left, dead, W, N)
            hole = (cursor + h < left) & (lives == 0)
            number = got + tl.cumsum(hole.to(tl.int32), 0) - 1
            takes = hole & (number < movers)
            holes += tl.sum(tl.where(takes[:, None] & (number[:, None] == slots[None, :]), (cursor + h)[:, None], 0), 0)
            taken = tl.sum(takes.to(tl.int32), 0)
            got += taken
            all_taken = taken == tl.sum(hole.to(tl.int32), 0)
            cursor = tl.where(all_taken, cursor + HEAD, tl.max(tl.where(takes, cursor + h, -1), 0) + 1)
        number = tl.cumsum(alive.to(tl.int32), 0) - 1
        to = tl.sum(tl.where(number[:, None] == slots[None, :], holes[None, :], 0), 1)
        tl.store(link + at, tl.where(alive, to, -1), mask=begin_at + t < old)
        where = tl.load(table + lane * W + to // N, mask=alive, other=0).to(tl.int64) * N + to % N
        tl.store(position + where, tl.load(position + at, mask=alive, other=0), mask=alive)
        tl.store(expiry + where, tl.load(expiry + at, mask=alive, other=0), mask=alive)
    return left


@triton.jit(do_not_specialize=["layer", "layers", "most"])
def _retire(
    table, length, position, expiry, link, dropped, recorded, row_slot, first, row_start, chunk, settled, rank, layer, layers,
    lanes, W, total, most,
    PER_LAYER: tl.constexpr, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row, unit = tl.program_id(0), tl.program_id(1)
    slot = tl.load(row_slot + row).to(tl.int64)
    if slot < 0:
        return
    begin = tl.load(first + row)
    count = tl.load(first + row + 1) - begin
    start = tl.load(row_start + row)
    dead = tl.where(count == 1, start, start + count)
    base = slot * lanes + layer * PER_LAYER
    lane = base + unit
    old = tl.load(length + lane)
    record = recorded + ((slot * layers + layer) * E + unit) * most
    h = tl.arange(0, HEAD)
    left = pair_up(table, position, expiry, link, record, lane, old, dead, W, most, N, HEAD, TAIL)
    stays = 0
    for begin_at in range(0, count, HEAD):
        i = begin_at + h
        expires = tl.load(chunk + unit * total + begin + i, mask=i < count, other=-2147483648)
        lives = expires > dead
        number = stays + tl.cumsum(lives.to(tl.int32), 0) - 1
        tl.store(rank + unit * total + begin + i, tl.where(lives, number, -1), mask=i < count)
        stays += tl.sum(lives.to(tl.int32), 0)
        if most > 0:
            tl.store(record + start + i, expires, mask=(i < count) & (lives == 0))
    tl.store(settled + (row * E + unit) * 2, old)
    tl.store(settled + (row * E + unit) * 2 + 1, left)
    if E == 1:
        for h_ in range(PER_LAYER):
            tl.store(length + base + h_, left + stays)
    else:
        for h_ in range(unit, PER_LAYER, H):
            tl.store(length + base + h_, left + stays)
    gone_before = tl.load(dropped + (slot * layers + layer) * E + unit)
    tl.store(dropped + (slot * layers + layer) * E + unit, gone_before + (old - left) + (count - stays))


@triton.jit(do_not_specialize=["layer"])
def _settle(
    table, position, expiry, link, kv, gates, row_slot, first, row_start, chunk, settled, rank, key, value, features, k_scale,
    v_scale, layer, lanes, W, total, key_stride, value_stride, feature_stride,
    PER_LAYER: tl.constexpr, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr, NG: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, SPAN: tl.constexpr, GATE_PAGE: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, MOVE: tl.constexpr, APPEND: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row, h = tl.program_id(0), tl.program_id(1)
    slot = tl.load(row_slot + row).to(tl.int64)
    if slot < 0:
        return
    begin = tl.load(first + row)
    count = tl.load(first + row + 1) - begin
    unit = 0 if E == 1 else h % H
    old = tl.load(settled + (row * E + unit) * 2)
    left = tl.load(settled + (row * E + unit) * 2 + 1)
    base = slot * lanes + layer * PER_LAYER
    x, o = tl.arange(0, WIDE), tl.arange(0, TILE)
    if MOVE:
        # Along the pairs that retire made: survivors beyond ``left`` go to holes before it.
        for tile in range(tl.program_id(2), (old - left + TILE - 1) // TILE, tl.num_programs(2)):
            j = left + tile * TILE + o
            ok = j < old
            at = tl.load(table + (base + unit) * W + j // N, mask=ok, other=0).to(tl.int64) * N + j % N
            to = tl.load(link + at, mask=ok, other=-1)
            ok = ok & (to >= 0)
            size = N if h < H else NG
            wide = 2 * D if h < H else SPAN
            source = (
                tl.load(table + (base + h) * W + j // size, mask=ok, other=0).to(tl.int64) * PAGE + (j % size) * wide
            )
            target = (
                tl.load(table + (base + h) * W + to // size, mask=ok, other=0).to(tl.int64) * PAGE + (to % size) * wide
            )
            mask = ok[:, None] & (x < wide)[None, :]
            tl.store(
                kv + target[:, None] + x[None, :],
                tl.load(kv + source[:, None] + x[None, :], mask=mask, other=0.0),
                mask=mask,
            )
    if MOVE and APPEND:
        tl.debug_barrier()  # what is appended lies where movers came from
    if APPEND:
        start = tl.load(row_start + row)
        for tile in range(tl.program_id(2), (count + TILE - 1) // TILE, tl.num_programs(2)):
            i = tile * TILE + o
            token = begin.to(tl.int64) + i
            number = tl.load(rank + unit * total + token, mask=i < count, other=-1)
            ok = number >= 0
            j = left + number
            if h < H:
                page = tl.load(table + (base + h) * W + j // N, mask=ok, other=0).to(tl.int64)
                target = page * PAGE + (j % N) * 2 * D
                mask = ok[:, None] & (x < D)[None, :]
                k = tl.load(key + token[:, None] * key_stride + h * D + x[None, :], mask=mask, other=0.0)
                v = tl.load(value + token[:, None] * value_stride + h * D + x[None, :], mask=mask, other=0.0)
                k, v = (
                    narrow(k, kv.dtype.element_ty, k_scale, INTERPRETED),
                    narrow(v, kv.dtype.element_ty, v_scale, INTERPRETED),
                )
                tl.store(kv + target[:, None] + x[None, :], k, mask=mask)
                tl.store(kv + target[:, None] + D + x[None, :], v, mask=mask)
                if h == unit:
                    at = page * N + j % N
                    tl.store(position + at, start + i, mask=ok)
                    tl.store(expiry + at, tl.load(chunk + unit * total + token, mask=ok, other=0), mask=ok)
            else:
                page = tl.load(table + (base + h) * W + j // NG, mask=ok, other=0).to(tl.int64)
                target = page * GATE_PAGE + (j % NG) * R
                mask = ok[:, None] & (x < R)[None, :]
                g = tl.load(
                    features + token[:, None] * feature_stride + (E + unit) * R + x[None, :], mask=mask, other=0.0
                )
                tl.store(gates + target[:, None] + x[None, :], g, mask=mask)


def settle(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, key: torch.Tensor, value: torch.Tensor, features: torch.Tensor | None,
    chunk: torch.Tensor, rank: torch.Tensor, most_tokens: int, splits: int = 1, k_scale: float = 1.0, v_scale: float = 1.0,
) -> None:  # fmt: skip
    """Drop and write for all rows of a layer.

    Args:
        kv: [P, 2 N D], the cache.
        rows: of the step; ``layer``: 0 to L - 1.
        key, value: [T, H, D]; features: [T, F], the last E r of which are gate keys; None without gate lanes.
        chunk: int32 [E, T], expiries of the step's own keys.
        rank: int32 [E, T], scratch.
        most_tokens: the most tokens a row has.
        splits: programs a lane.
        k_scale, v_scale: of an FP8 cache: what is stored is divided by them.
    """
    s = lanes.sizes
    if rows.count == 0:
        return
    if s.gate_rank and (features is None or features.stride(-1) != 1):
        raise ValueError("gate keys are needed, with dense rows")
    single = most_tokens == 1
    total = chunk.shape[1]
    _retire[(rows.count, s.units)](
        lanes.table, lanes.length, lanes.position, lanes.expiry, lanes.link, lanes.dropped, lanes.recorded, rows.slot, rows.first,
        rows.start, chunk, rows.settled, rank, layer, s.layers, s.lanes, s.width, total, lanes.record_tokens,
        PER_LAYER=s.per_layer, H=s.heads, E=s.units, N=s.page_tokens, HEAD=1024 if single else HEAD, TAIL=16 if single else 128,
    )  # fmt: skip
    gate = key if features is None else features
    gates, rank_of_gate = gate_view(s, kv, gate.dtype)
    # What is appended lies where movers came from: several programs a lane must not do both at once.
    for move, append in [(True, True)] if splits == 1 else [(True, False), (False, True)]:
        _settle[(rows.count, s.per_layer, splits)](
            lanes.table, lanes.position, lanes.expiry, lanes.link, kv, gates, rows.slot, rows.first, rows.start, chunk,
            rows.settled, rank, key, value, gate, k_scale, v_scale, layer, s.lanes, s.width, total, key.stride(0),
            value.stride(0), gate.stride(0),
            PER_LAYER=s.per_layer, H=s.heads, E=s.units, N=s.page_tokens, NG=s.gate_page_tokens, D=s.head_size,
            R=rank_of_gate, SPAN=s.gate_rank, GATE_PAGE=gates.shape[1],
            WIDE=triton.next_power_of_2(max(2 * s.head_size, s.gate_rank)), PAGE=s.page_numbers, TILE=16, MOVE=move,
            APPEND=append, INTERPRETED=INTERPRETED,
        )  # fmt: skip


def lanes_of(lanes: Lanes, layer: int, unit: int) -> list[int]:
    """Lanes that share a unit's decisions."""
    s = lanes.sizes
    step = 1 if s.units == 1 else s.heads
    return [layer * s.per_layer + h for h in range(unit, s.per_layer, step)]


def token_rows(lanes: Lanes, kv: torch.Tensor, slot: int, lane: int, index: int) -> torch.Tensor:
    """View of what a lane stores of a token: K and V [2 D], or a gate key [r]."""
    s = lanes.sizes
    size, wide = (s.page_tokens, 2 * s.head_size) if lane % s.per_layer < s.heads else (s.gate_page_tokens, s.gate_rank)
    page = int(lanes.table[slot, lane, index // size])
    return kv[page, index % size * wide : (index % size + 1) * wide]


def settle_naive(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, key: torch.Tensor, value: torch.Tensor, features: torch.Tensor | None,
    chunk: torch.Tensor, k_scale: float = 1.0, v_scale: float = 1.0,
) -> None:  # fmt: skip
    """``settle``, token by token."""
    s = lanes.sizes
    for row, slot in enumerate(rows.slot.tolist()):
        if slot < 0:
            continue
        begin, end, start = int(rows.first[row]), int(rows.first[row + 1]), int(rows.start[row])
        dead = start if end - begin == 1 else start + end - begin
        for unit in range(s.units):
            mine = lanes_of(lanes, layer, unit)
            old = int(lanes.length[slot, mine[0]])

            def at(j: int, slot: int = slot, lane: int = mine[0]) -> tuple[int, int]:
                return int(lanes.table[slot, lane, j // s.page_tokens]), j % s.page_tokens

            alive = [int(lanes.expiry[at(j)]) > dead for j in range(old)]
            left = sum(alive)
            for j in range(old):
                if not alive[j] and lanes.record_tokens:
                    lanes.recorded[slot, layer, unit, int(lanes.position[at(j)])] = lanes.expiry[at(j)]
            holes = [j for j in range(left) if not alive[j]]
            movers = [j for j in range(left, old) if alive[j]]
            for to, j in zip(holes, movers, strict=True):
                lanes.position[at(to)], lanes.expiry[at(to)] = lanes.position[at(j)], lanes.expiry[at(j)]
                for lane in mine:
                    token_rows(lanes, kv, slot, lane, to).copy_(token_rows(lanes, kv, slot, lane, j))
            for i in range(end - begin):
                expires = int(chunk[unit, begin + i])
                if expires <= dead:
                    if lanes.record_tokens:
                        lanes.recorded[slot, layer, unit, start + i] = expires
                    continue
                for lane in mine:
                    h, row_view = lane % s.per_layer, token_rows(lanes, kv, slot, lane, left)
                    if h < s.heads:
                        k, v = (
                            narrow_naive(key[begin + i, h], kv.dtype, k_scale),
                            narrow_naive(value[begin + i, h], kv.dtype, v_scale),
                        )
                        row_view.copy_(torch.cat([k, v]))
                    else:
                        assert features is not None
                        stored = gate_pages(row_view, features.dtype)
                        stored.copy_(features[begin + i, (s.units + unit) * len(stored) :][: len(stored)])
                lanes.position[at(left)], lanes.expiry[at(left)] = start + i, expires
                left += 1
            for lane in mine:
                lanes.length[slot, lane] = left
            lanes.dropped[slot, layer, unit] += old + end - begin - left
