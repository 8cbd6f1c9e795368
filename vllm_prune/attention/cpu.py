"""Gated attention on CPU: drop, write, attend, per layer and step.

Decode and undisturbed chunks go through vLLM's own CPU kernel with heads as batch: every lane is a sequence of one KV
head and G query heads. Chunks inside which a key expires take masked SDPA. Letters as in ``lane_ops``; T tokens of the
step, R requests.
"""

from __future__ import annotations

from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs

from vllm_prune.attention.boundary import BoundarySteps
from vllm_prune.attention.impl import GatedImpl, drops_nothing
from vllm_prune.attention.masked import gather_keys, gather_lanes, tiled_attention
from vllm_prune.attention.serving import DelayRule, QueryRule, RequestRule, Rule, WriteRule
from vllm_prune.attention.some_lanes import LanePlan, SomeLanes, pick_lanes
from vllm_prune.cache.geometry import cdiv
from vllm_prune.cache.lane_ops import NEVER, Tokens, check, lib
from vllm_prune.gates import BoundaryRule, Reveal

if TYPE_CHECKING:
    from vllm_prune.attention.state import Passed, PruneAttentionMetadata, Rows, WorkerState
    from vllm_prune.cache.lanes import LaneStore
    from vllm_prune.models.routing import Router
    from vllm_prune.models.sparse import Chooser


class PruneCPUImpl(GatedImpl):
    """One gated layer. See the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state: WorkerState | None = None
        self.tokens = Tokens()
        self.router: Router | None = None
        self.chooser: Chooser | None = None

    def attach(self, state: WorkerState, index: int) -> None:
        self.state, self.index, self.serving = state, index, state.serving
        self._boundaries = lru_cache(64)(self._boundaries_at)

    def _boundaries_at(self, strength: float) -> BoundarySteps | None:
        """What decides at boundaries at a strength; None where nothing does."""
        rule = self.rule_at(strength)
        return BoundarySteps(rule, self.index, self.group, self.scale) if isinstance(rule, BoundaryRule) else None

    def forward(  # type: ignore[override]
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PruneAttentionMetadata | None,
        output: torch.Tensor,
        features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Gated attention of a step.

        Args:
            layer: the attention layer.
            query: [T, H * G, D]; key, value: [T, H, D]; output: like query, written.
            kv_cache: unused; all layers are reached through the lane store.
            attn_metadata: rows of the step; None while profiling.
            features: [T, F] of the gate; None when gates are open.
        """
        if attn_metadata is None:
            return output
        m = attn_metadata.call or attn_metadata
        if m.passed is not None:
            return self._with_passed(attn_metadata, m, query, key, value, output)
        assert self.state is not None and self.state.store is not None
        store = self.state.store
        key, value = _rows(key), _rows(value)
        features = None if features is None else _rows(self._shared(features))
        tokens = self.tokens.point(key, value, features, m.positions)
        if self.serving.reveal is Reveal.AT_BOUNDARY:
            return self._forward_at_boundaries(store, m, tokens, query, key, value, output)
        rule_at = self.rule_at if m.positions is None else drops_nothing  # what a routed layer runs on it keeps
        if m.decodes.count:
            begin = perf_counter()
            for strength, rows in m.decodes.by_strength:
                self._decode(store, rows, tokens, rule_at(strength))
            self.state.spent("decide", begin)
        whole = m.decodes.whole
        for i in range(m.chunks.count):
            rule = rule_at(float(m.chunks.strengths[i]))
            for rows, j, left in self.state.pieces(m.chunks, i):
                undisturbed = self._chunk(store, rows, j, query, key, value, tokens, output, rule)
                if left is not None:
                    if undisturbed:
                        self._attend(store, m, [rows.row(j)], query, output)
                    store.leave(*left, self.index)
                elif undisturbed:
                    whole = [*whole, rows.row(j)]
        if whole:
            self._attend(store, m, whole, query, output)
        if self.serving.reveal is Reveal.PER_REQUEST:
            for rows in (m.decodes, m.chunks):
                self._close(store, rows, output)
        if self.router is not None:
            self.router.observe(self.index, m, query)
        return output

    def _shared(self, features: torch.Tensor) -> torch.Tensor:
        """Features that a decision of all heads is made of are the first rank's: vLLM's sums over more than two ranks round
        differently on each, and so could their products."""
        assert self.state is not None
        ranks = self.state.ranks
        return ranks.first(features) if ranks.several and not ranks.split else features

    def _forward_at_boundaries(self, store: LaneStore, m: PruneAttentionMetadata, tokens: Tokens, query: torch.Tensor,
                               key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:  # fmt: skip
        dense = _rows(query)

        def attend(rows: list[tuple[int, int, int]]) -> None:
            self._attend(store, m, rows, query, output)

        whole = m.decodes.whole
        if m.decodes.count:
            begin = perf_counter()
            for strength, rows in m.decodes.by_strength:
                steps = self._boundaries(strength)
                if steps is None:
                    self._decode(store, rows, tokens, None)
                else:
                    steps.decode(store, rows, tokens, dense)
            m.state.spent("decide", begin)
        for i in range(m.chunks.count):
            steps = self._boundaries(float(m.chunks.strengths[i]))
            for rows, j, left in m.state.pieces(m.chunks, i):
                row = rows.row(j)
                if steps is None:
                    self._chunk(store, rows, j, query, key, value, tokens, output, None)
                else:
                    row = steps.chunk(store, rows, j, tokens, dense, attend)
                if left is None:
                    whole = [*whole, row]
                else:
                    attend([row])
                    store.leave(*left, self.index)
        if whole:
            attend(whole)
        return output

    def _close(self, store: LaneStore, rows: Rows, output: torch.Tensor) -> None:
        """Decide for the requests whose prompt ends among these rows, from layer 0's attention output."""
        last = store.lanes.prompt[rows.slots] - 1 - rows.positions
        for i in np.flatnonzero((last >= 0) & (last < rows.tokens)):
            rule = self.rule_at(float(rows.strengths[i]))
            if isinstance(rule, RequestRule) and rule.gate is not None:
                attended = output[int(rows.first[i] + last[i])].flatten()
                store.lanes.closed[rows.slots[i]] = rule.gate.close(attended, rule.strength).numpy()

    def skip(self, slots: np.ndarray, positions: np.ndarray) -> None:
        """Account for tokens that this layer does not run on: never stored here. int32 [S] each."""
        assert self.state is not None and self.state.store is not None
        store = self.state.store
        check(lib.lanes_skip(store.lanes.ref, self.index, len(slots), slots.ctypes.data, positions.ctypes.data))

    def pass_by(self, slots: np.ndarray, positions: np.ndarray) -> None:
        """Record tokens that this layer does not run on though their keys are stored. int32 [S] each."""
        assert self.state is not None and self.state.store is not None
        self.state.store.record_passed(self.index, slots, positions)

    def store_passed(self, step: PruneAttentionMetadata, passed: Passed) -> None:
        """A layer that runs on no token at all of the step: keys are stored, nothing attends."""
        assert self.state is not None and self.state.store is not None
        tokens = self.tokens.point(_rows(passed.key), _rows(passed.value), None)
        store = self.state.store
        if step.decodes.count:
            self._decode(store, step.decodes, tokens, None)
        for i in range(step.chunks.count):
            self._chunk(store, step.chunks, i, passed.key, passed.key, passed.value, tokens, passed.key, None)

    def _with_passed(self, step: PruneAttentionMetadata, call: PruneAttentionMetadata, query: torch.Tensor, key: torch.Tensor,
                     value: torch.Tensor, output: torch.Tensor) -> torch.Tensor:  # fmt: skip
        """Attention of a routed call over the keys of the whole step: skipped tokens attend with a query of 0, in vain."""
        assert call.passed is not None and call.kept is not None
        kept = torch.from_numpy(call.kept)
        whole = [x.new_zeros(step.num_actual_tokens, *x.shape[1:]) for x in (query, key, value)]
        for x, part in zip(whole, (query, key, value), strict=True):
            x[kept] = part
        whole[1][call.passed.places] = call.passed.key
        whole[2][call.passed.places] = call.passed.value
        out = torch.empty_like(whole[0])
        step.call = None
        self.forward(None, whole[0], whole[1], whole[2], whole[0], step, out)
        output.copy_(out[kept])
        return output

    def lane_keys(self, slot: int) -> list[torch.Tensor]:
        """Keys [S, D] of each KV head of this layer for a request slot, in lane order."""
        assert self.state is not None and self.state.store is not None
        store = self.state.store
        found = []
        for head in range(self.num_kv_heads):
            kv, pages, length, size = self._lanes(store, slot, head, 1)
            found.append(gather_keys(kv, pages[0], length, size))
        return found

    def _lanes(self, store: LaneStore, slot: int, head: int, count: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """What gathers K/V lanes of one length of this layer: the flat cache, their pages, their length in tokens, D."""
        lane = self.index * store.geometry.lanes_per_layer + head
        length = int(store.lanes.length[slot, lane])
        pages = torch.from_numpy(
            store.lanes.table[slot, lane : lane + count, : cdiv(length, store.geometry.block_tokens)]
        )
        assert store.kv_tensor is not None
        return store.kv_tensor, pages, length, self.head_size

    # Dropping and writing ----------------------------------------------------------------------------------------

    def _decode(self, store: LaneStore, rows: Rows, tokens: Tokens, rule: Rule | None) -> None:
        args = (store.lanes.ref, self.index, rows.count, *rows.pointers, tokens)
        served = self.serving
        if isinstance(rule, QueryRule):
            check(lib.steps_decode_by_query(*args, rule.scale, rule.biases.ctypes.data, served.sinks, served.window))
        elif isinstance(rule, DelayRule):
            check(lib.steps_decode_delayed(*args, rule.threshold, rule.delay, served.sinks, rule.own))
        elif isinstance(rule, WriteRule):
            check(lib.steps_decode_at_write(*args, rule.salts.ctypes.data, rule.limit, rule.delay, served.sinks))
        elif isinstance(rule, RequestRule):
            check(lib.request_decode(*args))
        else:
            check(lib.steps_decode_open(*args))

    def _chunk(self, store: LaneStore, rows: Rows, i: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               tokens: Tokens, output: torch.Tensor, rule: Rule | None) -> bool:  # fmt: skip
        """Drop and write for one chunk. True: attention is left to the kernel (no key expires inside the chunk)."""
        a = store.lanes
        slot, first, count, start = (int(x[i]) for x in (rows.slots, rows.first, rows.tokens, rows.positions))
        heads, per_layer = self.num_kv_heads, store.geometry.lanes_per_layer
        lane0 = self.index * per_layer
        width = int(a.length[slot, lane0 : lane0 + heads].max())
        past = np.full((store.units, width), NEVER, np.int32)
        chunk = np.full((store.units, count), NEVER, np.int32)
        where = (a.ref, slot, self.index, start)
        self._chunk_expiry(where, first, count, tokens, past, chunk, rule)
        last, end = start + count - 1, first + count
        settled = (first, count, tokens, past.ctypes.data, width, chunk.ctypes.data)
        if not (_expires_within(past, start, last) or _expires_within(chunk, start, last)):
            check(lib.steps_settle_chunk(*where, start, *settled))
            return True
        each = heads // store.units
        lanes = [gather_lanes(*self._lanes(store, slot, unit * each, each)) for unit in range(store.units)]
        output[first:end] = tiled_attention(
            query[first:end], lanes, key[first:end], value[first:end],
            torch.from_numpy(past), torch.from_numpy(chunk), start, self.scale,
        )  # fmt: skip
        # What expires by the next query is invisible to it: not kept. Nothing by query can expire later than ``last``.
        check(lib.steps_settle_chunk(*where, last + 1, *settled))
        return False

    def _chunk_expiry(self, where: tuple[Any, ...], first: int, count: int, tokens: Tokens, past: np.ndarray,
                      chunk: np.ndarray, rule: Rule | None) -> None:  # fmt: skip
        served, begin = self.serving, perf_counter()
        args = (*where, first, count, tokens)
        if isinstance(rule, QueryRule):
            check(lib.steps_chunk_expiry_by_query(*args, rule.scale, rule.biases.ctypes.data, served.sinks, served.window,
                                                  past.ctypes.data, past.shape[1], chunk.ctypes.data))  # fmt: skip
        elif isinstance(rule, DelayRule):
            check(lib.steps_chunk_expiry_delayed(*args, rule.threshold, rule.delay, served.sinks, rule.own,
                                                 past.ctypes.data, past.shape[1], chunk.ctypes.data))  # fmt: skip
        elif isinstance(rule, WriteRule):
            lib.steps_chunk_expiry_at_write(*where, count, rule.salts.ctypes.data, rule.limit, rule.delay,
                                            served.sinks, past.ctypes.data, past.shape[1], chunk.ctypes.data)  # fmt: skip
        elif isinstance(rule, RequestRule):
            lib.request_chunk_expiry(*where, count, past.ctypes.data, past.shape[1], chunk.ctypes.data)
        assert self.state is not None
        self.state.spent("decide", begin)

    # Attending ---------------------------------------------------------------------------------------------------

    def _attend(self, store: LaneStore, m: PruneAttentionMetadata, rows: list[tuple[int, int, int]], query: torch.Tensor,
                output: torch.Tensor) -> None:  # fmt: skip
        """vLLM's kernel over all lanes of the given (slot, first token, count) rows."""
        heads, group, size = self.num_kv_heads, self.group, self.head_size
        plan = m.plan
        if plan is None or plan.rows != rows:  # other layers may have handled other chunks
            plan = m.plan = LanePlan(rows, heads, width=cdiv(store.max_tokens, store.geometry.block_tokens) + 1)
        lib.lanes_fill_tables(store.lanes.ref, self.index, len(rows), *plan.pointers)
        if plan.direct:
            begin = rows[0][1]
            lane_query = query[begin : begin + len(rows)].reshape(len(rows) * heads, group, size)
            lane_out = output[begin : begin + len(rows)].view(len(rows) * heads, group, size)
        else:
            parts = [_by_lane(query[f : f + c], heads) for _, f, c in rows]
            lane_query = parts[0] if len(parts) == 1 else torch.cat(parts)
            lane_out = torch.empty_like(lane_query)
        some = self._some_lanes(plan, m)
        if some is None:
            # Where neither rules nor routers are at work all layers have equal lengths.
            if plan.schedule is None or self.serving.ruled or self.router is not None:
                plan.schedule = self._schedule(plan.lengths, plan.starts, query.dtype)
            self._kernel(store, lane_query, lane_out, plan.lengths, plan.starts, plan.tables, plan.schedule)
        else:
            lane_out.zero_()  # a head that sees no key says nothing
            if len(some.tokens):
                out = torch.empty_like(picked := lane_query[some.tokens])
                schedule = self._schedule(some.lengths, some.starts, query.dtype)
                self._kernel(store, picked, out, some.lengths, some.starts, some.tables, schedule)
                lane_out[some.tokens] = out
        if not plan.direct:
            at = 0
            for _, first, count in rows:
                part = lane_out[at : at + count * heads].view(heads, count, group, size)
                output[first : first + count].view(count, heads, group, size).copy_(part.transpose(0, 1))
                at += count * heads

    def _some_lanes(self, plan: LanePlan, m: PruneAttentionMetadata) -> SomeLanes | None:
        """The lanes to attend to where some hold no key, which vLLM's kernel does not take, or were not chosen by single
        tokens (of chunks the output is masked); None for all of them."""
        chosen = None
        if self.serving.reveal is Reveal.PER_REQUEST:
            chosen = plan.lengths > 0
        elif self.chooser is not None and (choice := m.notes.get("shadow")) is not None:
            rows = [choice.groups[int(first), self.index] | bool(count > 1) for _, first, count in plan.rows]
            chosen = torch.cat(rows)
        return None if chosen is None or bool(chosen.all()) else pick_lanes(plan, chosen)

    def _schedule(self, lengths: torch.Tensor, starts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return ops.cpu_attn_get_scheduler_metadata(  # type: ignore[no-any-return]
            num_reqs=len(lengths), num_heads=self.group, num_kv_heads=1, head_dim=self.head_size, seq_lens=lengths,
            dtype=dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec",
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )  # fmt: skip

    def _kernel(self, store: LaneStore, query: torch.Tensor, out: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor,
                tables: torch.Tensor, schedule: torch.Tensor) -> None:  # fmt: skip
        """vLLM's kernel with lanes as sequences: query and out [tokens of all lanes, G, D], lengths [lanes], > 0."""
        cache = store.kv_tensor.view(-1, 1, 2 * store.geometry.block_tokens, self.head_size)  # type: ignore[union-attr]
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key_cache, value_cache=value_cache, output=out, query_start_loc=starts,
            seq_lens=lengths, scale=self.scale, causal=True, alibi_slopes=None, sliding_window=-1, block_table=tables,
            softcap=0.0, scheduler_metadata=schedule, s_aux=None,
        )  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with dense rows; rows themselves may stay strided (a slice of a fused projection)."""
    dense = x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2])
    return x if dense else x.contiguous()


def _by_lane(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[C, H * G, D] to [H * C, G, D]: each KV head's tokens as a sequence of its own."""
    c, all_heads, size = x.shape
    return x.reshape(c, heads, all_heads // heads, size).transpose(0, 1).reshape(heads * c, all_heads // heads, size)


def _expires_within(expiry: np.ndarray, start: int, last: int) -> bool:
    """Whether a key visible to the query at ``start`` is invisible to the one at ``last``."""
    return bool(((expiry > start) & (expiry <= last)).any())
