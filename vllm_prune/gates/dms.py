"""Dynamic Memory Sparsification (NVIDIA / Edinburgh, arXiv 2506.05345).

One logit per token and KV head, logit = 100 g - 5. ``form`` says what g is:

- ``separate``: a linear map with its own RMSNorm (of the layer's normed input here, of its unnormed input at NVIDIA).
- ``borrowed``: a number of the query, see ``borrowed.py``.

The logit of token j + 1 decides about key j; the decision takes effect w tokens later:

    expiry_j = j + w + 1 if logit_{j+1} > 0 else NEVER                     per (layer, KV head)

Soft twin: log V[n, j] = log sigmoid(-logit_{j+1} / tau) for n - j > w, else 0.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

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

LOGIT_SCALE = 100.0
LOGIT_OFFSET = 5.0


class DMSGate(Gate):
    """DMS's gate for one layer.

    Args:
        shape: of the base model.
        delay: w, tokens that a key stays visible after the decision about it could have been made. >= 0.
        eps: of the gate's RMSNorm (separate form).
        form: ``separate`` or ``borrowed``.
    """

    method: ClassVar[str] = "dms"
    reveal: ClassVar[Reveal] = Reveal.DELAYED
    scope: Scope = Scope.KV_HEAD
    unit: ClassVar[float] = LOGIT_OFFSET

    def __init__(self, shape: GateShape, delay: int = 64, eps: float = 1e-6, form: str = "separate") -> None:
        super().__init__()
        if delay < 0:
            raise ValueError(f"delay must be >= 0, got {delay}")
        if form not in ("separate", "borrowed"):
            raise ValueError(f"form must be 'separate' or 'borrowed', got {form!r}")
        self.shape = shape
        self.delay = delay
        self.borrows = form == "borrowed"
        self.norm = nn.Identity() if self.borrows else nn.RMSNorm(shape.hidden_size, eps=eps)
        self.gate = nn.Linear(shape.hidden_size, shape.num_kv_heads, bias=self.borrows)
        for p in self.gate.parameters():
            nn.init.zeros_(p)  # every logit starts at -5: all kept

    @property
    def num_features(self) -> int:
        return self.shape.num_kv_heads

    def keep_heads(self, heads: slice) -> None:
        self.gate.weight = nn.Parameter(self.gate.weight.detach()[heads].clone())
        if self.gate.bias is not None:
            self.gate.bias = nn.Parameter(self.gate.bias.detach()[heads].clone())
        self.gate.out_features = heads.stop - heads.start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return LOGIT_SCALE * self.gate(self.norm(x)) - LOGIT_OFFSET

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        t = features.shape[0]
        expiry = torch.full((self.num_units, t), NEVER, dtype=torch.int64, device=features.device)
        shift = decision_shift(strength) * self.unit
        if math.isinf(shift) or t < 2:
            return expiry
        evict = features[1:].float().T - shift > 0  # [H, T - 1]: logit of token j + 1 about key j
        pos = torch.arange(t - 1, device=features.device)
        at = (pos + self.delay + 1).maximum(protected_from(protection, t, features.device)[:-1])
        expiry[:, :-1] = torch.where(evict & (at < NEVER), at, NEVER)
        return expiry

    def log_visibility(self, features: torch.Tensor, **soft: Any) -> torch.Tensor:
        b, t, _ = features.shape
        logit = at_least_float32(features) / soft["tau"]
        keep = F.logsigmoid(-logit[:, 1:]).transpose(1, 2)  # [B, H, T - 1]
        keep = torch.cat([keep, keep.new_zeros(b, self.num_units, 1)], dim=-1)
        pos = torch.arange(t, device=features.device)
        late = pos[:, None] - pos[None, :] > self.delay
        return torch.where(late, keep[:, :, None, :], keep.new_zeros(()))

    def visibility_rows(
        self, inputs: torch.Tensor, start: int, carry: torch.Tensor | None, **soft: Any
    ) -> tuple[torch.Tensor, None]:
        # The last key's decision is not known yet; no row here may see it anyway.
        keep = F.pad(F.logsigmoid(-inputs[:, 1:] / soft["tau"]).transpose(1, 2), (0, 1))  # [B, H, S]
        pos = torch.arange(inputs.shape[1], device=inputs.device)
        late = pos[start:, None] - pos > self.delay
        return torch.where(late, keep[:, :, None, :], 0.0), None
