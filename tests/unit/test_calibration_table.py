"""The calibration table: reading between its rows, its bounds, and what a strength plans with."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_prune.calibration import LEAST_KEEP, Calibration, non_increasing, safe_strength
from vllm_prune.config import parse_drop_gate
from vllm_prune.errors import PruneError

BASE = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
SECTION = {"method": "dcp", "params": {"rank": 16}, "num_layers": 3, "num_kv_heads": 2, "hidden_size": 128}


def row(strength: float, kept: float, **more: Any) -> dict[str, Any]:
    return {"strength": strength, "kept": kept, "live": kept, "ppl": 10.0, "kl": 0.0, "length": 64, **more}


def table(*pairs: tuple[float, float], **more: Any) -> dict[str, Any]:
    rows = [row(*pair) for pair in pairs]
    return {"length": 64, "tokens": 640, "data_sha256": "d", "gates_sha256": "g", "safe_strength": 1.0, "rows": rows,
            **more}  # fmt: skip


def parse(strength: float | None = None, keep: float | None = None, **section: Any) -> Any:
    return parse_drop_gate(SimpleNamespace(drop_gate={**SECTION, **section}, **BASE), strength, keep)


PAIRS = ((0.0, 1.0), (0.5, 0.6), (1.0, 0.3), (2.0, 0.3), (4.0, 0.1))


@st.composite
def tables(draw: st.DrawFn) -> Calibration:
    strengths = sorted(draw(st.sets(st.integers(1, 1600), min_size=1, max_size=8)))
    kept = draw(st.lists(st.integers(0, 1000), min_size=len(strengths), max_size=len(strengths)))
    pairs = zip([s / 100 for s in strengths], [k / 1000 for k in sorted(kept, reverse=True)], strict=True)
    return Calibration.model_validate(table((0.0, 1.0), *pairs))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(tables(), st.floats(0, 1), st.floats(0, 16), st.floats(0, 16))
def test_between_rows(made: Calibration, share: float, a: float, b: float) -> None:
    for line in made.rows:
        assert made.keep_at(line.strength) == pytest.approx(max(LEAST_KEEP, line.kept), abs=1e-9)
    weak, strong = sorted((a, b))
    assert made.keep_at(weak) >= made.keep_at(strong) - 1e-12
    low, high = made.keep_range
    keep = low + share * (high - low)
    strength = made.strength_at(min(high, keep))
    assert 0 <= strength <= made.strongest
    assert made.keep_at(strength) == pytest.approx(max(LEAST_KEEP, keep), abs=1e-6)


def test_the_weakest_strength_of_a_plateau() -> None:
    made = Calibration.model_validate(table(*PAIRS))
    assert made.strength_at(0.3) == pytest.approx(1.0)
    assert made.strength_at(1.0) == 0.0
    assert 2.0 < made.strength_at(0.2) < 4.0
    for outside in (0.05, 0.0, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"0\.1\.\.1"):
            made.strength_at(outside)


LENGTHS = {"lengths": [16, 32], "rows": [row(0.0, 1.0, shorter=[1.0, 1.0]), row(1.0, 0.4, shorter=[0.8, 0.6]),
                                        row(3.0, 0.1, shorter=[0.5, 0.3])]}  # fmt: skip


def test_shorter_texts_keep_more() -> None:
    made = Calibration.model_validate(table(**LENGTHS))
    for tokens, want in ((64, 0.4), (1000, 0.4), (None, 0.4), (32, 0.6), (16, 0.8), (4, 0.9), (1, 1.0), (0, 1.0)):
        assert made.keep_at(1.0, tokens) == pytest.approx(want), tokens
    assert made.keep_at(1.0, 23) == pytest.approx(0.8 - 0.2 * math.log2(23 / 16))
    assert made.strength_at(0.4, 64) == 1.0 < made.strength_at(0.4, 32) < 3.0
    assert made.strength_at(0.2, 16) == 3.0, "the strongest that was measured keeps more than was asked for"
    assert Calibration.model_validate(table(*PAIRS)).keep_at(1.0, 2) == pytest.approx(0.3), "an older table"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(0.1, 1.0), st.integers(1, 80))
def test_at_any_length(keep: float, tokens: int) -> None:
    made = Calibration.model_validate(table(**LENGTHS))
    strength = made.strength_at(keep, tokens)
    least = made.kept_of(tokens)[-1]
    assert made.keep_at(strength, tokens) == pytest.approx(max(keep, least), abs=1e-6)
    assert strength >= made.strength_at(keep) - 1e-9, (
        "fewer tokens keep more: as much is dropped only with more strength"
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12))
def test_isotonic_regression(values: list[float]) -> None:
    fitted = non_increasing(values)
    assert len(fitted) == len(values)
    assert all(b <= a for a, b in pairwise(fitted))
    assert sum(fitted) == pytest.approx(sum(values), abs=1e-6)
    for at in range(len(values)):  # max-min formula, the definition
        naive = max(
            min(sum(values[i : j + 1]) / (j + 1 - i) for i in range(at + 1)) for j in range(at, len(values))
        )  # fmt: skip
        assert fitted[at] == pytest.approx(naive, abs=1e-9)


@pytest.mark.parametrize(
    ("ppl", "rise", "safe"),
    [
        ([10, 10.05, 10.2, 12], 0.01, 1.0),
        ([10, 10.05, 10.2, 12], 0.03, 2.0),
        ([10, 10.05, 10.2, 12], 1.0, 4.0),
        ([10, 11, 10, 10], 0.01, 0.0),  # better again beyond a bad one: not safe
        ([10, 9, 9.05, 10], 0.01, 2.0),  # measured against the best so far, not against open gates
    ],
)
def test_safe_strength(ppl: list[float], rise: float, safe: float) -> None:
    assert safe_strength([0.0, 1.0, 2.0, 4.0], ppl, rise) == safe


BROKEN = {
    "no open row": table((0.5, 0.6), (1.0, 0.3)),
    "open row drops": table((0.0, 0.9), (1.0, 0.3)),
    "strengths fall": table((0.0, 1.0), (1.0, 0.3), (0.5, 0.2)),
    "strength twice": table((0.0, 1.0), (1.0, 0.3), (1.0, 0.2)),
    "kept grows": table((0.0, 1.0), (1.0, 0.3), (2.0, 0.4)),
    "one row": table((0.0, 1.0)),
    "other length": table(*PAIRS, length=65),
    "other version": table(*PAIRS, version=2),
    "unknown field": table(*PAIRS, colour="red"),
    "lengths fall": table(**{**LENGTHS, "lengths": [32, 16]}),
    "length beyond": table(**{**LENGTHS, "lengths": [16, 64]}),
    "a length too many": table(**{**LENGTHS, "lengths": [8, 16, 32]}),
    "shorter grows": table(lengths=[16], rows=[row(0.0, 1.0, shorter=[1.0]), row(1.0, 0.4, shorter=[0.5]),
                                               row(2.0, 0.3, shorter=[0.6])]),
    "shorter open row drops": table(lengths=[16], rows=[row(0.0, 1.0, shorter=[0.9]), row(1.0, 0.4, shorter=[0.5])]),
    "nan": table((0.0, 1.0), (1.0, float("nan"))),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tables_are_refused(case: str) -> None:
    with pytest.raises(ValidationError):
        Calibration.model_validate(BROKEN[case])
    with pytest.raises(PruneError, match=r"drop_gate\.calibration"):
        parse(calibration=BROKEN[case])


def test_expected_keep_follows_the_strength() -> None:
    """Without a table a weaker strength forgets the fraction; with one it is known at every strength."""
    assert parse(0.5, expected_keep=0.2).expected_keep == 1.0
    assert parse(2.0, expected_keep=0.2).expected_keep == 0.2
    assert parse(expected_keep=0.2).expected_keep == 0.2
    known = {"expected_keep": 0.9, "calibration": table(*PAIRS)}
    assert parse(**known).expected_keep == pytest.approx(0.3)
    assert parse(0.5, **known).expected_keep == pytest.approx(0.6)
    assert parse(4.0, **known).expected_keep == pytest.approx(0.1)
    assert parse(16.0, **known).expected_keep == pytest.approx(0.1)
    assert parse(0.0, **known).expected_keep == 1.0


def test_keep_chooses_the_strength() -> None:
    calibration = table(*PAIRS)
    served = parse(keep=0.2, calibration=calibration)
    assert served.expected_keep == pytest.approx(0.2)
    assert served.strength == pytest.approx(Calibration.model_validate(calibration).strength_at(0.2))
    assert parse(keep=1, calibration=calibration).strength == 0.0
    with pytest.raises(PruneError, match=r"keep 0.05 lies outside .* 0.1 to 1 at strengths 0 to 4, 64 tokens"):
        parse(keep=0.05, calibration=calibration)
    with pytest.raises(PruneError, match=r"no calibration table .*vllm-prune calibrate DIR"):
        parse(keep=0.2)
    with pytest.raises(PruneError, match="both strength and keep"):
        parse(1.0, 0.2, calibration=calibration)


@pytest.mark.parametrize("strength", [-0.1, 16.5, float("nan")])
def test_strengths_out_of_range(strength: float) -> None:
    with pytest.raises(PruneError, match=r"strength must lie in 0..16"):
        parse(strength, calibration=table(*PAIRS))
