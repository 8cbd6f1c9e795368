"""Learned Token Pruning (Kim et al., KDD 2022, arXiv 2107.00910, section 3), in a causal form of ours: by age.

One learned threshold per layer. The published method prunes tokens of an encoder by the attention that they receive from
all queries; a causal decoder has no such moment. Here key j is judged once, by its first w later queries:

    s_j = mean over query heads and n = j + 1 .. j + w of A[n, j] * c_n     c_n keys that query n sees; 1 = uniform share
    m_j = the first multiple of the grid with m_j - j > w                   (or > the protected window, if that is wider)
    expiry_j = m_j if s_j < theta_l * strength else NEVER                   per layer

The score neither depends on the length nor on padding. theta_l starts at theta_final * l / L as published, layer 0 at 0; it
is trained too, unlike there. Soft twin: log V[n, j] = log sigmoid((s_j - theta_l) / tau) for n >= m_j, else 0, with s_j from
the softly masked attention itself. (The published soft mask scales hidden states; under the norms of a decoder that is undone.)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from vllm_prune.gates.base import GateShape, Protection
from vllm_prune.gates.boundary import LEAST_GRID, MOST_GRID, BoundaryGate, BoundaryRule


class LTPGate(BoundaryGate):
    """LTP's threshold for one layer, by age.

    Args:
        shape: of the base model.
        span: w, later queries by which a key is judged. >= 1.
        grid: tokens between positions at which keys are dropped.
        theta: the last layer's initial threshold would be theta * (L - 1) / L; 1 is a uniform share of attention. >= 0.
    """

    method: ClassVar[str] = "ltp"

    def __init__(self, shape: GateShape, span: int = 64, grid: int = 32, theta: float = 0.1) -> None:
        super().__init__()
        if span < 1:
            raise ValueError(f"span must be >= 1, got {span}")
        if not LEAST_GRID <= grid <= MOST_GRID:
            raise ValueError(f"grid must be between {LEAST_GRID} and {MOST_GRID}, got {grid}")
        if not theta >= 0.0:
            raise ValueError(f"theta must be >= 0, got {theta}")
        self.shape = shape
        self.span = span
        self.grid = grid
        self.final = float(theta)
        self.theta = nn.Parameter(torch.tensor(self.final))

    def at_layer(self, index: int) -> LTPGate:
        with torch.no_grad():
            self.theta.fill_(self.final * index / self.shape.num_layers)
        return self

    def rule(self, strength: float, protection: Protection) -> BoundaryRule:
        after = max(self.span, protection.window)
        threshold = float(self.theta.detach().float()) * strength
        return BoundaryRule(self.grid, self.span, after, protection.sinks, threshold=threshold)

    def soft_walk(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        tau: float | torch.Tensor,
        protection: Protection,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention under the soft twin, segment by segment of the grid: within one, visibility is a number a key.

        Gradients reach theta, and through the scores the attention weights; c_n is taken as it is.

        Args:
            query: [B, H * G, T, D]; key, value: [B, H, T, D], float32 or float64.
            scale: of the logits.
            tau: of the sigmoid, in uniform shares.
            protection: as served.

        Returns:
            Output [B, H * G, T, D], the mean visibility of past pairs (a scalar), and log V of the segments' queries
            [B, segments, T] (0 for keys from the segment's first on).
        """
        b, heads, t, d = query.shape
        h, g = key.shape[1], self.grid
        rule = self.rule(1.0, protection)
        grouped = query.reshape(b, h, heads // h, t, d)
        pos = torch.arange(t, device=query.device)
        mass, log_v = query.new_zeros(b, t), query.new_zeros(b, t)
        outputs, rows = [], []
        kept = query.new_zeros(())
        for start in range(0, t, g):
            stop = min(start + g, t)
            r = stop - start
            judged = slice(max(rule.sinks, start - rule.after - g, 0), max(0, start - rule.after))
            if judged.start < judged.stop:
                keep = F.logsigmoid((mass[:, judged] / self.span - self.theta.to(mass.dtype)) / tau)
                log_v = torch.cat([log_v[:, : judged.start], keep, log_v[:, judged.stop :]], dim=-1)
            past = log_v[:, :start].exp().sum(-1)  # [B]
            kept = kept + (r * past + r * (r - 1) / 2).sum()
            distance = pos[start:stop, None] - pos[:stop]
            logits = grouped[:, :, :, start:stop] @ key[:, :, None, :stop].transpose(-1, -2) * scale
            logits = logits + log_v[:, None, None, None, :stop]
            weights = logits.masked_fill(distance < 0, float("-inf")).softmax(dim=-1)  # [B, H, G, R, S]
            outputs.append((weights @ value[:, :, None, :stop]).flatten(1, 2))
            first = max(0, start - self.span)  # no older key is judged by these queries
            counts = (distance[:, first:] > 0) & (distance[:, first:] <= self.span)
            seen = past.detach()[:, None] + pos[:r] + 1  # [B, R]
            share = weights[..., first:].mean(dim=(1, 2)) * seen[..., None] * counts
            mass = mass + F.pad(share.sum(dim=1), (first, t - stop))
            rows.append(log_v)
        return torch.cat(outputs, dim=2), kept / max(1, b * (t * (t - 1) // 2)), torch.stack(rows, dim=1)
