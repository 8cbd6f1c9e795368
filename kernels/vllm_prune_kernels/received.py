"""Attention that keys receive, as a second pass over the saved log-sum-exp of each query row.

What gates at boundaries ask for (``vllm_prune.gates.boundary``):

    mass_j = sum over n of c_n / (H G) * sum over query heads of exp(q_n . k_j * scale - lse_n),    j < n < expiry_j

and, with a span, n - j <= span. One program sums one block of keys over all queries: no atomics, one order of sums.
Letters: C queries, S keys, H KV heads, G query heads per KV head, D head size.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

BLOCK_KEYS, BLOCK_QUERIES = 32, 32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The interpreter (3.9) multiplies bfloat16 wrongly: it is widened there. On a GPU products of bfloat16 are exact in float32."""


@triton.jit
def _received(
    query, key, lse, position, expiry, seen, out, queries, keys, start, span, scale, query_stride, query_head_stride,
    key_stride, key_head_stride, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, WIDE)
    born = tl.load(position + j, mask=j < keys, other=2147483647)
    dies = tl.load(expiry + j, mask=j < keys, other=0)
    total = tl.zeros([KEYS], dtype=tl.float32)
    for begin in range(0, queries, QUERIES):
        i = begin + tl.arange(0, QUERIES)
        n = start + i
        sees = (born[None, :] < n[:, None]) & (n[:, None] < dies[None, :]) & (i < queries)[:, None]
        sees = sees & ((span == 0) | (n[:, None] - born[None, :] <= span))
        weight = tl.zeros([QUERIES, KEYS], dtype=tl.float32)
        for head in tl.static_range(HEADS):
            q = tl.load(query + i[:, None] * query_stride + head * query_head_stride + d[None, :],
                        mask=(i < queries)[:, None] & (d < SIZE)[None, :], other=0.0)  # fmt: skip
            k = tl.load(key + j[None, :] * key_stride + (head // GROUP) * key_head_stride + d[:, None],
                        mask=(j < keys)[None, :] & (d < SIZE)[:, None], other=0.0)  # fmt: skip
            row = tl.load(lse + i * HEADS + head, mask=i < queries, other=0.0)
            if WIDEN:
                q, k = q.to(tl.float32), k.to(tl.float32)
            logit = tl.dot(q, k, input_precision="ieee") * scale
            weight += tl.where(sees, tl.exp(tl.where(sees, logit, 0.0) - row[:, None]), 0.0)
        live = tl.load(seen + i, mask=i < queries, other=0.0)
        total += tl.sum(tl.where(sees, weight * live[:, None] / HEADS, 0.0), axis=0)
    tl.store(out + j, total, mask=j < keys)


def received(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    position: torch.Tensor,
    expiry: torch.Tensor,
    seen: torch.Tensor,
    start: int,
    scale: float,
    span: int = 0,
) -> torch.Tensor:
    """Mass that each key received from a run of queries.

    Args:
        query: [C, H * G, D]; key: [S, H, D], in any order; the last dimension contiguous.
        lse: float32 [C, H * G], log-sum-exp of each row over all that it sees, itself included.
        position, expiry: int32 [S], of each key.
        seen: float32 [C], c_n: how many keys each query sees.
        start: position of the first query; the others follow.
        scale: of the logits.
        span: how many later queries count for a key; 0: all.

    Returns:
        float32 [S].
    """
    (c, heads, size), (s, kv_heads, _) = query.shape, key.shape
    if heads % kv_heads or query.stride(-1) != 1 or key.stride(-1) != 1:
        raise ValueError("query heads must be a multiple of KV heads, and the last dimension contiguous")
    out = torch.zeros(s, dtype=torch.float32, device=query.device)
    if c == 0 or s == 0:
        return out
    _received[(triton.cdiv(s, BLOCK_KEYS),)](
        query, key, lse.contiguous(), position.contiguous(), expiry.contiguous(), seen.contiguous(), out, c, s, start, span,
        scale, query.stride(0), query.stride(1), key.stride(0), key.stride(1), HEADS=heads, GROUP=heads // kv_heads,
        SIZE=size, WIDE=max(16, triton.next_power_of_2(size)), KEYS=BLOCK_KEYS, QUERIES=BLOCK_QUERIES,
        WIDEN=INTERPRETED,
    )  # fmt: skip
    return out


def received_naive(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    position: torch.Tensor,
    expiry: torch.Tensor,
    seen: torch.Tensor,
    start: int,
    scale: float,
    span: int = 0,
) -> torch.Tensor:
    """``received`` as the module's formula has it, in float64. Arguments as there; returns float64 [S]."""
    (c, heads, _), kv_heads = query.shape, key.shape[1]
    n = torch.arange(start, start + c, device=query.device)[:, None]
    sees = (position < n) & (n < expiry)
    if span:
        sees = sees & (n - position <= span)
    keys = key.double().repeat_interleave(heads // kv_heads, dim=1)
    logits = torch.einsum("chd,shd->hcs", query.double(), keys) * scale
    weights = (logits - lse.double().T[:, :, None]).exp().mean(0) * seen.double()[:, None]
    return weights.masked_fill(~sees, 0.0).sum(0)
