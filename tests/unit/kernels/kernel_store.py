"""The host's side of lanes on a device, by itself: what it sends ahead of a step, and what it makes of reports."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE

from vllm_prune.attention.serving import Knobs
from vllm_prune.cache.device_store import DeviceStore
from vllm_prune.cache.geometry import LaneGeometry
from vllm_prune.cache.ranks import Counts, Ranks, joined
from vllm_prune.cache.snapshots import SnapshotOrder
from vllm_prune.gates import NEVER
from vllm_prune.messages import StepGrant

L, H, N, D, BLOCKS = 2, 2, 16, 16, 20
SHARE = L * H  # pages of a block


def store_of(**more) -> DeviceStore:
    def knobs(strength: float) -> Knobs:
        return Knobs(shift=strength, limit=7, delay=3)

    store = DeviceStore(LaneGeometry(L, H, D, N), 4, 160, BLOCKS, H, 24, torch.device(DEVICE), knobs, **more)
    store.bind(list(torch.zeros(L, BLOCKS, H, N, 2 * D, device=DEVICE)))
    return store


def given(tokens, covered, blocks=(), epoch=1, **more) -> StepGrant:
    usual = {"remaining": 0, "last": False, "in_flight": 0, "prompt": 100, "strength": 1.0}
    return StepGrant(epoch, list(blocks), tokens, covered, **{**usual, **more})


def step(store, held, late=0, **grants):
    """A step after which lanes hold so many tokens, by request; its reports, by request."""
    ended = grants.pop("ended", [])
    store.begin(ended, grants)
    for name, tokens in held.items():
        store.lanes.length[store.slots[name].slot] = tokens
    store.end()
    return {name: report for name, _, report, _ in store.take(late)}


def test_reports():
    store = store_of()
    (said,) = step(store, {"a": 47}, a=given(47, 47, [3, 4, 5])).values()
    assert (said.epoch, said.covered, said.seen, said.keep) == (1, 47, 3, 3)
    assert said.pages == said.unsettled == tuple(SHARE * pages for pages in (3, 3, 4, 4, 4))
    assert (said.held, said.dropped, said.peak_pages, said.in_use, said.settled) == (47 * L * H, 0, 12, 12, 0)
    assert said.by_layer == (0, 0, 0, 0) and said.ends is None
    (said,) = step(store, {"a": 20}, a=given(1, 48)).values()
    assert (said.pages[0], said.keep, said.seen, said.peak_pages, said.covered) == (8, 2, 3, 12, 48)
    (said,) = step(store, {"a": 33}, a=given(13, 61, [7])).values()
    assert (said.pages[0], said.keep, said.seen) == (12, 4, 4)
    assert store.slots["a"].first_block == 3 and store.slots["a"].seen == 4


@pytest.mark.parametrize(("ahead", "keep"), [(0, 1), (1, 1), (2, 2), (4, 2), (5, 2), (17, 3), (33, 4)])
def test_what_may_be_in_flight_is_kept(ahead, keep):
    """Exact for up to four tokens, else a bound: their pages beside those in use."""
    store = store_of()
    (said,) = step(store, {"a": 15}, a=given(60, 60, [1, 2, 3, 4], in_flight=ahead)).values()
    assert said.keep == keep


def test_what_is_far_ahead_is_bounded_by_its_own_pages():
    """A full page now and five tokens to come: two pages a lane, though the fifth alone might have been the first of a second."""
    for tokens in (8, 16):
        (said,) = step(store_of(), {"a": tokens}, a=given(60, 60, [1, 2, 3, 4], in_flight=5)).values()
        assert said.keep == 2


def test_two_ranks_that_are_alike():
    """Keys add up, blocks are those of one."""

    class Two(Ranks):
        def join(self, mine: Counts) -> Counts:
            return joined(mine.columns().expand(2, -1, -1), mine.pages.shape[1], True)

    store = store_of(ranks=Two(0, 2, True))
    (said,) = step(store, {"a": 32}, a=given(40, 40, [1, 2, 3])).values()
    assert (said.pages, said.unsettled, said.keep, said.seen) == ((8, 12, 12, 12, 12), (8, 12, 12, 12, 12), 2, 3)
    assert (said.held, said.in_use, said.settled, said.dropped) == (2 * 32 * L * H, 16, 0, 0)


def test_near_the_longest_log_nothing_is_given_up():
    store = store_of()
    assert store.shrink_limit == 14
    (said,) = step(store, {"a": 5}, a=given(5, 5, range(1, 15))).values()
    assert (said.keep, said.seen) == (1, 14)
    (said,) = step(store, {"b": 5}, b=given(5, 5, range(1, 16)), ended=["a"]).values()
    assert (said.keep, said.seen) == (15, 15)


def test_lives_end_and_begin():
    store = store_of()
    assert store._free_slots == [3, 2, 1, 0] and store.lanes.record_tokens == 0
    with pytest.raises(RuntimeError, match="request b starts without blocks"):
        step(store, {}, b=given(1, 1))
    store = store_of(record=True)
    assert store.lanes.record_tokens == 160
    step(store, {"a": 30}, a=given(30, 30, [1, 2]))
    assert (store.expiries("a", 9) == NEVER).all() and store.expiries("a", 9).shape == (L, H, 9)
    (said,) = step(store, {"a": 5}, a=given(5, 5, [3], epoch=2)).values()
    assert (said.epoch, said.seen, said.pages[0], said.peak_pages) == (2, 1, SHARE, SHARE)
    assert store.events == {("a", 1), ("a", 2)} and store.lanes.slot_of_block[[1, 3]].tolist() == [-1, 0]
    step(store, {}, ended=["a", "never heard of"])
    assert not store.slots and sorted(store._free_slots) == [0, 1, 2, 3]
    assert (store.expiries("a", 9) == NEVER).all()
    with pytest.raises(KeyError, match="no drops were recorded for request b"):
        store.expiries("b", 9)
    with pytest.raises(KeyError, match="is the option 'record' on"):
        store_of().expiries("a", 9)


def test_knobs_and_spared_positions():
    store = store_of()
    step(store, {"a": 3, "b": 3}, a=given(3, 3, [1], strength=0.5, spared=((1, 3), (33, 34))), b=given(3, 3, [2]))
    slots = [store.slots[name].slot for name in "ab"]
    lanes = store.lanes
    assert lanes.shift[slots].tolist() == [0.5, 1.0] and lanes.delay[slots].tolist() == [3, 3]
    assert lanes.limit[slots].tolist() == [7, 7] and lanes.n_spared[slots].tolist() == [3, 0]
    assert lanes.spared[slots[0], :2].tolist() == [0b110, 0b10] and not lanes.spared[slots[1]].any()
    step(store, {"a": 4}, a=given(1, 4, strength=2.0))
    assert lanes.shift[slots].tolist() == [2.0, 1.0] and lanes.n_spared[slots[0]] == 3


def test_running_out_of_pages_is_an_error():
    store = store_of()
    with pytest.raises(RuntimeError, match="request a ran out of granted pages"):
        step(store, {"a": 33}, a=given(33, 33, [1]))


def test_reports_come_late():
    """Those of the last two steps may be outstanding, unless they are there."""
    store = store_of()
    told = []
    for number in range(1, 5):
        store.begin([], {"a": given(1, number, [number])})
        store.end()
        store._sent[-1].ready = lambda: False
        told.append([report.covered for _, _, report, _ in store.take(2)])
    assert told == [[], [], [1], [2]]
    assert [report.seen for _, _, report, _ in store.take(0)] == [3, 4]


@pytest.mark.parametrize("undecided", [None, 1])
def test_snapshots(undecided):
    """Made in the middle of a chunk; a request starts from it with all pages of its own, or shares the settled one."""
    store = store_of(undecided=undecided)
    order = SnapshotOrder("s", 9, 32, [6, 7, 11])
    store.begin([], {"a": given(40, 40, [1, 2, 3], snapshots=[order])})
    slot, place = store.slots["a"].slot, store.slots["s"].slot
    assert store.cuts is not None and store.cuts.at[slot].tolist() == [32] and len(store.cuts.copies) == 1
    assert store.cuts.copies[0].tolist() == [[slot, place, 32 - (undecided or 0)]]
    for layer in range(L):
        for lane in range(H * layer, H * layer + H):
            store.lanes.length[slot, lane] = 32
            for index in range(2):
                page = int(store.lanes.table[slot, lane, index])
                store.lanes.position[page] = torch.arange(N * index, N * index + N)
                store.lanes.expiry[page] = NEVER
        store.leave(store.cuts.copies[0], layer)
    store.lanes.length[slot] = 40
    store.end()
    assert store.cuts is None
    said = {name: report for name, _, report, _ in store.take(0)}
    settled = SHARE if undecided else 0
    assert (said["s"].epoch, said["s"].covered, said["s"].seen, said["s"].keep) == (9, 32, 3, 2)
    assert (said["s"].pages[0], said["s"].unsettled[0], said["s"].settled) == (8, 8 - settled, settled)
    assert said["a"].covered == 40 and said["a"].settled == 0
    (said,) = step(store, {"b": 33}, b=given(1, 33, [8, 9, 10], start="s")).values()
    assert (said.pages[0], said.in_use) == (12 - settled, 12) and said.keep == (2 if undecided else 3)
    assert store.lanes.shared[store.slots["b"].slot].tolist() == [settled // SHARE] * SHARE
    step(store, {}, ended=["s", "b"])
    assert not store.lanes.shared.any() and not store.lanes.settled.any()


def test_rows_of_one_token_leave_snapshots_at_the_end():
    store = store_of()
    step(store, {"a": 31}, a=given(31, 31, [1, 2]))
    store.begin([], {"a": given(1, 32, snapshots=[SnapshotOrder("s", 2, 32, [5, 6])])})
    store.lanes.length[store.slots["a"].slot] = 32
    store.end()
    said = {name: report for name, _, report, _ in store.take(0)}
    assert said["s"].held == said["a"].held == 32 * L * H and store.cuts is None
