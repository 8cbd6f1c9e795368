"""The host's side of lanes that live on a GPU: which request has which slot, and the tables that a step sends ahead.

What the CPU's ``LaneStore`` knows of pages only the device knows here (``vllm_prune_kernels.lanes``); the host learns of it by
reports, copied without waiting and read when they are there. Nothing here reads the device but ``expiries`` (recording, tests).
Runs in the worker.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm_prune_kernels.close import close
from vllm_prune_kernels.copy import copy_lanes
from vllm_prune_kernels.grants import forget, grant
from vllm_prune_kernels.lanes import AHEAD, NEVER, REPORT, Lanes, Sizes, send
from vllm_prune_kernels.narrow import FP8
from vllm_prune_kernels.plan import plan
from vllm_prune_kernels.rows import part_before
from vllm_prune_kernels.share import share, sort_lanes

from vllm_prune.cache.geometry import LaneGeometry, cdiv
from vllm_prune.cache.grants import LaneReport
from vllm_prune.cache.ranks import Counts, Ranks
from vllm_prune.cache.views import layers_in_one

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_prune.attention.serving import Knobs
    from vllm_prune.messages import StepGrant


@dataclass
class DeviceSlot:
    """One live request: its slot, the epoch and length of its grant log, and the first block of it."""

    slot: int
    epoch: int
    first_block: int
    seen: int = 0
    peak_pages: int = 0
    strength: float | None = None
    spared: int = 0


@dataclass
class Sent:
    """A report on its way: numbers [n, ``REPORT``] in pinned memory, the event after their copy, and whose they are."""

    numbers: torch.Tensor
    done: torch.cuda.Event | None
    grants: dict[str, StepGrant]
    states: list[DeviceSlot]
    seen: list[int]

    def ready(self) -> bool:
        return self.done is None or self.done.query()

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


@dataclass
class Cuts:
    """Where rows of a step are cut for snapshots.

    Attributes:
        at: int32 [S, C], positions by slot, ascending; NEVER where there is none.
        copies: by part (``parts_of``), int32 [n, 3], slots from which and to which lanes are copied after it, and the position
            below which keys without expiry stay.
    """

    at: torch.Tensor
    copies: dict[int, torch.Tensor]


def sizes_of(geometry: LaneGeometry, max_requests: int, max_tokens: int, num_blocks: int, units: int) -> Sizes:
    """Of the lanes on the device; arguments as for ``DeviceStore``."""
    g = geometry
    dense = g.blocks_for(max_tokens)
    return Sizes(
        layers=g.num_layers, heads=g.num_kv_heads, units=units, page_tokens=g.block_tokens, head_size=g.head_size,
        gate_rank=g.gate_rank, blocks=num_blocks, slots=max_requests, width=cdiv(max_tokens, g.block_tokens) + 1,
        grants=dense + 8,
    )  # fmt: skip


def snapshots_in(grants: dict[str, StepGrant]) -> dict[str, StepGrant]:
    """Snapshots that are made in a step, each as a request would be: its tokens are those of its request up to it."""
    return {
        order.name: replace(
            given, epoch=order.epoch, new_blocks=order.blocks, tokens=order.tokens - (given.covered - given.tokens),
            covered=order.tokens, remaining=0, last=True, in_flight=0, spared=(), map=False, start=req_id, snapshots=(),
        )
        for req_id, given in grants.items()
        for order in given.snapshots
    }  # fmt: skip


def counts_of(lanes: Lanes, rows: torch.Tensor) -> Counts:
    """What this rank's lanes need and hold, as ``close`` is about to count it; nothing is read back. Its ``pages``, [n, 2 + 2
    ``AHEAD``]: in use; of its own, now and after more tokens; the same of what is not settled; settled ones.

    Args:
        rows: int32 [n, 4], as ``close`` takes them.
    """
    s, slot = lanes.sizes, rows[:, 0].long()
    length = lanes.length[slot].long()  # [n, Z]
    kv = torch.arange(s.per_layer, device=rows.device) < s.heads
    size = torch.where(kv, s.page_tokens, s.gate_page_tokens).repeat(s.layers)
    shared, settled = (x[slot].long().sum(1) for x in (lanes.shared, lanes.settled))
    pages = [((length + more + size - 1) // size).sum(1) - shared for more in range(AHEAD)]
    need = ((length + rows[:, 1:2].clamp_min(0) + size - 1) // size).sum(1) + rows[:, 2] - shared
    told = [pages[0] + shared, *pages, *(x - settled for x in pages), settled]
    held = length.view(-1, s.layers, s.per_layer)[:, :, : s.units].sum((1, 2))
    dropped = lanes.dropped[slot].long().sum(-1)
    return Counts(need, torch.stack(told, 1), held, torch.zeros_like(held), dropped)


def with_need(rows: torch.Tensor, agreed: Counts, own: torch.Tensor) -> torch.Tensor:
    """Rows for ``close`` that keep as many pages as the rank in most need: ``own``, int64 [n], pages in use here."""
    more = agreed.need - own
    return torch.stack([rows[:, 0], torch.zeros_like(rows[:, 0]), more.to(rows.dtype), rows[:, 3]], dim=1)


def with_counts(out: torch.Tensor, agreed: Counts) -> torch.Tensor:
    """A report of this rank as one of all ranks: int32 [n, ``REPORT`` + 1 + ``AHEAD``], with pages in use on all and
    pages that are not settled, of the rank with most."""
    assert agreed.in_use is not None
    dropped = agreed.dropped.sum(1)
    own, unsettled, settled = agreed.pages[:, 1:].split([AHEAD, AHEAD, 1], dim=1)
    columns = [own, out[:, 5:6], agreed.held[:, None], dropped[:, None], out[:, 8:11], agreed.by_layer(), settled,
               out[:, 16:REPORT], agreed.in_use[:, None], unsettled]  # fmt: skip
    return torch.cat([column.to(out.dtype) for column in columns], dim=1)


class DeviceStore:
    """See the module.

    Args:
        geometry: of the model on this rank.
        max_requests: S, request slots.
        max_tokens: longest request in tokens.
        num_blocks: B, blocks of the pool.
        units: E, eviction units a layer.
        max_grants: most grants one request's log may list; near it nothing is given back until the request ends.
        device: of the KV cache.
        knobs: what a strength changes in the gates' rules.
        undecided: as for ``LaneStore``.
        record: keep the expiry of every key that is dropped (tests).
        ranks: whose heads these are.
        grid: of gates at boundaries, at which rows are cut; else 0.
    """

    def __init__(
        self, geometry: LaneGeometry, max_requests: int, max_tokens: int, num_blocks: int, units: int, max_grants: int,
        device: torch.device, knobs: Callable[[float], Knobs], undecided: int | None = None, record: bool = False,
        ranks: Ranks | None = None, grid: int = 0,
    ) -> None:  # fmt: skip
        self.geometry, self.num_blocks, self.units, self.device, self.record, self.grid = (
            geometry, num_blocks, units, device, record, grid,
        )  # fmt: skip
        self.knobs, self.undecided = knobs, None if geometry.gate_rank else undecided
        self.ranks = ranks or Ranks()
        self.shrink_limit = max_grants - geometry.blocks_for(max_tokens)
        sizes = sizes_of(geometry, max_requests, max_tokens, num_blocks, units)
        self.lanes = Lanes.make(sizes, device, record_tokens=max_tokens if record else 0)
        self.kv: torch.Tensor | None = None
        self.slots: dict[str, DeviceSlot] = {}
        self._free_slots = list(range(max_requests - 1, -1, -1))
        self.events: set[tuple[str, int]] = set()  # lives recorded: request and epoch
        self._recorded: dict[str, torch.Tensor] = {}
        self._closing: tuple[torch.Tensor, int, dict[str, StepGrant]] | None = None
        self.cuts: Cuts | None = None
        """Of the step that is under way."""
        self._sent: deque[Sent] = deque()

    def bind(self, layers: list[torch.Tensor]) -> None:
        """Attach the KV cache: see ``layers_in_one``. One of bytes is FP8: vLLM allocates it so."""
        g = self.geometry
        kv = layers_in_one(layers, self.num_blocks, g.num_kv_heads, g.block_tokens, g.head_size)
        self.kv = kv.view(FP8) if kv.dtype == torch.uint8 else kv

    # Before and after a step -------------------------------------------------------------------------------------

    def begin(self, ended: list[str], grants: dict[str, StepGrant]) -> None:
        """Bury requests and snapshots, take in new grants, give every lane its pages for the step, and copy lanes to those that
        start from a snapshot: one copy to the device, and one more where snapshots are made."""
        gone: list[tuple[int, ...]] = []
        news: list[tuple[int, ...]] = []
        plans: list[tuple[int, ...]] = []
        starts: list[tuple[int, ...]] = []
        orders: list[tuple[int, ...]] = []
        closes: list[tuple[int, ...]] = []
        fresh: list[tuple[float, ...]] = []
        spared: list[tuple[int, Sequence[tuple[int, int]]]] = []
        for req_id in ended:
            self._forget(req_id, gone)
        every = {**grants, **snapshots_in(grants)}
        for req_id, given in every.items():
            state = self.slots.get(req_id)
            if state is not None and state.epoch != given.epoch:
                self._forget(req_id, gone)
                state = None
            if state is None:
                if not given.new_blocks:
                    raise RuntimeError(f"vllm-prune: request {req_id} starts without blocks")
                state = self.slots[req_id] = DeviceSlot(self._free_slots.pop(), given.epoch, given.new_blocks[0])
                if self.record:
                    self.events.add((req_id, given.epoch))
            if given.spared:
                state.spared = sum(end - begin for begin, end in given.spared)
                spared.append((state.slot, given.spared))
            if state.strength != given.strength:
                state.strength, knobs = given.strength, self.knobs(given.strength)
                fresh.append((state.slot, knobs.shift, knobs.limit, knobs.delay, state.spared, *knobs.levels))
            for rank, block in enumerate(given.new_blocks):
                news.append((state.slot, block, state.seen + rank, rank))
            state.seen += len(given.new_blocks)
            origin = state.slot if given.start is None else self.slots[given.start].slot
            if req_id not in grants:
                orders.append((state.slot, given.tokens, len(given.new_blocks), origin))
            else:
                plans.append((state.slot, given.tokens, len(given.new_blocks), origin))
                if given.start is not None:
                    starts.append((origin, state.slot))
            closes.append(self._close_row(state, given))
        self._set_knobs(fresh)
        self._set_spared(spared)
        tables = self._send([(gone, 2), (news, 4), (plans, 4), (starts, 2), (orders, 4), (closes, 4)])
        forget(self.lanes, tables[0])
        grant(self.lanes, tables[1])
        share(self.lanes, tables[3])
        most = max((given.tokens for given in grants.values()), default=0)
        plan(self.lanes, tables[2], most)
        if starts:
            assert self.kv is not None
            copy_lanes(self.lanes, self.kv, tables[3])
        plan(self.lanes, tables[4], most)  # which come after what was copied
        self.cuts = self._cuts(grants) if orders else None
        self._closing = (tables[5], most, every) if grants else None

    def _cuts(self, grants: dict[str, StepGrant]) -> Cuts:
        most = max(len(given.snapshots) for given in grants.values())
        at = np.full((self.lanes.sizes.slots, most), NEVER, np.int32)
        copies: dict[int, list[tuple[int, ...]]] = {}
        for req_id, given in grants.items():
            slot = self.slots[req_id].slot
            for number, order in enumerate(given.snapshots):
                at[slot, number] = order.tokens
                part = part_before(order.tokens, number, given.covered - given.tokens, self.grid)
                copy = (slot, self.slots[order.name].slot, order.tokens - (self.undecided or 0))
                copies.setdefault(part, []).append(copy)
        tables = self._send([(rows, 3) for rows in copies.values()])
        return Cuts(send(torch.from_numpy(at), self.device), dict(zip(copies, tables, strict=True)))

    def _set_knobs(self, fresh: list[tuple[float, ...]]) -> None:
        """Slot, shift, limit, delay, n_spared, levels of requests that begin or go on at another strength: float64 holds all
        exactly."""
        if not fresh:
            return
        table = send(torch.tensor(fresh, dtype=torch.float64), self.device)
        slots = table[:, 0].long()
        lanes = self.lanes
        for column, into in enumerate((lanes.shift, lanes.limit, lanes.delay, lanes.n_spared), start=1):
            into.index_copy_(0, slots, table[:, column].to(into.dtype))
        if table.shape[1] > 5:
            lanes.level.index_copy_(0, slots, table[:, 5:])

    def _set_spared(self, spared: list[tuple[int, Sequence[tuple[int, int]]]]) -> None:
        """Slot and spans, [begin, end), of requests that begin."""
        for slot, spans in spared:
            bits = np.zeros((self.lanes.sizes.words, 32), np.uint8)
            for begin, end in spans:
                bits.reshape(-1)[begin:end] = 1
            words = np.packbits(bits, axis=1, bitorder="little").view("<i4").reshape(-1)
            self.lanes.spared[slot].copy_(send(torch.from_numpy(words), self.device))

    def _close_row(self, state: DeviceSlot, given: StepGrant) -> tuple[int, ...]:
        """See ``close``: how far the scheduler may have gone when it reads this step's report."""
        keep_all = state.seen > self.shrink_limit
        near = given.in_flight < AHEAD
        ahead, more = (given.in_flight, 0) if near else (0, self.geometry.pages_for(given.in_flight))
        return state.slot, ahead, more, 0 if keep_all else state.seen

    def _send(self, tables: list[tuple[list[tuple[int, ...]], int]]) -> list[torch.Tensor]:
        """Tables int32 [n, columns] on the device."""
        flat = send(
            torch.tensor([x for rows, _ in tables for row in rows for x in row], dtype=torch.int32), self.device
        )
        counts = [len(rows) * columns for rows, columns in tables]
        parts = flat.split(counts)
        return [part.view(-1, columns) for part, (_, columns) in zip(parts, tables, strict=True)]

    def _forget(self, req_id: str, gone: list[tuple[int, ...]]) -> None:
        """Every trace of a request ends here. Unknown ids are fine: it may never have reached the worker."""
        state = self.slots.pop(req_id, None)
        if state is None:
            return
        if self.record:
            self._recorded[req_id] = self.lanes.recorded[state.slot].to("cpu", copy=True)
        gone.append((state.slot, state.first_block))
        self._free_slots.append(state.slot)

    def leave(self, copies: torch.Tensor, layer: int | None = None) -> None:
        """Make snapshots of lanes as they are now, of one layer or all; ``copies``: see ``Cuts``."""
        assert self.kv is not None
        (copy_lanes if self.undecided is None else sort_lanes)(self.lanes, self.kv, copies, layer)

    def end(self) -> None:
        """Close the step on the device, and send its report on its way."""
        if self._closing is None:
            return
        (rows, most, grants), self._closing = self._closing, None
        assert self.kv is not None
        if self.cuts is not None and most == 1:  # rows of one token are not cut
            for copies in self.cuts.copies.values():
                self.leave(copies)
        self.cuts = None
        if self.ranks.several:
            mine = counts_of(self.lanes, rows)
            agreed = self.ranks.join(mine)
            out = with_counts(close(self.lanes, self.kv, with_need(rows, agreed, mine.pages[:, 1]), most), agreed)
        else:
            out = close(self.lanes, self.kv, rows, most)
        done = None
        if self.device.type == "cuda":
            numbers = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            numbers.copy_(out, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        else:
            numbers = out
        states = [self.slots[req_id] for req_id in grants]
        self._sent.append(Sent(numbers, done, grants, states, [state.seen for state in states]))

    def take(self, late: int) -> list[tuple[str, StepGrant, LaneReport, DeviceSlot]]:
        """Reports that are there, oldest first.

        Args:
            late: steps that may be outstanding; those before are waited for.
        """
        found = []
        while self._sent and (len(self._sent) > late or self._sent[0].ready()):
            sent = self._sent.popleft()
            sent.wait()
            rows = zip(sent.grants.items(), sent.states, sent.seen, sent.numbers.tolist(), strict=True)
            for (req_id, given), state, seen, row in rows:
                pages, (keep, held, dropped, _, _, error), by_layer = row[:AHEAD], row[AHEAD:11], row[11:15]
                if error:
                    raise RuntimeError(f"vllm-prune: request {req_id} ran out of granted pages; this is a bug")
                state.peak_pages = max(state.peak_pages, pages[0])
                settled, shared = row[15:REPORT]
                in_use, *unsettled = row[REPORT:] or [pages[0] + shared, *(x - settled for x in pages)]
                report = LaneReport(
                    epoch=given.epoch, covered=given.covered, pages=tuple(pages), keep=keep or seen, seen=seen,
                    dropped=dropped, held=held, peak_pages=state.peak_pages,
                    by_layer=tuple(by_layer), in_use=in_use, unsettled=tuple(unsettled), settled=settled,
                )  # fmt: skip
                found.append((req_id, given, report, state))
        return found

    # Looked at by tests ------------------------------------------------------------------------------------------

    def expiries(self, req_id: str, tokens: int) -> np.ndarray:
        """Recorded expiries of a request's last life (``record`` on): int64 [L, E, T], NEVER where none.

        Args:
            req_id: of a live or ended request.
            tokens: T, how many keys to report on.

        Raises:
            KeyError: nothing was recorded for the request.
        """
        state = self.slots.get(req_id)
        if not self.record or (state is None and req_id not in self._recorded):
            raise KeyError(f"no drops were recorded for request {req_id}: is the option 'record' on?")
        found = self._recorded[req_id] if state is None else self.lanes.recorded[state.slot].cpu()
        out = found[..., :tokens].numpy().astype(np.int64)
        return np.where(out == NEVER, 2**31 - 1, out)
