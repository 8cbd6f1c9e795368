"""Dynamic Memory Sparsification (NVIDIA / Edinburgh, arXiv 2506.05345).

One logit per token and KV head, logit = scale g - offset, 100 g - 5 as published. ``form`` says what g is:

- ``separate``: a linear map with its own RMSNorm of the layer's normed input.
- ``stream``: the same of its unnormed input, as at NVIDIA.
- ``borrowed``: a number of the query, moved into the gate, see ``borrowed.py``.
- ``query``: the same number left where it is, read after q_norm and before RoPE, and set to 0 before and after RoPE, as at
  NVIDIA. ``query_kept``: and nothing is set to 0, as FastDMS trains. No parameters: the base's are the gate.

``about`` says which key a token's logit decides about. The decision takes effect w tokens later, per (layer, KV head):

    previous:    expiry_j = j + w + 1 if logit_{j+1} > 0 else NEVER
    own:         expiry_j = j + w + 1 if logit_j > 0 else NEVER            (FastDMS)

Soft twin: log V[n, j] = log sigmoid(-logit / tau) of that logit for n - j > w, else 0.
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
    Reads,
    Reveal,
    Scope,
    at_least_float32,
    decision_shift,
    protected_from,
)

LOGIT_SCALE = 100.0
LOGIT_OFFSET = 5.0
FORMS = {
    "separate": Reads.INPUT,
    "stream": Reads.STREAM,
    "borrowed": Reads.INPUT,
    "query": Reads.QUERY,
    "query_kept": Reads.QUERY,
}
"""Each form, and what it reads."""


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


class DMSGate(Gate):
    """DMS's gate for one layer.

    Args:
        shape: of the base model.
        delay: w, tokens that a key stays visible after the decision about it could have been made. >= 0.
        eps: of the gate's RMSNorm (separate, stream).
        form: see the module.
        about: ``previous`` or ``own``, the key that a token decides about.
        per: ``head``, or ``layer``: the first KV head decides for all.
        scale, offset: of the logit; offset > 0, and the unit of strength.
    """

    method: ClassVar[str] = "dms"
    reveal: ClassVar[Reveal] = Reveal.DELAYED
    scope: Scope = Scope.KV_HEAD

    def __init__(
        self,
        shape: GateShape,
        delay: int = 64,
        eps: float = 1e-6,
        form: str = "separate",
        about: str = "previous",
        per: str = "head",
        scale: float = LOGIT_SCALE,
        offset: float = LOGIT_OFFSET,
    ) -> None:
        super().__init__()
        if delay < 0:
            raise ValueError(f"delay must be >= 0, got {delay}")
        _one_of("form", form, tuple(FORMS))
        _one_of("about", about, ("previous", "own"))
        _one_of("per", per, ("head", "layer"))
        if scale == 0.0 or not offset > 0.0:
            raise ValueError(f"scale must not be 0 and offset be > 0, got {scale} and {offset}")
        self.shape = shape
        self.delay = delay
        self.form = form
        self.own = about == "own"
        self.per = per
        self.scale = scale
        self.unit = offset
        self.reads = FORMS[form]
        self.borrows = form in ("borrowed", "query")
        if self.reads is Reads.QUERY:
            return
        self.norm = nn.Identity() if self.borrows else nn.RMSNorm(shape.hidden_size, eps=eps)
        self.gate = nn.Linear(shape.hidden_size, shape.num_kv_heads, bias=self.borrows)
        for p in self.gate.parameters():
            nn.init.zeros_(p)  # every logit starts at -offset: all kept

    @property
    def num_features(self) -> int:
        return self.shape.num_kv_heads

    def keep_heads(self, heads: slice) -> None:
        if self.reads is Reads.QUERY:  # a rank's queries are those of its heads
            return
        self.gate.weight = nn.Parameter(self.gate.weight.detach()[heads].clone())
        if self.gate.bias is not None:
            self.gate.bias = nn.Parameter(self.gate.bias.detach()[heads].clone())
        self.gate.out_features = heads.stop - heads.start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers = x if self.reads is Reads.QUERY else self.gate(self.norm(x))
        logits = self.scale * numbers - self.unit
        return logits[..., :1].expand(logits.shape).contiguous() if self.per == "layer" else logits

    def misfit(self, config: Any) -> str | None:
        if self.reads is Reads.QUERY and config.num_attention_heads % self.shape.num_kv_heads:
            return f"{config.num_attention_heads} query heads are no groups of {self.shape.num_kv_heads} KV heads."
        return None

    def _about(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [..., T, H], those of the keys that have one [..., T or T - 1, H]."""
        return logits if self.own else logits[..., 1:, :]

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        t = features.shape[0]
        expiry = torch.full((self.num_units, t), NEVER, dtype=torch.int64, device=features.device)
        shift = decision_shift(strength) * self.unit
        logits = self._about(features.float()).T
        n = logits.shape[1]
        if math.isinf(shift) or n == 0:
            return expiry
        pos = torch.arange(n, device=features.device)
        at = (pos + self.delay + 1).maximum(protected_from(protection, t, features.device)[:n])
        expiry[:, :n] = torch.where((logits - shift > 0) & (at < NEVER), at, NEVER)
        return expiry

    def log_visibility(self, features: torch.Tensor, **soft: Any) -> torch.Tensor:
        return self._rows(at_least_float32(features), 0, soft["tau"])

    def visibility_rows(
        self, inputs: torch.Tensor, start: int, carry: torch.Tensor | None, **soft: Any
    ) -> tuple[torch.Tensor, None]:
        return self._rows(inputs, start, soft["tau"]), None

    def _rows(self, logits: torch.Tensor, start: int, tau: float) -> torch.Tensor:
        """log V [B, H, T - start, T] of logits [B, T, H]."""
        # The last key's decision may not be known yet; no row here may see it anyway.
        keep = F.logsigmoid(-self._about(logits) / tau).transpose(1, 2)
        keep = F.pad(keep, (0, logits.shape[1] - keep.shape[2]))  # [B, H, T]
        pos = torch.arange(logits.shape[1], device=logits.device)
        late = pos[start:, None] - pos > self.delay
        return torch.where(late, keep[:, :, None, :], keep.new_zeros(()))
