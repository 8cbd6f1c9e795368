"""The lane store by itself: grants and pages, reports, recorded drops, several ranks, copies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_prune.cache.geometry import LaneGeometry
from vllm_prune.cache.lane_ops import NEVER, Tokens, check, lib
from vllm_prune.cache.lanes import LaneStore
from vllm_prune.cache.ranks import Ranks

L, H, N, D, BLOCKS = 3, 2, 32, 32, 12
GEOMETRY = LaneGeometry(L, H, D, N)


def store_of(**changes) -> LaneStore:
    args = {"max_requests": 3, "max_tokens": 320, "num_blocks": BLOCKS, "dtype": torch.float32, "units": 1, **changes}
    store = LaneStore(args.pop("geometry", GEOMETRY), **args)
    store.bind(list(torch.zeros(L, args["num_blocks"], H, N, 2 * D)))
    return store


def write(store: LaneStore, name: str, start: int, count: int) -> None:
    """Dense tokens in all layers; keys are their positions."""
    for layer in range(L):
        key = torch.arange(start, start + count).float()[:, None, None].expand(count, H, D).contiguous()
        tokens = Tokens().point(key, key + 0.5, None)
        slot = store.slots[name].slot
        past = np.full((1, 400), NEVER, np.int32)
        chunk = np.full((1, count), NEVER, np.int32)
        args = (store.lanes.ref, slot, layer, start, start, 0, count, tokens, past.ctypes.data, 400, chunk.ctypes.data)
        check(lib.steps_settle_chunk(*args))


def skip(store: LaneStore, layer: int, slots: list[int], positions: list[int]) -> None:
    """Tokens that a layer does not run on: dropped where they stand."""
    s, p = np.asarray(slots, np.int32), np.asarray(positions, np.int32)
    check(lib.lanes_skip(store.lanes.ref, layer, len(s), s.ctypes.data, p.ctypes.data))


def lane(store: LaneStore, name: str, layer: int, head: int) -> list[float]:
    """First number of each key of a lane."""
    slot, at = store.slots[name].slot, layer * store.geometry.lanes_per_layer + head
    pages = store.lanes.table[slot, at, : -(-int(store.lanes.length[slot, at]) // N)]
    keys = store.kv_tensor[torch.from_numpy(pages)][:, : N * D].view(-1, D, N)[:, 0].flatten()
    return keys[: int(store.lanes.length[slot, at])].tolist()


# Grants, pages, reports -----------------------------------------------------------------------------------------------


def test_pages_come_from_the_lowest_grants_and_tails_go_back():
    store = store_of()
    store.update("a", 1, [5])
    store.update("a", 1, [7, 3])
    slot = store.slots["a"].slot
    a = store.lanes
    assert store.slots["a"].grants == [5, 7, 3] and store.slots["a"].first_block == 5 and a.n_free[slot] == 3 * L * H
    assert store.slot_of_block == {5: "a"}
    write(store, "a", 0, N)
    used = {int(page) // H % BLOCKS for page in a.table[slot, :, 0]}
    assert used == {5}, "one page a lane: all of the first grant"
    assert a.n_free[slot] == 2 * L * H
    told = store.report({"a": N})["a"]
    assert (told.epoch, told.covered, told.pages, told.keep, told.seen) == (1, N, (6, 12, 12), 1, 3)
    assert (told.dropped, told.held, told.peak_pages, told.in_use, told.by_layer, told.ends) == (
        0, L * N, 6, 6, (0, 0, 0, 0), 0,
    )  # fmt: skip
    assert told.kept_pairs == 1.0 and told.drops is None
    assert store.slots["a"].grants == [5, -1, -1] and store.slots["a"].returned == 2 and a.n_free[slot] == 0
    store.update("a", 1, [9, 10])
    assert store.slots["a"].grants == [5, -1, -1, 9, 10]
    write(store, "a", N, N + 1)
    assert lane(store, "a", 2, 1) == list(range(2 * N + 1))
    again = store.report({"a": 2 * N + 1})["a"]
    assert (again.pages, again.keep, again.seen, again.peak_pages) == ((18, 18, 18), 5, 5, 18)


@pytest.mark.parametrize(
    ("tokens", "ahead", "keep"),
    [
        (N, 0, 1),
        (N, 1, 2),
        (N, 2, 2),
        (N, 3, 2),
        (N, 33, 3),
        (N, 64, 3),
        (N, 65, 4),
        (N - 2, 2, 1),
        (N - 1, 1, 1),
        (N - 1, 2, 2),
    ],
)
def test_what_may_be_in_flight_is_kept(tokens, ahead, keep):
    store = store_of()
    store.update("a", 1, [1, 2, 3, 4, 5])
    write(store, "a", 0, tokens)
    assert store.report({"a": tokens}, {"a": ahead, "b": 500})["a"].keep == keep


def test_nothing_is_in_flight_of_a_request_of_which_nothing_is_said():
    store = store_of()
    store.update("a", 1, [1, 2, 3])
    store.update("c", 1, [4, 5, 6])
    write(store, "a", 0, N - 1)
    write(store, "c", 0, N)
    assert store.report({"a": N - 1}, {"b": 500})["a"].pages == (L * H, L * H, 2 * L * H)
    assert store.report({"c": N}, {"b": 500})["c"].keep == 1


def test_pages_of_three_heads():
    """Each head-page of a block once, those of the first block on top."""
    g = LaneGeometry(L, 3, D, N)
    store = LaneStore(g, 3, 320, BLOCKS, torch.float32, 1)
    store.update("a", 1, [4, 9])
    pages = store.lanes.free_pages[0, : int(store.lanes.n_free[0])].tolist()
    want = [{(layer * BLOCKS + block) * 3 + head for layer in range(L) for head in range(3)} for block in (9, 4)]
    assert [set(pages[: L * 3]), set(pages[L * 3 :])] == want and len(pages) == 2 * L * 3


def test_the_first_of_several_new_grants_fills_first():
    store = store_of()
    store.update("a", 1, [5, 7, 3])
    write(store, "a", 0, 3 * N)
    pages = store.lanes.table[store.slots["a"].slot, :, :3].reshape(
        L, -1
    )  # a layer's fill a block, one layer after another
    assert [{int(page) // H % BLOCKS for page in layer} for layer in pages] == [{5}, {7}, {3}]


def test_pages_are_packed_into_the_lowest_grants():
    store = store_of()
    store.update("a", 4, [1, 2, 3, 4])
    write(store, "a", 0, 3 * N)
    before = [lane(store, "a", layer, head) for layer in range(L) for head in range(H)]
    a, slot = store.lanes, store.slots["a"].slot
    for at in range(L * H):  # only the newest page of each lane is left
        newest = int(a.table[slot, at, 2])
        for index in range(2):
            a.page_lane[a.table[slot, at, index]] = -1
            a.free_pages[slot, a.n_free[slot]] = a.table[slot, at, index]
            a.n_free[slot] += 1
        a.table[slot, at, 0], a.page_index[newest], a.length[slot, at] = newest, 0, N
    told = store.report({"a": 3 * N})["a"]
    assert (told.keep, told.seen, told.pages[0]) == (1, 4, 6) and store.slots["a"].grants == [1, -1, -1, -1]
    after = [lane(store, "a", layer, head) for layer in range(L) for head in range(H)]
    assert after == [keys[2 * N :] for keys in before]
    assert {int(page) // H % BLOCKS for page in a.table[slot, :, 0]} == {1}


def test_a_long_log_gives_nothing_back_any_more():
    store = store_of(max_grants=14)  # 10 blocks hold 320 tokens
    store.update("a", 1, [1, 2, 3, 4])
    write(store, "a", 0, 5)
    assert store.report({"a": 5})["a"].keep == 1
    store.update("a", 1, [5])
    assert store.report({"a": 5})["a"].keep == 5
    assert store_of().shrink_limit is None


def test_ends_and_new_lives():
    store = store_of(record=True)
    for name, block in (("a", 1), ("b", 2), ("c", 3)):
        store.update(name, 1, [block])
    assert sorted(state.slot for state in store.slots.values()) == [0, 1, 2]
    write(store, "b", 0, 9)
    slot = store.slots["b"].slot
    store.set_facts("b", 9, 2.0)
    store.spare("b", [(2, 4), (6, 7)])
    a = store.lanes
    assert a.prompt[slot] == 9 and a.strength[slot] == 2.0
    assert a.n_spared[slot] == 3 and np.flatnonzero(a.spared[slot]).tolist() == [2, 3, 6]
    a.ends[slot], a.closed[slot], a.dropped[slot] = 5, 1, 1
    store.forget("b")
    store.forget("nobody")
    assert "b" not in store.slots and 2 not in store.slot_of_block and (a.page_lane == -1).all()
    numbers = (a.length, a.n_free, a.dropped, a.ends, a.closed, a.spared, a.n_spared)
    assert not any(x[slot].any() for x in numbers) and a.prompt[slot] == NEVER
    store.update("d", 7, [4])
    assert store.slots["d"].slot == slot and store.slots["d"].epoch == 7
    store.update("a", 2, [5])
    assert store.slots["a"].grants == [5] and 1 not in store.slot_of_block, "another epoch is another life"
    store.update("a", 2, [])
    with pytest.raises(RuntimeError, match="request e starts without blocks"):
        store.update("e", 1, [])
    assert store.report({}) == {}


# Recorded drops -------------------------------------------------------------------------------------------------------


def test_drops_are_recorded_by_life():
    store = store_of(record=True)
    store.update("a", 1, [1])
    store.update("b", 1, [2])
    a, b = store.slots["a"].slot, store.slots["b"].slot
    store.reserve_events(10)
    skip(store, 1, [a, b, a], [3, 0, 5])
    skip(store, 2, [a], [0])
    want = np.full((L, 1, 6), NEVER)
    want[1, 0, [3, 5]], want[2, 0, 0] = [3, 5], 0
    np.testing.assert_array_equal(store.expiries("a", 6), want)
    assert (store.expiries("b", 2) != NEVER).sum() == 1
    store.update("a", 2, [3])
    store.reserve_events(10)
    skip(store, 0, [store.slots["a"].slot], [1])
    assert np.argwhere(store.expiries("a", 6) != NEVER).tolist() == [[0, 0, 1]], "of the last life alone"
    store.forget("a")
    assert np.argwhere(store.expiries("a", 6) != NEVER).tolist() == [[0, 0, 1]], "and after its end"
    told = store.report({"b": 1})["b"]
    assert (told.dropped, told.by_layer) == (1, (1, 0, 1, 0))
    with pytest.raises(KeyError, match="is the option 'record' on"):
        store.expiries("c", 1)
    store.forget("b")
    store.update("bb", 5, [4])
    assert store.slots["bb"].covered == 0
    assert np.argwhere(store.expiries("a", 6) != NEVER).tolist() == [[0, 0, 1]], "whatever lives others have"
    store.record_passed(0, np.asarray([store.slots["bb"].slot]), np.asarray([2]))
    assert store.passed_by("".join(["b", "b"]), 3).sum() == 1 and not store.passed_by("a", 3).any()


def test_drops_are_told_once_to_who_asked():
    store = store_of()
    store.update("a", 1, [1])
    store.update("b", 1, [2])
    store.set_facts("a", 9, 1.0, mapped=True)
    a, b = store.slots["a"].slot, store.slots["b"].slot
    store.reserve_events(4)
    skip(store, 1, [a, b], [3, 4])
    store.set_facts("a", 9, 1.0, mapped=True)
    store.set_facts("b", 9, 1.0)
    told = store.report({"a": 4, "b": 5})
    assert told["a"].drops.tolist() == [[1, 3, 3]] and told["b"].drops is None
    assert store.report({"a": 4})["a"].drops.shape == (0, 3)
    store.reserve_events(0)
    skip(store, 1, [a], [5])
    assert store.report({"a": 6})["a"].drops.shape == (0, 3), "nothing is recorded when nobody wants it"
    assert not store.events


def test_room_for_events_grows_and_too_little_is_found_out():
    store = store_of(record=True)
    store.update("a", 1, [1])
    slot = store.slots["a"].slot
    store.reserve_events(2)
    assert store.lanes.store.events_cap == 2
    store.reserve_events(1)
    assert store.lanes.store.events_cap == 2
    with pytest.raises(RuntimeError, match="event buffer overflowed"):
        skip(store, 0, [slot] * 3, [0, 1, 2])
    store.reserve_events(5)
    assert store.lanes.store.events_cap == 5 and store.lanes.events.shape == (5, 4)


def test_bypassed_tokens_are_recorded():
    store = store_of(record=True)
    store.update("a", 1, [1])
    store.update("b", 3, [2])
    slots = np.asarray([store.slots[name].slot for name in "aba"])
    store.record_passed(2, slots, np.asarray([4, 1, 6]))
    assert np.argwhere(store.passed_by("a", 8)).tolist() == [[2, 4], [2, 6]]
    assert np.argwhere(store.passed_by("b", 8)).tolist() == [[2, 1]]
    store.update("a", 2, [3])
    assert not store.passed_by("a", 8).any()
    off = store_of()
    off.update("a", 1, [1])
    off.record_passed(0, np.asarray([0]), np.asarray([0]))
    assert not off.passed


# Several ranks, one by one --------------------------------------------------------------------------------------------


class Other:
    """vLLM's coordinator of two ranks, of which this one tells what the other, ``more``, would."""

    def __init__(self, more) -> None:
        self.more = more

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        assert x.dtype == torch.float32
        return torch.cat([x, self.more(x.view(torch.int64).clone()).view(torch.float32)], dim)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x + 7


def test_the_rank_that_needs_most_decides_what_is_kept():
    def more(x: torch.Tensor) -> torch.Tensor:
        x[:, :8] += 7  # need, pages in use, and of its own now and after one and two tokens, all and unsettled
        x[:, 9:11] += 100  # held, ends
        x[:, 11:] += torch.tensor([1, 2, 9])
        return x

    ranks = Ranks(1, 2, True, Other(more))
    store = store_of(ranks=ranks)
    store.update("a", 1, [1, 2, 3, 4])
    write(store, "a", 0, N)
    skip(store, 2, [store.slots["a"].slot], [5])
    told = store.report({"a": N})["a"]
    assert (told.pages, told.keep, told.seen) == ((13, 19, 19), 3, 4)
    assert (told.held, told.dropped, told.ends) == (2 * L * N + 100, 14, 2 * 6 + 100)
    assert told.by_layer == (11, 1, 2, 11) and told.in_use == 6 + 13 and told.peak_pages == 13
    assert ranks.several and not ranks.speaks and not Ranks().several and Ranks().speaks
    assert ranks.first(torch.ones(2)).tolist() == [7, 7] and Ranks(0, 2, group=Other(more)).first(
        torch.ones(2)
    ).tolist() == [8, 8]
    assert store.report({}) == {}, "nobody to speak of, nothing to join"


def test_slots_are_as_many_as_requests():
    store = store_of()
    assert store._free_slots == [2, 1, 0] and store.shrink_limit is None
    assert store_of(max_grants=25).shrink_limit == 25 - 10


# Copies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [1, 31, 32, 33, 64, 70, 96])
def test_what_a_lane_that_only_grows_held_after_some_tokens(begin):
    """A copy of it is what somebody holds who computed no more than these; layer 1 does not run on every third token."""

    def compute(store: LaneStore, name: str, tokens: int) -> None:
        for at in range(tokens):
            for layer in range(L):
                if layer == 1 and at % 3 == 1:
                    skip(store, layer, [store.slots[name].slot], [at])
                else:
                    one(store, name, layer, at)

    store, short = store_of(record=True, appends=True), store_of(record=True)
    for one_store, name, block in ((store, "a", 1), (short, "b", 1)):
        one_store.update(name, 1, list(range(block, block + 4)))
        one_store.reserve_events(40)
    compute(store, "a", 96)
    compute(short, "b", begin)
    store.update("b", 1, [5, 6, 7, 8])
    store.leave("a", "b", begin)
    said, want = store.report({"b": begin})["b"], short.report({"b": begin})["b"]
    settled = 2 * L * (begin // N) - 2 * (begin // N) + 2 * ((begin - want.dropped) // N)
    assert said.unsettled == tuple(pages - settled for pages in want.pages)
    assert (
        said.settled == settled
        and replace(said, unsettled=want.unsettled, settled=0) == want
        and want.dropped == (begin + 1) // 3
        and want.held == 3 * begin - want.dropped
    )
    for layer in range(L):
        for head in range(H):
            assert lane(store, "b", layer, head) == lane(short, "b", layer, head)
    np.testing.assert_array_equal(store.expiries("b", begin), short.expiries("b", begin))
    assert (store.expiries("b", begin)[1] != NEVER).sum() == want.dropped


def test_records_of_a_layer_go_along_with_its_copy():
    store = store_of(record=True, units=2)
    store.update("a", 1, [1])
    store.update("b", 7, [2])
    slot = store.slots["a"].slot
    store.reserve_events(10)
    for layer, at in ((0, 4), (1, 6), (2, 1), (1, 9)):
        skip(store, layer, [slot], [at])
    store.leave("a", "b", 10, layer=1)
    one = [[1, 0, 6], [1, 0, 9], [1, 1, 6], [1, 1, 9]]
    assert np.argwhere(store.expiries("b", 10) != NEVER).tolist() == one
    store.leave("a", "b", 10, layer=2)
    assert np.argwhere(store.expiries("b", 10) != NEVER).tolist() == [*one, [2, 0, 1], [2, 1, 1]]


def one(store: LaneStore, name: str, layer: int, at: int) -> None:
    """A token of one layer; its key is its position."""
    key = torch.full((1, H, D), float(at))
    tokens, slot = Tokens().point(key, key, None), store.slots[name].slot
    past, chunk = np.full((1, 400), NEVER, np.int32), np.full((1, 1), NEVER, np.int32)
    args = (store.lanes.ref, slot, layer, at, at, 0, 1, tokens, past.ctypes.data, 400, chunk.ctypes.data)
    check(lib.steps_settle_chunk(*args))
