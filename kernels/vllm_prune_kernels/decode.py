"""Attention of single tokens over their lanes: split-KV, all query heads of a KV head together.

Served are rows of exactly one token, after ``settle``: every token of a lane is visible then, the row's own among them. Programs
of a (row, KV head) share its lane in contiguous parts; where there is but one part it writes the result, else ``_combine`` does.
How many parts a lane really has follows from its length on the device, so that the grid can be captured. ``decode_naive`` is the
twin. Letters as in ``lanes``; R rows, T tokens, G query heads per KV head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import INTERPRETED, Lanes
from .rows import Rows

KEYS = 64
"""Tokens of a tile."""
LEAST = 4
"""Least tiles of a part: shorter lanes have fewer parts."""
PROGRAMS = 528
"""Programs wanted: four for each multiprocessor of an H100 or H200."""
MOST_SPLITS = 64


def splits_for(rows: int, heads: int, programs: int = PROGRAMS) -> int:
    """Parts a lane, at most, for R rows of H KV heads: a power of two."""
    return triton.next_power_of_2(max(1, min(MOST_SPLITS, programs // (rows * heads))))


def scratch_for(
    rows: int, heads: int, group: int, head_size: int, splits: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``decode``'s two float32 scratch tensors, of which it takes the first numbers."""
    return (rows, heads, splits, group, head_size), (rows, heads, splits, group, 2)


@triton.jit
def _part(length, SPLITS: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr):
    """Tokens of a part: a multiple of the tile."""
    return tl.maximum((length + SPLITS * KEYS - 1) // (SPLITS * KEYS), LEAST) * KEYS


@triton.jit(do_not_specialize=["layer"])
def _decode(
    table, length, kv, row_slot, first, query, out, partial, sums, scale, layer, lanes, W, query_stride, query_head, out_stride,
    out_head, PER_LAYER: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    G: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, SPLITS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(row_slot + row).to(tl.int64)
    begin = tl.load(first + row)
    if (slot < 0) | (tl.load(first + row + 1) - begin != 1):
        return
    lane = slot * lanes + layer * PER_LAYER + h
    tokens = tl.load(length + lane)
    part = _part(tokens, SPLITS, KEYS, LEAST)
    at = split * part
    end = tl.minimum(at + part, tokens)
    if (at >= tokens) & (split > 0):
        return
    g, d, o = tl.arange(0, GROUP), tl.arange(0, WIDE), tl.arange(0, KEYS)
    has = (g < G)[:, None] & (d < D)[None, :]
    heads = h * G + g
    q = tl.load(
        query + begin.to(tl.int64) * query_stride + heads[:, None] * query_head + d[None, :], mask=has, other=0.0
    )
    if WIDEN:
        q = q.to(tl.float32)
    top = tl.full([GROUP], -1.0e30, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, WIDE], tl.float32)
    pages = table + lane * W
    for tile in range(at, end, KEYS):
        j = tile + o
        ok = j < end
        place = tl.load(pages + j // N, mask=ok, other=0).to(tl.int64) * PAGE + (j % N) * (2 * D)
        if WIDE == D:
            k = tl.load(kv + place[None, :] + d[:, None], mask=ok[None, :], other=0.0)
            v = tl.load(kv + place[:, None] + D + d[None, :], mask=ok[:, None], other=0.0)
        else:
            k = tl.load(kv + place[None, :] + d[:, None], mask=ok[None, :] & (d < D)[:, None], other=0.0)
            v = tl.load(kv + place[:, None] + D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        logit = tl.where(ok[None, :], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        p = tl.exp2(logit - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher
    if tokens <= part:
        result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        into = out + begin.to(tl.int64) * out_stride + heads[:, None] * out_head + d[None, :]
        tl.store(into, result.to(out.dtype.element_ty), mask=has)
    else:
        cell = ((row * H + h).to(tl.int64) * SPLITS + split) * G + g
        tl.store(partial + cell[:, None] * D + d[None, :], acc, mask=has)
        tl.store(sums + 2 * cell, top, mask=g < G)
        tl.store(sums + 2 * cell + 1, total, mask=g < G)


@triton.jit(do_not_specialize=["layer"])
def _combine(
    length, row_slot, first, out, partial, sums, layer, lanes, out_stride, out_head,
    PER_LAYER: tl.constexpr, H: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, G: tl.constexpr, KEYS: tl.constexpr,
    LEAST: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row, h, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(row_slot + row).to(tl.int64)
    begin = tl.load(first + row)
    if (slot < 0) | (tl.load(first + row + 1) - begin != 1):
        return
    tokens = tl.load(length + slot * lanes + layer * PER_LAYER + h)
    part = _part(tokens, SPLITS, KEYS, LEAST)
    if tokens <= part:
        return
    s, d = tl.arange(0, SPLITS), tl.arange(0, WIDE)
    ok = s * part < tokens
    cell = ((row * H + h).to(tl.int64) * SPLITS + s) * G + g
    top = tl.load(sums + 2 * cell, mask=ok, other=-1.0e30)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(sums + 2 * cell + 1, mask=ok, other=0.0), 0)
    acc = tl.load(partial + cell[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
    result = tl.sum(acc * weight[:, None], 0) / total
    into = out + begin.to(tl.int64) * out_stride + (h * G + g) * out_head + d
    tl.store(into, result.to(out.dtype.element_ty), mask=d < D)


def decode(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, query: torch.Tensor, out: torch.Tensor, scale: float,
    partial: torch.Tensor, sums: torch.Tensor, splits: int,
) -> None:  # fmt: skip
    """Attention of rows of one token; others are left alone.

    Args:
        kv: [P, 2 N D], the cache.
        rows: of the step; ``layer``: 0 to L - 1.
        query: [T, H G, D]; out: alike, written. The last dimension of both is dense.
        scale: of the logits.
        partial, sums: float32, at least as many numbers as ``scratch_for`` says.
        splits: parts a lane, at most (``splits_for``).
    """
    s = lanes.sizes
    if rows.count == 0:
        return
    group = query.shape[1] // s.heads
    wide = max(16, triton.next_power_of_2(s.head_size))
    shape = {"PER_LAYER": s.per_layer, "H": s.heads, "D": s.head_size, "WIDE": wide, "G": group, "KEYS": KEYS, "LEAST": LEAST,
             "SPLITS": splits}  # fmt: skip
    _decode[(rows.count, s.heads, splits)](
        lanes.table, lanes.length, kv, rows.slot, rows.first, query, out, partial, sums, scale * 1.4426950408889634, layer,
        s.lanes, s.width, query.stride(0), query.stride(1), out.stride(0), out.stride(1), N=s.page_tokens, PAGE=s.page_numbers,
        GROUP=max(16, triton.next_power_of_2(group)), WIDEN=INTERPRETED, num_warps=4, num_stages=3 if wide <= 128 else 2, **shape,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows.count, s.heads, group)](
            lanes.length, rows.slot, rows.first, out, partial, sums, layer, s.lanes, out.stride(0), out.stride(1), num_warps=4,
            **shape,
        )  # fmt: skip


def decode_naive(lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, query: torch.Tensor, out: torch.Tensor,
                 scale: float, precision: torch.dtype = torch.float64) -> None:  # fmt: skip
    """``decode``, row by row and head by head, computed in ``precision``."""
    s = lanes.sizes
    group = query.shape[1] // s.heads
    for row, slot in enumerate(rows.slot.tolist()):
        begin, end = int(rows.first[row]), int(rows.first[row + 1])
        if slot < 0 or end - begin != 1:
            continue
        for h in range(s.heads):
            k, v = lane_tokens(lanes, kv, slot, layer, h, precision)
            q = query[begin, h * group : (h + 1) * group].to(precision)
            out[begin, h * group : (h + 1) * group] = ((q @ k.T * scale).softmax(-1) @ v).to(out.dtype)


def lane_tokens(lanes: Lanes, kv: torch.Tensor, slot: int, layer: int, head: int,
                dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Keys and values of a lane, [tokens, D] each, in lane order."""
    s = lanes.sizes
    lane = layer * s.per_layer + head
    j = torch.arange(int(lanes.length[slot, lane]), device=kv.device)
    page = lanes.table[slot, lane].long()[j // s.page_tokens]
    token = kv.view(-1, s.page_tokens, 2 * s.head_size)[page, j % s.page_tokens].to(dtype)
    return token[:, : s.head_size], token[:, s.head_size :]
