"""Dynamic Context Pruning (Anagnostidis et al., NeurIPS 2023, arXiv 2305.15805, section 3).

Per layer, two bias-free projections to r numbers, q'_n = X_n W_q and k'_j = X_j W_k, and one bias beta:

    s[n, j] = <q'_n, k'_j> / sqrt(r) + beta            query n keeps key j iff s[n, j] > 0
    p[n, j] = sigma_alpha(s[n, j])                      the soft decision, first coordinate of alpha-entmax on (s, 0)
    V[n, j] = prod_{m = j+1..n} p[m, j]                 visibility; the product includes m = n

With scope ``kv_head`` all of this holds for each KV head, with r / H in place of r.

So the current query already denies the keys it drops, a token never drops itself, and visibility only falls.
Served by query: k' is remembered per token, expiry_j = min{n > j : s[n, j] <= 0}.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_prune.gates.base import (
    NEVER,
    Gate,
    GateShape,
    Protection,
    Reveal,
    Scope,
    at_least_float32,
    decision_shift,
    protected_from,
)
from vllm_prune.gates.entmax import log_sigma_alpha

LOG_FLOOR = -30.0
"""Clamp of summed log visibility: exp(-30) is nothing to a softmax, and finite in every dtype (1e-40 is not)."""


class DCPGate(Gate):
    """DCP's gate for one layer.

    Args:
        shape: of the base model.
        rank: r, width of the interaction vectors: of the layer, or of all its KV heads together. Positive.
        beta: initial bias; positive keeps at first.
        scope: ``layer``, one decision for all heads as published, or ``kv_head``: each KV head has r / H numbers, a beta
            of its own, and so its own expiries (ours; H must divide r).
    """

    method: ClassVar[str] = "dcp"
    reveal: ClassVar[Reveal] = Reveal.BY_QUERY
    scope: Scope = Scope.LAYER
    row_carry: ClassVar[bool] = True

    def __init__(self, shape: GateShape, rank: int = 32, beta: float = 2.0, scope: str = "layer") -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}")
        if scope not in set(Scope):
            raise ValueError(f"scope must be 'layer' or 'kv_head', got {scope!r}")
        self.shape = shape
        self.rank = rank
        self.scope = Scope(scope)
        if rank % self.num_units:
            raise ValueError(f"rank {rank} does not divide among {self.num_units} KV heads")
        self.qk = nn.Linear(shape.hidden_size, 2 * rank, bias=False)
        nn.init.normal_(self.qk.weight, std=0.02)
        self.beta = nn.Parameter(
            torch.full((), beta) if self.scope is Scope.LAYER else torch.full((self.num_units,), beta)
        )

    @property
    def num_features(self) -> int:
        return 2 * self.rank

    @property
    def projection(self) -> nn.Linear:
        return self.qk

    @property
    def num_remembered(self) -> int:
        return self.rank

    @property
    def unit_rank(self) -> int:
        """r / E: numbers of one decision's interaction vectors."""
        return self.rank // self.num_units

    def keep_heads(self, heads: slice) -> None:
        weight = self.qk.weight.detach().unflatten(0, (2, self.num_units, self.unit_rank))[:, heads].flatten(0, 2)
        self.rank = self.unit_rank * (heads.stop - heads.start)
        self.qk.weight, self.qk.out_features = nn.Parameter(weight.clone()), 2 * self.rank
        self.beta = nn.Parameter(self.beta.detach()[heads].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qk(x)

    def _by_unit(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T, r] to [..., E, T, r / E]."""
        return x.unflatten(-1, (self.num_units, self.unit_rank)).transpose(-2, -3)

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """s[n, j] of whole sequences.

        Args:
            features: [..., T, 2r] (q', then k', each by KV head if there are several units).

        Returns:
            float32 (float64 for float64 features) [..., E, T, T] (query, key).
        """
        q, k = (self._by_unit(x) for x in at_least_float32(features).split(self.rank, dim=-1))
        return q @ k.transpose(-1, -2) / math.sqrt(self.unit_rank) + self.beta.to(q.dtype).reshape(-1, 1, 1)

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        t = features.shape[0]
        expiry = torch.full((self.num_units, t), NEVER, dtype=torch.int64, device=features.device)
        shift = decision_shift(strength) * self.unit
        if math.isinf(shift):
            return expiry
        q, k = (self._by_unit(x) for x in features.float().split(self.rank, dim=-1))  # [E, T, r / E]
        bias = self.beta.float().reshape(-1, 1, 1) + shift
        first = protected_from(protection, t, features.device)
        pos = torch.arange(t, device=features.device)
        for start in range(0, t, 256):  # 256 queries at a time: bounded memory, earlier ones win
            rows = pos[start : start + 256]
            s = q[:, rows] @ k.transpose(-1, -2) / math.sqrt(self.unit_rank) + bias
            drop = (s <= 0) & (rows[:, None] >= first[None, :])
            hit = rows[drop.to(torch.int8).argmax(1)]
            expiry = torch.where(drop.any(1) & (expiry == NEVER), hit, expiry)
        return expiry

    def log_visibility(self, features: torch.Tensor, **soft: Any) -> torch.Tensor:
        q, k = (self._by_unit(x) for x in at_least_float32(features).split(self.rank, dim=-1))
        s = k @ q.transpose(-1, -2) / math.sqrt(self.unit_rank) + self.beta.to(q.dtype).reshape(
            -1, 1, 1
        )  # (key, query)
        t = s.shape[-1]
        past = torch.ones(t, t, dtype=torch.bool, device=s.device).triu(1)
        log_p = log_sigma_alpha(s, soft["alpha"], soft.get("leak", 0.0)).masked_fill(~past, 0.0)
        return log_p.cumsum(dim=-1).clamp_min(LOG_FLOOR).transpose(-1, -2)  # over contiguous queries: faster

    def soft_inputs(self, features: torch.Tensor) -> torch.Tensor:
        x = at_least_float32(features)
        return torch.cat([x, self.beta.to(x.dtype).reshape(-1).expand(*x.shape[:-1], self.num_units)], dim=-1)

    def visibility_rows(
        self, inputs: torch.Tensor, start: int, carry: torch.Tensor | None, **soft: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The carry is the sum of log p per key over the rows so far, not clamped."""
        assert carry is not None
        r, t = self.rank, inputs.shape[1]
        q, k = self._by_unit(inputs[:, start:, :r]), self._by_unit(inputs[:, :, r : 2 * r])
        beta = inputs[:, start:, 2 * r :].transpose(1, 2)[:, :, None]  # [B, E, 1, R]
        s = k @ q.transpose(-1, -2) / math.sqrt(self.unit_rank) + beta  # [B, E, S, R] (key, query)
        pos = torch.arange(t, device=s.device)
        past = pos[:, None] < pos[start:]
        log_p = torch.where(past, log_sigma_alpha(s, soft["alpha"], soft.get("leak", 0.0)), 0.0)
        total = log_p.cumsum(dim=-1) + carry[..., None]
        return total.clamp_min(LOG_FLOOR).transpose(-1, -2), total[..., -1]
