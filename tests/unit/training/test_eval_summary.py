"""From answers to rows: the arithmetic by hand, what is excluded, and what is printed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from rich.console import Console
from vllm_prune_training.engine_eval import stats, summary
from vllm_prune_training.engine_eval.jobs import Answer, Request
from vllm_prune_training.engine_eval.samples import Sample
from vllm_prune_training.engine_eval.show import show

SIZE = summary.KVSize(num_layers=8, num_kv_heads=2, head_size=64, number_bytes=2)


def judged(task: str, score: float | None, depth: float = 0.0, kept: float = 0.25, nll: float | None = None,
           context: int = 0, tokens: int = 320) -> summary.Judged:  # fmt: skip
    memory = {"tokens": tokens, "kept_fraction": kept, "keys_held": 0, "keys_dropped": 0, "blocks_held": 4,
              "blocks_peak": 6, "blocks_returned": 3, "blocks_dense": 10}  # fmt: skip
    sample = Sample(task, 512, context, Request(list(range(tokens + 1)), 8, nll is not None), ("x",), (depth,))
    return summary.Judged(sample, Answer(0, [], nll, memory), "", score)


def test_memory_by_hand() -> None:
    found = summary.memory([judged("t", 1.0, kept=0.2), judged("t", 1.0, kept=0.4, tokens=160)], SIZE)
    assert SIZE.token == 8 * 2 * 2 * 64 * 2 == 4096 and SIZE.block == 32 * 4096
    assert found["kv_bytes"] == pytest.approx((0.2 * 320 + 0.4 * 160) / 2 * 4096)
    assert found["dense_kv_bytes"] == 240 * 4096
    assert (found["kept_fraction"], found["kept_fraction_least"], found["kept_fraction_most"]) == pytest.approx(
        (0.3, 0.2, 0.4)
    )
    assert (found["blocks_peak"], found["blocks_held"], found["dense_blocks"]) == (6, 4, 10)
    assert found["peak_bytes"] == 6 * SIZE.block and found["dense_bytes"] == 10 * SIZE.block


def test_what_the_model_cannot_do_open_is_left_out() -> None:
    gated = [*(judged("able", s) for s in (1, 1, 0, 1)), *(judged("unable", s) for s in (1, 0, 0, 1))]
    opened = [*(judged("able", s) for s in (1, 1, 1, 1)), *(judged("unable", s) for s in (0, 0, 0, 1))]
    able, unable = summary.rows(gated, opened, SIZE)
    assert (able["excluded"], unable["excluded"]) == (False, True)
    assert able["interval"] == stats.wilson(0.75, 4) and able["open"]["score"] == 1.0
    mean = summary.averages([able, unable])
    assert mean["score"] == 0.75 and mean["open_score"] == 1.0 and mean["rows"] == 1
    assert mean["excluded"] == ["unable at 512"] and mean["checked_open"]
    only_bad = summary.averages([unable])
    assert only_bad["score"] is None and "open_score" not in only_bad


def test_without_an_open_run_nothing_is_excluded_and_it_says_so() -> None:
    table = summary.rows([judged("a", 0.0), judged("b", 1.0)], None, SIZE)
    mean = summary.averages(table)
    assert mean["score"] == 0.5 and not mean["excluded"] and not mean["checked_open"]
    assert all("open" not in row and "excluded" not in row for row in table)


def test_perplexity_against_the_open_run_on_the_same_windows() -> None:
    gated = [judged("ppl", None, nll=320 * 2.1), judged("ppl", None, nll=320 * 2.3)]
    opened = [judged("ppl", None, nll=320 * 2.0), judged("ppl", None, nll=320 * 2.2)]
    (row,) = summary.rows(gated, opened, SIZE)
    assert row["perplexity"] == pytest.approx(math.exp(2.2)) and row["open"]["perplexity"] == pytest.approx(
        math.exp(2.1)
    )
    assert row["ratio"] == pytest.approx(math.exp(0.1)) and row["ratio_interval"] == pytest.approx((math.exp(0.1),) * 2)
    assert summary.averages([row])["score"] is None  # perplexity is no score
    assert row["window_tokens"] == 321


def test_depth_bins_hold_every_sample_once() -> None:
    depths = [0.0, 0.19, 0.2, 0.5, 0.99, 1.0]
    found = summary.by_depth([judged("t", float(d >= 0.5), depth=d) for d in depths])
    assert [row["samples"] for row in found] == [2, 1, 1, 2]
    assert [row["score"] for row in found] == [0, 0, 1, 1]
    assert found[-1]["to"] == 1.0 and found[2]["distance"] == pytest.approx(0.5 * 321)


def test_obeyed_rules_by_position() -> None:
    scores = {0: (1, 0, 1, 1), 1: (1, 0, 0, 1)}
    rules = [judged("instructions", s, depth=i / 10, context=c) for c, row in scores.items() for i, s in enumerate(row)]
    found = summary.obeyed(rules[::-1])
    assert found == {"contexts": 2, "rules": 4, "obeyed": 2.5, "by_position": [1, 0, 0.5, 1], "spread": 1}
    (row,) = summary.rows(rules, rules, SIZE)
    assert row["obeyed"] == found == row["open"]["obeyed"]
    fewer = summary.obeyed([each for each in rules if (each.sample.context, each.sample.depths) != (1, (0.3,))])
    assert fewer["rules"] == 3.5 and fewer["obeyed"] == 2.0 and fewer["by_position"] == [1, 0, 0.5, 1]


@pytest.mark.parametrize("dense", [False, True])
def test_the_tables_state_what_was_measured(dense: bool) -> None:
    gated = [judged("able", 1.0), judged("unable", 0.0), judged("ppl", None, nll=320.0), judged("instructions", 1.0)]
    opened = [judged("able", 1.0), judged("unable", 0.0), judged("ppl", None, nll=160.0), judged("instructions", 1.0)]
    table = summary.rows(gated, opened if dense else None, SIZE)
    result: dict[str, Any] = {
        "gate": {"method": "dcp", "strength": 1.0},
        "rows": table,
        "averages": summary.averages(table),
    }
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as capture:
        show(console, result)
    text = capture.get()
    assert "25.0%" in text and "2.718" in text and "1 rules" in text
    assert "0.31 / 1.25" in text and "6.0 / 10.0" in text  # MiB of the kept keys and of all
    assert ("cannot do these with gates open (score below 0.5), excluded: unable at 512" in text) == dense
    assert ("x 1.649" in text) == dense
    assert ("was not checked" in text) == (not dense)
