"""Physical accounting of gated requests in vLLM's scheduler: blocks follow resident pages, not logical tokens.

Owns: each running request's grant log. Does not own: the block pool (vLLM's), nor any knowledge of which key was dropped.
Runs in the engine core.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from vllm_prune.cache.grants import GrantLog, LaneReport
from vllm_prune.cache.promise import Promise
from vllm_prune.cache.snapshots import Snapshot, Snapshots
from vllm_prune.cache.spec import PruneSpec
from vllm_prune.metrics import Tally

LONGEST_WAIT = 16
"""Steps for a report that a request is short of, before somebody is preempted after all: reports are a few steps late at most."""


class PruneManager(SingleTypeKVCacheManager):
    """Grants blocks by what a request can need, takes them back by what its worker says it no longer needs.

    ``req_to_blocks`` is the grant log as vLLM sees it: one entry a grant, the null block where a grant was given back.
    """

    kv_cache_spec: PruneSpec

    def __init__(self, kv_cache_spec: PruneSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self.geometry = kv_cache_spec.geometry
        self.grants: dict[str, GrantLog] = {}
        self.expected_keep: dict[str, float] = {}
        """Kept fraction that a request of its own strength is planned with; the spec's for all others."""
        self.promise = Promise(kv_cache_spec.chunk_tokens)
        self.snapshots: Snapshots | None = None
        self.starting: dict[str, Snapshot] = {}
        """What waiting requests will start from, as found when they were last looked at."""
        self._epochs = count(1)
        self._short: str | None = None
        self._waited = 0
        self.tally = Tally(self.geometry, kv_cache_spec.eviction_units, kv_cache_spec.ranks)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        grants = self.grants.get(request_id)
        if grants is None and self._short is not None:
            return self.block_pool.num_gpu_blocks  # nobody is let in before the one who is short
        if grants is None and total_computed_tokens > 0:
            most = self._planned(request_id, num_tokens) if apply_admission_cap else None
            return self.blocks_to_start(self.starting[request_id], num_tokens, most)
        if apply_admission_cap and (grants is None or grants.report is None):
            # Admission asks for the whole prompt at once: plan for its peak, thinned out as requests of late have been.
            # One that is planned larger than the pool is tried alone, lest it and all behind it wait for ever.
            planned = min(self._planned(request_id, num_tokens), self.block_pool.num_gpu_blocks - 1)
            return planned - (grants.live if grants else 0)
        if grants is None:
            return self.geometry.blocks_for(num_tokens)
        more = max(grants.needed(self.geometry, num_tokens) - grants.live, 0)
        if more > self.block_pool.get_num_free_blocks():
            self._short = request_id
        return more

    def new_step_starts(self) -> None:
        self._short = None

    def waits_for_report(self) -> bool:
        """Whether the running request that has just been short of blocks may be given fewer, or more be free, once its
        worker's report is here."""
        grants = self.grants.get(self._short or "")
        if grants is None or not grants.awaits_report:
            return False
        self._waited += 1
        return self._waited <= LONGEST_WAIT

    def blocks_to_start(self, snapshot: Snapshot, num_tokens: int, most: int | None = None) -> int:
        """Free blocks that a request of ``num_tokens`` tokens takes to start from a snapshot: its own (``most``, where that many
        are planned at most), and those of the snapshot, which nobody may be given while they are read."""
        assert self.snapshots is not None
        own = snapshot.begun(0).needed(self.geometry, num_tokens)
        if most is not None:
            own = min(own, most)
        return own + self.snapshots.free_blocks_of(snapshot)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """A request starts from a snapshot: its blocks are granted with those for its next tokens."""
        assert self.snapshots is not None
        snapshot = self.starting[request_id]
        self.snapshots.hold(snapshot, request_id)
        self.grants[request_id] = snapshot.begun(next(self._epochs))

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Blocks hold pages of any lane, not tokens in order: vLLM must not find them by their hashes."""

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        grants = self.grants.get(request_id)
        if grants is None:
            grants = self.grants[request_id] = GrantLog(next(self._epochs))
        more = grants.needed(self.geometry, num_tokens) - grants.live
        if more <= 0:
            return []
        blocks = self.block_pool.get_new_blocks(more)
        grants.grant(blocks)
        self.req_to_blocks[request_id].extend(blocks)
        return blocks

    def accept(self, request_id: str, report: LaneReport) -> int:
        """Take in a worker's report; the blocks it gives up go back to the pool.

        Returns:
            Blocks returned; 0 for a request that no longer runs or an earlier life of it.
        """
        grants = self.grants.get(request_id)
        if grants is None:
            return 0
        self._waited = 0
        before = grants.report
        back = grants.accept(report)
        if grants.report is report:
            self.tally.report(before, report)
            self.promise.learn(report, self._promised(request_id))
        self.tally.add("blocks_returned", len(back))
        if back:
            row = self.req_to_blocks[request_id]
            for index, block in enumerate(grants.log):
                if block is None:
                    row[index] = self._null_block
            self.block_pool.free_blocks(back)
        return len(back)

    def _planned(self, request_id: str, num_tokens: int) -> int:
        return self.kv_cache_spec.peak_blocks(num_tokens, self.promise.planned(self._promised(request_id)))

    def _promised(self, request_id: str) -> float:
        return self.expected_keep.get(request_id, self.kv_cache_spec.expected_keep)

    def over_plan(self) -> bool:
        """Whether a running request holds more than admission planned for all of its tokens so far."""
        return any(
            grants.report is not None
            and grants.live > self.kv_cache_spec.peak_blocks(grants.report.covered, self._promised(request_id))
            for request_id, grants in self.grants.items()
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.grants.pop(request_id, None)
        if self.snapshots is not None:
            self.snapshots.release(request_id)
        return [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]

    @classmethod
    def find_longest_cache_hit(cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int],
                               block_pool: BlockPool, *args: Any, **kwargs: Any) -> tuple[tuple[list, ...], int]:  # fmt: skip
        """Never a hit: prefixes are held as snapshots, which the connector finds (``PruneConnector``)."""
        return tuple([] for _ in kv_cache_group_ids), 0
