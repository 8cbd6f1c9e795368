"""What a snapshot holds, sorted into what stays and what may go, and requests that share the first: on the lane store alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_lanes import D, H, L, N, lane, store_of, write

from vllm_prune.cache.geometry import LaneGeometry
from vllm_prune.cache.grants import GrantLog
from vllm_prune.cache.lane_ops import NEVER, Tokens, check, lib
from vllm_prune.cache.lanes import LaneStore
from vllm_prune.cache.ranks import Ranks, joined
from vllm_prune.cache.snapshots import Prefix, Snapshot


def computed(store: LaneStore, name: str, seed: int, tokens: int = 150) -> None:
    """A request of which a chunk was computed in every layer: some tokens died inside of it (another share in each lane), others
    have an expiry to come, the rest stays. Keys are positions."""
    rng = np.random.default_rng(seed)
    store.update(name, 1, list(range(1, 7)))
    key = torch.arange(tokens).float()[:, None, None].expand(tokens, H, D).contiguous()
    said = Tokens().point(key, key + 0.5, None)
    for layer in range(L):
        e, past = store.units, np.zeros((store.units, 1), np.int32)
        chunk = np.where(
            rng.random((e, tokens)) < [[rng.random()]] * e, NEVER, rng.integers(1, 3 * tokens, (e, tokens))
        )
        chunk = np.maximum(chunk, np.arange(tokens) + 1).astype(np.int32)
        slot = store.slots[name].slot
        args = (store.lanes.ref, slot, layer, 0, tokens, 0, tokens, said, past.ctypes.data, 1, chunk.ctypes.data)
        check(lib.steps_settle_chunk(*args))


def marks(store: LaneStore, name: str, layer: int, unit: int) -> list[tuple[int, int]]:
    """(position, expiry) of a lane's slots."""
    a, slot, at = store.lanes, store.slots[name].slot, layer * store.geometry.lanes_per_layer + unit
    n = int(a.length[slot, at])
    pages = a.table[slot, at, : -(-n // N)]
    return list(zip(a.pos[pages].flatten()[:n].tolist(), a.exp[pages].flatten()[:n].tolist(), strict=True))


def bits(store: LaneStore, name: str) -> list[bytes]:
    """Content of each page that a snapshot has settled, with its marks."""
    a, slot = store.lanes, store.slots[name].slot
    pages = [page for at in range(L * H) for page in a.table[slot, at, : a.settled[slot, at]]]
    return [b"".join(x[page].tobytes() for x in (store.kv_tensor.numpy(), a.pos, a.exp)) for page in pages]


@pytest.mark.parametrize("units", [1, H])
@pytest.mark.parametrize("seed", range(8))
def test_what_stays_comes_first(units, seed):
    """Against plain lists: the same keys, those that stay first, those that may go after them in their order, the newest last."""
    store = store_of(units=units, undecided=1)
    computed(store, "a", seed)
    store.update("s", 9, list(range(7, 12)))
    store.leave("a", "s", 150)
    a, slot = store.lanes, store.slots["s"].slot
    for layer in range(L):
        for head in range(H):
            was, now = (marks(store, name, layer, head if units > 1 else 0) for name in "as")
            stay = [mark for mark in was if mark[1] == NEVER and mark[0] < 149]
            assert sorted(now[: len(stay)]) == sorted(stay)
            assert now[len(stay) :] == [mark for mark in was if mark not in stay]
            assert a.settled[slot, layer * H + head] == len(stay) // N and not a.shared[slot].any()
            assert lane(store, "s", layer, head) == [position for position, _ in now]
    reports = store.report({"a": 150, "s": 150})
    said, of_a = reports["s"], reports["a"]
    settled = int(a.settled[slot].sum())
    assert settled > 0 and (said.dropped, said.held, said.ends) == (of_a.dropped, of_a.held, of_a.ends)
    assert said.unsettled == tuple(pages - settled for pages in said.pages) and of_a.unsettled == of_a.pages


def test_where_any_key_may_go_nothing_is_settled():
    for store in (store_of(), store_of(undecided=1, geometry=LaneGeometry(L, H, D, N, 16, 1))):
        store.update("a", 1, [1, 2, 3, 4, 5])
        store.update("s", 1, [6, 7, 8, 9, 10])
        if not store.geometry.gate_rank:
            write(store, "a", 0, 100)
        store.leave("a", "s", 100)
        assert not store.lanes.settled.any()


@pytest.mark.parametrize("seed", range(4))
def test_requests_share_what_stays(seed):
    """Two go on from a snapshot, each in its own way; its pages are as they were, and outlive its name."""
    store = store_of(units=H, undecided=1, record=True, max_requests=4, num_blocks=20)
    store.reserve_events(10_000)
    computed(store, "a", seed)
    store.update("s", 9, list(range(7, 12)))
    store.leave("a", "s", 150)
    store.report({"s": 150})
    store.forget("a")
    before, held = bits(store, "s"), {(x, h): marks(store, "s", x, h) for x in range(L) for h in range(H)}
    assert before
    dropped = {}
    for name, block in (("b", 1), ("c", 12)):
        store.update(name, 2, list(range(block, block + 6)))
        store.start("s", name)
        assert held == {(x, h): marks(store, name, x, h) for x in range(L) for h in range(H)}
        if name == "c":
            store.forget("s")
        now = 150 + 200 * (name == "c")  # all that may go does by then, for one of them
        for layer in range(L):
            past = np.full((H, 200), NEVER, np.int32)
            for head in range(H):
                for at, (_, expiry) in enumerate(held[layer, head]):
                    past[head, at] = expiry
            chunk, key = np.full((H, 20), NEVER, np.int32), torch.full((20, H, D), 7.0)
            args = (layer, 150, now, 0, 20, Tokens().point(key, key, None), past.ctypes.data, 200, chunk.ctypes.data)
            check(lib.steps_settle_chunk(store.lanes.ref, store.slots[name].slot, *args))
        said = store.report({name: 170})[name]
        a, slot = store.lanes, store.slots[name].slot
        own = a.table[slot] * 0
        for at in range(L * H):
            pages = a.table[slot, at, a.shared[slot, at] : -(-int(a.length[slot, at]) // N)]
            assert set((pages // H) % store.num_blocks) <= {x for x in store.slots[name].grants if x >= 0}
            own[at, : len(pages)] = 1
        assert said.pages[0] == own.sum() and said.in_use == own.sum() + a.shared[slot].sum()
        dropped[name] = said.dropped
        for layer in range(L):
            for head in range(H):
                left = [(p, e) for p, e in held[layer, head] if e > now]
                new = [(150 + i, NEVER) for i in range(20)]
                assert sorted(marks(store, name, layer, head)) == sorted(left + new)
        if name == "b":
            assert bits(store, "s") == before
    assert dropped["c"] > dropped["b"]
    pages = [page for at in range(L * H) for page in store.lanes.table[slot, at, : store.lanes.shared[slot, at]]]
    found = [
        b"".join(x[page].tobytes() for x in (store.kv_tensor.numpy(), store.lanes.pos, store.lanes.exp))
        for page in pages
    ]
    assert found == before, "what c shares is there, though the snapshot is gone"
    store.forget("b")
    store.forget("c")
    assert not store.lanes.shared.any() and not store.lanes.settled.any()


def test_a_shared_key_is_not_dropped():
    """It would change for all who share it: refused, whoever asks for it."""
    store = store_of(units=1, undecided=1)
    store.update("a", 1, [1, 2, 3])
    write(store, "a", 0, N + 5)
    store.update("s", 1, [4, 5, 6])
    store.leave("a", "s", N + 5)
    store.update("b", 1, [7, 8, 9])
    store.start("s", "b")

    def drop(name: str) -> int:
        past, chunk, key = np.full((1, 400), NEVER, np.int32), np.full((1, 1), NEVER, np.int32), torch.zeros(1, H, D)
        past[0, N - 1] = N + 5
        args = (0, N + 5, N + 5, 0, 1, Tokens().point(key, key, None), past.ctypes.data, 400, chunk.ctypes.data)
        return lib.steps_settle_chunk(store.lanes.ref, store.slots[name].slot, *args)

    with pytest.raises(RuntimeError, match="a key was to be dropped that was shared"):
        check(drop("b"))
    assert check(drop("a")) == 0, "its own it may"
    assert lane(store, "b", 0, 0) == [float(x) for x in range(N + 5)]


def test_ranks_agree_on_what_is_unsettled():
    """The most that any rank needs of its own, whichever has more settled."""

    class Two(Ranks):
        def join(self, mine):
            flat = mine.columns()
            other = flat.clone()
            other[:, 1:9] = torch.tensor([50, 11, 12, 13, 1, 2, 3, 10])  # in use; own now and later; unsettled; settled
            return joined(torch.stack([flat, other]), mine.pages.shape[1], self.split)

    store = store_of(undecided=1, ranks=Two(0, 2, True))
    store.update("a", 1, [1, 2, 3])
    write(store, "a", 0, N + 5)
    store.update("s", 1, [4, 5, 6])
    store.leave("a", "s", N + 5)
    said = store.report({"s": N + 5})["s"]
    assert (said.pages, said.unsettled, said.settled, said.in_use) == ((12, 12, 13), (6, 6, 6), 10, 62)
    # Nothing is settled here, much is there: its pages are shared there, so the blocks must be held.
    store.undecided = None
    store.update("t", 1, [7, 8, 9])
    store.leave("a", "t", N + 5)
    said = store.report({"t": N + 5})["t"]
    assert (said.pages, said.unsettled, said.settled) == ((12, 12, 13), (12, 12, 12), 10)
    assert Snapshot("t", Prefix(b"", 1.0, ()), N + 5, GrantLog(1), said).shared
