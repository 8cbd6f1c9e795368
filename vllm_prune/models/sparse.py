"""ShadowLLM's token form in the worker: generated tokens run on chosen KV groups and neurons from layer 1 on.

Layer 0's output projection is where the choice is made: its input is what the predictors read. Behind it the projections of
the other layers' attention and their MLPs are replaced by ones that know the step's choice. A step of nothing but a few
generated tokens reads only the chosen rows of the weights (``compute.sparse``); in any other the products are dense and
what was not chosen is masked, which is the same but for rounding. A token is generated iff its position is at or
past its request's own prompt length, so that a preempted request's tokens choose again what they chose.

What is chosen is known at run time only: such models run without torch.compile (``hook.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.forward_context import get_forward_context

from vllm_prune.attention.gated import GatedAttention
from vllm_prune.attention.state import PruneAttentionMetadata, each_strength
from vllm_prune.attention.subset import token_places, token_strengths
from vllm_prune.compute.sparse import MLPWeights, add_rows, dot_rows, sparse_mlp
from vllm_prune.gates.shadow_token import ShadowTokenGate

MOST_SPARSE = 3
"""Tokens of a step up to which rows are picked: at a half of the rows each, the union of four is 94 % of them."""


@dataclass(frozen=True)
class Choice:
    """What the tokens of a step run on. T tokens, L layers, H KV groups, M neurons.

    Attributes:
        groups: bool [T, L, H].
        generated: int64 [R], places of the generated tokens in the step; all others are dense.
        neurons: bool [R, L, M] of those.
        sparse: whether the step has nothing else, and few of them.
    """

    groups: torch.Tensor
    generated: torch.Tensor
    neurons: torch.Tensor
    sparse: bool


class Chooser:
    """One a model on a worker: makes the step's choice, and finds it again.

    Args:
        gate: layer 0's, with the predictors.
        layer: layer 0's attention.
    """

    def __init__(self, gate: ShadowTokenGate, layer: GatedAttention) -> None:
        self.gate, self.layer = gate, layer
        self.recorded: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        """By request and position: groups [L, H], neurons [L, M] (option ``record``)."""

    def step(self) -> PruneAttentionMetadata | None:
        """The running step; None while profiling."""
        context = get_forward_context().attn_metadata
        return context[self.layer.layer_name] if isinstance(context, dict) else None  # type: ignore[return-value]

    def choice(self) -> Choice | None:
        """That of the running step; None when all its tokens are dense."""
        step = self.step()
        return None if step is None else step.notes.get("shadow")  # type: ignore[return-value]

    def choose(self, attended: torch.Tensor) -> None:
        """Make the step's choice. attended: [T', H * G * D] of layer 0, T' >= T."""
        step = self.step()
        if step is None:
            return
        slots, positions = token_places(step)
        store = step.state.store
        assert store is not None
        strengths = token_strengths(step)
        mine = (positions >= store.lanes.prompt[slots]) & (strengths > 0.0)
        places = torch.from_numpy(np.flatnonzero(mine))
        if not len(places):
            return
        chosen, neurons = self._choose(attended[places], strengths[mine])
        groups = torch.ones(len(mine), *chosen.shape[1:], dtype=torch.bool)
        groups[places] = chosen
        sparse = bool(mine.all()) and attended.shape[0] == len(mine) <= MOST_SPARSE
        step.notes["shadow"] = Choice(groups, places, neurons, sparse)
        if step.state.record:
            owner = {state.slot: req_id for req_id, state in store.slots.items()}
            for i, place in enumerate(places.tolist()):
                key = owner[int(slots[place])], int(positions[place])
                self.recorded[key] = chosen[i].numpy().copy(), neurons[i].numpy().copy()

    def _choose(self, attended: torch.Tensor, strengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Groups bool [R, L, H] and neurons bool [R, L, M] of tokens [R, H * G * D], each at its request's strength [R]."""
        made = [(mine, *self.gate.choose(attended[mine], x)) for x, mine in each_strength(strengths)]
        groups, neurons = (torch.empty(len(attended), *made[0][i].shape[1:], dtype=torch.bool) for i in (1, 2))
        for mine, some, few in made:
            groups[mine], neurons[mine] = some, few
        return groups, neurons


class ChoosingOut(nn.Module):
    """Layer 0's output projection: dense, and the place where the choice is made."""

    def __init__(self, dense: nn.Module, chooser: Chooser) -> None:
        super().__init__()
        self.dense, self.chooser = dense, chooser

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        self.chooser.choose(x)
        return self.dense(x)  # type: ignore[no-any-return]


class SparseQKV(nn.Module):
    """The fused projection: K and V whole, of Q the chosen groups, 0 for the others.

    Args:
        dense: vLLM's projection, its weight [(H G + 2 H) D, D_model] as loaded.
        heads: H.
        group_rows: G * D, rows of one group's queries.
    """

    def __init__(self, dense: Any, chooser: Chooser, index: int, heads: int, group_rows: int) -> None:
        super().__init__()
        self.dense, self.chooser, self.index = dense, chooser, index
        self.rows = dense.weight.data
        count = self.rows.shape[0]
        self.by_group = torch.arange(heads * group_rows, dtype=torch.int32).view(heads, group_rows)
        self.keys_values = torch.arange(heads * group_rows, count, dtype=torch.int32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        choice = self.chooser.choice()
        if choice is None or not choice.sparse:
            return self.dense(x)  # type: ignore[no-any-return]
        some = choice.groups[:, self.index].any(0)
        index = torch.cat([self.by_group[some].flatten(), self.keys_values])
        out = torch.zeros(x.shape[0], self.rows.shape[0], dtype=x.dtype)
        out[:, index.long()] = dot_rows(self.rows, index, x).to(x.dtype)
        return out, None


class SparseOut(nn.Module):
    """The output projection of chosen groups; what the others said is 0.

    Args:
        dense: vLLM's projection, its weight [D_model, H G D] as loaded; a transposed copy is made.
        heads: H.
    """

    def __init__(self, dense: Any, chooser: Chooser, index: int, heads: int) -> None:
        super().__init__()
        self.dense, self.chooser, self.index, self.heads = dense, chooser, index, heads
        self.rows = dense.weight.data.t().contiguous()
        self.by_group = torch.arange(self.rows.shape[0], dtype=torch.int32).view(heads, -1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        choice = self.chooser.choice()
        if choice is None:
            return self.dense(x)  # type: ignore[no-any-return]
        groups = choice.groups[:, self.index]
        masked = x.clone()
        told = masked[: len(groups)].unflatten(-1, (self.heads, -1))
        told.masked_fill_(~groups[..., None], 0.0)
        if not choice.sparse:
            return self.dense(masked)  # type: ignore[no-any-return]
        index = self.by_group[groups.any(0)].flatten()
        return add_rows(self.rows, index, masked[:, index.long()]).to(x.dtype), None


class SparseMLP(nn.Module):
    """A gated MLP of chosen neurons.

    Args:
        dense: vLLM's ``LlamaMLP`` or ``Qwen2MLP`` with weights as loaded; a transposed copy of the down projection is made.
    """

    def __init__(self, dense: Any, chooser: Chooser, index: int) -> None:
        super().__init__()
        self.dense, self.chooser, self.index = dense, chooser, index
        self.weights = MLPWeights(dense.gate_up_proj.weight.data, dense.down_proj.weight.data.t().contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = self.chooser.choice()
        if choice is None:
            return self.dense(x)  # type: ignore[no-any-return]
        chosen = choice.neurons[:, self.index]
        if choice.sparse:
            return sparse_mlp(self.weights, x, chosen)
        both, _ = self.dense.gate_up_proj(x)
        hidden = self.dense.act_fn(both)
        hidden[choice.generated] = hidden[choice.generated].masked_fill(~chosen, 0.0)
        return self.dense.down_proj(hidden)[0]  # type: ignore[no-any-return]


def make_sparse(model: nn.Module) -> Chooser:
    """Replace the projections and MLPs of a loaded gated model, before vLLM packs its weights."""
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "self_attn", None), nn.Module)]
    first = layers[0].self_attn
    chooser = Chooser(first.attn.drop_gate, first.attn)  # type: ignore[union-attr,arg-type]
    first.o_proj = ChoosingOut(first.o_proj, chooser)  # type: ignore[arg-type,union-attr]
    for index, layer in enumerate(layers[1:], start=1):
        attention: Any = layer.self_attn
        attention.attn.impl.chooser = chooser
        attention.qkv_proj = SparseQKV(
            attention.qkv_proj, chooser, index, attention.num_kv_heads, attention.q_size // attention.num_kv_heads
        )
        attention.o_proj = SparseOut(attention.o_proj, chooser, index, attention.num_kv_heads)
        layer.mlp = SparseMLP(layer.mlp, chooser, index)
    return chooser
