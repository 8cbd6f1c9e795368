"""Gates without parameters: their hard mask as log visibility, so that a base model can be fine-tuned under it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_prune.gates.base import Gate, Protection
from vllm_prune.gates.dcp import LOG_FLOOR


def hard_log_visibility(gate: Gate, features: torch.Tensor, soft: Mapping[str, float], start: int = 0) -> torch.Tensor:
    """0 where a past key is visible, LOG_FLOOR where it has expired. No gradient reaches the gate.

    Args:
        gate: whose expiries depend on nothing but the position.
        features: [B, T, F]; only B, T and the precision matter.
        soft: ``strength`` (default 1), ``sinks`` and ``window`` (default 0) as they will be served; temperatures are
            accepted and change nothing.
        start: first query row.

    Returns:
        float32 (float64 for float64 features) [B, E, T - start, T] (query, key), one matrix seen B times.
    """
    b, t, _ = features.shape
    protection = Protection(int(soft.get("sinks", 0)), int(soft.get("window", 0)))
    expiry = gate.expiry(features[0], float(soft.get("strength", 1.0)), protection)[:, None, :]  # [E, 1, T]
    query = torch.arange(start, t, device=features.device)[:, None]
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    log_v = torch.zeros(expiry.shape[0], t - start, t, dtype=dtype, device=features.device)
    return log_v.masked_fill(expiry <= query, LOG_FLOOR).expand(b, -1, -1, -1)  # expiry > j: past keys alone can expire


class HardGate(Gate):
    """A gate whose expiries depend on nothing but the position: F = 0, nothing to train, and nothing to soften.

    ``soft`` of both forms of log visibility: see ``hard_log_visibility``.
    """

    @property
    def num_features(self) -> int:
        return 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :0]

    def log_visibility(self, features: torch.Tensor, **soft: float) -> torch.Tensor:
        return hard_log_visibility(self, features, soft)

    def visibility_rows(
        self, inputs: torch.Tensor, start: int, carry: torch.Tensor | None, **soft: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return hard_log_visibility(self, inputs, soft, start), None
