"""Where prompts leave snapshots: against all prompts compared with all, by hand, and at the limits."""

from __future__ import annotations

import random
from collections import Counter
from itertools import count
from types import SimpleNamespace

import pytest

from vllm_prune.cache.partings import MOST_PARTS, PUT_OFF, Partings

N = 8
NAMES = count()


def prompt(letters: str, more: int = 3) -> SimpleNamespace:
    """A request of one block a letter, and some tokens."""
    hashes = [letters[: n + 1].encode() for n in range(len(letters))]
    tokens = len(letters) * N + more
    return SimpleNamespace(request_id=f"r{next(NAMES)}", num_prompt_tokens=tokens, block_hashes=hashes)


def places(partings: Partings, request: SimpleNamespace) -> list[int]:
    """All that it leaves if it is computed a token at a time."""
    return [
        at for end in range(1, request.num_prompt_tokens + 1) for at in partings.take(request.request_id, end - 1, end)
    ]


def alone(partings: Partings, letters: str, more: int = 3) -> list[int]:
    """Of one who comes when all others have ended."""
    request = prompt(letters, more)
    partings.arrives(request)
    partings.starts(request.request_id, 0)
    assert partings.behind(request.request_id) is None
    found = places(partings, request)
    partings.ended(request.request_id)
    return found


def test_one_after_another():
    partings = Partings(N)
    assert alone(partings, "abba") == [4 * N], "nobody was here before"
    assert alone(partings, "abba") == [4 * N]
    assert alone(partings, "abab") == [2 * N, 4 * N]
    assert alone(partings, "abbb", 0) == [3 * N], "its last token is computed in any case"
    assert alone(partings, "abaa", 1) == [3 * N, 4 * N]
    assert alone(partings, "b", 0) == [] and alone(partings, "", 3) == []
    assert alone(partings, "ba") == [2 * N]
    assert not len(partings)


def test_a_lead_is_left_once():
    """By the first who comes with it, at the last whole block before its end; not where somebody has come with as much before."""
    partings = Partings(N)

    def led(letters: str, lead: int) -> list[int]:
        request = prompt(letters)
        partings.arrives(request, lead)
        partings.starts(request.request_id, 0)
        found = places(partings, request)
        partings.ended(request.request_id)
        return found

    assert led("abba", 2 * N + 5) == [2 * N, 4 * N]
    assert led("abcc", 2 * N + 5) == [2 * N, 4 * N], "where the two part"
    assert led("abbb", 2 * N) == [3 * N, 4 * N]
    assert led("c", N - 1) == [N] and led("dd", 99 * N) == [2 * N], "less than a block; more than all of it"


def test_a_lead_gives_way():
    """To what is known to be shared, where a step cannot be cut for both."""
    partings = Partings(N)
    first, second = prompt("abba"), prompt("acca")
    for one in (first, second):
        partings.arrives(one, 2 * N)
    assert partings.behind(second.request_id) == (first.request_id, N, True)
    partings.starts(first.request_id, 0)
    assert partings.take(first.request_id, 0, first.num_prompt_tokens) == [N, 4 * N]
    partings.starts(second.request_id, N)
    assert partings.take(second.request_id, N, second.num_prompt_tokens) == [2 * N, 4 * N]
    third = prompt("abcc")
    partings.arrives(third, 3 * N)
    partings.starts(third.request_id, 0)
    assert partings.take(third.request_id, 0, third.num_prompt_tokens) == [2 * N, 4 * N]
    fresh = prompt("zyxw")
    for one, lead in ((fresh, 2 * N), (prompt("zyvu"), 2 * N), (prompt("zt"), N)):
        partings.arrives(one, lead)
    partings.starts(fresh.request_id, 0)
    assert partings.take(fresh.request_id, 0, fresh.num_prompt_tokens) == [2 * N, 4 * N], "its lead is wanted by now"


def test_many_at_once():
    """The first learns where the others part from it while it is waiting, and on its way as long as it has not passed there."""
    partings = Partings(N)
    first, second, third, late = prompt("abba"), prompt("abab"), prompt("ba"), prompt("abbb")
    for one in (first, second, third):
        partings.arrives(one)
    assert partings.behind(second.request_id) == (first.request_id, 2 * N, True)
    assert partings.behind(first.request_id) is partings.behind(third.request_id) is None
    fourth = prompt("abcc")
    partings.arrives(fourth)
    assert partings.behind(fourth.request_id) == (first.request_id, 2 * N, True), "the first of all, not the second"
    partings.ended(fourth.request_id)
    partings.starts(first.request_id, 0)
    assert partings.take(first.request_id, 0, 2 * N + 1) == [2 * N]
    assert partings.behind(second.request_id) == (first.request_id, 2 * N, False)
    partings.arrives(late)
    assert partings.behind(late.request_id) == (first.request_id, 3 * N, True)
    other = prompt("abb")
    partings.arrives(other)
    assert partings.behind(other.request_id) == (first.request_id, 3 * N, True), "it is still in this block"
    partings.ended(other.request_id)
    assert partings.take(first.request_id, 2 * N + 1, 4 * N + 3) == [3 * N, 4 * N]
    again = prompt("ab")
    partings.arrives(again)
    assert partings.behind(again.request_id) == (late.request_id, 2 * N, True), "the first had been there"
    partings.starts(late.request_id, 2 * N)
    assert partings.behind(again.request_id) == (late.request_id, 2 * N, False), "it starts from there"
    assert partings.take(late.request_id, 2 * N, 4 * N + 3) == [3 * N, 4 * N]
    partings.ended(second.request_id)
    assert partings.behind(third.request_id) is None


def test_against_all_pairs():
    """Requests arrive, go on, are thrown out and end at random. Each leaves a place where it ends, where it parts from whoever
    came before, and where those part from it who came before it was there; and who is behind somebody says so."""
    seen = Counter[str]()
    for seed in range(150):
        rng = random.Random(seed)
        partings, past = Partings(N), list[str]()
        alive: dict[str, SimpleNamespace] = {}
        owed: dict[str, set[int]] = {}
        at: dict[str, int] = {}
        for _ in range(40):
            if rng.random() < 0.4:
                letters = "".join(rng.choices("ab", k=rng.randint(1, 6)))
                new = prompt(letters)
                shared = max(
                    (n for n in range(1, len(letters) + 1) for one in past if one[:n] == letters[:n]), default=0
                )
                able = [
                    name for name, other in alive.items()
                    if shared and other.block_hashes[shared - 1 : shared] == [letters[:shared].encode()]
                    and at[name] < shared * N
                ]  # fmt: skip
                partings.arrives(new)
                behind = partings.behind(new.request_id)
                comers = sum(one[:shared] == letters[:shared] for one in past)
                assert able or behind is None
                assert behind is not None or not shared or len(able) < comers, "all that began so are still to come by"
                if behind is not None:
                    assert behind == (behind[0], shared * N, True) and behind[0] in able
                    owed[behind[0]].add(shared * N)
                    seen["behind"] += 1
                past.append(letters)
                alive[new.request_id], at[new.request_id] = new, 0
                owed[new.request_id] = {shared * N, len(letters) * N} - {0}
            elif alive:
                name = rng.choice(list(alive))
                end = alive[name].num_prompt_tokens + 5
                if rng.random() < 0.15:  # thrown out, and admitted again
                    at[name] = rng.choice([0, N])
                    partings.starts(name, at[name])
                    seen["again"] += 1
                step = rng.randint(1, 12)
                due = sorted(place for place in owed[name] if at[name] < place <= at[name] + step)
                assert partings.take(name, at[name], at[name] + step) == due[-(MOST_PARTS - 1) :]
                at[name] += step
                if at[name] >= end or rng.random() < 0.05:
                    partings.ended(name)
                    del alive[name]
                    at[name] = 1 << 30
            assert len(partings) == len(alive)
    assert min(seen["behind"], seen["again"]) > 100, seen


@pytest.mark.parametrize("asked,spacing", [(1, N), (N, N), (N + 1, 2 * N), (2 * N, 2 * N)])
def test_spacing(asked, spacing):
    partings = Partings(N, asked)
    assert alone(partings, "abcdef") == sorted({*range(spacing, 6 * N, spacing), 6 * N})


def test_more_than_a_step_is_cut_for():
    """What is known to be shared is left before what lies at a fixed distance, and what is longer before what is shorter."""
    partings = Partings(N, N)
    alone(partings, "abx")
    request = prompt("abcdef")
    partings.arrives(request)
    partings.starts(request.request_id, 0)
    assert partings.take(request.request_id, 0, 6 * N) == [5 * N, 6 * N], "all of them lie at a fixed distance"
    partings = Partings(N, 3 * N)
    alone(partings, "abx")
    request = prompt("abcdefg")
    partings.arrives(request)
    partings.starts(request.request_id, 0)
    assert partings.take(request.request_id, 0, 7 * N) == [2 * N, 7 * N]


def test_nobody_waits_for_ever():
    partings = Partings(N)
    one = prompt("ab")
    partings.arrives(one)
    assert [partings.may_wait(one.request_id) for _ in range(PUT_OFF + 2)] == [True] * PUT_OFF + [False] * 2


def test_only_the_latest_prompts_are_remembered(monkeypatch):
    monkeypatch.setattr("vllm_prune.cache.partings.SEEN", 4)
    partings = Partings(N)
    for letters in ("aa", "bb", "aa", "ccc"):
        alone(partings, letters)
    assert list(partings._first) == [b"aa", b"c", b"cc", b"ccc"]
    assert alone(partings, "bb") == [2 * N] and alone(partings, "ab") == [2 * N]


def test_one_that_ended_twice_or_never_came():
    partings = Partings(N)
    partings.ended("nobody")
    one = prompt("ab")
    partings.arrives(one)
    partings.ended(one.request_id)
    partings.ended(one.request_id)
    assert not len(partings)
