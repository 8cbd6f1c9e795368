"""Token routing: a decoder layer runs on a subset of the step's tokens; the others bypass it and its computation.

A skipped token leaves the layer as it came in, x_out = x_in, and has no KV there: its expiry is its own position. vLLM keeps
the stream in two parts, x = hidden + residual; both are left as they are, so that bypassing rounds nothing.

With ``keeps_kv`` skipped tokens still get a key and a value here, from the stream that passes by.

The number of kept tokens is known at run time only, so methods that route run without torch.compile (``hook.py`` sees to
it). What a layer runs on it keeps: rules of by-query or delayed gates do not apply to a routed call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context

from vllm_prune.attention.received import attention_received
from vllm_prune.attention.state import Passed, each_strength
from vllm_prune.attention.subset import subset, token_places, token_strengths
from vllm_prune.gates import Protection
from vllm_prune.gates.routing import FACTS, RoutingGate

if TYPE_CHECKING:
    from vllm_prune.attention.cpu import PruneCPUImpl
    from vllm_prune.attention.state import PruneAttentionMetadata


class Router(ABC):
    """Chooses the tokens of each layer. One for all layers of a model on a worker.

    ``step.notes`` is the place for what it remembers from layer to layer of a step; nothing outlives the step unless the
    router keeps it by request. Letters: T tokens of the step, K of a routed call.
    """

    keeps_kv: bool = False

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
            call: the whole step's metadata, or a routed call's (``kept`` are then its tokens' places in the step). With
                ``keeps_kv`` always the whole step's.
            query: [T or K, H * G, D], rotated; 0 for tokens that the layer does not run on.
        """
        return


class GateRouter(Router):
    """Routes by gates that decide from facts (``gates/routing.py``), causal ones here.

    Args:
        gates: one a layer, loaded.
        protection: as served; strengths are the requests'.
    """

    def __init__(self, gates: Sequence[RoutingGate], protection: Protection) -> None:
        super().__init__()
        self.gates, self.protection = gates, protection
        self.keeps_kv = gates[0].keeps_kv
        self._always = [gate.always_runs for gate in gates]

    def keep(
        self, layer: int, step: PruneAttentionMetadata, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> np.ndarray | None:
        step.notes["ran"] = None
        if self._always[layer]:
            return None
        facts, prompts = self._facts(step), step.notes.get("prompts")
        keep = np.ones(step.num_actual_tokens, np.bool_)
        for strength, mine in each_strength(token_strengths(step)):
            of = None if prompts is None else prompts[mine]
            keep[mine] = self.gates[layer].runs_on(facts[mine], strength, self.protection, of).numpy()
        step.notes["ran"] = keep
        return keep

    @staticmethod
    def _facts(step: PruneAttentionMetadata) -> torch.Tensor:
        """float32 [T, 3], of the last layer that computed each token."""
        if "facts" not in step.notes:
            facts = torch.zeros(step.num_actual_tokens, FACTS)
            facts[:, 0] = torch.from_numpy(token_places(step)[1])
            step.notes["facts"] = facts
        return step.notes["facts"]  # type: ignore[no-any-return]

    def observe(self, layer: int, call: PruneAttentionMetadata, query: torch.Tensor) -> None:
        if layer + 1 == len(self.gates) or self._always[layer + 1]:
            return  # the next layer runs on everything, and so makes its facts anew
        facts = self._facts(call.parent or call)
        for places, fresh in self.seen(layer, call, query):
            facts[places, 1:] = fresh

    def seen(
        self, layer: int, call: PruneAttentionMetadata, query: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What a layer's attention says of the tokens that it ran on: their places in the step int64 [N], scores and ranks
        [N, 2], for some tokens at a time. Arguments as ``observe``."""
        impl, ran = self.impls[layer], (call.parent or call).notes["ran"]
        for rows in (call.decodes, call.chunks):
            for i in range(rows.count):
                first, count = int(rows.first[i]), int(rows.tokens[i])
                keys = impl.lane_keys(int(rows.slots[i]))
                found = attention_received(query[first : first + count], keys, impl.scale)
                live = torch.arange(keys[0].shape[0] - count + 1, keys[0].shape[0] + 1).float()
                at = (
                    torch.arange(first, first + count)
                    if call.kept is None
                    else torch.from_numpy(call.kept[first : first + count])
                )
                new = torch.stack([found.own * live, found.rank / live], dim=-1)
                if ran is not None:
                    chosen = torch.from_numpy(ran)[at]
                    at, new = at[chosen], new[chosen]
                yield at, new


class RoutedLayer:
    """Mixin over vLLM's decoder layers (``forward(positions, hidden_states, residual)``, attention in
    ``self_attn.attn``)."""

    router: Router
    index: int
    self_attn: Any
    input_layernorm: Any

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer on the tokens that the router keeps. Arguments and result as vLLM's layers have them."""
        context = get_forward_context().attn_metadata
        step: Any = context[self.self_attn.attn.layer_name] if isinstance(context, dict) else None
        keep = None if step is None else self.router.keep(self.index, step, hidden_states, residual)
        run = super().forward  # type: ignore[misc]
        if keep is None or keep.all():
            return run(positions, hidden_states, residual, **kwargs)  # type: ignore[no-any-return]
        return self._run_on(keep, step, positions, hidden_states, residual, kwargs)

    def _run_on(self, keep: np.ndarray, step: PruneAttentionMetadata, positions: torch.Tensor, hidden: torch.Tensor,
                residual: torch.Tensor | None, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        impl: PruneCPUImpl = self.self_attn.attn.impl
        slots, places = token_places(step)
        call = subset(step, keep)
        if self.router.keeps_kv:
            skipped = torch.from_numpy(np.flatnonzero(~keep))
            key, value = self._pass_by(
                positions[..., skipped], hidden[skipped], None if residual is None else residual[skipped]
            )
            call.passed = Passed(skipped, key, value)
            impl.pass_by(slots[~keep], places[~keep])
        else:
            impl.skip(slots[~keep], places[~keep])
        out = (torch.zeros_like(hidden), hidden.clone()) if residual is None else (hidden, residual)
        assert call.kept is not None
        if len(call.kept) == 0:
            if call.passed is not None:
                impl.store_passed(step, call.passed)
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

    def _pass_by(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [S, H, D] of tokens that the layer does not run on. The tensors given are copies."""
        normed = self.input_layernorm(hidden) if residual is None else self.input_layernorm(hidden, residual)[0]
        _, key, value = self.self_attn.rotated(positions, normed)
        attn = self.self_attn.attn
        return key.view(-1, attn.num_kv_heads, attn.head_size), value.view(-1, attn.num_kv_heads, attn.head_size)
