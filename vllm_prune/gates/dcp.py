"""Dynamic Context Pruning (Anagnostidis et al., NeurIPS 2023, arXiv 2305.15805, section 3).

Per layer, two bias-free projections to r numbers, q'_n = X_n W_q and k'_j = X_j W_k, and one bias beta:

    s[n, j] = <q'_n, k'_j> / sqrt(r) + beta            query n keeps key j iff s[n, j] > 0
    p[n, j] = sigma_alpha(s[n, j])                      the soft decision, first coordinate of alpha-entmax on (s, 0)
    V[n, j] = prod_{m = j+1..n} p[m, j]                 visibility; the product includes m = n

so the current query already denies the keys it drops, a token never drops itself, and visibility only falls.
Served by query: k' is remembered per token, expiry_j = min{n > j : s[n, j] <= 0}.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from vllm_prune.gates.base import NEVER, Gate, GateShape, Protection, Reveal, Scope, decision_shift, protected_from
from vllm_prune.gates.entmax import log_sigma_alpha

LOG_FLOOR = -30.0
"""Clamp of summed log visibility: exp(-30) is nothing to a softmax, and finite in every dtype (1e-40 is not)."""


class DCPGate(Gate):
    """DCP's gate for one layer.

    Args:
        shape: of the base model.
        rank: r, width of the interaction vectors. Must be positive.
        beta: initial bias; positive keeps at first.
    """

    method: ClassVar[str] = "dcp"
    reveal: ClassVar[Reveal] = Reveal.BY_QUERY
    scope: ClassVar[Scope] = Scope.LAYER

    def __init__(self, shape: GateShape, rank: int = 32, beta: float = 2.0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}")
        self.shape = shape
        self.rank = rank
        self.qk = nn.Linear(shape.hidden_size, 2 * rank, bias=False)
        nn.init.normal_(self.qk.weight, std=0.02)
        self.beta = nn.Parameter(torch.tensor(float(beta)))

    @property
    def num_features(self) -> int:
        return 2 * self.rank

    @property
    def num_remembered(self) -> int:
        return self.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qk(x)

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """s[n, j] of whole sequences.

        Args:
            features: [..., T, 2r] (q', then k').

        Returns:
            float32 [..., T, T] (query, key).
        """
        q, k = features.float().split(self.rank, dim=-1)
        return q @ k.transpose(-1, -2) / math.sqrt(self.rank) + self.beta.float()

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        t = features.shape[0]
        expiry = torch.full((1, t), NEVER, dtype=torch.int64, device=features.device)
        shift = decision_shift(strength) * self.unit
        if math.isinf(shift):
            return expiry
        q, k = features.float().split(self.rank, dim=-1)
        first = protected_from(protection, t, features.device)
        pos = torch.arange(t, device=features.device)
        for start in range(0, t, 256):  # 256 queries at a time: bounded memory, earlier ones win
            rows = pos[start : start + 256]
            s = q[rows] @ k.T / math.sqrt(self.rank) + self.beta.float() + shift
            drop = (s <= 0) & (rows[:, None] >= first[None, :])
            crossed = drop.any(0)
            hit = rows[drop.to(torch.int8).argmax(0)]
            expiry[0] = torch.where(crossed & (expiry[0] == NEVER), hit, expiry[0])
        return expiry

    def log_visibility(self, features: torch.Tensor, **soft: float) -> torch.Tensor:
        q, k = features.float().split(self.rank, dim=-1)
        s = k @ q.transpose(-1, -2) / math.sqrt(self.rank) + self.beta.float()  # [B, T, T] (key, query)
        t = s.shape[-1]
        past = torch.ones(t, t, dtype=torch.bool, device=s.device).triu(1)
        log_p = log_sigma_alpha(s, soft["alpha"]).masked_fill(~past, 0.0)
        return log_p.cumsum(dim=-1).clamp_min(LOG_FLOOR).transpose(-1, -2)[:, None]  # over contiguous queries: faster
