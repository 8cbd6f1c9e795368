"""Gates that decide at boundaries (LTP, ACC-style) in a masked model: their decisions follow from the attention itself, so
attention walks from boundary to boundary. ``lean`` or ``naive`` visibility makes no difference to them: nothing of size T x T
is held per query row but what attention itself keeps for its backward pass.

Dimension letters: B batch, T tokens, S segments, H KV heads, G query heads per KV head, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_prune.gates import BoundaryGate, LTPGate, Protection, expiry_mask
from vllm_prune.gates.boundary import walk

from .attend import attend_masked
from .gate_evaluation import past_pair_kept


@dataclass
class Walk:
    """How one layer attends in one forward pass.

    Attributes:
        gate: of the layer.
        strength, protection: as served.
        tau: temperature of LTP's soft twin; None for the hard mask, which is also ACC-style's only form.
        found: expiries int64 [B, 1, T], or log V [B, S, T] of the segments (soft).
        kept: mean visibility of past pairs, a scalar.
    """

    gate: BoundaryGate
    strength: float
    protection: Protection
    tau: Any = None
    found: Tensor | None = None
    kept: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Output [B, T, H * G, D] of query [B, H * G, T, D] and key, value [B, H, T, D]."""
        with torch.autocast(query.device.type, enabled=False):
            if self.tau is not None and isinstance(self.gate, LTPGate):
                wide = torch.float64 if value.dtype == torch.float64 else torch.float32
                out, self.kept, self.found = self.gate.soft_walk(
                    query.to(wide), key.to(wide), value.to(wide), scale, self.tau, self.protection
                )
                return out.to(value.dtype).transpose(1, 2)
            rule = self.gate.rule(self.strength, self.protection)
            with torch.no_grad():
                self.found, mass = walk(rule, query, key, scale)
                if self.gate.watcher is not None:
                    self.gate.watcher(mass)
                self.kept = past_pair_kept(self.found).mean().float()
            return attend_masked(query, key, value, scale, torch.stack([expiry_mask(row) for row in self.found]))
