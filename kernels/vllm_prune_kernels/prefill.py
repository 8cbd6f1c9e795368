"""Attention of chunks, in which keys expire: over past keys in lanes, and over the chunk's own up to each query.

Query n sees key j iff j <= n < expiry_j. What has expired before a tile of queries begins is not read at all: ``_live`` lists,
for each tile of queries, the earlier keys of the chunk that its first query still sees, and attention gathers those alone; so a
prompt of which a gate drops most costs less than one that keeps all. Lanes hold no key that expired before the step. Served are
rows of more than one token. ``prefill_naive`` is the twin. Letters as in ``lanes``; R rows, T tokens, C of a row, G query heads
per KV head.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from .decode import LOG2E, lane_tokens
from .lanes import INTERPRETED, Lanes
from .rows import Rows

QUERIES = 128
"""Queries of a tile."""
SCAN = 512
"""Keys looked at together when listing."""


def list_width(tokens: int) -> int:
    """Numbers of a unit's lists for steps of ``tokens`` tokens: a row of C tokens from token b on has its lists from
    b * ``share`` on, the i-th of them (i - 1) i / 2 tiles further; together they are C^2 / (2 tiles) long at most."""
    return (tokens + QUERIES) * share(tokens)


def share(tokens: int) -> int:
    return triton.cdiv(tokens, 2 * QUERIES) + 1


@triton.jit(do_not_specialize=["total", "width", "share"])
def _live(
    row_slot, first, row_start, chunk, lists, counts, total, width, share, QUERIES: tl.constexpr, SCAN: tl.constexpr
):
    tile, row, unit = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(first + row)
    count = tl.load(first + row + 1) - begin
    before = tile * QUERIES
    if (tl.load(row_slot + row) < 0) | (count < 2) | (before >= count):
        return
    now = tl.load(row_start + row) + before
    into = (
        lists + unit.to(tl.int64) * width + begin.to(tl.int64) * share + (tile.to(tl.int64) - 1) * tile // 2 * QUERIES
    )
    found = 0
    for at in range(0, before, SCAN):
        j = at + tl.arange(0, SCAN)
        lives = tl.load(chunk + unit * total + begin + j, mask=j < before, other=0) > now
        lives = lives & (j < before)
        place = found + tl.cumsum(lives.to(tl.int32), 0) - 1
        tl.store(into + place, j, mask=lives)
        found += tl.sum(lives.to(tl.int32), 0)
    tl.store(counts + unit * total + begin + before, found)


@triton.jit
def _add(q, k, v, seen, scale, top, total, acc):
    """Keys k [D, S] and values v [S, D] into a running softmax, where ``seen`` [Q, S]."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    logit = tl.where(seen, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
    higher = tl.maximum(top, tl.max(logit, 1))
    p = tl.exp2(logit - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return higher, total, acc


@triton.jit
def _fetch(keys, values, offsets, ok, D: tl.constexpr, WIDE: tl.constexpr):
    """K [D, S] and V [S, D] of tokens at ``offsets`` from two pointers."""
    d = tl.arange(0, WIDE)
    if WIDE == D:
        k = tl.load(keys + offsets[None, :] + d[:, None], mask=ok[None, :], other=0.0)
        v = tl.load(values + offsets[:, None] + d[None, :], mask=ok[:, None], other=0.0)
    else:
        k = tl.load(keys + offsets[None, :] + d[:, None], mask=ok[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(values + offsets[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
    return k, v


@triton.jit(do_not_specialize=["layer", "total", "width", "share"])
def _prefill(
    table, length, expiry, kv, row_slot, first, row_start, query, key, value, chunk, lists, counts, out, weigh, scale, k_scale,
    v_scale, layer, lanes, W, total, width, share, query_stride, query_head, key_stride, out_stride, out_head,
    PER_LAYER: tl.constexpr, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    PAGE: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr,
    WEIGH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # Later tiles have more keys: they start first.
    parts = tl.num_programs(0)
    i0 = (parts - 1 - tl.program_id(0)) * PART
    head, row = tl.program_id(1), tl.program_id(2)
    slot = tl.load(row_slot + row).to(tl.int64)
    begin = tl.load(first + row).to(tl.int64)
    count = tl.load(first + row + 1) - tl.load(first + row)
    if (slot < 0) | (count < 2) | (i0 >= count):
        return
    start = tl.load(row_start + row)
    h = head // G
    unit = 0 if E == 1 else h
    tile = i0 // QUERIES
    before = tile * QUERIES
    i, d, o = i0 + tl.arange(0, PART), tl.arange(0, WIDE), tl.arange(0, KEYS)
    n = start + i
    has = (i < count)[:, None] & (d < D)[None, :]
    q = tl.load(query + (begin + i)[:, None] * query_stride + head * query_head + d[None, :], mask=has, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    top = tl.full([PART], -1.0e30, tl.float32)
    sums = tl.zeros([PART], tl.float32)
    acc = tl.zeros([PART, WIDE], tl.float32)
    # Past keys, in the lane.
    pages = table + (slot * lanes + layer * PER_LAYER + h) * W
    owners = table + (slot * lanes + layer * PER_LAYER + unit) * W
    past = tl.load(length + slot * lanes + layer * PER_LAYER + h)
    for at in range(0, past, KEYS):
        j = at + o
        ok = j < past
        page = tl.load(pages + j // N, mask=ok, other=0).to(tl.int64)
        owner = page if E > 1 else tl.load(owners + j // N, mask=ok, other=0).to(tl.int64)
        dies = tl.load(expiry + owner * N + j % N, mask=ok, other=-2147483648)
        offsets = page * PAGE + (j % N) * (2 * D)
        k, v = _fetch(kv, kv + D, offsets, ok, D, WIDE)
        top, sums, acc = _add(q, k, v, dies[None, :] > n[:, None], scale * k_scale, top, sums, acc)
    if kv.dtype.element_ty.is_fp8():
        acc *= v_scale  # what follows is not in the cache
    # Earlier keys of the chunk that live at the tile's first query.
    live = tl.load(counts + unit * total + begin + before)
    listed = lists + unit * width.to(tl.int64) + begin * share + (tile.to(tl.int64) - 1) * tile // 2 * QUERIES
    dying = chunk + unit * total + begin
    for at in range(0, live, KEYS):
        ok = at + o < live
        j = tl.load(listed + at + o, mask=ok, other=0)
        dies = tl.load(dying + j, mask=ok, other=-2147483648)
        k, v = _fetch(key + h * D, value + h * D, (begin + j) * key_stride, ok, D, WIDE)
        top, sums, acc = _add(q, k, v, dies[None, :] > n[:, None], scale, top, sums, acc)
    # The tile's own keys.
    for at in range(before, tl.minimum(i0 + PART, count), KEYS):
        j = at + o
        ok = j < count
        dies = tl.load(dying + j, mask=ok, other=-2147483648)
        k, v = _fetch(key + h * D, value + h * D, (begin + j) * key_stride, ok, D, WIDE)
        top, sums, acc = _add(q, k, v, (dies[None, :] > n[:, None]) & (j[None, :] <= i[:, None]), scale, top, sums, acc)
    result = acc / tl.where(sums > 0.0, sums, 1.0)[:, None]
    into = out + (begin + i)[:, None] * out_stride + head * out_head + d[None, :]
    tl.store(into, result.to(out.dtype.element_ty), mask=has)
    if WEIGH:
        said = weigh + 2 * ((begin + i) * H * G + head)
        tl.store(said, top, mask=i < count)
        tl.store(said + 1, 1.0 / tl.where(sums > 0.0, sums, 1.0), mask=i < count)


@cache
def _tiles(head_size: int, elem: int) -> tuple[int, int, int, int]:
    """Queries of a program, keys of a tile, warps and stages: what fits an H100's shared memory without spills."""
    if elem == 4:
        return (16, 16, 4, 1)
    return (128, 64, 8, 3) if head_size <= 128 else (64, 32, 8, 2)


def prefill(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    chunk: torch.Tensor, lists: torch.Tensor, counts: torch.Tensor, out: torch.Tensor, scale: float, most_tokens: int,
    k_scale: float = 1.0, v_scale: float = 1.0, weigh: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of rows of several tokens; others are left alone.

    Args:
        kv: [P, 2 N D], the cache, of query's dtype or FP8; the step's own keys and values are read as they are.
        rows: of the step; ``layer``: 0 to L - 1.
        query: [T, H G, D]; key, value: [T, H, D] with equal strides, what is inside a token dense; out: like query, written.
        chunk: int32 [E, T], expiries of the step's own keys.
        lists: int32 [E, ``list_width(T)``], counts: int32 [E, T], scratch.
        scale: of the logits.
        most_tokens: the most tokens a row has.
        k_scale, v_scale: of an FP8 cache; 1 of another.
        weigh: as for ``decode``.
    """
    s = lanes.sizes
    if rows.count == 0 or most_tokens < 2:
        return
    if key.stride() != value.stride() or key.stride(2) != 1 or key.stride(1) != s.head_size:
        key, value = key.contiguous(), value.contiguous()
    total = chunk.shape[1]
    numbers = {"total": total, "width": lists.shape[1], "share": share(total)}
    _live[(triton.cdiv(most_tokens, QUERIES), rows.count, s.units)](
        rows.slot, rows.first, rows.start, chunk, lists, counts, **numbers, QUERIES=QUERIES, SCAN=SCAN
    )
    heads = query.shape[1]
    part, keys, warps, stages = _tiles(s.head_size, query.element_size())
    _prefill[(triton.cdiv(most_tokens, part), heads, rows.count)](
        lanes.table, lanes.length, lanes.expiry, kv, rows.slot, rows.first, rows.start, query, key, value, chunk, lists, counts,
        out, out if weigh is None else weigh, scale * LOG2E, k_scale, v_scale, layer, s.lanes, s.width, **numbers,
        query_stride=query.stride(0), query_head=query.stride(1), key_stride=key.stride(0), out_stride=out.stride(0),
        out_head=out.stride(1), PER_LAYER=s.per_layer, H=s.heads, E=s.units, N=s.page_tokens, D=s.head_size,
        WIDE=max(16, triton.next_power_of_2(s.head_size)), PAGE=s.page_numbers, G=heads // s.heads, QUERIES=QUERIES, PART=part,
        KEYS=keys, WEIGH=weigh is not None, WIDEN=INTERPRETED, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def prefill_naive(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    chunk: torch.Tensor, out: torch.Tensor, scale: float, precision: torch.dtype = torch.float64,
    k_scale: float = 1.0, v_scale: float = 1.0,
) -> None:  # fmt: skip
    """``prefill``, row by row and head by head, computed in ``precision``."""
    s = lanes.sizes
    group = query.shape[1] // s.heads
    for row, slot in enumerate(rows.slot.tolist()):
        begin, end, start = int(rows.first[row]), int(rows.first[row + 1]), int(rows.start[row])
        if slot < 0 or end - begin < 2:
            continue
        n = torch.arange(start, start + end - begin, device=kv.device)[:, None]
        for h in range(s.heads):
            unit = 0 if s.units == 1 else h
            past, values = lane_tokens(lanes, kv, slot, layer, h, precision)
            owner = layer * s.per_layer + unit
            j = torch.arange(len(past), device=kv.device)
            dies = lanes.expiry[lanes.table[slot, owner].long()[j // s.page_tokens], j % s.page_tokens]
            k, v = (
                torch.cat([past * k_scale, key[begin:end, h].to(precision)]),
                torch.cat([values * v_scale, value[begin:end, h].to(precision)]),
            )
            own = (n >= n.T) & (chunk[unit, begin:end][None] > n)
            seen = torch.cat([dies[None] > n, own], dim=1)
            for head in range(h * group, (h + 1) * group):
                logit = query[begin:end, head].to(precision) @ k.T * scale
                weight = logit.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
                out[begin:end, head] = (weight @ v).to(out.dtype)
