"""Held-out numbers of gated models, always with the hard mask that the server applies.

Dimension letters: B batch, T tokens, L layers, E eviction units of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .masked import GatedModel, GatedOutput, Mode


def live_pairs(expiry: torch.Tensor) -> torch.Tensor:
    """Visible past pairs, n > j, that each key's expiry leaves: int64, the shape of expiry [..., T]."""
    t = expiry.shape[-1]
    pos = torch.arange(t, device=expiry.device)
    return (expiry.clamp(max=t) - pos - 1).clamp_min(0)


def past_pair_kept(expiry: torch.Tensor) -> torch.Tensor:
    """Share of past pairs (j < n) that stay visible: float64 [...] of expiry [..., T]."""
    t = expiry.shape[-1]
    return live_pairs(expiry).sum(-1).double() / max(1, t * (t - 1) // 2)


def final_live(expiry: torch.Tensor) -> torch.Tensor:
    """Share of the T keys that the last query can still see: float64 [...]."""
    return (expiry >= expiry.shape[-1]).double().mean(-1)


class AsCausalLM(nn.Module):
    """A gated model in one mode under the calling convention of a causal LM; adds up what is kept in hard mode."""

    def __init__(self, gated: GatedModel, mode: Mode, strength: float | None = None) -> None:
        super().__init__()
        self.gated, self.mode, self.strength = gated, mode, strength
        self.kept: list[torch.Tensor] = []
        self.live: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> GatedOutput:
        """Logits [B, T, V] of int64 [B, T]."""
        out: GatedOutput = self.gated(input_ids, self.mode, strength=self.strength)
        if out.expiry is not None:
            self.kept += list(past_pair_kept(out.expiry).mean(-1))  # [L] each
            self.live += list(final_live(out.expiry).mean(-1))
        return out
