"""Attention under a soft bias or a hard mask, and what a mask keeps: the plain forms, which hold T x T.

Dimension letters: B batch, T tokens, H KV heads, G query heads per KV head, D head size, E eviction units of a layer (1 or H).
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_prune.gates.base import at_least_float32


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, bias: torch.Tensor
) -> torch.Tensor:
    """Causal grouped-query attention with a differentiable bias, softmax in float32.

    Args:
        query: [B, H * G, T, D]; key, value: [B, H, T, D].
        scaling: of the logits.
        bias: float32 [B, E, T, T] (query, key), added to the scaled logits.

    Returns:
        [B, T, H * G, D].
    """
    b, heads, t, d = query.shape
    h = key.shape[1]
    grouped = query.reshape(b, h, heads // h, t, d)
    logits = (
        at_least_float32(grouped @ key[:, :, None].transpose(-1, -2)) * scaling + bias[:, :, None]
    )  # [B, H, G, T, T]
    future = torch.ones(t, t, dtype=torch.bool, device=query.device).triu(1)
    out = logits.masked_fill(future, float("-inf")).softmax(dim=-1).to(value.dtype) @ value[:, :, None]
    return out.reshape(b, heads, t, d).transpose(1, 2)


def attend_masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention under a bool mask [B, E, T, T] that is causal by itself, or just causal, as ``attend``."""
    heads = query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
    out = scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # a head that sees no key says nothing
    return out.transpose(1, 2)


def past_mean(log_visibility: torch.Tensor) -> torch.Tensor:
    """Mean visibility over past pairs j < n of [B, E, T, T]: the diagonal and the future do not count."""
    b, e, t, _ = log_visibility.shape
    past = torch.ones(t, t, dtype=torch.bool, device=log_visibility.device).tril(-1)
    return torch.where(past, log_visibility.exp(), 0.0).sum() / max(1, b * e * t * (t - 1) // 2)
