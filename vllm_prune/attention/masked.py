"""Prefill attention with the expiry mask, CPU: masked SDPA over gathered survivors and the chunk's own keys.

``tiled_attention`` is what serves, ``masked_attention`` its naive twin. FlashAttention-like kernels know causal masks only;
inside a chunk each key has its own last query. Letters: C tokens of the chunk, P live keys of the past, H KV heads, G query
heads a KV head, D head size, E eviction units (1 or H).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

TILE = 128
"""Queries of a chunk that attend together where keys expire inside it."""


def gather_lanes(
    kv: torch.Tensor, pages: torch.Tensor, length: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of lanes of one length, in lane order.

    Args:
        kv: [pages, 2 N D], the flat cache; a page is K as [D, N], then V as [N, D].
        pages: int [H, n], the lanes' pages.
        length: P, tokens in each.
        head_size: D.

    Returns:
        key [H, P, D], value [H, P, D].
    """
    lanes = pages.shape[0]
    page = kv.index_select(0, pages.flatten())  # whole rows: a seventh of the time of kv[pages]
    n = page.shape[1] // (2 * head_size)
    key = page[:, : n * head_size].view(-1, head_size, n).transpose(1, 2).reshape(lanes, -1, head_size)
    value = page[:, n * head_size :].reshape(lanes, -1, head_size)
    return key[:, :length], value[:, :length]


def gather_keys(kv: torch.Tensor, pages: torch.Tensor, length: int, head_size: int) -> torch.Tensor:
    """Keys [P, D] of one lane, in lane order; arguments as ``gather_lanes``, but pages [n]."""
    page = kv.index_select(0, pages)
    n = page.shape[1] // (2 * head_size)
    return page[:, : n * head_size].view(-1, head_size, n).transpose(1, 2).reshape(-1, head_size)[:length]


def masked_attention(
    query: torch.Tensor,
    past: list[tuple[torch.Tensor, torch.Tensor]],
    key: torch.Tensor,
    value: torch.Tensor,
    past_expiry: torch.Tensor,
    chunk_expiry: torch.Tensor,
    start: int,
    scale: float,
) -> torch.Tensor:
    """Attention of a chunk's queries over live past keys and the chunk's keys, each up to its expiry.

    Args:
        query: [C, H * G, D].
        past: per KV head, key and value [P_h, D].
        key, value: [C, H, D], the chunk's own.
        past_expiry: int [E, P max], chunk_expiry: int [E, C]: absolute positions.
        start: position of the chunk's first token.
        scale: of the logits.

    Returns:
        [C, H * G, D]; 0 for a query that sees no key, not even its own.
    """
    c, heads = key.shape[:2]
    group = query.shape[1] // heads
    now = torch.arange(start, start + c)[:, None]
    causal = torch.ones(c, c, dtype=torch.bool).tril()
    out = torch.empty_like(query)
    mask = None
    for h in range(heads):
        past_key, past_value = past[h]
        p = past_key.shape[0]
        if mask is None or past_expiry.shape[0] > 1:
            unit = h if past_expiry.shape[0] > 1 else 0
            visible_past = now < past_expiry[unit, :p][None, :]
            mask = torch.cat([visible_past, causal & (now < chunk_expiry[unit][None, :])], dim=1)
        k = torch.cat([past_key, key[:, h]]).expand(1, group, -1, -1)
        v = torch.cat([past_value, value[:, h]]).expand(1, group, -1, -1)
        q = query[:, h * group : (h + 1) * group].transpose(0, 1)[None]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        o = o.masked_fill(~mask.any(1)[:, None], 0.0)
        out[:, h * group : (h + 1) * group] = o[0].transpose(0, 1)
    return out


def tiled_attention(
    query: torch.Tensor,
    past: list[tuple[torch.Tensor, torch.Tensor]],
    key: torch.Tensor,
    value: torch.Tensor,
    past_expiry: torch.Tensor,
    chunk_expiry: torch.Tensor,
    start: int,
    scale: float,
) -> torch.Tensor:
    """``masked_attention``, ``TILE`` queries at a time over the keys that some query of the tile still sees: what the
    gates drop inside a chunk is not computed either. Arguments and result as there, but for ``past``: per unit, key and
    value [H / E, P_e, D] of the heads that share its decisions."""
    count, heads = key.shape[:2]
    group, units = query.shape[1] // heads, len(past)
    mine = heads // units
    now = torch.arange(start, start + count)
    out = torch.empty_like(query)
    for unit, (past_key, past_value) in enumerate(past):
        own = slice(unit * mine, (unit + 1) * mine)
        keys = torch.cat([past_key, key[:, own].transpose(0, 1)], dim=1)
        values = torch.cat([past_value, value[:, own].transpose(0, 1)], dim=1)
        length = past_key.shape[1]
        expiry = torch.cat([past_expiry[unit, :length], chunk_expiry[unit]])
        born = torch.cat([torch.full((length,), -1), now])
        for begin in range(0, count, TILE):
            end = min(begin + TILE, count)
            into = out[begin:end, own.start * group : own.stop * group].view(end - begin, mine, group, -1)
            seen = (expiry[: length + end] > start + begin).nonzero()[:, 0]
            if not len(seen):
                into.zero_()
                continue
            rows = now[begin:end, None]
            hidden = (rows >= expiry[seen]) | (rows < born[seen])
            mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
            q = query[begin:end, own.start * group : own.stop * group].view(end - begin, mine, group, -1)
            # The query heads of a KV head are rows of one product.
            q = q.permute(1, 2, 0, 3).reshape(mine, 1, group * (end - begin), -1)
            k, v = (x.index_select(1, seen)[:, None] for x in (keys, values))
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(group, 1), scale=scale)
            o = o.view(mine, group, end - begin, -1).masked_fill_(hidden.all(1)[:, None], 0.0)
            into.copy_(o.permute(2, 0, 1, 3))
    return out
