"""Quality at equal kept fractions: drop gates, gates without training, training-free presses, and an oracle.

    python benchmarks/quality.py --model DIR --gated NAME=DIR ... --json OUT.json [--quick]

Everything runs in float32 on the same cases (``baselines/cases.py``) under the same protocol: the context is read first,
without knowing what follows; then the questions are asked, each from the context alone, or the text goes on. The budget is
the fraction of the *context's* keys held at that moment, measured: gates reach it by their strength, fitted on calibration
cases of their own; presses by their compression ratio. What differs and is in the nature of the methods:

* gates drop while they read, and go on dropping in what follows; presses read the context densely, hold all of its keys
  until its end, cut once, and keep what follows;
* the oracle is told the true question and answer; it reads densely too. It bounds choosing keys by attention, layer by
  layer, and is no bound in the strict sense.

Presses run in the environment of ``make baselines``; without it they are left out, and the output says so. Beside OUT.json
come OUT.md and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from baselines import ours
from baselines.case_file import Case, Row, save_cases
from baselines.cases import CasePlan, make_cases
from baselines.table import as_json, markdown, plot, summarize
from common import origin
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar
from vllm_prune_training.packing import Corpus, load_corpus

from vllm_prune.errors import PruneError

ROOT = Path(__file__).resolve().parents[1]
PRESS_PYTHON = ROOT / ".venv-baselines" / "bin" / "python"
QUICK_PLAN = CasePlan(tokens=768, texts=2, continuation=128, tasks=1, questions=4, calibration=1,
                      names=("niah_single_1",))  # fmt: skip
QUICK_PRESSES = ("SnapKV", "ExpectedAttention", "StreamingLLM")
PROTOCOL = __doc__.split("\n\n", 2)[2].rsplit("\n\n", 1)[0]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder whose base weights the baselines run on")
    parser.add_argument(
        "--gated",
        nargs="*",
        default=[],
        metavar="NAME=DIR[@K,...]",
        help="gated checkpoints; with @ only for these budgets, so that one name may have several folders",
    )
    parser.add_argument("--corpus", type=Path, default=ROOT / "build/reference/corpus", help="of `make reference`")
    parser.add_argument("--json", type=Path, required=True, help="result; .md and .png are written beside it")
    parser.add_argument("--budgets", nargs="+", type=float, help="fractions of context keys; default 0.5 0.3 0.2 0.1")
    parser.add_argument("--tokens", type=int, help="of a context; default 2048")
    parser.add_argument("--texts", type=int, help="held-out continuations; default 8")
    parser.add_argument("--tasks", type=int, help="contexts of each task; default 4")
    parser.add_argument("--presses", nargs="*", help="names in baselines/press.py; none leaves them out")
    parser.add_argument("--add", action="store_true", help="only the --gated ones, added to what OUT.json has already")
    parser.add_argument("--quick", action="store_true", help="under two minutes, for a look; proves little")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.budgets is None:
        args.budgets = [0.5, 0.2] if args.quick else [0.5, 0.3, 0.2, 0.1]
    if not all(0.0 < budget < 1.0 for budget in args.budgets):
        parser.error("--budgets must lie between 0 and 1")
    args.gated = [parse_gated(parser, item, args.budgets) for item in args.gated]
    measured = [(name, budget) for name, _, budgets in args.gated for budget in budgets]
    if len(set(measured)) < len(measured):
        parser.error("--gated names one point twice")
    if args.presses is None and args.quick:
        args.presses = list(QUICK_PRESSES)
    return args


def parse_gated(
    parser: argparse.ArgumentParser, item: str, budgets: Sequence[float]
) -> tuple[str, Path, Sequence[float]]:
    """(name, folder, budgets) of NAME=DIR or NAME=DIR@K,K."""
    name, sign, rest = item.partition("=")
    folder, _, only = rest.partition("@")
    if not (sign and name and folder):
        parser.error(f"--gated wants NAME=DIR, not {item!r}")
    try:
        wanted = [float(part) for part in only.split(",")] if only else budgets
    except ValueError:
        parser.error(f"--gated {item!r}: what follows @ must be budgets with commas between")
    if not set(wanted) <= set(budgets):
        parser.error(f"--gated {item!r} wants budgets that are not in --budgets")
    return name, Path(folder), wanted


def plan_of(args: argparse.Namespace) -> CasePlan:
    base = QUICK_PLAN if args.quick else CasePlan()
    given = {name: value for name in ("tokens", "texts", "tasks") if (value := getattr(args, name)) is not None}
    return CasePlan(**{**base.__dict__, **given})


def open_corpus(folder: Path, model: Path, plan: CasePlan) -> Corpus:
    """The held-out corpus, if it is in the model's own tokens and the model is long enough.

    Raises:
        PruneError: it is not there, belongs to another tokenizer, or the contexts are too long.
    """
    if not (folder / "corpus.json").is_file():
        raise PruneError(f"there is no corpus in {folder}.", "`make reference` builds it; or give --corpus.")
    corpus = load_corpus(folder, model)
    longest = AutoConfig.from_pretrained(model).max_position_embeddings
    need = plan.tokens + plan.continuation
    if need > longest:
        raise PruneError(f"contexts and continuations take {need} tokens, {model} is made for {longest}.",
                         "Give fewer --tokens.")  # fmt: skip
    return corpus


def run_presses(model: Path, cases: Path, args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the training-free presses from their own environment, and its record (why not, if they were left out)."""
    if args.presses == []:
        return [], {"left_out": "--presses names none"}
    if not PRESS_PYTHON.exists():
        return [], {"left_out": "there is no .venv-baselines: run `make baselines`"}
    out = cases.with_name("presses.json")
    command = [str(PRESS_PYTHON), str(ROOT / "benchmarks/baselines/press.py"), "--model", str(model), "--cases", str(cases),
               "--out", str(out), "--threads", str(args.threads), "--budgets", *map(str, args.budgets)]  # fmt: skip
    if args.presses:
        command += ["--presses", *args.presses]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise PruneError(
            f"the presses failed with status {done.returncode} (see above).", "Or leave them out: --presses"
        )
    data = json.loads(out.read_text(encoding="utf-8"))
    return [Row(**row) for row in data["rows"]], data["record"]


def logit_check(model: ours.Model, cases: Sequence[Case]) -> dict[str, Any]:
    """A prompt and our last logits for it, which the other environment must reproduce."""
    ids = cases[0].context[:128]
    cache = model.runner.context(ids[:-1], ours.Dense())
    logits = model.runner.branches(cache, len(ids) - 1, torch.tensor([ids[-1:]]), ours.Dense())
    return {"ids": ids, "logits": logits[0, -1].tolist()}


def untrained(
    args: argparse.Namespace,
    cases: Sequence[Case],
    test: Sequence[Case],
    rows: list[Row],
    timed: Any,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """All that needs no training, on the base: rows and seconds are added to; the record of the presses."""
    base = ours.load_base(args.model)
    timed("dense", ours.dense_rows(base, test))
    timed("oracle", ours.oracle_rows(base, test, args.budgets))
    timed("untrained gates", ours.untrained_rows(base, test, args.budgets))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        save_cases(path, cases, logit_check(base, test), {"plan": plan_of(args).__dict__})
        at = time.perf_counter()
        more, presses = run_presses(args.model, path, args)
        rows += more
        seconds["presses"] = round(time.perf_counter() - at, 1)
    del base
    return presses


def earlier(path: Path, model: Path, plan: CasePlan) -> dict[str, Any]:
    """An earlier result to add to. Raises PruneError: there is none, or it is of another model or other cases."""
    if not path.is_file():
        raise PruneError(f"there is no {path} to add to.", "Run without --add first.")
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(plan.__dict__))
    if before["plan"] != asked or f"--model {model} " not in before["command"]:
        raise PruneError(f"{path} is of another model or other cases.", "Run without --add, or name another file.")
    return before


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    started, plan = time.perf_counter(), plan_of(args)
    corpus = open_corpus(args.corpus, args.model, plan)
    cases = make_cases(corpus, plan)
    test = [case for case in cases if case.split == "test"]
    calibration = [case for case in cases if case.split == "calibration"]
    seconds: dict[str, float] = {}
    rows: list[Row] = []
    strengths: dict[str, float] = {}
    notes: list[str] = []

    def timed(name: str, more: Any) -> None:
        at = time.perf_counter()
        rows.extend(more)
        seconds[name] = round(time.perf_counter() - at, 1)
        print(f"{name}: {seconds[name]:.0f} s", flush=True)

    if args.add:
        before = earlier(args.json, args.model, plan)
        names = {name for name, _, _ in args.gated}
        methods = {row["method"] for row in before["rows"]} - names
        rows = [Row(**row) for row in before["rows"] if row["method"].removesuffix(" (open)") in methods]
        strengths = {key: value for key, value in before["strengths"].items() if key.partition("@")[0] not in names}
        notes = [note for note in before["notes"] if note.split(" ")[0] not in names]
        seconds, presses = before["seconds"], before["presses"]
    else:
        presses = untrained(args, cases, test, rows, timed, seconds)
    for name, gated, budgets in args.gated:
        open_corpus(args.corpus, gated, plan)
        model = ours.load_with_gates(gated)
        timed(name, ours.gated_rows(model, name, test, calibration, budgets, strengths, notes,
                                    gated.name if budgets is not args.budgets else name))  # fmt: skip
    lines = summarize(rows)
    if "left_out" in presses:
        notes.append(f"Presses left out: {presses['left_out']}.")
    record = origin(args.threads, started)
    command = " ".join(["python", "benchmarks/quality.py", *(arguments or sys.argv[1:])])
    result = {
        "what": PROTOCOL, **record, "command": f"{before['command']}; {command}" if args.add else command,
        "presses": presses, "plan": plan.__dict__, "cases": len(test), "strengths": strengths, "notes": notes,
        "seconds": {**seconds, "all": record["seconds"]},
        "lines": as_json(lines), "rows": [row.__dict__ for row in rows],
    }  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    table = markdown(lines, notes)
    args.json.with_suffix(".md").write_text(table, encoding="utf-8")
    title = f"{args.model.name}: contexts of {plan.tokens} tokens, {len(test)} cases, {lines[0].answers} questions"
    plot(lines, args.json.with_suffix(".png"), title)
    print(table)


if __name__ == "__main__":
    try:
        main()
    except PruneError as error:
        sys.exit(str(error))
