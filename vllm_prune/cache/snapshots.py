"""Prefix caching of compressed state: which prefixes' lanes are held for later requests, and in whose blocks. Engine core.

Gates are causal: what they left of a prompt's first P tokens is a function of these tokens, the gate, its strength and the
spared positions, and of nothing else. A *snapshot* is a copy of the lanes as they stood at P, a multiple of the block size, in
blocks of its own. Between uses these are free blocks that vLLM's pool hands out last (``BlockPool.unpin_blocks``): memory that
nobody wants holds prefixes, and whoever wants it gets it. A request that begins with the same tokens starts from a copy.

Owns: which blocks hold which snapshot. Does not own: the blocks (vLLM's pool), what is in them (the worker).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from vllm_prune.cache.grants import GrantLog, LaneReport
from vllm_prune.chat import Span

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from vllm_prune.cache.geometry import LaneGeometry

MOST = 256
"""Snapshots held or being made at once; each has a slot in the worker's tables, which is address space until it is used."""
MOST_ON_GPU = 64
"""The same where tables take memory at once."""


@dataclass(frozen=True)
class Prefix:
    """What a request's first P tokens leave behind depends on.

    Attributes:
        block_hash: vLLM's, of all blocks up to P: tokens, cache salt, adapter.
        strength: of the gates.
        spared: positions [begin, end) below P whose keys no gate may drop.
    """

    block_hash: bytes
    strength: float
    spared: tuple[Span, ...]


@dataclass(eq=False)
class Snapshot:
    """Attributes: name, in the worker's tables; prefix; tokens: P; log: its grants; report: the worker's, once it is made."""

    name: str
    prefix: Prefix
    tokens: int
    log: GrantLog
    report: LaneReport | None = None

    @property
    def blocks(self) -> list[KVCacheBlock]:
        return [block for block in self.log.log if block is not None]

    def begun(self, epoch: int) -> GrantLog:
        """Account of a request that begins with its content: nothing granted yet, all pages needed but those that are shared."""
        report = self.report
        assert report is not None
        own = report.unsettled if self.shared else report.pages
        return GrantLog(
            epoch, report=replace(report, epoch=epoch, seen=0, drops=None, pages=own, unsettled=(), settled=0)
        )

    @property
    def shared(self) -> bool:
        """Whether requests that start from it share pages of it, on any rank."""
        return self.report is not None and self.report.settled > 0


@dataclass
class SnapshotOrder:
    """To the worker: copy a request's lanes as they are after ``tokens`` tokens into these blocks. ``epoch`` as of grants."""

    name: str
    epoch: int
    tokens: int
    blocks: list[int]


class Snapshots:
    """See the module.

    Args:
        pool: vLLM's; geometry: of the model.
        most: ``MOST``, or fewer.

    Attributes:
        made, used, lost: snapshots so far that were completed, started from, and ended.
    """

    def __init__(self, pool: BlockPool, geometry: LaneGeometry, most: int = MOST) -> None:
        self.pool, self.geometry, self.most = pool, geometry, most
        self.block_tokens = geometry.block_tokens
        self._by_prefix: OrderedDict[Prefix, Snapshot] = OrderedDict()  # least recently used first
        self._by_name: dict[str, Snapshot] = {}
        self._hashes: Counter[bytes] = Counter()  # of their prefixes: most lookups end here
        self._owner: dict[int, Snapshot] = {}
        self._held: list[Snapshot] = []
        self._sharers: dict[str, Snapshot] = {}
        self._useless: list[KVCacheBlock] = []
        self._gone: list[str] = []
        self._numbers = count(1)
        self.made = self.used = self.lost = 0

    def __len__(self) -> int:
        return len(self._by_prefix)

    @property
    def blocks(self) -> int:
        """Blocks that snapshots are in."""
        return len(self._owner)

    def prefix(self, request: Any, blocks: int, strength: float, spared: Sequence[Span]) -> Prefix:
        """Of a request's first blocks."""
        p = blocks * self.block_tokens
        below = tuple((begin, min(end, p)) for begin, end in spared if begin < p)
        return Prefix(request.block_hashes[blocks - 1], strength, below)

    # Starting from one ----------------------------------------------------------------------------------------------

    def find(self, request: Any, strength: float, spared: Sequence[Span]) -> Snapshot | None:
        """The longest snapshot that a request may start from. Its last token is computed in any case, for its logits."""
        most = min((request.num_tokens - 1) // self.block_tokens, len(request.block_hashes))
        for blocks in range(most, 0, -1):
            if request.block_hashes[blocks - 1] in self._hashes:
                found = self._by_prefix.get(self.prefix(request, blocks, strength, spared))
                if found is not None and found.report is not None:
                    return found
        return None

    def being_made(self, prefix: Prefix) -> bool:
        """Whether it was ordered and the worker has still to report it."""
        snapshot = self._by_prefix.get(prefix)
        return snapshot is not None and snapshot.report is None

    def hold(self, snapshot: Snapshot, request_id: str) -> None:
        """A request starts from it: its blocks may not be handed out until the step that copies them has been told to the worker
        (``settle``), or, where some of its pages are shared, until the request's life is over (``release``)."""
        self.pool.touch(snapshot.blocks)
        if snapshot.shared:
            self._sharers[request_id] = snapshot
        else:
            self._held.append(snapshot)
        self._by_prefix.move_to_end(snapshot.prefix)
        self.used += 1

    def release(self, request_id: str) -> None:
        """A life of a request is over. What it shared is free like any snapshot, once nobody else shares it."""
        snapshot = self._sharers.pop(request_id, None)
        if snapshot is None:
            return
        if self._by_name.get(snapshot.name) is snapshot:
            self._by_prefix.move_to_end(snapshot.prefix)
            self.pool.unpin_blocks(snapshot.blocks, self._taken)
        else:
            self.pool.free_blocks(snapshot.blocks)

    def shared_by(self, request_id: str) -> int:
        """Blocks of the snapshot that a request shares pages of."""
        snapshot = self._sharers.get(request_id)
        return 0 if snapshot is None else snapshot.log.live

    def free_blocks_of(self, snapshot: Snapshot) -> int:
        """How many free blocks of the pool ``hold`` would take."""
        return sum(block.ref_cnt == 0 for block in snapshot.blocks)

    # Making one -----------------------------------------------------------------------------------------------------

    def make(
        self, request: Any, grants: GrantLog, tokens: int, strength: float, spared: Sequence[Span]
    ) -> SnapshotOrder | None:
        """Order a snapshot of a request at ``tokens`` tokens; None where there is one, or no room for one now.

        Room is for whatever the gates may keep, and for what the request shares; what it is too much comes back when the worker
        has reported.
        """
        prefix = self.prefix(request, tokens // self.block_tokens, strength, spared)
        begun = self._sharers.get(request.request_id)
        room = grants.needed(self.geometry, tokens, begun.report.pages[0] if begun and begun.report else 0)
        if prefix in self._by_prefix or room > self.pool.get_num_free_blocks():
            return None
        if len(self._by_prefix) >= self.most:
            oldest = next((one for one in self._by_prefix.values() if one not in self._held), None)
            if oldest is None:
                return None
            self._forget(oldest)
        number = next(self._numbers)
        log = GrantLog(number)
        log.grant(self.pool.get_new_blocks(room))
        snapshot = Snapshot(f"\0snapshot {number}", prefix, tokens, log)
        self._by_prefix[prefix] = self._by_name[snapshot.name] = snapshot
        self._hashes[prefix.block_hash] += 1
        self._owner.update((block.block_id, snapshot) for block in snapshot.blocks)
        self._held.append(snapshot)
        return SnapshotOrder(snapshot.name, number, tokens, [block.block_id for block in log.take_unsent()])

    def accept(self, name: str, report: LaneReport) -> bool:
        """Take in the worker's report of a snapshot: from here on requests may start from it. False: none has that name."""
        snapshot = self._by_name.get(name)
        if snapshot is None:
            return False
        back = snapshot.log.accept(report)
        for block in back:
            del self._owner[block.block_id]
        self._useless += back
        snapshot.report = report
        self.made += 1
        return True

    # The end of one -------------------------------------------------------------------------------------------------

    def _taken(self, block: KVCacheBlock) -> None:
        """The pool hands out a block, or its prefix cache is reset."""
        snapshot = self._owner.get(block.block_id)
        if snapshot is not None:
            self._forget(snapshot)

    def _forget(self, snapshot: Snapshot) -> None:
        del self._by_prefix[snapshot.prefix], self._by_name[snapshot.name]
        self._hashes[snapshot.prefix.block_hash] -= 1
        if not self._hashes[snapshot.prefix.block_hash]:
            del self._hashes[snapshot.prefix.block_hash]
        for block in snapshot.blocks:
            del self._owner[block.block_id]
        self._useless += snapshot.blocks
        self._gone.append(snapshot.name)
        self.lost += 1

    def take_gone(self) -> list[str]:
        """Snapshots that ended since the last call: the worker hears of it before anyone writes into their blocks."""
        gone, self._gone = self._gone, []
        return gone

    def settle(self) -> None:
        """A step was told to the worker: what it copies from or to may be handed out in the next one, of which it hears later.
        Blocks of snapshots that ended go to the front of the pool's queue."""
        for snapshot in self._held:
            self.pool.unpin_blocks(snapshot.blocks, self._taken)
        self._held = []
        useless = [block for block in self._useless if block.ref_cnt == 0 and block.block_id not in self._owner]
        self.pool.touch(useless)
        self.pool.free_blocks(useless)
        self._useless = []
