"""Attention that a chunk's queries give: to themselves, in which rank, and to each key. Second pass over the lanes.

Fused kernels do not return attention weights. ``attention_received`` makes them again, ``TILE`` queries at a time;
``attention_received_naive`` is its twin. Softmax in float32 whatever the cache's dtype. Letters: C queries of the chunk, S
keys of the lane of which the last C are the chunk's own, H KV heads, G query heads a KV head, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE = 128


@dataclass
class Received:
    """Attention weights of a chunk's rows, averaged over all H * G query heads.

    Attributes:
        own: float32 [C], A[i, i]: weight of each query's own key.
        rank: int64 [C], keys of the row with more weight than its own: 0 when it is the strongest. Empty if not asked.
        columns: float32 [S], attention each key received from the chunk's queries, summed over them. Empty if not asked.
    """

    own: torch.Tensor
    rank: torch.Tensor
    columns: torch.Tensor


def attention_received(
    query: torch.Tensor, keys: list[torch.Tensor], scale: float, rank: bool = True, columns: bool = False
) -> Received:
    """Own weights, ranks and column sums of a chunk's causal attention.

    Args:
        query: [C, H * G, D], rotated.
        keys: per KV head, [S, D]: everything that the chunk's last query sees, the chunk's own keys last and in order.
        scale: of the logits.
        rank, columns: what to compute beside the own weights.
    """
    c, heads = query.shape[0], len(keys)
    s, size = keys[0].shape
    past, group = s - c, query.shape[1] // heads
    own = torch.empty(c)
    ranks = torch.empty(c if rank else 0, dtype=torch.int64)
    received = torch.zeros(s if columns else 0)
    wide = [k.float() for k in keys]
    for begin in range(0, c, TILE):
        end = min(begin + TILE, c)
        seen, n = past + end, end - begin
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        mean = torch.zeros(n, seen)
        for h in range(heads):
            q = query[begin:end, h * group : (h + 1) * group].float() * scale
            logits = (q.reshape(n * group, size) @ wide[h][:seen].T).view(n, group, seen)
            logits[:, :, seen - n :].masked_fill_(future[:, None], float("-inf"))
            mean += logits.softmax(-1).sum(1)
        mean /= heads * group
        mine = mean.diagonal(seen - n)
        own[begin:end] = mine
        if rank:
            ranks[begin:end] = (mean > mine[:, None]).sum(-1)
        if columns:
            received[:seen] += mean.sum(0)
    return Received(own, ranks, received)


def attention_received_naive(query: torch.Tensor, keys: list[torch.Tensor], scale: float) -> Received:
    """All of it, one query at a time. Arguments as ``attention_received``."""
    c, s = query.shape[0], keys[0].shape[0]
    group = query.shape[1] // len(keys)
    own, rank, columns = [], [], torch.zeros(s)
    for i in range(c):
        last = s - c + i
        rows = [
            (keys[h][: last + 1].double() @ query[i, h * group + g].double() * scale).softmax(-1)
            for h in range(len(keys))
            for g in range(group)
        ]
        row = torch.stack(rows).mean(0)
        own.append(row[last])
        rank.append((row > row[last]).sum())
        columns[: last + 1] += row.float()
    return Received(torch.stack(own).float(), torch.stack(rank), columns)
