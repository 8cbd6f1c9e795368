"""Gated attention on CPU: drop, write, attend, per layer and step.

Decode and undisturbed chunks go through vLLM's own CPU kernel with heads as batch: every lane is a sequence of one KV
head and G query heads. Chunks inside which a key expires take masked SDPA. Letters as in ``lane_ops``; T tokens of the
step, R requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_prune.attention.masked import gather_lane, masked_attention
from vllm_prune.attention.serving import DelayRule, QueryRule
from vllm_prune.cache import steps
from vllm_prune.cache.lane_ops import NEVER, drop_expired, fill_tables

if TYPE_CHECKING:
    from vllm_prune.attention.state import PruneAttentionMetadata, Rows, WorkerState


class PruneCPUImpl(AttentionImpl):
    """One gated layer. See the module."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            "attention sinks": kwargs.get("sinks") is not None,
            f"attention type {attn_type}": attn_type != AttentionType.DECODER,
        }
        for what, present in unsupported.items():
            if present:
                raise NotImplementedError(f"vllm-prune: {what} cannot be served with drop gates; serve the base model.")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.group = num_heads // num_kv_heads
        self.scale = float(scale)
        self.softcap = logits_soft_cap or 0.0
        self.kv_cache_dtype = kv_cache_dtype
        self.state: WorkerState | None = None
        self.index = 0
        self.rule: QueryRule | DelayRule | None = None

    def attach(self, state: WorkerState, index: int) -> None:
        self.state, self.index = state, index

    def forward(
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
        m = attn_metadata
        assert self.state is not None and self.state.store is not None
        store = self.state.store
        t = m.num_actual_tokens
        key, value = key[:t].contiguous(), value[:t].contiguous()
        bits = (_bits(key, store), _bits(value, store), self._feature_bits(features, key, t, store))
        self._decode(store, m.decodes, *bits)
        whole = [(m.decodes.slots[i], m.decodes.first[i], 1) for i in range(len(m.decodes.slots))]
        for i in range(len(m.chunks.slots)):
            slot, first, count = int(m.chunks.slots[i]), int(m.chunks.first[i]), int(m.chunks.tokens[i])
            if self._chunk(store, slot, first, count, int(m.chunks.positions[i]), query, key, value, bits, output):
                whole.append((slot, first, count))
        if whole:
            self._attend(store, m, whole, query, output)
        return output

    # Dropping and writing ----------------------------------------------------------------------------------------

    def _decode(self, store: Any, rows: Rows, key: np.ndarray, value: np.ndarray, features: np.ndarray) -> None:
        if len(rows.slots) == 0:
            return
        args = (store.lanes, store.dims, self.index, rows.slots, rows.first, rows.positions, key, value, features)
        served = self.state.serving  # type: ignore[union-attr]
        if isinstance(self.rule, QueryRule):
            scale, bias = np.float32(self.rule.scale), np.float32(self.rule.bias)
            steps.decode_by_query(*args, scale, bias, served.sinks, served.window)
        elif isinstance(self.rule, DelayRule):
            steps.decode_delayed(*args, np.float32(self.rule.threshold), self.rule.delay, served.sinks)
        else:
            steps.decode_open(*args)

    def _chunk(
        self,
        store: Any,
        slot: int,
        first: int,
        count: int,
        start: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bits: tuple[np.ndarray, np.ndarray, np.ndarray],
        output: torch.Tensor,
    ) -> bool:
        """Drop and write for one chunk. True: attention is left to the kernel (no key expires inside the chunk)."""
        a, d, end = store.lanes, store.dims, first + count
        own_bits = tuple(x[first:end] for x in bits)
        unit_lanes = [self.index * d.per_layer + unit for unit in range(d.units)]
        lengths = [int(a.length[slot, lane]) for lane in unit_lanes]
        past = np.zeros((d.units, max(lengths)), np.int32)
        chunk = np.full((d.units, count), NEVER, np.int32)
        self._chunk_expiry(store, slot, start, own_bits[2], past, chunk)
        last = start + count - 1
        if not (_expires_within(past, start, last) or _expires_within(chunk, start, last)):
            steps.settle_chunk(a, d, slot, self.index, start, start, past, chunk, *own_bits)
            return True
        lanes = []
        for h in range(d.H):
            lane = self.index * d.per_layer + h
            length = int(a.length[slot, lane])
            pages = torch.from_numpy(a.table[slot, lane, : -(-length // d.N)])
            lanes.append(gather_lane(store.kv_tensor, pages, length, d.D))
        output[first:end] = masked_attention(
            query[first:end], lanes, key[first:end], value[first:end],
            torch.from_numpy(past), torch.from_numpy(chunk), start, self.scale,
        )  # fmt: skip
        # What expires by the next query is invisible to it: not kept. Nothing by query can expire later than ``last``.
        steps.settle_chunk(a, d, slot, self.index, start, last + 1, past, chunk, *own_bits)
        return False

    def _chunk_expiry(self, store: Any, slot: int, start: int, features: np.ndarray, past: np.ndarray, chunk: np.ndarray) -> None:
        a, d, served = store.lanes, store.dims, self.state.serving  # type: ignore[union-attr]
        if isinstance(self.rule, QueryRule):
            scale, bias = np.float32(self.rule.scale), np.float32(self.rule.bias)
            steps.chunk_expiry_by_query(
                a, d, slot, self.index, start, features, scale, bias, served.sinks, served.window, past[0], chunk[0]
            )
        elif isinstance(self.rule, DelayRule):
            threshold = np.float32(self.rule.threshold)
            steps.chunk_expiry_delayed(
                a, d, slot, self.index, start, features, threshold, self.rule.delay, served.sinks, past, chunk
            )
        else:
            past[:] = NEVER

    # Attending ---------------------------------------------------------------------------------------------------

    def _attend(self, store: Any, m: PruneAttentionMetadata, rows: list[tuple[int, int, int]], query: torch.Tensor,
                output: torch.Tensor) -> None:  # fmt: skip
        """vLLM's kernel over all lanes of the given (slot, first token, count) rows."""
        d, heads = store.dims, self.num_kv_heads
        s = m.shared
        if "tables" not in s:
            width = -(-int(store.max_tokens) // d.N) + 1
            s["slots"] = np.asarray([slot for slot, _, _ in rows], np.int32)
            s["tables"] = np.zeros((len(rows) * heads, width), np.int32)
            s["lengths"] = np.zeros(len(rows) * heads, np.int32)
            s["rows"] = rows
        if s["rows"] != rows:  # other layers may have handled other chunks
            s["slots"] = np.asarray([slot for slot, _, _ in rows], np.int32)
            s["tables"] = np.zeros((len(rows) * heads, s["tables"].shape[1]), np.int32)
            s["lengths"] = np.zeros(len(rows) * heads, np.int32)
            s["rows"] = rows
            s.pop("plan", None)
        fill_tables(store.lanes, d, s["slots"], self.index, s["tables"], s["lengths"])
        counts = [count for _, _, count in rows]
        lengths = torch.from_numpy(s["lengths"])
        if "plan" not in s or self.rule is not None:
            starts = np.zeros(len(rows) * heads + 1, np.int32)
            np.cumsum(np.repeat(counts, heads), out=starts[1:])
            s["starts"] = torch.from_numpy(starts)
            s["plan"] = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(rows) * heads, num_heads=self.group, num_kv_heads=1, head_dim=d.D, seq_lens=lengths,
                dtype=query.dtype, query_start_loc=s["starts"], causal=True, sliding_window_size=-1, isa="vec",
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            )  # fmt: skip
        direct = max(counts) == 1 and rows[-1][1] - rows[0][1] == len(rows) - 1
        begin = rows[0][1]
        if direct:
            lane_query = query[begin : begin + len(rows)].reshape(len(rows) * heads, self.group, d.D)
            lane_out = output[begin : begin + len(rows)].view(len(rows) * heads, self.group, d.D)
        else:
            lane_query = torch.cat([_by_lane(query[f : f + c], heads) for _, f, c in rows])
            lane_out = torch.empty_like(lane_query)
        cache = store.kv_tensor.view(-1, 1, 2 * d.N, d.D)
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=lane_query, key_cache=key_cache, value_cache=value_cache, output=lane_out,
            query_start_loc=s["starts"], seq_lens=lengths, scale=self.scale, causal=True, alibi_slopes=None,
            sliding_window=-1, block_table=torch.from_numpy(s["tables"]), softcap=self.softcap,
            scheduler_metadata=s["plan"], s_aux=None,
        )  # fmt: skip
        if not direct:
            at = 0
            for _, first, count in rows:
                part = lane_out[at : at + count * heads].view(heads, count, self.group, d.D)
                output[first : first + count] = part.transpose(0, 1).reshape(count, self.num_heads, d.D)
                at += count * heads

    def _feature_bits(self, features: torch.Tensor | None, key: torch.Tensor, t: int, store: Any) -> np.ndarray:
        if features is None:
            return _bits(key.new_empty((t, 0)), store)
        return _bits(features[:t].contiguous(), store)

    def warm_up(self) -> None:
        """Compile (or load from cache) the loops this layer's method needs, so that no request waits for it."""
        assert self.state is not None and self.state.store is not None
        store = self.state.store
        d = store.dims
        none = np.zeros(0, np.int32)
        kv = _bits(torch.empty(0, d.H, d.D, dtype=store.dtype), store)
        width = 2 * d.r if isinstance(self.rule, QueryRule) else (d.units if self.rule else 0)
        features = _bits(torch.empty(0, width, dtype=store.dtype), store)
        a, at = store.lanes, self.index
        rows = (a, d, at, none, none, none, kv, kv, features)
        past, chunk = np.zeros((d.units, 0), np.int32), np.zeros((d.units, 0), np.int32)
        f = np.float32(1)
        if isinstance(self.rule, QueryRule):
            steps.decode_by_query(*rows, f, f, 0, 0)
            steps.chunk_expiry_by_query(a, d, 0, at, 0, features, f, f, 0, 0, past[0], chunk[0])
        elif isinstance(self.rule, DelayRule):
            steps.decode_delayed(*rows, f, 0, 0)
            steps.chunk_expiry_delayed(a, d, 0, at, 0, features[:0], f, 0, 0, past, chunk)
            drop_expired(a, d, 0, at, 0, 0)
        else:
            steps.decode_open(*rows)
        steps.settle_chunk(a, d, 0, at, 0, 0, past, chunk, kv, kv, features)
        fill_tables(a, d, none, at, np.zeros((0, 1), np.int32), none)


def _bits(x: torch.Tensor, store: Any) -> np.ndarray:
    return x.view(store.bits_dtype).numpy()


def _by_lane(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[C, H * G, D] to [H * C, G, D]: each KV head's tokens as a sequence of its own."""
    c, all_heads, size = x.shape
    return x.view(c, heads, all_heads // heads, size).transpose(0, 1).reshape(heads * c, all_heads // heads, size)


def _expires_within(expiry: np.ndarray, start: int, last: int) -> bool:
    """Whether a key visible to the query at ``start`` is invisible to the one at ``last``."""
    return bool(((expiry > start) & (expiry <= last)).any())


