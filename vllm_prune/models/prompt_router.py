"""Serves gates that decide about whole prompts (``gates/prompt.py``): each layer runs on who is left of the step's prompts.

After a layer's attention the survivors' scores are computed from their queries and the keys in their lanes, and the layer's
gate says who goes on to the next. The prompt's own length comes with the step's grants: what a preempted request had
generated is computed again in the same step, but is no part of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_prune.gates.prompt import PromptGate, received
from vllm_prune.models.routing import Router

if TYPE_CHECKING:
    from vllm_prune.attention.state import PruneAttentionMetadata
    from vllm_prune.config import DropGateConfig


class PromptRouter(Router):
    """See the module.

    Args:
        gates: loaded, one a layer.
        section: strength and protection, as served.
    """

    def __init__(self, gates: Sequence[PromptGate], section: DropGateConfig) -> None:
        super().__init__()
        self.gates, self.strength, self.protection = gates, section.strength, section.protection
        self._left: np.ndarray | None = None

    def keep(
        self, layer: int, step: PruneAttentionMetadata, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> np.ndarray | None:
        if layer == 0:
            prompts = _prompts(step)
            self._left = None
            for i in range(step.chunks.count):
                start, count = int(step.chunks.positions[i]), int(step.chunks.tokens[i])
                prompt = int(prompts[step.chunks.slots[i]])
                if start < prompt and (start > 0 or count < prompt):
                    raise RuntimeError(f"vllm-prune: tokens {start} to {start + count} of {prompt} came as a chunk")
                if start < prompt and self._left is None:
                    self._left = np.ones(step.num_actual_tokens, np.bool_)
        return self._left

    def observe(self, layer: int, call: PruneAttentionMetadata, query: torch.Tensor) -> None:
        if self._left is None or layer == len(self.gates) - 1:
            return
        rows, left = call.chunks, self._left.copy()
        for i in range(rows.count):
            slot, first, count = (int(x[i]) for x in (rows.slots, rows.first, rows.tokens))
            places = np.arange(first, first + count) if call.kept is None else call.kept[first : first + count]
            begin = int(rows.positions[i])
            at = np.arange(begin, begin + count) if call.positions is None else call.positions[first : first + count]
            prompt = int(_prompts(call)[slot])
            n = int((at < prompt).sum())
            if n > 1:
                impl: Any = self.impls[layer]
                key = torch.stack([lane[:n] for lane in impl.lane_keys(slot)], dim=1)
                scores = received(query[first : first + n], key, impl.scale)
                positions = torch.from_numpy(at[:n].astype(np.int64))
                stay = self.gates[layer].survives(scores, positions, prompt, self.strength, self.protection)
                left[places[:n]] = stay.numpy()
        self._left = left


def _prompts(step: PruneAttentionMetadata) -> np.ndarray:
    """int32 by slot: tokens of each request's prompt."""
    assert step.state.store is not None
    return step.state.store.lanes.prompt
