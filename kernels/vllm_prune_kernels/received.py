"""Attention that keys receive, added up in gate lanes: what gates at boundaries decide by (``vllm_prune.gates.boundary``).

    mass_j += sum over n of c_n / (H G) * sum over query heads of A[n, j],    j < n, and with a span n - j <= span

A second pass over a layer's lanes after its step has been written, in which all keys of a lane live. ``decode`` and ``prefill``
leave what makes weights of logits: A = 2^(logit - top) * share, logits in base 2. A token's mass is a float64, its gate key: so
it moves, is copied and paged with the token. One program sums a tile of keys over all queries: no atomics, one order of sums.
``received_naive`` is the twin. Letters as in ``lanes``; R rows, T tokens, G query heads per KV head, c_n keys that query n sees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .decode import LOG2E, lane_tokens
from .lanes import INTERPRETED, Lanes
from .narrow import gate_view
from .rows import Rows

KEYS = 64
"""Tokens of a tile."""


@triton.jit(do_not_specialize=["layer", "layers", "span"])
def _received(
    table, length, position, kv, masses, level, row_slot, first, row_start, query, weigh, scale, span, layer, layers, lanes, W,
    query_stride, query_head, PER_LAYER: tl.constexpr, H: tl.constexpr, N: tl.constexpr, NG: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, PAGE: tl.constexpr, GATE_PAGE: tl.constexpr, G: tl.constexpr, KEEP: tl.constexpr, KEYS: tl.constexpr,
    QUERIES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(row_slot + row).to(tl.int64)
    if slot < 0:
        return
    says = tl.load(level + slot * layers + layer)
    if (says >= 1.0) if KEEP else (says <= 0.0):
        return  # nothing can go: nobody asks
    begin = tl.load(first + row).to(tl.int64)
    count = tl.load(first + row + 1) - tl.load(first + row)
    start = tl.load(row_start + row)
    base = slot * lanes + layer * PER_LAYER
    tokens = tl.load(length + base)
    before = tokens - count
    d, o, r = tl.arange(0, WIDE), tl.arange(0, KEYS), tl.arange(0, QUERIES)
    for tile in range(tl.program_id(1), (tokens + KEYS - 1) // KEYS, tl.num_programs(1)):
        j = tile * KEYS + o
        ok = j < tokens
        at = tl.load(table + base * W + j // N, mask=ok, other=0).to(tl.int64) * N + j % N
        born = tl.load(position + at, mask=ok, other=-1)
        if (span == 0) | (tl.max(born, 0) >= start - span):
            total = tl.zeros([KEYS], dtype=tl.float64)
            for h in range(H):
                page = tl.load(table + (base + h) * W + j // N, mask=ok, other=0).to(tl.int64)
                place = page * PAGE + (j % N) * (2 * D)
                k = tl.load(kv + place[None, :] + d[:, None], mask=ok[None, :] & (d < D)[:, None], other=0.0)
                for rows_from in range(0, count * G, QUERIES):
                    i, head = (rows_from + r) // G, h * G + (rows_from + r) % G
                    there = i < count
                    q = tl.load(
                        query + (begin + i)[:, None] * query_stride + head[:, None] * query_head + d[None, :],
                        mask=there[:, None] & (d < D)[None, :],
                        other=0.0,
                    )
                    if WIDEN:
                        q = q.to(tl.float32)
                    said = weigh + 2 * ((begin + i) * H * G + head)
                    top, share = tl.load(said, mask=there, other=0.0), tl.load(said + 1, mask=there, other=0.0)
                    n = start + i
                    sees = ok[None, :] & there[:, None] & (born[None, :] < n[:, None])
                    sees = sees & ((span == 0) | (n[:, None] - born[None, :] <= span))
                    logit = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
                    weight = tl.exp2(tl.where(sees, logit - top[:, None], float("-inf"))) * share[:, None]
                    seen = (before + i + 1).to(tl.float32)
                    total += tl.sum(weight * seen[:, None], 0).to(tl.float64)
            page = tl.load(table + (base + H) * W + j // NG, mask=ok, other=0).to(tl.int64)
            into = masses + page * GATE_PAGE + j % NG
            tl.store(into, tl.load(into, mask=ok, other=0.0) + total / (H * G), mask=ok)


def received(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, query: torch.Tensor, weigh: torch.Tensor, scale: float, span: int,
    keep: bool, most_tokens: int, splits: int, k_scale: float = 1.0,
) -> None:  # fmt: skip
    """Add what the rows' queries give to the keys before them.

    Args:
        kv: [P, 2 N D], the cache, of query's dtype or FP8.
        rows: of the step, whose tokens are written; ``layer``: 0 to L - 1.
        query: [T, H G, D]; the last dimension dense.
        weigh: float32 [T, H G, 2], of ``decode`` and ``prefill``: largest logit in base 2, and 1 over the sum of weights.
        scale: of the logits.
        span: how many later queries count for a key; 0: all.
        keep: how a ``level`` is meant: see ``judge``.
        most_tokens: the most tokens a row has.
        splits: programs a row.
        k_scale: of an FP8 cache; 1 of another.
    """
    s = lanes.sizes
    if rows.count == 0:
        return
    if s.units != 1 or query.stride(-1) != 1:
        raise ValueError("heads decide together, and the last dimension of query is dense")
    masses, _ = gate_view(s, kv, torch.float64)
    group, wide = query.shape[1] // s.heads, max(16, triton.next_power_of_2(s.head_size))
    keys, most = (KEYS, 64) if wide * query.element_size() <= 256 else (KEYS // 2, 32)  # what fits beside each other
    queries = max(16, min(most, triton.next_power_of_2(most_tokens * group)))
    _received[(rows.count, splits)](
        lanes.table, lanes.length, lanes.position, kv, masses, lanes.level, rows.slot, rows.first, rows.start, query, weigh,
        scale * k_scale * LOG2E, span, layer, s.layers, s.lanes, s.width, query.stride(0), query.stride(1),
        PER_LAYER=s.per_layer, H=s.heads, N=s.page_tokens, NG=s.gate_page_tokens, D=s.head_size,
        WIDE=wide, PAGE=s.page_numbers, GATE_PAGE=masses.shape[1], G=group, KEEP=keep, KEYS=keys, QUERIES=queries,
        WIDEN=INTERPRETED, num_stages=2,
    )  # fmt: skip


def received_naive(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, query: torch.Tensor, scale: float, span: int, keep: bool,
    k_scale: float = 1.0,
) -> None:  # fmt: skip
    """``received``, row by row in float64, softmax and all."""
    s = lanes.sizes
    masses, _ = gate_view(s, kv, torch.float64)
    group = query.shape[1] // s.heads
    for row, slot in enumerate(rows.slot.tolist()):
        if slot < 0 or nothing_goes(float(lanes.level[slot, layer]), keep):
            continue
        begin, end, start = int(rows.first[row]), int(rows.first[row + 1]), int(rows.start[row])
        lane = layer * s.per_layer
        j = torch.arange(int(lanes.length[slot, lane]))
        born = lanes.position[lanes.table[slot, lane].long()[j // s.page_tokens], j % s.page_tokens]
        n = torch.arange(start, start + end - begin)[:, None]
        weights = torch.zeros(end - begin, len(j), dtype=torch.float64)
        for h in range(s.heads):
            k, _ = lane_tokens(lanes, kv, slot, layer, h, torch.float64)
            q = query[begin:end, h * group : (h + 1) * group].double()
            logits = (q @ k.T * (scale * k_scale)).masked_fill((born > n)[:, None], float("-inf"))
            weights += logits.softmax(-1).sum(1)
        counts = (born < n) & ((n - born <= span) if span else True)
        seen = (len(j) - (end - begin) + 1 + n - start).double()
        page = lanes.table[slot, lane + s.heads].long()[j // s.gate_page_tokens]
        masses[page, j % s.gate_page_tokens] += (weights * counts * seen).sum(0) / query.shape[1]


def nothing_goes(level: float, keep: bool) -> bool:
    """Whether a level lets no key go."""
    return level >= 1.0 if keep else level <= 0.0
