"""Scheduler-side accounting without vLLM: bounds and reports."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_prune.cache.geometry import LaneGeometry, cdiv
from vllm_prune.cache.grants import GrantLog, LaneReport


def geometry_of(per_head: bool, **sizes: int) -> LaneGeometry:
    return LaneGeometry(**sizes, gate_lanes=sizes["num_kv_heads"] if per_head else 1)


geometries = st.builds(
    geometry_of,
    per_head=st.booleans(),
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 4),
    head_size=st.sampled_from([32, 64]),
    block_tokens=st.sampled_from([32, 64]),
    gate_rank=st.sampled_from([0, 16, 64]),
)


def report(**changes) -> LaneReport:
    return LaneReport(**{"epoch": 1, "covered": 100, "pages": (10, 11, 12), "keep": 3, "seen": 5, **changes})


@settings(deadline=None)
@given(geometries, st.integers(0, 500), st.lists(st.integers(0, 400), min_size=1, max_size=6), st.integers(1, 200))
def test_bound_covers_whatever_the_gates_keep(geometry, covered, lengths, more):
    """Any lane lengths up to what was covered, then ``more`` tokens kept everywhere: the grant suffices."""
    g = geometry
    lanes = [min(lengths[i % len(lengths)], covered) for i in range(g.num_lanes)]

    def pages(extra: int) -> int:
        total = 0
        for i, length in enumerate(lanes):
            gate = g.gate_rank and i % g.lanes_per_layer >= g.num_kv_heads
            total += cdiv(length + extra, g.gate_page_tokens if gate else g.block_tokens)
        return total

    log = GrantLog(1, report=report(covered=covered, pages=(pages(0), pages(1), pages(2))))
    assert log.needed(g, covered + more) * g.pages_per_block >= pages(more)
    assert log.needed(g, covered + more) <= g.blocks_for(covered + more), "never more than keeping everything"


@settings(deadline=None)
@given(geometries, st.integers(1, 3000), st.integers(1, 512), st.floats(0.01, 1.0))
def test_planned_peak(geometry, tokens, chunk, keep):
    assert geometry.peak_blocks(tokens, chunk, keep) <= geometry.blocks_for(tokens)
    assert geometry.peak_blocks(tokens, chunk, 1.0) == geometry.blocks_for(tokens), "keeping all plans like stock vLLM"
    assert geometry.peak_blocks(tokens, chunk, keep) >= geometry.blocks_for(min(tokens, chunk))


def test_accept_gives_back_the_tail_once_and_ignores_earlier_lives():
    log = GrantLog(2)
    log.grant(list("abcdef"))
    assert log.accept(report(epoch=1)) == [], "an earlier life"
    assert log.accept(report(epoch=2, keep=2, seen=5)) == ["e", "d", "c"], "f was granted after the worker spoke"
    assert log.log == ["a", "b", None, None, None, "f"] and (log.live, log.returned) == (3, 3)
    assert log.accept(report(epoch=2, keep=2, seen=5)) == []
    assert log.accept(report(epoch=2, keep=0, seen=6)) == ["f", "b"], "the first grant names the request: it stays"


def test_unsent_grants_are_told_once():
    log = GrantLog(1)
    log.grant(["a", "b"])
    assert log.take_unsent() == ["a", "b"] and log.take_unsent() == []
    log.grant(["c"])
    assert log.take_unsent() == ["c"]


def test_a_page_that_cannot_hold_gate_keys_is_refused():
    for rank in (48, 4096):
        with pytest.raises(ValueError, match="a head-page of 2048 numbers cannot be divided into gate keys of"):
            LaneGeometry(1, 1, 32, 32, gate_rank=rank)
    assert LaneGeometry(1, 1, 32, 32, gate_rank=2048).gate_page_tokens == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=8), st.randoms())
def test_reports_in_any_order_twice_or_never(steps, rng):
    """A worker is granted blocks and gives some up, step after step; its reports come in any order, some twice, some never.
    What was given up in those that came is given back, once, and nothing that was not given up (a later report may repeat a
    lost one); the newest says what is needed."""
    log, reports, held, gone = GrantLog(1), list[LaneReport](), list[int](), list[set[int]]()
    for step, (more, keep) in enumerate(steps):
        log.grant(list(range(len(log.log), len(log.log) + more)))
        held = [*held, *range(len(log.log) - more, len(log.log))]
        gone.append(set(held[keep:]))
        held = held[:keep]
        last = held[-1] + 1 if gone[-1] else len(log.log)
        reports.append(report(covered=step, pages=(step, step, step), keep=last, seen=len(log.log)))
    come = [i for i in range(len(steps)) if rng.random() < 0.8]
    order = come + [i for i in come if rng.random() < 0.3]
    rng.shuffle(order)
    back = [block for i in order for block in log.accept(reports[i])]
    assert set().union(*(gone[i] for i in come)) <= set(back) <= set().union(*gone) and len(set(back)) == len(back)
    assert log.live == sum(block is not None for block in log.log) == len(log.log) - len(back)
    assert not set(held) & set(back), "what the worker still uses"
    assert log.report is (reports[max(come)] if come else None)


def test_what_is_not_said_is_nothing():
    said = report()
    assert (said.dropped, said.held, said.peak_pages, said.by_layer, said.in_use) == (0, 0, 0, (0, 0, 0, 0), 0)
    assert said.ends is said.drops is said.kept_pairs is None
    log = GrantLog(1)
    assert (log.live, log.sent, log.told, log.returned, log.peak, log.log) == (0, 0, 0, 0, 0, [])


def test_a_report_is_awaited_from_the_first_token_on():
    log = GrantLog(1)
    assert not log.awaits_report
    log.told = 1
    assert log.awaits_report
    log.told = 100
    log.accept(report(covered=99))
    assert log.awaits_report
    log.accept(report(covered=100))
    assert not log.awaits_report


def test_needs_for_fewer_tokens_than_were_reported_are_those_of_now():
    g = LaneGeometry(num_layers=2, num_kv_heads=1, head_size=32, block_tokens=32)
    log = GrantLog(1, report=report(covered=640, pages=(12, 25, 39)))
    now, then = g.blocks_for_pages(12), g.blocks_for_pages(25)
    assert log.needed(g, 600) == log.needed(g, 640) == now != then == log.needed(g, 641)


def test_an_epoch_is_a_number():
    log = GrantLog(int("1000"))
    log.grant(list("abcde"))
    assert (
        log.accept(report(epoch=int("1000"), covered=10, keep=3)) == ["e", "d"] and log.live == 3 and log.returned == 2
    )


def test_kept_pairs_by_hand():
    """Five tokens; of two lanes one dropped key 0 at query 3 and key 2 at query 4: two queries saw the first, one the second."""
    whole = 2 * (1 + 2 + 3 + 4)
    missed = 2 + 1  # queries 3 and 4 of key 0, query 4 of key 2
    said = report(covered=5, dropped=2, held=8, ends=3 + 4)
    assert said.kept_pairs == pytest.approx(1 - missed / whole)
    # Six tokens; keys 0, 1 and 2 of one lane at queries 3, 4 and 5: the first is missed by three, then two, then one.
    assert report(covered=6, dropped=3, held=9, ends=3 + 4 + 5).kept_pairs == pytest.approx(1 - 6 / 30)
    assert report(covered=5, dropped=0, held=10, ends=0).kept_pairs == 1.0
    assert report(covered=1, dropped=0, held=2, ends=0).kept_pairs == 1.0, "no query had a past"


def test_what_is_shared_is_needed_beside_its_own():
    """By who copies all that a request sees; never more than every token takes densely."""
    geometry = LaneGeometry(num_layers=2, num_kv_heads=2, head_size=32, block_tokens=32)  # 4 pages a block
    log = GrantLog(1, report=report(covered=320, pages=(10, 11, 12)))
    assert [log.needed(geometry, 320, shared) for shared in (0, 2, 3, 11, 500)] == [3, 3, 4, 6, 10]
    assert log.needed(geometry, 321, 3) == 4 and log.needed(geometry, 352, 3) == cdiv(10 + 4 + 3, 4)
