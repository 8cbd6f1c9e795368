"""How a map is gathered and carried: what goes in comes out, what is damaged is named, one life's drops and no other's."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vllm_prune import lifetimes
from vllm_prune.cache.grants import LaneReport
from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER
from vllm_prune.lifetimes import Lifetimes, pack, unpack

SECTION = DropGateConfig(method="dms", params={"delay": 8}, num_layers=3, num_kv_heads=2, hidden_size=128, strength=1.0)


def report(epoch: int, covered: int, drops: list[list[int]] | None) -> LaneReport:
    listed = None if drops is None else np.asarray(drops, np.int32).reshape(-1, 3)
    return LaneReport(epoch=epoch, covered=covered, pages=(1, 1, 1), keep=1, seen=1, drops=listed)


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 40)).flatmap(
        lambda shape: arrays(np.int64, shape, elements=st.sampled_from([0, 1, 2, 7, 39, 40, 2000, NEVER]))
    )
)
def test_what_goes_in_comes_out(expiry):
    answer = pack(expiry, 1, "by_query")
    tokens = expiry.shape[-1]
    again = json.loads(json.dumps(answer))
    np.testing.assert_array_equal(unpack(again), np.where(expiry >= tokens, NEVER, expiry))
    assert (again["layers"], again["units"], again["tokens"], again["reveal"]) == (*expiry.shape, "by_query")


def test_as_the_documentation_reads_it():
    answer = pack(np.asarray([[[1, 3, NEVER]], [[2, NEVER, 3]]]), 2, "by_query")
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(answer["expiry"])), "<i4")
    assert numbers.reshape(2, 1, 3).tolist() == [[[1, -1, -1]], [[2, -1, -1]]]  # of 3 tokens query 3 never came


GOOD = pack(np.asarray([[[1, NEVER]]]), 1, "by_query")


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 2}, {"tokens": 0}, {"tokens": -2, "layers": -1}, {"tokens": "x"}, {"units": None}, {"tokens": 2**40},
        {"expiry": "!"}, {"expiry": None}, {"expiry": GOOD["expiry"][:-8]}, {"expiry": base64.b64encode(b"no zlib").decode()},
        {"expiry": base64.b64encode(zlib.compress(bytes(4))).decode()},
        {"expiry": base64.b64encode(zlib.compress(bytes(400))).decode()}, {"layers": float("inf")},
    ],
)  # fmt: skip
def test_a_damaged_map_is_named(changes: dict[str, Any]):
    with pytest.raises(PruneError, match="the map is damaged"):
        unpack({**GOOD, **changes})


def test_a_missing_field_is_damage():
    with pytest.raises(PruneError, match="damaged: KeyError"):
        unpack({name: value for name, value in GOOD.items() if name != "units"})


def test_reports_add_up():
    made = Lifetimes.of(SECTION, units=2)
    assert made.reveal == "delayed"
    made.add(report(1, 4, [[0, 0, 2], [5, 1, 3]]))
    made.add(report(1, 5, []))
    made.add(report(1, 6, [[0, 3, 5]]))
    answer = made.answer(prompt=4, tokens=6)
    want = np.full((3, 2, 6), NEVER)
    want[0, 0, 0], want[2, 1, 1], want[0, 0, 3] = 2, 3, 5
    np.testing.assert_array_equal(unpack(answer), want)
    assert answer["prompt_tokens"] == 4


def test_a_prompt_that_was_not_all_computed():
    assert Lifetimes.of(SECTION, 1).answer(prompt=10, tokens=6)["prompt_tokens"] == 6


def test_another_life_begins_anew_and_late_reports_of_the_last_change_nothing():
    made = Lifetimes.of(SECTION, units=1)
    made.add(report(3, 6, [[0, 0, 1], [1, 2, 4]]))
    made.add(report(5, 3, [[2, 0, 2]]))
    made.add(report(3, 7, [[1, 1, 2]]))
    want = np.full((3, 1, 6), NEVER)
    want[2, 0, 0] = 2
    np.testing.assert_array_equal(unpack(made.answer(4, 6)), want)


def test_too_large_a_map_is_refused_and_not_gathered(monkeypatch):
    monkeypatch.setattr(lifetimes, "CELLS", 3 * 2 * 10)
    made = Lifetimes.of(SECTION, units=2)
    made.add(report(1, 10, [[0, 0, 1]]))
    assert unpack(made.answer(8, 10)).shape == (3, 2, 10)
    made.add(report(1, 11, [[0, 1, 2]]))
    assert made.drops == []
    with pytest.raises(PruneError, match=r"a map of 66 keys is too large, 60 is the most\. Ask"):
        unpack(made.answer(8, 11))
