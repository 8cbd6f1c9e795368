"""What a worker on CPU holds between and within steps: the lane store, the rows of the running step, its reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_prune.attention.step_state import StepState, Told
from vllm_prune.cache.lanes import LaneStore
from vllm_prune.cache.snapshots import MOST
from vllm_prune.cache.spec import PruneSpec
from vllm_prune.gates import Reveal

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_prune.attention.some_lanes import LanePlan
    from vllm_prune.messages import PruneMetadata, StepGrant


def each_strength(strengths: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Every strength among some requests' or tokens' (float64 [N]), and who has it: bool [N]. As a rule there is one."""
    return [(x, strengths == x) for x in np.unique(strengths).tolist()]


class Rows:
    """Requests of one step, in batch order: slot, first token in the batch, tokens, position of the first token.

    Args:
        slots, first, tokens, positions: int32 numpy arrays of one entry a request.
        strengths: float64, of each request's gates.
    """

    def __init__(
        self, slots: np.ndarray, first: np.ndarray, tokens: np.ndarray, positions: np.ndarray, strengths: np.ndarray
    ) -> None:
        self.slots, self.first, self.tokens, self.positions, self.strengths = slots, first, tokens, positions, strengths
        self.count = len(slots)
        self.whole = [(int(s), int(f), 1) for s, f in zip(slots, first, strict=True)]
        self.pointers = (slots.ctypes.data, first.ctypes.data, positions.ctypes.data)

    def pick(self, mask: np.ndarray) -> Rows:
        return Rows(self.slots[mask], self.first[mask], self.tokens[mask], self.positions[mask], self.strengths[mask])

    def part(self, i: int, begin: int, end: int) -> Rows:
        """Of row i, its tokens at positions [begin, end)."""
        slot, first = self.slots[i : i + 1], self.first[i : i + 1] + np.int32(begin - self.positions[i])
        count, position = np.asarray([[end - begin], [begin]], np.int32)
        return Rows(slot, first, count, position, self.strengths[i : i + 1])

    def row(self, i: int) -> tuple[int, int, int]:
        """Slot, first token in the batch, tokens."""
        return int(self.slots[i]), int(self.first[i]), int(self.tokens[i])

    @cached_property
    def by_strength(self) -> list[tuple[float, Rows]]:
        """The rows of each strength."""
        return [(x, self if mine.all() else self.pick(mine)) for x, mine in each_strength(self.strengths)]


@dataclass
class Passed:
    """Tokens that a layer does not run on but whose keys and values it stores: places in the step int64 [S], key and
    value [S, H, D]."""

    places: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass
class PruneAttentionMetadata:
    """What the attention op reads in a step. Shared by all layers of the model.

    Attributes:
        num_actual_tokens: T, tokens of the step.
        state: of the worker.
        decodes: rows with one token.
        chunks: rows with several.
        plan: tables of the kernel call, shared by layers that attend to the same rows.
        positions: int32 [T], of the tokens of a routed layer's call, which have holes (``subset.py``); else None.
        kept: int64 [T], a routed call's tokens as indices of the step; else None.
        parent: the step of a routed call; else None.
        passed: tokens whose keys a routed layer stores without running on them; else None.
        call: what the layer now running attends for, when that is not the whole step.
        notes: what a router remembers from layer to layer of the step.
    """

    num_actual_tokens: int
    state: WorkerState
    decodes: Rows
    chunks: Rows
    plan: LanePlan | None = None
    positions: np.ndarray | None = None
    kept: np.ndarray | None = None
    parent: PruneAttentionMetadata | None = None
    passed: Passed | None = None
    call: PruneAttentionMetadata | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class WorkerState(StepState):
    """See the module. Arguments as for ``StepState``."""

    store: LaneStore | None

    def __init__(self, vllm_config: VllmConfig, spec: PruneSpec, layer_names: list[str]) -> None:
        super().__init__(vllm_config, spec, layer_names)
        self._step: dict[str, StepGrant] = {}
        self._cuts: dict[int, list[tuple[int, str, str]]] = {}

    def bind(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Attach the allocated KV cache."""
        views = [kv_caches[name] for name in self.layer_names]
        self.store = LaneStore(
            self.spec.geometry,
            self.max_requests + (MOST if self.prefixes else 0),
            self.max_tokens,
            num_blocks=views[0].shape[0],
            dtype=views[0].dtype,
            units=self.serving.num_units,
            max_grants=self.spec.max_grants(self.max_tokens),
            record=self.record,
            received=self.serving.reveal is Reveal.AT_BOUNDARY,
            appends=self.serving.appends,
            undecided=self.serving.undecided,
            ranks=self.ranks,
        )
        self.store.bind(views)

    def begin_step(self, meta: PruneMetadata) -> None:
        """Bury the dead first: their blocks may be among the new grants."""
        store = self._store()
        for req_id in (*meta.gone, *meta.ended):
            store.forget(req_id)
        self._cuts = {}
        for req_id, grant in meta.grants.items():
            store.update(req_id, grant.epoch, grant.new_blocks)
            store.set_facts(req_id, grant.prompt, grant.strength, grant.map)
            if grant.spared:
                store.spare(req_id, grant.spared)
            if grant.start is not None:
                store.start(grant.start, req_id)
            for order in grant.snapshots:
                store.update(order.name, order.epoch, order.blocks)
                if not self.serving.appends:
                    self._cuts.setdefault(store.slots[req_id].slot, []).append((order.tokens, order.name, req_id))
        self._step = meta.grants

    def pieces(self, rows: Rows, i: int) -> list[tuple[Rows, int, tuple[str, str, int] | None]]:
        """Row i of a step, cut where its request leaves snapshots: rows and which of them, and what to leave (request, snapshot,
        tokens) once these tokens are written."""
        cuts = self._cuts.get(int(rows.slots[i]))
        if not cuts:
            return [(rows, i, None)]
        begin = int(rows.positions[i])
        found: list[tuple[Rows, int, tuple[str, str, int] | None]] = []
        for at, name, req_id in cuts:
            found.append((rows.part(i, begin, at), 0, (req_id, name, at)))
            begin = at
        end = int(rows.positions[i] + rows.tokens[i])
        return [*found, (rows.part(i, begin, end), 0, None)] if begin < end else found

    def metadata(
        self, block_table: torch.Tensor, query_start: np.ndarray, seq_lens: np.ndarray
    ) -> PruneAttentionMetadata:
        """Rows of a step from vLLM's batch: a row's first block id names the request.

        Args:
            block_table: int32 [R, W].
            query_start: int [R + 1], first token of each row.
            seq_lens: int [R], tokens of each request including this step's.
        """
        store = self._store()
        count = len(seq_lens)
        tokens = np.diff(query_start).astype(np.int32)
        first_blocks = block_table[:count, 0].tolist()
        slots = np.asarray([store.slots[store.slot_of_block[block]].slot for block in first_blocks], np.int32)
        strengths = store.lanes.strength[slots]
        rows = Rows(slots, query_start[:-1].astype(np.int32), tokens, (seq_lens - tokens).astype(np.int32), strengths)
        single = tokens == 1
        total = int(query_start[-1])
        store.reserve_events(self._most_drops(store, slots, total))
        return PruneAttentionMetadata(total, self, rows.pick(single), rows.pick(~single & (tokens > 0)))

    def _most_drops(self, store: LaneStore, slots: np.ndarray, tokens: int) -> int:
        """Keys that a step of these slots and tokens could drop; 0 where nobody asks which."""
        if not store.record and not any(grant.map for grant in self._step.values()):
            return 0
        lengths = store.lanes.length[slots].reshape(len(slots), -1, store.geometry.lanes_per_layer)
        return int(lengths[:, :, : store.units].sum()) + tokens * store.geometry.num_layers * store.units

    def end_step(self) -> Told:
        """Close the step: reports of its requests, and first blocks of those that can never go on (see ``doomed``)."""
        step, self._step = self._step, {}
        if not step:
            return {}, set()
        begin = perf_counter()
        store = self._store()
        if self.serving.reveal is Reveal.PER_REQUEST:
            for req_id, grant in step.items():
                if grant.covered >= grant.prompt:
                    store.close_lanes(req_id)
        ahead = {req_id: grant.in_flight for req_id, grant in step.items() if grant.in_flight}
        covered = {req_id: grant.covered for req_id, grant in step.items()}
        for req_id, grant in step.items():
            for order in grant.snapshots:
                if self.serving.appends or grant.tokens == 1:  # rows of one token are not cut
                    store.leave(req_id, order.name, order.tokens)
                covered[order.name] = order.tokens
        reports = store.report(covered, ahead)
        doomed = {
            store.slots[req_id].first_block
            for req_id, report in reports.items()
            if req_id in step and self.doomed(req_id, step[req_id], report, store.num_blocks)
        }
        self.spent("compaction", begin)
        return {req_id: [report] for req_id, report in reports.items()}, doomed

    def _store(self) -> LaneStore:
        assert self.store is not None, "the KV cache is not bound yet"
        return self.store
