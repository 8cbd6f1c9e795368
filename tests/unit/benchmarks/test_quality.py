"""Budgets, strengths and the summary of the quality benchmark; its refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import quality
import torch
from baselines import ours
from baselines.branches import BranchRunner
from baselines.case_file import Case, Question, Row, judge
from baselines.table import as_json, markdown, plot, summarize
from test_branches import gates_of, ids, tiny

from vllm_prune.errors import PruneError


def text_case(seed: int, tokens: int) -> Case:
    return Case(f"text-{seed}", "text", "test", ids(seed, tokens), continuation=ids(seed + 1, 8))


def test_judging_counts_whole_answers_and_the_tokens_before_them() -> None:
    case = Case("c", "t", "test", [0, 1], [Question([5, 6], [1, 2]), Question([7], [3])])
    logits = torch.full((2, 4, 8), -10.0)
    logits[0, 1, 1] = logits[0, 2, 2] = 10.0  # the last question token says 1, that says 2: right
    logits[1, 0, 4] = 10.0  # wrong
    assert case.padded().tolist() == [[5, 6, 1, 2], [7, 3, 0, 0]]
    found = judge(case, logits)
    assert found == {"answers": 2, "right": 1, "nll": pytest.approx(20.0, abs=1e-3), "tokens": 3}
    logits[0, 2, 2] = -10.0
    logits[0, 2, 0] = 10.0  # one token of two is not an answer
    assert judge(case, logits)["right"] == 0


@pytest.mark.parametrize("budget", [0.5, 0.3, 0.1])
@pytest.mark.parametrize("name", ours.UNTRAINED)
def test_gates_without_training_keep_their_budget(name: str, budget: float) -> None:
    model = ours.Model(BranchRunner(tiny()))
    row = ours.run_case(model, text_case(0, 200), name, budget, ours.untrained(model, name, budget, 200))
    assert row.kept == pytest.approx(budget, abs=0.06 if name == "random" else 0.003)
    assert row.past_kept is not None and row.past_kept < 1.0


def test_a_strength_is_found_by_bisection_and_reused() -> None:
    gates, section = gates_of("dcp")
    model = ours.Model(BranchRunner(tiny()), gates, section)
    knob = ours.Knob(model, [text_case(1, 80), text_case(2, 80)])
    strong, open_ = knob.kept(1.0), knob.kept(1 / 64)
    assert strong < open_
    target = (strong + open_) / 2
    strength = knob.strength_for(target, steps=12)
    assert strength is not None and knob.kept(strength) == pytest.approx(target, rel=0.06)
    measured = len(knob.known)
    assert knob.strength_for(target, steps=12) == strength and len(knob.known) == measured
    assert knob.strength_for(knob.kept(16.0) / 2) is None, "a budget that no strength reaches is not made up"


def test_calibration_is_weighed_as_the_test() -> None:
    gates, section = gates_of("dcp")
    model = ours.Model(BranchRunner(tiny()), gates, section)
    one, other = text_case(1, 80), Case("c", "asked", "calibration", ids(9, 40), [Question([1], [2])])
    alone = [ours.Knob(model, [case]).kept(1.0) for case in (one, other)]
    assert alone[0] != alone[1]
    both = ours.Knob(model, [one, one, other], {"text": 3, "asked": 1}).kept(1.0)
    assert both == pytest.approx(0.75 * alone[0] + 0.25 * alone[1])


def rows() -> list[Row]:
    def pair(method: str, budget: float, kept: float, right: int, nll: float) -> list[Row]:
        return [Row(method, budget, "t", "text", kept, 0, 0, nll, 10),
                Row(method, budget, "q", "lookup", kept, 4, right, 3.0, 9)]  # fmt: skip

    return [*pair("dense", 1.0, 1.0, 4, 10.0), *pair("DCP (open)", 1.0, 1.0, 4, 9.0), *pair("DCP", 0.2, 0.21, 3, 11.0),
            *pair("SnapKV", 0.2, 0.2, 1, 12.0)]  # fmt: skip


def test_summary() -> None:
    lines = {line.method: line for line in summarize(rows())}
    assert lines["dense"].perplexity == pytest.approx(math.e) and lines["dense"].recall == 1.0
    assert lines["DCP"].ratio == pytest.approx(math.exp(0.1)) and lines["DCP"].own_ratio == pytest.approx(math.exp(0.2))
    assert lines["SnapKV"].own_ratio is None
    assert lines["SnapKV"].recall == 0.25 and lines["SnapKV"].by_task == {"lookup": 0.25} and lines["DCP"].kept == 0.21


def test_a_method_that_skipped_a_case_is_not_compared() -> None:
    with pytest.raises(ValueError, match=r"SnapKV at 0\.2 has run on other cases"):
        summarize(rows()[:-1])
    with pytest.raises(ValueError, match="dense"):
        summarize(rows()[2:])


def test_table_and_plot(tmp_path: Path) -> None:
    lines = summarize(rows())
    table = markdown(lines, ["A note."]).splitlines()
    assert [row.split("|")[2].strip() for row in table[2:6]] == ["DCP (open)", "dense", "DCP", "SnapKV"]
    assert table[-1] == "A note."
    plot(lines, tmp_path / "q.png", "title")
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    only_text = summarize([row for row in rows() if row.task == "text"])
    assert json.loads(json.dumps(as_json(only_text)))[0]["recall"] is None


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--budgets", "1.5"], ["--gated", "DIR"], ["--gated", "A=x", "A=y"],
                  ["--gated", "A=x@0.5", "A=y@0.5"], ["--gated", "A=x@0.4"], ["--gated", "A=x@half"]):  # fmt: skip
        with pytest.raises(SystemExit):
            quality.parse(["--model", "m", "--json", "o", *wrong])
        assert "error" in capsys.readouterr().err
    several = quality.parse(["--model", "m", "--json", "o", "--gated", "A=x@0.5,0.3", "A=y@0.2", "B=z"])
    assert [(name, str(folder), list(budgets)) for name, folder, budgets in several.gated] == [
        ("A", "x", [0.5, 0.3]), ("A", "y", [0.2]), ("B", "z", [0.5, 0.3, 0.2, 0.1])]  # fmt: skip
    args = quality.parse(["--model", "m", "--json", "o", "--quick", "--tokens", "99"])
    assert quality.plan_of(args).tokens == 99 and args.budgets == [0.5, 0.2]
    with pytest.raises(PruneError, match="no corpus"):
        quality.open_corpus(tmp_path, tmp_path, quality.plan_of(args))
