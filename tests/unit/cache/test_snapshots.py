"""Which prefixes are held, in whose blocks, and when they end: against a model, on vLLM's own pool, step by step."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from types import SimpleNamespace
from typing import Any

from test_grants import report
from vllm.v1.core.block_pool import BlockPool

from vllm_prune.cache.geometry import LaneGeometry
from vllm_prune.cache.grants import GrantLog
from vllm_prune.cache.snapshots import Prefix, Snapshots

N = 8
GEOMETRY = LaneGeometry(num_layers=2, num_kv_heads=1, head_size=16, block_tokens=N)


def asked(letters: str, tokens: int | None = None) -> SimpleNamespace:
    """A request of whole blocks and ``tokens`` in all; by default three more than these hold."""
    hashes = [letters[: n + 1].encode() for n in range(len(letters))]
    return SimpleNamespace(
        request_id="asker", num_tokens=len(letters) * N + 3 if tokens is None else tokens, block_hashes=hashes
    )


def holder(blocks: int = 20, **options: int) -> Snapshots:
    return Snapshots(BlockPool(blocks, enable_caching=False, hash_block_size=N), GEOMETRY, **options)


def held(snapshots: Snapshots, letters: str, keep: int = 1) -> str:
    """One that was made, told of and reported with ``keep`` blocks; its name."""
    order = snapshots.make(asked(letters), GrantLog(1), len(letters) * N, 1.0, ())
    assert order is not None
    snapshots.settle()
    assert snapshots.accept(
        order.name, report(epoch=order.epoch, covered=order.tokens, keep=keep, seen=len(order.blocks))
    )
    return order.name


class Steps:
    """Snapshots are ordered, told of, reported, started from and lost; others take blocks and give them back."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.total, self.most = rng.randint(8, 30), rng.randint(2, 6)
        self.snapshots = holder(self.total + 1, most=self.most)
        self.pool = self.snapshots.pool
        self.alive: OrderedDict[Prefix, list[Any]] = (
            OrderedDict()
        )  # [name, tokens, blocks, epoch, reported]; oldest first
        self.pinned: set[str] = set()
        self.shares: dict[str, tuple[str, set[int]]] = {}  # of requests that live: snapshot and its blocks
        self.others: list[Any] = []
        self.gone: set[str] = set()
        self.lost = self.spared = self.made = self.used = self.shared = self.orphans = 0
        self.loose = False  # whether blocks came free that have still to go to the front of the queue

    def letters(self) -> str:
        begun = self.rng.choice(["", *(one.block_hash.decode() for one in self.alive)])
        return (begun + "".join(self.rng.choices("ab", k=self.rng.randint(1, 3))))[:5]

    def ends(self, prefix: Prefix) -> None:
        self.gone.add(self.alive.pop(prefix)[0])
        self.lost += 1
        self.loose = True

    def taken(self, blocks: list[int]) -> None:
        """The pool has handed out blocks: who was held in them is gone."""
        for prefix in [one for one, own in self.alive.items() if set(own[2]) & set(blocks)]:
            assert self.alive[prefix][0] not in self.pinned, "it was promised until the step is told"
            assert self.alive[prefix][0] not in dict(self.shares.values()), "somebody reads it"
            self.ends(prefix)

    def make(self) -> None:
        letters, strength = self.letters(), self.rng.choice([0.5, 1.0, 1.0])
        spared = self.rng.choice([(), (), ((2, 5),), ((2, 99),), ((0, 3), (8 * 5, 99))])
        tokens = len(letters) * N
        below = tuple((begin, min(end, tokens)) for begin, end in spared if begin < tokens)
        prefix, free = Prefix(letters.encode(), strength, below), self.pool.get_num_free_blocks()
        full = len(self.alive) >= self.most
        oldest = next((one for one, own in self.alive.items() if own[0] not in self.pinned), None)
        order = self.snapshots.make(asked(letters), GrantLog(1), tokens, strength, spared)
        if prefix in self.alive or len(letters) > free or (full and oldest is None):
            assert order is None
            return
        assert order is not None and order.tokens == tokens and len(order.blocks) == len(letters)
        if full:
            assert oldest is not None
            self.ends(oldest)
        self.taken(order.blocks)
        self.alive[prefix] = [order.name, tokens, list(order.blocks), order.epoch, False]
        self.pinned.add(order.name)

    def step(self) -> None:
        """A step is told to the worker, and reports come: of what was told before, and of what it was told now or later."""
        self.snapshots.settle()
        gone = self.snapshots.take_gone()
        assert set(gone) == self.gone and len(gone) == len(self.gone)
        late, told = self.rng.random() < 0.3, self.pinned
        self.gone, self.pinned, self.loose = set(), set(), False
        for prefix, own in self.alive.items():
            name, tokens, blocks, epoch, reported = own
            if reported or (late and name in told):
                continue
            left, free = self.rng.randint(1, len(blocks)), self.pool.get_num_free_blocks()
            assert self.snapshots.being_made(prefix)
            pages = self.rng.choice([(9, 9, 9), (9, 9, 9), (5, 9, 9), (0, 9, 9)])  # of its nine those that change
            told_of = report(epoch=epoch, covered=tokens, keep=left, seen=len(blocks), pages=(9, 9, 9), unsettled=pages,
                             settled=9 - pages[0])  # fmt: skip
            assert self.snapshots.accept(name, told_of)
            assert self.pool.get_num_free_blocks() == free, "they were free before"
            assert not self.snapshots.being_made(prefix)
            own[2:] = [blocks[:left], epoch, True]
            self.loose = self.loose or left < len(blocks)
            self.made += 1

    def start(self) -> None:
        letters, strength = self.letters(), self.rng.choice([0.5, 1.0, 1.0])
        request = asked(letters, self.rng.randint(1, len(letters) * N + 3))
        found = self.snapshots.find(request, strength, ())
        fitting = [
            (own[1], own[0])
            for prefix, own in self.alive.items()
            if own[4] and own[1] < request.num_tokens and letters.encode().startswith(prefix.block_hash)
            and (prefix.strength, prefix.spared) == (strength, ())
        ]  # fmt: skip
        assert (found and (found.tokens, found.name)) == max(fitting, default=None)
        if found is None:
            return
        blocks, free = {block.block_id for block in found.blocks}, self.pool.get_num_free_blocks()
        assert blocks == set(self.alive[found.prefix][2])
        takes = 0 if found.name in self.pinned or found.name in dict(self.shares.values()) else len(blocks)
        assert self.snapshots.free_blocks_of(found) == takes
        self.used += 1
        name = f"r{self.used}"
        self.snapshots.hold(found, name)
        assert self.pool.get_num_free_blocks() == free - takes
        begun = found.begun(7000)
        assert begun.report is not None and found.report is not None
        assert begun.epoch == begun.report.epoch == 7000 != found.report.epoch and not begun.log
        assert begun.report.seen == 0 and begun.report.drops is None and begun.report.covered == found.tokens
        left = found.report.unsettled
        assert begun.report.pages == left and found.shared == (left[0] < 9)
        assert self.snapshots.shared_by(name) == (len(blocks) if found.shared else 0)
        if found.shared:
            self.shares[name] = found.name, blocks
            self.shared += 1
        else:
            self.pinned.add(found.name)
        self.alive.move_to_end(found.prefix)

    def request_ends(self) -> None:
        """Of somebody who may have shared pages, of a snapshot that may be gone."""
        name = self.rng.choice([*self.shares, "somebody else"])
        free, (snapshot, blocks) = self.pool.get_num_free_blocks(), self.shares.pop(name, ("", set()))
        self.snapshots.release(name)
        back = 0 if snapshot in self.pinned or snapshot in dict(self.shares.values()) else len(blocks)
        assert self.pool.get_num_free_blocks() == free + back and self.snapshots.shared_by(name) == 0
        known = [prefix for prefix, own in self.alive.items() if own[0] == snapshot]
        for prefix in known:
            self.alive.move_to_end(prefix)
        self.orphans += bool(snapshot) and not known

    def others_take(self) -> None:
        free = self.pool.get_num_free_blocks()
        count = min(self.rng.randint(1, 6), free)
        busy = {*self.pinned, *dict(self.shares.values())}
        owned = sum(len(own[2]) for own in self.alive.values() if own[0] not in busy)
        before, order = len(self.alive), list(self.alive)
        new = self.pool.get_new_blocks(count)
        self.others.append(new)
        self.taken([block.block_id for block in new])
        if not self.pinned and not self.loose and count <= free - owned:
            self.spared += before
            assert list(self.alive) == order, "nobody is thrown out while there are blocks that nobody wants"

    def others_give_back(self) -> None:
        if self.others:
            self.pool.free_blocks(self.others.pop(self.rng.randrange(len(self.others))))

    def reset(self) -> None:
        done = self.pool.reset_prefix_cache()
        assert done == (not any(self.others) and not self.pinned and not self.shares)
        for prefix in list(self.alive) if done else ():
            self.ends(prefix)

    def check(self) -> None:
        owned = [block for own in self.alive.values() for block in own[2]]
        assert len(owned) == len(set(owned)) == self.snapshots.blocks and len(self.snapshots) == len(self.alive)
        hashes = Counter(prefix.block_hash for prefix in self.alive)
        assert self.snapshots._hashes == hashes and len(self.snapshots._hashes) == len(hashes)
        counts = (self.snapshots.lost, self.snapshots.made, self.snapshots.used)
        assert counts == (self.lost, self.made, self.used)
        others = {block.block_id for some in self.others for block in some}
        read = {block for _, blocks in self.shares.values() for block in blocks}
        assert not others & {*owned, *read}
        pinned = {block for own in self.alive.values() if own[0] in self.pinned for block in own[2]}
        assert self.pool.get_num_free_blocks() == self.total - len(others) - len(pinned | read)


def test_steps():
    seen, orphans = Counter[str](), 0
    for seed in range(80):
        steps = Steps(random.Random(seed))
        does = [
            *[steps.make, steps.others_take, steps.others_give_back] * 2, *[steps.step] * 4, *[steps.start] * 4,
            *[steps.request_ends] * 3,
        ]  # fmt: skip
        for number in range(120):
            (steps.reset if number % 40 == 39 else steps.rng.choice(does))()
            steps.check()
        seen.update(lost=steps.lost, spared=steps.spared, used=steps.used, made=steps.made)
        seen.update(shared=steps.shared)
        orphans += steps.orphans
    assert min(seen.values()) > 50 and orphans > 3, (seen, orphans)


def test_one_settled_page_is_shared_by_all_who_start():
    """Then its blocks are held for as long as they live; without any they are free once the step is told."""
    for settled in (0, 1):
        snapshots = holder(blocks=10)
        order = snapshots.make(asked("aaa"), GrantLog(1), 3 * N, 1.0, ())
        snapshots.settle()
        told = {"pages": (6, 6, 6), "unsettled": (6 - settled, 6, 6), "settled": settled}
        snapshots.accept(order.name, report(epoch=order.epoch, covered=3 * N, keep=3, seen=3, **told))
        snapshots.hold(snapshots.find(asked("aaa"), 1.0, ()), "r")
        snapshots.settle()
        assert snapshots.shared_by("r") == 3 * settled and snapshots.pool.get_num_free_blocks() == 9 - 3 * settled
        snapshots.release("r")
        assert snapshots.pool.get_num_free_blocks() == 9


def test_the_least_recently_used_goes_first():
    snapshots = holder(blocks=10)
    names = {letters: held(snapshots, letters * 3) for letters in "abc"}
    snapshots.settle()
    assert snapshots.blocks == 3 and snapshots.pool.get_num_free_blocks() == 9 and snapshots.made == 3
    snapshots.hold(snapshots.find(asked("aaa"), 1.0, ()), "r")
    snapshots.settle()
    snapshots.pool.get_new_blocks(7)  # six that nobody wants, and one
    assert snapshots.take_gone() == [names["b"]] and snapshots.lost == 1 and snapshots.used == 1
    snapshots.pool.get_new_blocks(1)
    assert snapshots.take_gone() == [names["c"]] and snapshots.find(asked("aaa"), 1.0, ()).name == names["a"]


def test_blocks_of_one_that_ended_are_nobodys():
    """One of its blocks is handed out: the others go before those of any other snapshot."""
    snapshots = holder(blocks=7)
    held(snapshots, "aaa", keep=3)
    second = held(snapshots, "bbb", keep=3)
    snapshots.settle()
    snapshots.pool.get_new_blocks(1)
    assert len(snapshots) == 1 and snapshots.blocks == 3
    snapshots.settle()
    snapshots.pool.get_new_blocks(2)
    assert snapshots.find(asked("bbb"), 1.0, ()).name == second


def test_a_block_that_another_took_over_is_anothers():
    """It came from one that ended, in the same step: it does not go to the front with the rest of that one's."""
    snapshots = holder(blocks=6)
    held(snapshots, "aaa", keep=3)
    second = held(snapshots, "bbb", keep=3)
    assert snapshots.blocks == 3 and len(snapshots) == 1, "two that nobody wanted, and one of the first"
    snapshots.pool.get_new_blocks(2)
    assert snapshots.find(asked("bbb"), 1.0, ()).name == second


def test_one_that_is_reported_after_its_end_is_unknown():
    snapshots = holder(blocks=4)
    order = snapshots.make(asked("aaa"), GrantLog(1), 3 * N, 1.0, ())
    snapshots.settle()
    snapshots.pool.get_new_blocks(2)
    assert not snapshots.accept(order.name, report(epoch=order.epoch, covered=3 * N, keep=1, seen=3))
    assert snapshots.made == 0 and not len(snapshots) and snapshots.find(asked("aaa"), 1.0, ()) is None


def test_room_is_what_the_request_may_still_need():
    snapshots = holder(blocks=4)
    grants = GrantLog(1, report=report(epoch=1, covered=6 * N, pages=(3, 5, 7)))
    assert snapshots.make(asked("ababab"), GrantLog(1), 6 * N, 1.0, ()) is None
    assert len(snapshots.make(asked("ababab"), grants, 6 * N, 1.0, ()).blocks) == 2
