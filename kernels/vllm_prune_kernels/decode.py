"""Attention of single tokens over their lanes: split-KV, all query heads of a KV head together.

Served are rows of exactly one token, after their step's drops and writes: every token of a lane is visible then, the row's own
among them. Programs of a (row, KV head) share its lane in contiguous parts; where there is but one part it writes the result,
else the last that arrives does. How many parts a lane really has follows from its length on the device, so that the grid can be
captured. ``decode_naive`` is the twin. Letters as in ``lanes``; R rows, T tokens, G query heads per KV head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import INTERPRETED, Lanes
from .rows import Rows

LOG2E = 1.4426950408889634
"""Logits are in base 2 in all attention kernels."""
KEYS = 64
"""Tokens of a tile."""
LEAST = 4
"""Least tiles of a part: shorter lanes have fewer parts."""
WARPS, STAGES = 4, 3
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
    table, length, kv, row_slot, first, query, out, partial, sums, arrivals, weigh, scale, v_scale, layer, lanes, W,
    query_stride, query_head, out_stride, out_head,
    PER_LAYER: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    PAGE: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, SPLITS: tl.constexpr,
    WEIGH: tl.constexpr, WIDEN: tl.constexpr,
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
        k, v = k.to(q.dtype), v.to(q.dtype)
        logit = tl.where(ok[None, :], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        p = tl.exp2(logit - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher
    if kv.dtype.element_ty.is_fp8():
        acc *= v_scale
    into = out + begin.to(tl.int64) * out_stride
    if tokens <= part:
        result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(into + heads[:, None] * out_head + d[None, :], result.to(out.dtype.element_ty), mask=has)
        if WEIGH:
            said = weigh + 2 * (begin.to(tl.int64) * H * G + heads)
            tl.store(said, top, mask=g < G)
            tl.store(said + 1, 1.0 / total, mask=g < G)
    else:
        cell = ((row * H + h).to(tl.int64) * SPLITS + split) * G + g
        tl.store(partial + cell[:, None] * D + d[None, :], acc, mask=has)
        tl.store(sums + 2 * cell, top, mask=g < G)
        tl.store(sums + 2 * cell + 1, total, mask=g < G)
        tl.debug_barrier()
        parts = (tokens + part - 1) // part
        if tl.atomic_add(arrivals + row * H + h, 1) == parts - 1:
            tl.store(arrivals + row * H + h, 0)
            s = tl.arange(0, SPLITS)
            ok = s < parts
            for i in tl.static_range(G):
                cells = ((row * H + h).to(tl.int64) * SPLITS + s) * G + i
                tops = tl.load(sums + 2 * cells, mask=ok, other=-1.0e30)
                highest = tl.max(tops, 0)
                weight = tl.exp2(tops - highest)
                all_sums = tl.sum(weight * tl.load(sums + 2 * cells + 1, mask=ok, other=0.0), 0)
                piece = tl.load(
                    partial + cells[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0
                )
                whole = tl.sum(piece * weight[:, None], 0) / all_sums
                tl.store(into + (h * G + i) * out_head + d, whole.to(out.dtype.element_ty), mask=d < D)
                if WEIGH:
                    said = weigh + 2 * ((begin.to(tl.int64) * H + h) * G + i)
                    tl.store(said, highest)
                    tl.store(said + 1, 1.0 / all_sums)


def decode(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, query: torch.Tensor, out: torch.Tensor, scale: float,
    partial: torch.Tensor, sums: torch.Tensor, arrivals: torch.Tensor, splits: int, k_scale: float = 1.0, v_scale: float = 1.0,
    weigh: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of rows of one token; others are left alone.

    Args:
        kv: [P, 2 N D], the cache, of query's dtype or FP8.
        rows: of the step; ``layer``: 0 to L - 1.
        query: [T, H G, D]; out: alike, written. The last dimension of both is dense.
        scale: of the logits.
        partial, sums: float32, at least as many numbers as ``scratch_for`` says.
        arrivals: int32 [R, H] at least, zero between launches.
        splits: parts a lane, at most (``splits_for``).
        k_scale, v_scale: of an FP8 cache; 1 of another.
        weigh: float32 [T, H G, 2], filled with what makes weights of logits (``received``); None where nobody asks.
    """
    s = lanes.sizes
    if rows.count == 0:
        return
    group = query.shape[1] // s.heads
    wide = max(16, triton.next_power_of_2(s.head_size))
    _decode[(rows.count, s.heads, splits)](
        lanes.table, lanes.length, kv, rows.slot, rows.first, query, out, partial, sums, arrivals,
        sums if weigh is None else weigh, scale * k_scale * LOG2E, v_scale, layer, s.lanes, s.width, query.stride(0),
        query.stride(1), out.stride(0), out.stride(1), PER_LAYER=s.per_layer, H=s.heads, N=s.page_tokens, D=s.head_size,
        WIDE=wide, PAGE=s.page_numbers, G=group, GROUP=max(16, triton.next_power_of_2(group)), KEYS=KEYS, LEAST=LEAST,
        SPLITS=splits, WEIGH=weigh is not None, WIDEN=INTERPRETED, num_warps=WARPS,
        num_stages=STAGES if wide <= 128 and kv.element_size() <= 2 else 2,
    )  # fmt: skip


def decode_naive(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, query: torch.Tensor, out: torch.Tensor, scale: float,
    precision: torch.dtype = torch.float64, k_scale: float = 1.0, v_scale: float = 1.0,
) -> None:  # fmt: skip
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
            weight = (q @ k.T * (scale * k_scale)).softmax(-1)
            out[begin, h * group : (h + 1) * group] = (weight @ v * v_scale).to(out.dtype)


def lane_tokens(lanes: Lanes, kv: torch.Tensor, slot: int, layer: int, head: int,
                dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Keys and values of a lane, [tokens, D] each, in lane order."""
    s = lanes.sizes
    lane = layer * s.per_layer + head
    j = torch.arange(int(lanes.length[slot, lane]), device=kv.device)
    page = lanes.table[slot, lane].long()[j // s.page_tokens]
    token = kv.view(-1, s.page_tokens, 2 * s.head_size)[page, j % s.page_tokens].to(dtype)
    return token[:, : s.head_size], token[:, s.head_size :]
