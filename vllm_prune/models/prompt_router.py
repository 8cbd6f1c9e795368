"""Serves gates that decide about whole prompts (``gates/prompt.py``): each layer runs on who is left of the step's prompts.

After a layer's attention the survivors' scores are computed from their queries and the keys in their lanes, and the layer's
gate says who goes on to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_prune.gates.prompt import PromptGate, received
from vllm_prune.models.prompt_rows import has_prompt, prompt_rows
from vllm_prune.models.routing import Router

if TYPE_CHECKING:
    from vllm_prune.attention.state import PruneAttentionMetadata
    from vllm_prune.config import DropGateConfig


class PromptRouter(Router):
    """See the module.

    Args:
        gates: loaded, one a layer.
        section: protection, as served; strengths are the requests'.
    """

    def __init__(self, gates: Sequence[PromptGate], section: DropGateConfig) -> None:
        super().__init__()
        self.gates, self.protection = gates, section.protection
        self._left: np.ndarray | None = None

    def keep(
        self, layer: int, step: PruneAttentionMetadata, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> np.ndarray | None:
        if layer == 0:
            self._left = np.ones(step.num_actual_tokens, np.bool_) if has_prompt(step) else None
        return self._left

    def observe(self, layer: int, call: PruneAttentionMetadata, query: torch.Tensor) -> None:
        if self._left is None or layer == len(self.gates) - 1:
            return
        left, impl = self._left.copy(), self.impls[layer]
        for row in prompt_rows(call):
            n = len(row.places)
            key = torch.stack([lane[:n] for lane in impl.lane_keys(row.slot)], dim=1)
            scores = received(query[row.first : row.first + n], key, impl.scale)
            positions = torch.from_numpy(row.positions)
            gate: Any = self.gates[layer]
            if row.strength > 0.0:
                left[row.places] = gate.survives(scores, positions, row.prompt, row.strength, self.protection).numpy()
        self._left = left
