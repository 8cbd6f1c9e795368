"""A context run once under hard masks, then several branches from it: ``masked.GatedModel`` in hard mode, without running
the context again for every question. A test compares the two.

A *policy* says which keys each query sees. Dimension letters: B branches, T context tokens, Q tokens of the longest branch,
E eviction units of a layer (1 or H), H KV heads, D head size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm_prune_training.gate_evaluation import past_pair_kept
from vllm_prune_training.masked import attend_masked

from vllm_prune.config import DropGateConfig
from vllm_prune.gates import NEVER, Gate, expiry_mask

ATTENTION = "vllm_prune_branches"


@dataclass
class _Call:
    """What the running layer's attention is handed: a mask [B, E, Q, K] (None: causal), and somebody who looks on."""

    mask: torch.Tensor | None = None
    watch: Callable[[torch.Tensor, torch.Tensor, float], None] | None = None


class Policy(ABC):
    """Visibility for one case. One object serves one case: it may remember what the context told."""

    @abstractmethod
    def context_mask(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """bool [1, E, T, T] for the context's own queries, or None for all.

        x: [1, T, D_model], the layer's normed input.
        """

    @abstractmethod
    def branch_seen(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """bool [B, E, Q, T + Q], causal by itself, for the branches' queries, or None for all.

        x: [B, Q, D_model].
        """

    def kept(self) -> float:
        """Fraction of the context's keys still held when the branches begin."""
        return 1.0

    def past_kept(self) -> float | None:
        """Visible share of past pairs within the context; None when all are."""
        return None


class Dense(Policy):
    """Everything is seen."""

    def context_mask(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        return None

    def branch_seen(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        return None


class GatePolicy(Policy):
    """Drop gates at a strength, decided as the server decides, in the context and on through the branches.

    Args:
        gates: one a layer.
        section: protection, and the strength unless given.
        strength: replaces the section's.
        cache_dtype: features are rounded to it, as in the server's cache.
    """

    def __init__(
        self, gates: list[Gate], section: DropGateConfig, strength: float | None = None,
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.gates, self.section, self.cache_dtype = gates, section, cache_dtype
        self.strength = section.strength if strength is None else strength
        self.features: list[torch.Tensor] = []
        self.expiry: list[torch.Tensor] = []

    def _features(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        gate = self.gates[layer]
        dtype = next(gate.parameters(), x).dtype
        return gate(x.to(dtype)).to(self.cache_dtype)

    def context_mask(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        features = self._features(layer, x)[0]
        expiry = self.gates[layer].expiry(features, self.strength, self.section.protection)
        self.features.append(features)
        self.expiry.append(expiry)
        return expiry_mask(expiry)[None]

    def branch_seen(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        context = self.features[layer]
        rows = [
            self.gates[layer].expiry(torch.cat([context, row]), self.strength, self.section.protection)
            for row in self._features(layer, x)
        ]
        return after(torch.stack(rows), len(context))

    def kept(self) -> float:
        live = [(expiry > expiry.shape[-1]).double().mean() for expiry in self.expiry]
        return float(torch.stack(live).mean())

    def past_kept(self) -> float | None:
        return float(torch.stack([past_pair_kept(expiry).mean() for expiry in self.expiry]).mean())


class Chosen(Policy):
    """A dense context of which each branch sees the keys in ``keep`` only, and all of itself.

    Args:
        keep: bool [B, H, T], one a layer.
    """

    def __init__(self, keep: list[torch.Tensor]) -> None:
        self.keep = keep

    def context_mask(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        return None

    def branch_seen(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        keep, length = self.keep[layer], x.shape[1]
        t = keep.shape[-1]
        dropped = torch.full((*keep.shape[:2], t + length), NEVER)
        dropped[..., :t] = torch.where(keep, NEVER, t)
        return after(dropped, t)

    def kept(self) -> float:
        return float(torch.stack([keep.double().mean() for keep in self.keep]).mean())


class Watcher(Dense):
    """Dense, and adds up the attention that each context key receives from the true tokens of each branch.

    Args:
        lengths: true tokens of each branch, B of them; padding asks nothing.
        tokens: T.
    """

    def __init__(self, lengths: list[int], tokens: int) -> None:
        self.lengths, self.tokens = torch.tensor(lengths), tokens
        self.received: list[torch.Tensor] = []

    def watch(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Sees one layer's query [B, H * G, Q, D] and key [B, H, T + Q, D] of the branches; layers come in order."""
        b, heads, q, d = query.shape
        h, total = key.shape[1], key.shape[2]
        logits = query.view(b, h, heads // h, q, d) @ key[:, :, None].transpose(-1, -2) * scaling
        future = torch.arange(total)[None, :] > self.tokens + torch.arange(q)[:, None]
        weights = logits.float().masked_fill(future, float("-inf")).softmax(-1)
        true = torch.arange(q)[None, :] < self.lengths[:, None]
        self.received.append((weights * true[:, None, None, :, None]).sum((2, 3))[..., : self.tokens])

    def best(self, budget: float) -> Chosen:
        """The oracle: for each branch, layer and KV head the ``budget`` of keys that receives most."""
        count = max(1, round(budget * self.tokens))
        keep = [
            torch.zeros_like(received, dtype=torch.bool).scatter_(-1, received.topk(count, dim=-1).indices, True)
            for received in self.received
        ]
        return Chosen(keep)


def after(expiry: torch.Tensor, tokens: int) -> torch.Tensor:
    """Visibility for the queries from position ``tokens`` on: int [B, E, T + Q] to bool [B, E, Q, T + Q]."""
    pos = torch.arange(expiry.shape[-1])
    query = pos[tokens:, None]
    return (pos[None, :] <= query) & (query < expiry[:, :, None, :])


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None = None, scaling: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    call: _Call = module.branch_call  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if call.watch is not None:
        call.watch(query, key, scale)
    return attend_masked(query, key, value, scale, call.mask), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


class BranchRunner:
    """Runs cases through one model.

    Args:
        model: a Hugging Face decoder with ``self_attn`` in its layers. Its attention is replaced for good.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.policy: Policy = Dense()
        self.tokens = 0  # of the context, while branches run; 0 while the context runs
        self.calls = []
        model.set_attn_implementation(ATTENTION)
        for index, layer in enumerate(model.get_decoder().layers):
            call = _Call()
            self.calls.append(call)
            object.__setattr__(layer.self_attn, "branch_call", call)
            layer.self_attn.register_forward_pre_hook(self._hook(index, call), with_kwargs=True)

    def _hook(self, index: int, call: _Call) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def take(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            call.watch = None
            if not self.tokens:
                call.mask = self.policy.context_mask(index, x)
                return
            call.mask = self.policy.branch_seen(index, x)
            if call.mask is None:
                every = torch.full((1, 1, self.tokens + x.shape[1]), NEVER)
                call.mask = after(every, self.tokens)
            if isinstance(self.policy, Watcher):
                call.watch = self.policy.watch

        return take

    @torch.no_grad()
    def context(self, ids: list[int], policy: Policy) -> DynamicCache:
        """Run a context of T tokens; its keys and values, all of them: what is dropped is masked."""
        self.policy, self.tokens = policy, 0
        cache = DynamicCache()
        self.model.get_decoder()(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        self._rest()
        return cache

    @torch.no_grad()
    def branches(self, cache: DynamicCache, tokens: int, padded: torch.Tensor, policy: Policy) -> torch.Tensor:
        """Logits [B, Q, V] of branches [B, Q] that each follow the context of T = ``tokens`` tokens in ``cache``."""
        b, q = padded.shape
        self.policy, self.tokens = policy, tokens
        own = DynamicCache()
        for index, layer in enumerate(cache.layers):
            own.update(layer.keys.expand(b, -1, -1, -1), layer.values.expand(b, -1, -1, -1), index)
        positions = torch.arange(tokens, tokens + q)[None].expand(b, -1)
        hidden = self.model.get_decoder()(
            input_ids=padded, past_key_values=own, use_cache=True, position_ids=positions
        ).last_hidden_state
        self._rest()
        return self.model.get_output_embeddings()(hidden)

    def _rest(self) -> None:
        self.policy, self.tokens = Dense(), 0
        for call in self.calls:
            call.mask = call.watch = None
