"""What a worker on a GPU holds between and within steps: the device store, and what layers share at fixed addresses.

Whole steps are replayed as CUDA graphs, so everything that a captured kernel reads lies in tensors made once: rows, expiries of
the step's own keys, scratch. Letters: R rows, T tokens of a step, E eviction units.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from vllm_prune_kernels.decode import scratch_for, splits_for
from vllm_prune_kernels.lanes import NEVER, bytes_per_page, fixed_bytes
from vllm_prune_kernels.prefill import list_width
from vllm_prune_kernels.rows import Rows
from vllm_prune_kernels.single import Meeting

from vllm_prune.attention.serving import Knobs, knobs_of, levels_of
from vllm_prune.attention.step_state import StepState, Told
from vllm_prune.cache.device_store import DeviceStore, sizes_of
from vllm_prune.cache.snapshots import MOST_ON_GPU
from vllm_prune.cache.spec import PruneSpec
from vllm_prune.messages import LATE, PruneMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass
class DeviceAttentionMetadata:
    """What the attention op reads in a step. Shared by all layers of the model.

    Attributes:
        state: of the worker.
        rows: of the step; slots are found by its first layer.
        block_table: int32 [R, W']; seq_lens: int32 [R]: vLLM's.
        most_tokens: the most tokens a row has.
        splits: programs a row and KV head in decode attention.
        parts: rows in the order in which each layer takes them, and which snapshots it leaves after each (``leave``); found by
            the first layer of a step that is not of single tokens. Several where rows are cut, for snapshots or at boundaries.
    """

    state: DeviceState
    rows: Rows
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    most_tokens: int
    splits: int
    parts: list[tuple[Rows, torch.Tensor | None]] = field(default_factory=list)


class DeviceState(StepState):
    """See the module. Arguments as for ``StepState``; device: of the KV cache."""

    store: DeviceStore | None

    def __init__(self, vllm_config: VllmConfig, spec: PruneSpec, layer_names: list[str], device: torch.device) -> None:
        self.device, self.late = device, LATE
        super().__init__(vllm_config, spec, layer_names)
        # Graphs are captured for numbers of rows that may lie above the most requests.
        r = max([self.max_requests, *(vllm_config.compilation_config.cudagraph_capture_sizes or [])])
        if self.prefixes or self.serving.mass:
            r = max(r, 2 * self.max_requests + 1)  # see ``parts_of``
        e, t = self.serving.num_units, self.chunk_tokens
        self.chunk = torch.full((e, t), NEVER, dtype=torch.int32, device=device)
        self.rank = torch.zeros(e, t, dtype=torch.int32, device=device)
        self.lists = torch.zeros(e, list_width(t), dtype=torch.int32, device=device)
        self.counts = torch.zeros(e, t, dtype=torch.int32, device=device)
        self.scratch_rows = Rows.make(r, e, torch.zeros(r + 1, dtype=torch.int32, device=device), device)
        first = self.layers[0].impl
        heads, group, size = first.num_kv_heads, first.group, first.head_size  # type: ignore[attr-defined]
        shapes = [
            scratch_for(n, heads, group, size, splits_for(n, heads))
            for n in range(1, r + 1)
            if n == 1 or splits_for(n, heads) > 1  # else programs write results themselves
        ]
        accumulators, sums = (max(torch.Size(shape[i]).numel() for shape in shapes) for i in (0, 1))
        self.accumulators = torch.empty(accumulators, dtype=torch.float32, device=device)
        self.sums = torch.empty(sums, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(r, heads, dtype=torch.int32, device=device)
        self.meeting = Meeting.make(r, e, device)
        # Of gates at boundaries: what makes weights of logits, and a mass of 0 for each token that is written.
        self.weigh = torch.empty(t, heads * group, 2, dtype=torch.float32, device=device) if self.serving.mass else None
        self.blank = torch.zeros(1, 2, dtype=torch.float64, device=device)

    def bind(self, kv_caches: dict[str, torch.Tensor]) -> None:
        views = [kv_caches[name] for name in self.layer_names]
        for layer in self.layers:
            layer.impl.reserved = None  # type: ignore[attr-defined]
        slots = self.max_requests + (MOST_ON_GPU if self.prefixes else 0)
        self.store = DeviceStore(
            self.spec.geometry, slots, self.max_tokens, views[0].shape[0], self.serving.num_units,
            self.spec.max_grants(self.max_tokens), self.device,
            self._knobs(), self.serving.undecided, self.record, self.ranks, self.grid,
        )  # fmt: skip
        self.store.bind(views)

    def _knobs(self) -> Callable[[float], Knobs]:
        section = self.layers[0].section
        gates: list[Any] = [layer.drop_gate for layer in self.layers]
        if not self.serving.mass:
            return partial(knobs_of, gates[0], section)
        # Copies on the host: nothing waits for the device when a request comes with a new strength.
        return lru_cache(64)(partial(levels_of, [deepcopy(gate).cpu() for gate in gates], section))

    @property
    def grid(self) -> int:
        """Of gates at boundaries; 0 of others."""
        return getattr(self.layers[0].drop_gate, "grid", 0) if self.serving.mass else 0

    def begin_step(self, meta: PruneMetadata) -> None:
        assert self.store is not None, "the KV cache is not bound yet"
        self.store.begin([*meta.gone, *meta.ended], meta.grants)

    def end_step(self) -> Told:
        assert self.store is not None, "the KV cache is not bound yet"
        self.store.end()
        reports, doomed = {}, set()  # type: ignore[var-annotated]
        for req_id, grant, report, slot in self.store.take(self.late):
            reports.setdefault(req_id, []).append(report)
            alive = self.store.slots.get(req_id) is slot
            if alive and self.doomed(req_id, grant, report, self.store.num_blocks):
                doomed.add(slot.first_block)
        return reports, doomed

    def metadata(self, m: CommonAttentionMetadata) -> DeviceAttentionMetadata:
        """Rows of a step from vLLM's batch, nothing read back."""
        n = m.num_reqs
        s = self.scratch_rows
        rows = Rows(s.slot[:n], m.query_start_loc[: n + 1], s.start[:n], s.settled[:n])
        splits = splits_for(n, self.layers[0].impl.num_kv_heads)  # type: ignore[attr-defined]
        return DeviceAttentionMetadata(self, rows, m.block_table_tensor[:n], m.seq_lens[:n], m.max_query_len, splits)


def bookkeeping_bytes(vllm_config: VllmConfig, spec: PruneSpec, units: int) -> int:
    """Device memory that page tables will take beside the KV cache that vLLM is about to plan."""
    cache = vllm_config.cache_config
    given = cache.kv_cache_memory_bytes
    if given is None:
        free, total = torch.cuda.mem_get_info()
        given = max(int(total * cache.gpu_memory_utilization) - (total - free), 0)
    slots = vllm_config.scheduler_config.max_num_seqs + (MOST_ON_GPU if cache.enable_prefix_caching else 0)
    sizes = sizes_of(spec.geometry, slots, vllm_config.model_config.max_model_len, 1, units)
    page = sizes.page_numbers * spec.dtype.itemsize
    share = bytes_per_page(sizes) / (page + bytes_per_page(sizes))
    return fixed_bytes(sizes) + int(given * share)
