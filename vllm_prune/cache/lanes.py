"""The worker's state of every request: slots, grants, page table, lanes. Lives and dies with the requests.

Owns: which head-page belongs to which lane, and the record of positions and expiries. Does not own: the KV memory itself
(vLLM allocates it), nor the decision which blocks a request gets (the scheduler's manager grants them).
Runs in the worker; CPU (the arrays are numpy, the loops over them compiled, ``lane_ops``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_prune.cache.geometry import LaneGeometry, cdiv
from vllm_prune.cache.grants import LaneReport
from vllm_prune.cache.lane_ops import NEVER, Lanes, check, lib
from vllm_prune.cache.ranks import Counts, Ranks
from vllm_prune.cache.views import layers_in_one


@dataclass
class SlotState:
    """One live request on the worker. ``grants`` holds block ids in log order, -1 where given up; ``drops`` what was recorded
    of a request that asked for its map and not yet reported (``LaneReport.drops``), None of all others."""

    slot: int
    epoch: int
    grants: list[int] = field(default_factory=list)
    returned: int = 0
    covered: int = 0
    peak_pages: int = 0
    drops: list[np.ndarray] | None = None

    @property
    def first_block(self) -> int:
        return self.grants[0]


class LaneStore:
    """Page table and lanes of all requests of one worker.

    Args:
        geometry: of the model on this rank.
        max_requests: S, request slots.
        max_tokens: longest request in tokens.
        num_blocks: B, blocks of the pool (block 0 is vLLM's null block and never granted).
        dtype: of the KV cache, bfloat16 or float32.
        units: E, eviction units a layer.
        max_grants: most grants one request's log may list; past that nothing is given back until it ends.
        record: keep every drop of every request as an event (for tests, the demo and recorded truth).
        received: keep what attention each key received (gates that decide at boundaries).
        appends: what is stored stays.
        undecided: newest keys that may still get an expiry; older ones without stay. None: any may.
        ranks: whose heads these are.
    """

    def __init__(
        self,
        geometry: LaneGeometry,
        max_requests: int,
        max_tokens: int,
        num_blocks: int,
        dtype: torch.dtype,
        units: int,
        max_grants: int | None = None,
        record: bool = False,
        received: bool = False,
        appends: bool = False,
        undecided: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.geometry = g = geometry
        self.num_blocks = num_blocks
        self.num_pages = g.num_layers * num_blocks * g.num_kv_heads
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.units = units
        self.ranks = ranks or Ranks()
        dense = g.blocks_for(max_tokens)
        self.shrink_limit = (max_grants - dense) if max_grants is not None else None
        self.record = record
        self.appends, self.undecided = appends, None if geometry.gate_rank else undecided
        self.events: dict[tuple[str, int], list[np.ndarray]] = {}
        self.passed: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self.lanes = Lanes(
            g, num_blocks, max_requests, width=cdiv(max_tokens, g.block_tokens) + 1,
            free_width=(dense + 2) * g.pages_per_block, units=units, elem=dtype.itemsize,
            received=received,
        )  # fmt: skip
        self.slots: dict[str, SlotState] = {}
        self.slot_of_block: dict[int, str] = {}
        self._free_slots = list(range(max_requests - 1, -1, -1))
        self.kv_tensor: torch.Tensor | None = None

    def bind(self, layers: list[torch.Tensor]) -> None:
        """Attach the KV cache.

        Args:
            layers: L views [B, H, N, 2 D] of one storage in LBHNC order, as vLLM allocates them.

        Raises:
            RuntimeError: the layers do not lie back to back in one storage.
        """
        g = self.geometry
        flat = layers_in_one(layers, self.num_blocks, g.num_kv_heads, g.block_tokens, g.head_size)
        self.kv_tensor = flat
        self.lanes.bind(flat)

    # Life of a request -------------------------------------------------------------------------------------------

    def update(self, req_id: str, epoch: int, new_blocks: list[int]) -> None:
        """Learn of new grants; a new epoch begins a new life of the request."""
        state = self.slots.get(req_id)
        if state is not None and state.epoch != epoch:
            self.forget(req_id)
            state = None
        if state is None:
            if not new_blocks:
                raise RuntimeError(f"vllm-prune: request {req_id} starts without blocks")
            state = SlotState(self._free_slots.pop(), epoch)
            self.slots[req_id] = state
            self.slot_of_block[new_blocks[0]] = req_id
            if self.record:
                self.events.setdefault((req_id, epoch), [])
        if not new_blocks:
            return
        g, a, s = self.geometry, self.lanes, state.slot
        state.grants.extend(new_blocks)
        blocks = np.asarray(new_blocks, np.int64)
        layer = np.arange(g.num_layers)[None, :, None]
        head = np.arange(g.num_kv_heads)[None, None, :]
        pages = ((layer * self.num_blocks + blocks[::-1, None, None]) * g.num_kv_heads + head).reshape(-1)
        n = int(a.n_free[s])
        # Newest grants at the bottom of the stack: the lowest grants fill first.
        a.free_pages[s, len(pages) : len(pages) + n] = a.free_pages[s, :n].copy()
        a.free_pages[s, : len(pages)] = pages
        a.n_free[s] = n + len(pages)

    def forget(self, req_id: str) -> None:
        """Every trace of a request ends here. Unknown ids are fine: it may never have reached the worker."""
        if req_id not in self.slots:
            return
        self.take_events()
        state = self.slots.pop(req_id)
        a, s = self.lanes, state.slot
        self.slot_of_block.pop(state.first_block, None)
        for block in state.grants:
            if block >= 0:  # a grant given up may belong to somebody else by now; its pages were freed then
                self._page_view(a.page_lane, block)[:] = -1
        a.length[s] = 0
        a.settled[s] = a.shared[s] = 0
        a.n_free[s] = 0
        a.dropped[s] = 0
        a.ends[s] = 0
        a.closed[s] = 0
        a.prompt[s] = NEVER
        if a.n_spared[s]:
            a.spared[s] = 0
            a.n_spared[s] = 0
        self._free_slots.append(s)

    def _page_view(self, array: np.ndarray, block: int) -> np.ndarray:
        g = self.geometry
        return array.reshape(g.num_layers, self.num_blocks, g.num_kv_heads)[:, block]

    def set_facts(self, req_id: str, prompt: int, strength: float, mapped: bool = False) -> None:
        """Learn how long a live request's prompt is, which stays so whatever a later life computes again, and at which strength
        its gates decide; ``mapped``: its reports list single drops."""
        state = self.slots[req_id]
        self.lanes.prompt[state.slot], self.lanes.strength[state.slot] = prompt, strength
        if mapped and state.drops is None:
            state.drops = []

    def spare(self, req_id: str, spans: Sequence[tuple[int, int]]) -> None:
        """Positions [begin, end) of a request that just began whose keys no gate may drop."""
        a, slot = self.lanes, self.slots[req_id].slot
        for begin, end in spans:
            a.spared[slot, begin:end] = 1
        a.n_spared[slot] = a.spared[slot].sum()

    def leave(self, req_id: str, name: str, tokens: int, layer: int | None = None) -> None:
        """What a request holds after its first ``tokens`` tokens, into the pages of a snapshot that holds nothing yet: in one
        layer, or in all. That is what it holds now, unless it only ``appends``."""
        layers = range(self.geometry.num_layers) if layer is None else (layer,)
        slots = self.slots[req_id].slot, self.slots[name].slot
        for at in layers:
            if self.appends:
                check(lib.lanes_copy_begin(self.lanes.ref, at, *slots, tokens))
            else:
                sure = 0 if self.undecided is None else tokens - self.undecided
                check(lib.lanes_copy(self.lanes.ref, at, *slots, sure))
        self._record_too(req_id, name, layers, tokens)

    def start(self, name: str, req_id: str) -> None:
        """A request begins with what a snapshot holds. Pages in which nothing changes any more are shared: the scheduler keeps
        their blocks for as long as the request lives."""
        for layer in range(self.geometry.num_layers):
            check(lib.lanes_start(self.lanes.ref, layer, self.slots[name].slot, self.slots[req_id].slot))
        self._record_too(name, req_id, range(self.geometry.num_layers))

    def _record_too(self, origin: str, to: str, layers: Sequence[int], below: int = NEVER) -> None:
        """What is recorded of an entry's drops in these layers, of keys ``below`` a position, is so of another's too."""
        if not self.record:
            return
        self.take_events()
        mine, theirs = (self.events[(name, self.slots[name].epoch)] for name in (to, origin))
        found = [rows[np.isin(rows[:, 0] // self.units, layers)] for rows in theirs]
        mine += [rows[rows[:, 1] < below] for rows in found] if self.appends else found

    # After a step ------------------------------------------------------------------------------------------------

    def close_lanes(self, req_id: str) -> None:
        """Free the lanes that were closed for a request (``Lanes.closed``); its prompt is computed."""
        check(lib.request_close(self.lanes.ref, self.slots[req_id].slot))

    def report(self, covered: dict[str, int], reserve: dict[str, int] | None = None) -> dict[str, LaneReport]:
        """Close a step: pack the pages of requests where that frees grants, and say what each still needs.

        Args:
            covered: tokens computed so far of each request of the step, by id.
            reserve: tokens that may already have been scheduled beyond that (asynchronous scheduling); grants for
                them are kept.

        Returns:
            One report a request: of all ranks, and the same on each.
        """
        self.take_events()
        g, a = self.geometry, self.lanes
        states = [self.slots[req_id] for req_id in covered]
        counts = np.empty((len(states), 15), np.int64)
        slots = np.asarray([state.slot for state in states], np.int32)
        lib.lanes_summarize(a.ref, len(states), slots.ctypes.data, counts.ctypes.data)
        ahead = [reserve.get(req_id, 0) if reserve else 0 for req_id in covered]
        needs = [row[n] if n < 3 else row[0] + g.pages_for(n) for n, row in zip(ahead, counts.tolist(), strict=True)]
        in_use = counts[:, 14]
        if self.ranks.several and states:
            needs, counts, in_use = self._of_all_ranks(needs, counts, slots)
        reports = {}
        rows = zip(covered.items(), states, needs, counts.tolist(), in_use.tolist(), strict=True)
        for (req_id, tokens), state, need, row, used in rows:
            state.covered = tokens
            state.peak_pages = max(state.peak_pages, row[0])
            keep = self._shrink(state, max(g.blocks_for_pages(need), 1))
            reports[req_id] = LaneReport(
                epoch=state.epoch, covered=tokens, pages=(row[0], row[1], row[2]), keep=keep,
                seen=len(state.grants), dropped=row[4], held=row[3], peak_pages=state.peak_pages,
                by_layer=tuple(row[5:9]), ends=row[9], drops=self._take_drops(state), in_use=used, unsettled=tuple(row[10:13]),
                settled=row[13],
            )  # fmt: skip
        return reports

    def _of_all_ranks(
        self, needs: list[int], counts: np.ndarray, slots: np.ndarray
    ) -> tuple[list[int], np.ndarray, np.ndarray]:
        """What ``report`` works with, joined: pages needed, counts as ``lanes_summarize`` has them but the last, pages in use."""
        by_layer = torch.from_numpy(self.lanes.dropped[slots].sum(-1))
        told = torch.from_numpy(counts)
        pages = torch.cat([told[:, 14:], told[:, :3], told[:, 10:14]], dim=1)
        x = self.ranks.join(Counts(torch.tensor(needs), pages, told[:, 3], told[:, 9], by_layer))
        assert x.in_use is not None
        held, dropped, ends = (column[:, None] for column in (x.held, x.dropped.sum(1), x.ends))
        counted = torch.cat([x.pages[:, 1:4], held, dropped, x.by_layer(), ends, x.pages[:, 4:]], dim=1)
        return x.need.tolist(), counted.numpy(), x.in_use.numpy()

    def _take_drops(self, state: SlotState) -> np.ndarray | None:
        """See ``LaneReport.drops``; told once."""
        if state.drops is None:
            return None
        told, state.drops = state.drops, []
        return np.concatenate([np.empty((0, 3), np.int32), *told])

    def _shrink(self, state: SlotState, blocks: int) -> int:
        """Give up all but the lowest ``blocks`` live grants; returns the log index from which nothing is needed."""
        seen = len(state.grants)
        if seen - state.returned <= blocks or (self.shrink_limit is not None and seen > self.shrink_limit):
            return seen
        live = [i for i, block in enumerate(state.grants) if block >= 0]
        self._pack(state, live[:blocks], live[blocks:])
        state.returned += len(live) - blocks
        return live[blocks - 1] + 1

    def _pack(self, state: SlotState, kept: list[int], gone: list[int]) -> None:
        """Move every page in use out of the grants ``gone`` into free pages of the grants ``kept``, then give up."""
        stay = np.asarray([state.grants[i] for i in kept], np.int32)
        leave = np.asarray([state.grants[i] for i in gone], np.int32)
        check(lib.lanes_pack(self.lanes.ref, state.slot, stay.ctypes.data, len(stay), leave.ctypes.data, len(leave)))
        for i in gone:
            state.grants[i] = -1

    def take_events(self) -> None:
        """Move what the compiled loops recorded into ``events`` and to the requests that asked for their maps."""
        a = self.lanes
        n = int(a.n_events[0])
        if n == 0:
            return
        rows = a.events[:n].copy()
        a.n_events[0] = 0
        owner = {state.slot: (req_id, state) for req_id, state in self.slots.items()}
        for slot in np.unique(rows[:, 0]):
            req_id, state = owner[int(slot)]
            if not self.record and state.drops is None:
                continue
            drops = rows[rows[:, 0] == slot][:, 1:]
            if self.record:
                self.events[(req_id, state.epoch)].append(drops)
            if state.drops is not None:
                state.drops.append(drops)

    def record_passed(self, layer: int, slots: np.ndarray, positions: np.ndarray) -> None:
        """Remember which tokens a layer did not run on though their keys are stored (nothing when not recording)."""
        if not self.record:
            return
        owner = {state.slot: (req_id, state.epoch) for req_id, state in self.slots.items()}
        for slot in np.unique(slots):
            rows = [(layer, int(position)) for position in positions[slots == slot]]
            self.passed.setdefault(owner[int(slot)], []).extend(rows)

    def passed_by(self, req_id: str, tokens: int) -> np.ndarray:
        """Recorded bypasses of a request's last life with stored keys: bool [L, T]."""
        out = np.zeros((self.geometry.num_layers, tokens), bool)
        lives = [epoch for recorded, epoch in self.events if recorded == req_id]
        for layer, position in self.passed.get((req_id, max(lives)), ()):
            out[layer, position] = True
        return out

    def reserve_events(self, most: int) -> None:
        """Record the coming step's drops, ``most`` at most; 0 records none."""
        self.take_events()
        if most == 0:
            self.lanes.store.events_cap = 0
        elif self.lanes.store.events_cap < most:
            self.lanes.make_events(most)

    def expiries(self, req_id: str, tokens: int) -> np.ndarray:
        """Recorded expiries of a request's last life (``record`` on): int64 [L, E, T], NEVER where none.

        Args:
            req_id: of a live or ended request.
            tokens: T, how many keys to report on.

        Raises:
            KeyError: nothing was recorded for the request.
        """
        self.take_events()
        lives = [epoch for recorded, epoch in self.events if recorded == req_id]
        if not lives:
            raise KeyError(f"no drops were recorded for request {req_id}: is the option 'record' on?")
        out = np.full((self.geometry.num_layers * self.units, tokens), NEVER, np.int64)
        for rows in self.events[(req_id, max(lives))]:
            out[rows[:, 0], rows[:, 1]] = rows[:, 2]
        return out.reshape(self.geometry.num_layers, self.units, tokens)
