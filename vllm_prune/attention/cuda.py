"""Gated attention on a GPU: decide, attend to chunks, drop and write, attend to single tokens; per layer and step.

All of it is kernels of ours (``vllm_prune_kernels``) on tensors at fixed addresses, so that a step of single tokens can be
captured as one CUDA graph. Letters: T tokens of the step, H KV heads, G query heads per KV head, D head size, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm_prune_kernels.crossing import crossing
from vllm_prune_kernels.decode import decode, splits_for
from vllm_prune_kernels.judge import Boundaries, judge
from vllm_prune_kernels.marks import at_write, delayed
from vllm_prune_kernels.narrow import FP8
from vllm_prune_kernels.prefill import prefill
from vllm_prune_kernels.received import received
from vllm_prune_kernels.rows import Rows, find_rows, parts_of
from vllm_prune_kernels.settle import settle
from vllm_prune_kernels.single import DELAYED, OPEN, OWN, QUERY, WRITE, Decision, single

from vllm_prune.attention.impl import GatedImpl
from vllm_prune.attention.serving import DelayRule, QueryRule, WriteRule
from vllm_prune.gates import BoundaryGate

if TYPE_CHECKING:
    from vllm_prune.attention.device_state import DeviceAttentionMetadata, DeviceState
    from vllm_prune.cache.device_store import Cuts

PROGRAMS = 264
"""Programs that fill a large GPU twice: how far work on few rows is split."""


def parts_of_step(rows: Rows, cuts: Cuts | None, grid: int, most_tokens: int) -> list[tuple[Rows, torch.Tensor | None]]:
    """See ``DeviceAttentionMetadata.parts``. ``grid``: of boundaries; 0 where there are none."""
    if cuts is None and not grid:
        return [(rows, None)]
    parts = parts_of(rows, None if cuts is None else cuts.at, grid, most_tokens)
    return [(part, None if cuts is None else cuts.copies.get(number)) for number, part in enumerate(parts)]


class PruneCUDAImpl(GatedImpl):
    """One gated layer. See the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state: DeviceState | None = None
        self.reserved: torch.Tensor | None = None
        self.bookkeeping: Callable[[], int] | None = None
        self._decision: Decision
        self._boundaries: Boundaries | None = None
        self.scales = (1.0, 1.0)

    def attach(self, state: DeviceState, index: int) -> None:
        self.state, self.index, self.serving = state, index, state.serving
        rule, served = self.rule_at(1.0), state.serving  # strengths are the requests': see ``DeviceStore``
        gate = state.layers[index].drop_gate
        if isinstance(gate, BoundaryGate):
            at = gate.rule(1.0, state.layers[index].section.protection)
            self._boundaries = Boundaries(at.grid, at.span, at.after, at.sinks, at.keep is not None)
        nothing = torch.zeros(served.num_units, dtype=torch.int32, device=state.device)
        if isinstance(rule, QueryRule):  # at strength 1 biases are the gate's own
            biases = torch.from_numpy(rule.biases).to(state.device)
            self._decision = Decision(QUERY, biases, rule.scale, served.sinks, served.window)
        elif isinstance(rule, DelayRule):
            self._decision = Decision(OWN if rule.own else DELAYED, nothing, sinks=served.sinks)
        elif isinstance(rule, WriteRule):
            salts = torch.from_numpy(rule.salts.astype("int64")).to(state.device)
            self._decision = Decision(WRITE, salts, sinks=served.sinks)
        else:
            self._decision = Decision(OPEN, nothing)

    def forward(  # type: ignore[override]
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DeviceAttentionMetadata | None,
        output: torch.Tensor,
        features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Gated attention of a step.

        Args:
            layer: the attention layer, which has the scales of an FP8 cache.
            query: [T, H * G, D]; key, value: [T, H, D]; output: like query, written.
            kv_cache: unused; all layers are reached through the store.
            attn_metadata: rows of the step; None while profiling, or with no cache bound yet.
            features: [T, F] of the gate; None when gates are open.
        """
        if attn_metadata is None or attn_metadata.state.store is None:  # profiling, of memory or of graphs
            if self.bookkeeping is not None and self.reserved is None:
                # vLLM gives the KV cache what profiling leaves: the page tables' share is held until they are made.
                self.reserved = torch.empty(self.bookkeeping(), dtype=torch.uint8, device=query.device)
            return output
        m, state = attn_metadata, attn_metadata.state
        assert state.store is not None and state.store.kv is not None
        lanes, kv, rows, most = state.store.lanes, state.store.kv, m.rows, m.most_tokens
        self.scales = (layer._k_scale_float, layer._v_scale_float) if kv.dtype == FP8 else (1.0, 1.0)
        if self.index == 0:
            find_rows(lanes, rows, m.block_table, m.seq_lens)
            m.parts = [] if most == 1 else parts_of_step(rows, state.store.cuts, state.grid, most)
        if self._boundaries is not None:
            features, most = state.blank.expand(len(key), -1), min(most, self._boundaries.grid)
        if most == 1:
            if self._boundaries is not None:
                judge(lanes, kv, rows, self.index, self._boundaries)
            single(lanes, kv, rows, self.index, self._decision, key, value, features, state.meeting, self._splits(rows),
                   *self.scales)  # fmt: skip
            self._decode(state, rows, query, output, m.splits, most)
            return output
        remembered = features if self.serving.rank else None
        for part, copies in m.parts:
            self._decide(state, part, features, most)
            prefill(lanes, kv, part, self.index, query, key, value, state.chunk, state.lists, state.counts, output, self.scale,
                    most, *self.scales, state.weigh)  # fmt: skip
            splits = min(max(1, most // 64), 32)
            settle(
                lanes, kv, part, self.index, key, value, remembered, state.chunk, state.rank, most, splits, *self.scales
            )
            splits = m.splits if part is rows else splits_for(part.count, self.num_kv_heads)
            self._decode(state, part, query, output, splits, most)
            if copies is not None:
                state.store.leave(copies, self.index)
        return output

    def _decode(
        self, state: DeviceState, rows: Rows, query: torch.Tensor, output: torch.Tensor, splits: int, most: int
    ) -> None:
        """Attention of single tokens; then, for gates at boundaries, what all rows' keys received."""
        assert state.store is not None and state.store.kv is not None
        lanes, kv, rule = state.store.lanes, state.store.kv, self._boundaries
        decode(lanes, kv, rows, self.index, query, output, self.scale, state.accumulators, state.sums, state.arrivals, splits,
               *self.scales, state.weigh)  # fmt: skip
        if rule is not None:
            assert state.weigh is not None
            received(lanes, kv, rows, self.index, query, state.weigh, self.scale, rule.span, rule.keep, most, self._splits(rows),
                     self.scales[0])  # fmt: skip

    def _splits(self, rows: Rows) -> int:
        """Programs a row and unit that share a lane's decisions."""
        return max(1, min(32, PROGRAMS // (rows.count * self.serving.num_units)))

    def _decide(self, state: DeviceState, rows: Rows, features: torch.Tensor | None, most: int) -> None:
        """Expiries that these rows' tokens give to keys in lanes and to their own."""
        rule = self._decision
        assert state.store is not None and state.store.kv is not None
        lanes = state.store.lanes
        if self._boundaries is not None:
            judge(lanes, state.store.kv, rows, self.index, self._boundaries)
        elif rule.kind == QUERY:
            assert features is not None
            crossing(lanes, state.store.kv, rows, self.index, features, state.chunk, rule.scale, rule.constants, rule.sinks,
                     rule.window, self._splits(rows), most)  # fmt: skip
        elif rule.kind in (DELAYED, OWN):
            assert features is not None
            delayed(lanes, rows, self.index, features, state.chunk, rule.sinks, most, rule.kind == OWN)
        elif rule.kind == WRITE:
            at_write(lanes, rows, state.chunk, rule.constants, rule.sinks, most)
