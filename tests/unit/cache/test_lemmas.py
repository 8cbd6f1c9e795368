"""What admission rests on (docs/admission.md): lemmas about grants for any drops, and what is learned of kept fractions."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grants import geometries, report

from vllm_prune.cache.geometry import LaneGeometry, cdiv
from vllm_prune.cache.grants import GrantLog, LaneReport
from vllm_prune.cache.promise import Promise

# Lemmas -----------------------------------------------------------------------------------------------------------------


class Lanes:
    """A worker's lanes of one request that drop at random, and the grants that it still uses, by index in the log."""

    def __init__(self, geometry: LaneGeometry, dice: random.Random) -> None:
        self.geometry, self.dice = geometry, dice
        g = geometry
        gate = [bool(g.gate_rank) and i % g.lanes_per_layer >= g.num_kv_heads for i in range(g.num_lanes)]
        self.sizes = [g.gate_page_tokens if own else g.block_tokens for own in gate]
        self.lengths = [0] * g.num_lanes
        self.live: list[int] = []
        self.seen = self.covered = 0

    def pages(self, more: int) -> int:
        return sum(cdiv(length + more, size) for length, size in zip(self.lengths, self.sizes, strict=True))

    def step(self, granted: int, tokens: int, ahead: int) -> LaneReport:
        """Compute tokens, drop at random, give up what the next ``ahead`` tokens cannot need."""
        g = self.geometry
        self.live += range(self.seen, self.seen + granted)
        self.seen += granted
        assert self.pages(tokens) <= len(self.live) * g.pages_per_block, "the worker ran out of pages"
        self.covered += tokens
        self.lengths = [self.dice.randint(0, length + tokens) for length in self.lengths]
        need = self.pages(ahead) if ahead < 3 else self.pages(0) + g.pages_for(ahead)
        kept = max(g.blocks_for_pages(need), 1)
        keep = self.live[kept - 1] + 1 if len(self.live) > kept else self.seen
        self.live = self.live[:kept]
        return report(covered=self.covered, pages=tuple(map(self.pages, range(3))), keep=keep, seen=self.seen)


@settings(deadline=None)
@given(geometries, st.integers(0, 2**32), st.lists(st.integers(1, 90), min_size=1, max_size=25), st.integers(0, 3))
def test_a_worker_never_lacks_pages_however_late_its_reports_are(geometry, seed, chunks, late):
    """Lemma 1: what ``needed`` grants covers every lane keeping everything, for any drops and reports ``late`` steps old."""
    lanes, log, flying, most = Lanes(geometry, random.Random(seed)), GrantLog(1), [], max(chunks)
    for tokens in chunks:
        before = log.live
        log.grant(list(range(max(log.needed(geometry, lanes.covered + tokens) - before, 0))))
        granted = len(log.take_unsent())
        flying.append(lanes.step(granted, tokens, late * most))
        while len(flying) > late:
            log.accept(flying.pop(0))
            assert log.live == sum(block is not None for block in log.log)
        assert {i for i, block in enumerate(log.log) if block is not None} >= set(lanes.live)
        assert log.live <= geometry.blocks_for(lanes.covered), "Lemma 3: never more than keeping everything takes"
    for told in flying:
        log.accept(told)
    assert [i for i, block in enumerate(log.log) if block is not None] == lanes.live


@settings(deadline=None)
@given(geometries, st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 400), st.integers(0, 400))
def test_the_bound_rises_with_tokens_and_falls_with_reports(geometry, seed, covered, more, later):
    """Lemma 2: more tokens never need fewer blocks; a report never raises the bound for tokens that it does not cover."""
    lanes, fresh = Lanes(geometry, random.Random(seed)), GrantLog(1)
    told = GrantLog(1, report=lanes.step(geometry.blocks_for(covered), covered, 0))
    for log in (fresh, told):
        assert log.needed(geometry, covered + more) <= log.needed(geometry, covered + more + later)
    assert told.needed(geometry, covered + more) <= fresh.needed(geometry, covered + more)
    next_one = lanes.step(told.needed(geometry, covered + more), more, 0)
    later_log = GrantLog(1, report=next_one)
    tokens = covered + more + later
    assert later_log.needed(geometry, tokens) <= geometry.blocks_for(tokens)


def test_a_bound_in_numbers():
    """2 layers of 3 heads, 32 tokens a page, 6 pages a block."""
    g = LaneGeometry(2, 3, 32, 32)
    assert (g.num_lanes, g.gate_page_tokens, g.pages_for(33), g.blocks_for(33), g.dense_blocks(33)) == (6, 0, 12, 2, 2)
    log = GrantLog(1, report=report(covered=100, pages=(13, 14, 16)))
    assert [log.needed(g, tokens) for tokens in (90, 100, 101, 102, 103, 132, 133)] == [3, 3, 3, 3, 4, 4, 5]
    assert LaneGeometry(2, 3, 32, 32, 16, 3).pages_for(129) == 2 * 3 * 5 + 2 * 3 * 2
    gated = LaneGeometry(2, 3, 32, 32, 16)
    assert (gated.lanes_per_layer, gated.num_lanes, gated.gate_page_tokens, gated.pages_for(129)) == (4, 8, 128, 34)
    assert (gated.blocks_for_pages(34), gated.blocks_for(129)) == (6, 6)
    # 200 tokens, the newest 64 whole: a quarter of 136 tokens' 34 pages, and 14 of the chunk, and a page a lane.
    assert gated.peak_blocks(200, 64, 0.25) == cdiv(int(0.25 * gated.pages_for(136)) + 14 + 8, 6) == 5
    assert gated.peak_blocks(64, 64, 0.25) == gated.blocks_for(64) == 3


# The learned promise ----------------------------------------------------------------------------------------------------


def kept(share: float, covered: int = 1000) -> LaneReport:
    return report(covered=covered, held=round(share * 10 * covered), dropped=round((1 - share) * 10 * covered))


def test_a_promise_that_is_kept_or_bettered_stands():
    promise = Promise(chunk_tokens=100)
    assert promise.factor == 1.0 and promise.planned(0.2) == 0.2
    for share in (0.2, 0.1, 0.05):
        promise.learn(kept(share), 0.2)
    assert promise.factor == 1.0


def test_a_wrong_promise_is_corrected_at_once_and_the_correction_fades():
    promise = Promise(chunk_tokens=100)
    promise.learn(kept(0.6), 0.2)
    assert promise.factor == pytest.approx(3.0) and promise.planned(0.2) == pytest.approx(0.6)
    assert promise.planned(0.5) == 1.0, "nothing keeps more than everything"
    for _ in range(1000):
        promise.learn(kept(0.2), 0.2)
    assert 1.0 < promise.factor < 2.5
    for _ in range(9000):
        promise.learn(kept(0.2), 0.2)
    assert promise.factor == pytest.approx(1.0, abs=0.01)


def test_long_requests_weigh_more_and_short_ones_teach_nothing():
    promise = Promise(chunk_tokens=100)
    promise.learn(kept(1.0, covered=100), 0.2)
    promise.learn(report(covered=1000, held=0, dropped=0), 0.2)
    assert promise.factor == 1.0
    promise.learn(kept(0.2, covered=101), 0.2)
    promise.learn(kept(0.4, covered=10100), 0.2)
    assert promise.factor == pytest.approx(2.0, abs=0.02)
