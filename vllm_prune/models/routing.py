"""Token routing: a decoder layer runs on a subset of the step's tokens; the others bypass it and its computation.

A skipped token leaves the layer as it came in, x_out = x_in, and has no KV there: expiry = its own position. vLLM keeps
the stream in two parts, x = hidden + residual; both are left as they are, so that bypassing rounds nothing.

The number of kept tokens is known at run time only, so methods that route run without torch.compile (``hook.py`` sees to
it). What a layer runs on it keeps: rules of by-query or delayed gates do not apply to a routed call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context

from vllm_prune.attention.subset import subset, token_places

if TYPE_CHECKING:
    from vllm_prune.attention.cpu import PruneCPUImpl
    from vllm_prune.attention.state import PruneAttentionMetadata


class Router(ABC):
    """Chooses the tokens of each layer. One for all layers of a model on a worker.

    ``step.notes`` is the place for what it remembers from layer to layer of a step; nothing outlives the step unless the
    router keeps it by request. Letters: T tokens of the step, K of a routed call.
    """

    def __init__(self) -> None:
        self.impls: list[PruneCPUImpl] = []

    @abstractmethod
    def keep(
        self, layer: int, step: PruneAttentionMetadata, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> np.ndarray | None:
        """Tokens that the layer runs on.

        Args:
            layer: 0 to L - 1.
            step: the rows of the step; ``token_places`` tells each token's request and position.
            hidden, residual: [T', D_model], T' >= T: the stream is their sum (residual None before layer 0).

        Returns:
            bool [T], or None for all.
        """

    def observe(self, layer: int, call: PruneAttentionMetadata, query: torch.Tensor) -> None:
        """Called after a layer's attention, with the keys of the call in their lanes.

        Args:
            layer: 0 to L - 1.
            call: the whole step's metadata, or a routed call's (``kept`` are then its tokens' places in the step).
            query: [T or K, H * G, D], rotated.
        """
        return


class RoutedLayer:
    """Mixin over vLLM's decoder layers (``forward(positions, hidden_states, residual)``, attention in
    ``self_attn.attn``)."""

    router: Router
    index: int
    self_attn: Any

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer on the tokens that the router keeps. Arguments and result as vLLM's layers have them."""
        context = get_forward_context().attn_metadata
        step = context[self.self_attn.attn.layer_name] if isinstance(context, dict) else None
        keep = None if step is None else self.router.keep(self.index, step, hidden_states, residual)  # type: ignore[arg-type]
        run = super().forward  # type: ignore[misc]
        if keep is None or keep.all():
            return run(positions, hidden_states, residual, **kwargs)  # type: ignore[no-any-return]
        return self._run_on(keep, step, positions, hidden_states, residual, kwargs)

    def _run_on(self, keep: np.ndarray, step: Any, positions: torch.Tensor, hidden: torch.Tensor,
                residual: torch.Tensor | None, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        impl = self.self_attn.attn.impl
        slots, places = token_places(step)
        impl.skip(slots[~keep], places[~keep])
        out = (torch.zeros_like(hidden), hidden.clone()) if residual is None else (hidden, residual)
        call = subset(step, keep)
        if len(call.kept) == 0:  # type: ignore[arg-type]
            return out
        index = torch.from_numpy(call.kept)
        step.call = call
        try:
            ran = super().forward(  # type: ignore[misc]
                positions[..., index], hidden[index], None if residual is None else residual[index], **kwargs
            )
        finally:
            step.call = None
        for whole, part in zip(out, ran, strict=True):
            whole.index_copy_(0, index, part)
        return out
