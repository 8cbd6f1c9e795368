"""Serves gates that route by facts of whole prompts (FTP's prompt mode): which tokens of the step's prompts each layer runs on.

As ``GateRouter``, but score and rank come from what the prompt's later tokens gave (``gates/routing.py``). A step without a
prompt routes nothing and pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_prune.attention.subset import token_places
from vllm_prune.gates.prompt import larger_share, received
from vllm_prune.models.prompt_rows import has_prompt, prompt_lengths, prompt_rows
from vllm_prune.models.routing import GateRouter

if TYPE_CHECKING:
    from vllm_prune.attention.state import PruneAttentionMetadata


class PromptFactsRouter(GateRouter):
    """See the module. Arguments as ``GateRouter``."""

    def keep(
        self, layer: int, step: PruneAttentionMetadata, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> np.ndarray | None:
        if "prompts" not in step.notes:
            slots, _ = token_places(step)
            step.notes["prompts"] = torch.from_numpy(prompt_lengths(step)[slots]) if has_prompt(step) else None
        if step.notes["prompts"] is None:
            return None
        return super().keep(layer, step, hidden, residual)

    def observe(self, layer: int, call: PruneAttentionMetadata, query: torch.Tensor) -> None:
        if (call.parent or call).notes["prompts"] is not None:
            super().observe(layer, call, query)

    def seen(
        self, layer: int, call: PruneAttentionMetadata, query: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        impl, ran = self.impls[layer], (call.parent or call).notes["ran"]
        for row in prompt_rows(call):
            n = len(row.places)
            places = torch.from_numpy(row.places)
            queries = query[row.first : row.first + n]
            key = torch.stack([lane[:n] for lane in impl.lane_keys(row.slot)], dim=1)
            own = torch.arange(n)
            if ran is not None and self.keeps_kv:  # all keys are there, but not all tokens ask
                own = torch.from_numpy(np.flatnonzero(ran[row.places]))
                queries, places = queries[own], places[own]
            score = received(queries, key, impl.scale, own)
            yield places, torch.stack([score, larger_share(score, torch.ones_like(score, dtype=torch.bool))], dim=-1)
