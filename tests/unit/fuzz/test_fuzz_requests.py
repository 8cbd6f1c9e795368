"""Any value in any per-request field: understood, or refused by the field's name."""

from __future__ import annotations

import json
import pickle
import time
from typing import Any

import pytest
from fuzz import SCALARS, TEXTS, deep, examples, json_values
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_prune.chat import Markers
from vllm_prune.config import MAX_STRENGTH, DropGateConfig
from vllm_prune.protect import parse_protect
from vllm_prune.requests import FIELDS, MAP, PROTECT, STRENGTH, BadField, RequestGates, request_gates

BASE = {"num_layers": 2, "num_kv_heads": 2, "hidden_size": 32}
ROW = {"live": 0.5, "ppl": 2.0, "kl": 0.1, "length": 64}
TABLE = {
    "length": 64, "tokens": 640, "data_sha256": "d", "gates_sha256": "g", "safe_strength": 1.0,
    "rows": [{"strength": 0.0, "kept": 1.0, **ROW}, {"strength": 2.0, "kept": 0.2, **ROW}],
}  # fmt: skip
SECTIONS = [
    DropGateConfig.model_validate({"method": "dcp", "params": {"rank": 16}, "calibration": TABLE, **BASE}),
    DropGateConfig.model_validate({"method": "dcp", "params": {"rank": 16}, "strength": 0.0, **BASE}),
    DropGateConfig.model_validate({"method": "ltp", **BASE}),
]
WORDS = st.lists(
    st.one_of(
        st.sampled_from(["system", "markers", "none", " ", "message:0-999999", "message:3-1", "0:999999999", "٣:٤", "1:0"]),
        st.builds("message:{}".format, st.integers(-1, 10**7)), st.builds("{}:{}".format, st.integers(), st.integers()),
        TEXTS,
    ),
    max_size=6,
).map(",".join)  # fmt: skip
VALUES = st.one_of(json_values(), WORDS, st.floats(-0.1, 1.1), st.sampled_from([0, 1, True, False]))
ASKED = st.dictionaries(
    st.one_of(st.sampled_from(FIELDS), st.builds("prune.{}".format, TEXTS), TEXTS), VALUES, max_size=3
)
MARKERS = Markers((("system", (3, 4)), ("user", (3, 5))), frozenset({3}), (3, 6))


@examples(600)
@given(ASKED, st.sampled_from(SECTIONS), st.sampled_from([0.0, 0.5]), st.booleans())
@example({STRENGTH: 10**400}, SECTIONS[0], 0.0, False)
@example({STRENGTH: 10**5000}, SECTIONS[0], 0.0, False)
@example({MAP: 10**5000}, SECTIONS[0], 0.0, True)
@example({PROTECT: 10**5000}, SECTIONS[0], 0.0, True)
@example({PROTECT: "x" * 10**6}, SECTIONS[0], 0.0, True)
@example({STRENGTH: deep(5000)}, SECTIONS[0], 0.0, True)
@example({PROTECT: "0:1," * 10**5 + "0:1"}, SECTIONS[0], 0.0, True)
def test_any_value_of_any_field(asked: dict[str, Any], section: DropGateConfig, floor: float, maps: bool) -> None:
    try:
        found = request_gates(asked, section, floor, maps)
    except BadField as error:
        assert error.field in asked and error.field in error.problem
        assert len(str(error)) < 20_000 and error.way_out
        assert str(pickle.loads(pickle.dumps(error))) == str(error), "it travels between processes"
        return
    ours = {name for name in asked if name.startswith("prune.")}
    assert ours <= set(FIELDS), "an unknown field was let through"
    assert 0.0 <= found.strength <= MAX_STRENGTH and 0.0 < found.expected_keep <= 1.0
    if not ours:
        assert found == RequestGates(section.strength, section.expected_keep)
    json.dumps([found.strength, found.expected_keep, found.map])
    if found.protect is not None:
        spans = found.protect.spans([3, 4, 9, 9, 3, 5, 9, 9, 3, 6], MARKERS)
        assert all(0 <= a < b <= 10 for a, b in spans) and list(spans) == sorted(spans)


@pytest.mark.parametrize("word", ["message:0-999999", "0:999999999", "5:5", "message:7"])
def test_many_words_hold_nobody_up(word: str) -> None:
    """The engine core finds the spans of a prompt of 100,000 tokens in 25,000 messages between two steps."""
    asked = parse_protect(",".join([word] * 1000))
    ids = [3, 5, 9, 9] * 25_000
    begun = time.process_time()
    asked.spans(ids, MARKERS)
    assert time.process_time() - begun < 1.0


@examples(200)
@given(WORDS | SCALARS)
def test_protect_is_understood_or_refused(value: Any) -> None:
    try:
        found = parse_protect(value)
    except ValueError as error:
        assert len(str(error)) < 20_000
        return
    assert isinstance(value, str)
    assert all(0 <= a <= b for a, b in (*found.messages, *found.tokens))
