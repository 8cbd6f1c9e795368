"""The cache spec, and the scheduler's manager over a pool by itself."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from test_grants import report
from vllm.v1.core.block_pool import BlockPool

from vllm_prune.cache.geometry import LaneGeometry
from vllm_prune.cache.grants import GrantLog
from vllm_prune.cache.manager import LONGEST_WAIT, PruneManager
from vllm_prune.cache.snapshots import Snapshots
from vllm_prune.cache.spec import PruneSpec

SIZES = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}


def spec_of(**changes) -> PruneSpec:
    return PruneSpec(**{**SIZES, "num_layers": 3, "chunk_tokens": 64, **changes})


def test_the_spec_plans_with_the_geometry():
    spec = spec_of(gate_rank=16, gate_lanes=2, expected_keep=0.3, ranks=2)
    assert spec.geometry == LaneGeometry(3, 2, 64, 32, 16, 2)
    assert spec.block_bytes == 2 * 3 * spec.page_size_bytes and spec.page_size_bytes == 2 * 32 * 2 * 64 * 4
    assert not spec.prefix_cacheable and not spec.uses_slot_mapping
    assert spec.peak_blocks(500) == spec.geometry.peak_blocks(500, 64, 0.3) < spec.peak_blocks(500, 0.9)
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=500))
    assert spec.max_memory_usage_bytes(config) == spec.peak_blocks(500) * spec.page_size_bytes
    assert spec.max_num_blocks_per_req(config, 500) == spec.max_grants(500) == 3 * spec.geometry.blocks_for(500) + 64
    assert PruneSpec.merge([spec, spec]) == spec
    assert spec_of().expected_keep == 1.0 and spec_of().ranks == 1 and spec_of().eviction_units == 1


class Bare:
    """A manager over a pool, without a scheduler."""

    def __init__(self, blocks: int = 20, **changes) -> None:
        self.spec = spec_of(**changes)
        self.pool = BlockPool(blocks, enable_caching=False, hash_block_size=32)
        self.manager = PruneManager(
            self.spec, self.pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=32
        )

    def asks(self, name: str, tokens: int, whole: bool = False) -> int:
        report = self.manager.grants[name].report if name in self.manager.grants else None
        computed, more = (report.covered if report else 0), {"apply_admission_cap": True} if whole else {}
        return self.manager.get_num_blocks_to_allocate(name, tokens, [], computed, computed, tokens, **more)

    def grant(self, name: str, tokens: int) -> int:
        if name not in self.manager.num_cached_block:
            self.manager.add_local_computed_blocks(name, [], 0, 0)
        return len(self.manager.allocate_new_blocks(name, tokens, tokens))

    def hears(self, name: str, **changes) -> int:
        grants = self.manager.grants[name]
        return self.manager.accept(name, report(epoch=grants.epoch, seen=len(grants.log), **changes))


def test_a_manager_grants_and_takes_back():
    bare = Bare(expected_keep=0.25)
    assert bare.asks("a", 200, whole=True) == bare.spec.peak_blocks(200) == 5
    assert bare.asks("a", 200) == bare.spec.geometry.blocks_for(200) == 7, (
        "a step is not planned: it gets what it may need"
    )
    assert bare.asks("a", 64) == bare.grant("a", 64) == 2
    assert bare.asks("a", 200, whole=True) == 3, "what it holds is not asked for again"
    assert bare.asks("a", 128) == bare.grant("a", 128) == 2 and bare.grant("a", 128) == 0
    assert bare.hears("a", covered=128, pages=(9, 9, 9), keep=2, held=30, dropped=90) == 2
    row, grants = bare.manager.req_to_blocks["a"], bare.manager.grants["a"]
    assert [block.is_null for block in row] == [False, False, True, True] and grants.live == 2
    assert bare.pool.get_num_free_blocks() == 19 - 2 and bare.manager.tally.counts["blocks_returned"] == 2
    assert bare.asks("a", 129) == 0 and bare.asks("a", 192) == bare.grant("a", 192) == 2
    assert bare.asks("a", 200, whole=True) == bare.asks("a", 200) == 1, "it has reported: no plan any more"
    assert len(bare.manager.pop_blocks_for_free("a")) == 4, "null blocks are not freed"
    assert not bare.manager.grants and bare.manager.accept("a", report()) == 0, "a late word of the dead"
    assert PruneManager.find_longest_cache_hit([], 5, [0], bare.pool) == (([],), 0)


def test_lives_of_a_request_are_told_apart():
    bare = Bare()
    bare.grant("a", 64)
    first = bare.manager.grants["a"].epoch
    bare.pool.free_blocks(bare.manager.pop_blocks_for_free("a"))
    bare.manager.num_cached_block.pop("a", None)
    bare.grant("a", 64)
    assert bare.manager.grants["a"].epoch > first
    assert bare.manager.accept("a", report(epoch=first, keep=1, seen=2)) == 0
    assert bare.manager.grants["a"].live == 2 and not bare.manager.tally.counts


def test_over_plan_compares_with_what_was_promised():
    bare = Bare(expected_keep=0.25)
    bare.grant("a", 320)
    assert not bare.manager.over_plan(), "nothing is known yet"
    planned = bare.spec.peak_blocks(320)
    bare.hears("a", covered=320, pages=(planned * 6,) * 3, keep=planned)
    assert bare.manager.grants["a"].live == planned and not bare.manager.over_plan()
    bare.grant("a", 352)
    assert bare.manager.over_plan()
    bare.manager.expected_keep["a"] = 1.0
    assert not bare.manager.over_plan(), "it promised to keep everything"
    assert bare.asks("b", 320, whole=True) < bare.spec.geometry.blocks_for(320)
    bare.manager.expected_keep["b"] = 1.0
    assert bare.asks("b", 320, whole=True) == bare.spec.geometry.blocks_for(320)


def test_admission_learns():
    bare = Bare(blocks=60, expected_keep=0.25)
    bare.grant("a", 320)
    before = bare.asks("b", 640, whole=True)
    bare.hears("a", covered=320, pages=(60, 60, 60), keep=10, held=200, dropped=200)
    assert bare.asks("b", 640, whole=True) == bare.spec.peak_blocks(640, 0.5) > before


def test_who_is_short_awaits_its_report_and_lets_nobody_in():
    bare = Bare(blocks=8)
    bare.grant("a", 128)
    bare.manager.grants["a"].told = 128
    assert not bare.manager.waits_for_report()
    assert bare.asks("a", 256) == 4 > bare.pool.get_num_free_blocks() and bare.manager.waits_for_report()
    assert bare.asks("b", 10, whole=True) > bare.pool.get_num_free_blocks() < bare.asks("b", 10)
    bare.manager.new_step_starts()
    assert not bare.manager.waits_for_report() and bare.asks("b", 10) == 1
    assert bare.asks("b", 4000, whole=True) == 7, "more than the pool is tried alone"
    assert bare.hears("a", covered=128, pages=(6, 6, 6), keep=1) == 3
    assert bare.asks("a", 256) == 4 and not bare.manager.waits_for_report()
    bare.grant("a", 256)
    assert bare.asks("a", 400) > bare.pool.get_num_free_blocks() and not bare.manager.waits_for_report()


def test_who_has_room_keeps_nobody_out():
    bare = Bare(blocks=8)
    bare.grant("a", 128)
    assert bare.asks("a", 192) == 2 < bare.pool.get_num_free_blocks()
    assert bare.asks("b", 10) == 1 and bare.asks("a", 224) == 3 == bare.pool.get_num_free_blocks()
    assert bare.asks("b", 10) == 1, "just enough is enough"


def test_starting_from_a_snapshot():
    """What is granted: room for its lanes and the next tokens, planned at admission; its own blocks are held meanwhile."""
    bare = Bare(blocks=30, expected_keep=0.01)
    snapshots = bare.manager.snapshots = Snapshots(bare.pool, bare.spec.geometry)
    request = SimpleNamespace(request_id="a", num_tokens=600, block_hashes=[bytes([n]) for n in range(18)])
    order = snapshots.make(request, GrantLog(1), 320, 1.0, ())
    assert order is not None and len(order.blocks) == 10
    snapshots.settle()
    snapshots.accept(order.name, report(epoch=order.epoch, covered=320, pages=(24, 30, 30), keep=4, seen=10))
    found = bare.manager.starting["b"] = snapshots.find(request, 1.0, ())
    assert found is not None
    dense = 4 + bare.spec.geometry.blocks_for(280)  # 24 pages, and nothing dropped of what follows
    planned = bare.spec.peak_blocks(600)
    assert planned < dense
    ask = bare.manager.get_num_blocks_to_allocate
    assert ask("b", 600, [], 320, 0, 600) == dense + 4
    assert ask("b", 600, [], 320, 0, 600, apply_admission_cap=True) == planned + 4
    snapshots.hold(found, "a")
    assert ask("b", 600, [], 320, 0, 600) == dense, "somebody else holds its blocks already"
    snapshots.settle()
    bare.manager.allocate_external_computed_blocks("b", 0, 320)
    assert bare.manager.grants["b"].report.covered == 320 and bare.pool.get_num_free_blocks() == 29 - 4
    bare.manager.add_local_computed_blocks("b", [], 0, 0)
    assert bare.grant("b", 352) == 5 == bare.manager.grants["b"].live and bare.grant("b", 352) == 0


def test_sharing_a_snapshot():
    """Of its own a request needs what changes; the snapshot's blocks are its as long as it lives, and then free."""
    bare = Bare(blocks=30)
    snapshots = bare.manager.snapshots = Snapshots(bare.pool, bare.spec.geometry)
    request = SimpleNamespace(request_id="a", num_tokens=400, block_hashes=[bytes([n]) for n in range(12)])
    order = snapshots.make(request, GrantLog(1), 320, 1.0, ())
    assert order is not None
    snapshots.settle()
    said = report(
        epoch=order.epoch, covered=320, pages=(24, 30, 30), unsettled=(6, 12, 12), settled=18, keep=4, seen=10
    )
    snapshots.accept(order.name, said)
    found = snapshots.find(request, 1.0, ())
    assert found is not None and found.shared
    for name in ("b", "c"):
        bare.manager.starting[name] = found
        free = bare.pool.get_num_free_blocks()
        taken = 4 if name == "b" else 0
        assert bare.manager.get_num_blocks_to_allocate(name, 352, [], 320, 0, 352) == 2 + taken
        bare.manager.allocate_external_computed_blocks(name, 0, 320)
        bare.manager.add_local_computed_blocks(name, [], 0, 0)
        assert bare.grant(name, 352) == 2 and bare.pool.get_num_free_blocks() == free - taken - 2
        snapshots.settle()
    assert bare.pool.get_num_free_blocks() == 29 - 4 - 2 * 2, "once for both"
    for name, free in (("b", 29 - 4 - 2), ("c", 29)):
        assert snapshots.shared_by(name) == 4
        bare.manager.free(name)
        assert bare.pool.get_num_free_blocks() == free


def test_waiting_for_a_report_has_an_end():
    bare = Bare(blocks=8)
    bare.grant("a", 128)
    bare.manager.grants["a"].told = 128
    assert bare.asks("a", 256) > bare.pool.get_num_free_blocks()
    assert [bare.manager.waits_for_report() for _ in range(LONGEST_WAIT + 2)] == [True] * LONGEST_WAIT + [False] * 2
    bare.hears("a", covered=64, pages=(12, 12, 12), keep=4)
    assert bare.asks("a", 256) > bare.pool.get_num_free_blocks()
    waits = [bare.manager.waits_for_report() for _ in range(LONGEST_WAIT + 1)]
    assert waits == [True] * LONGEST_WAIT + [False], "it counts anew"


def test_a_spec_has_no_gate_keys_unless_told():
    assert (spec_of().gate_rank, spec_of().gate_lanes) == (0, 1)
