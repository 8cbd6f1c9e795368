"""The naive twin of a whole gated attention layer: one sequence, all at once, no lanes, no pages, no chunks."""

from __future__ import annotations

import torch

from vllm_prune.gates import BoundaryGate, Gate, Protection, expiry_mask
from vllm_prune.gates.boundary import naive_walk


def reference_layer(
    gate: Gate | None,
    features: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    strength: float = 1.0,
    protection: Protection | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a sequence under a gate's hard expiries.

    Args:
        gate: None attends to everything.
        features: [T, F] of the gate.
        query: [T, H * G, D]; key, value: [T, H, D].
        scale: of the logits.
        strength, protection: as in ``Gate.expiry``.

    Returns:
        [T, H * G, D] in float32, and the expiries int64 [E, T] (None without a gate).
    """
    t, heads, _ = key.shape
    group = query.shape[1] // heads
    k = key.float().repeat_interleave(group, dim=1).transpose(0, 1)
    v = value.float().repeat_interleave(group, dim=1).transpose(0, 1)
    logits = query.float().transpose(0, 1) @ k.transpose(1, 2) * scale
    if gate is None or features is None:
        visible = torch.ones(1, t, t, dtype=torch.bool).tril()
        expiry = None
    else:
        if isinstance(gate, BoundaryGate):
            rule = gate.rule(strength, protection or Protection())
            expiry = naive_walk(rule, query.transpose(0, 1)[None], key.transpose(0, 1)[None], scale)[0]
        else:
            expiry = gate.expiry(features, strength, protection or Protection())
        visible = expiry_mask(expiry)
    visible = visible.expand(heads, t, t).repeat_interleave(group, dim=0)
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1), expiry
