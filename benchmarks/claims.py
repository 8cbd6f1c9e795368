"""Claims A to C and the falsifier for DCP (docs/quality.md), at the size of the reference model, over several seeds, with
trained baselines.

The base is the reference's (8 layers of 256, trained dense on code and recall tasks). From it, for each seed (order of the
text, tasks, gates' initial weights) and for the same steps each: dense (the yardstick), DCP, and window, sinks + window and
random under their own masks, matched on the past-pair kept fraction that DCP reached. All learn from the next token,
through recipes. Finished runs are not repeated.

    make reference                                                         # makes the base and the text, among other things
    python benchmarks/claims.py --json benchmarks/results/claims.json      # --quick: one seed, few steps
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch
from common import origin
from transformers import AutoModelForCausalLM
from vllm_prune_training.evaluate import held_out_perplexity, recall_accuracy, task_accuracy
from vllm_prune_training.gate_evaluation import AsCausalLM
from vllm_prune_training.masked import load_gated
from vllm_prune_training.packing import Corpus, held_out_blocks, load_corpus
from vllm_prune_training.recency import draw_pairs, explain
from vllm_prune_training.recipe import Recipe
from vllm_prune_training.train import run

T = 512
KEEPS = (0.2,)
MATCHED = (0.2,)
SINKS, DELAY = 4, 16
NAMES = ["lookup", "niah_single_1", "niah_multikey_2"]
DCP = {"alpha": {"schedule": "band", "from": 0.0, "until": 0.8}, "ramp": 0.02, "leak": 0.03}


def recipe(
    corpus: Path, out: Path, model: Path, gate: dict[str, Any], steps: int, seed: int, **objective: Any
) -> Recipe:
    """One run. All runs of a seed see the same sequences of text and tasks."""
    dcp = gate["method"] == "dcp"
    return Recipe.model_validate({
        "model": str(model), "output": str(out), "gate": gate,
        "objective": {"answer_weight": 4.0, **(DCP if dcp else {}), **objective},
        "data": {"train": [{"path": str(corpus / "train.parquet"), "format": "parquet"}],
                 "held_out": [{"path": str(corpus / "held_out.parquet"), "format": "parquet"}],
                 "tasks": {"share": 0.4, "names": NAMES}, "check": "lazy"},
        "training": {"steps": steps, "lengths": T, "batch_tokens": 4096, "optimizer": "muon", "adam_lr": 3e-4,
                     "lr": 1.5e-3, "gate_lr": 2e-3, "bias_lr": 0.03, "precision": "bf16",
                     "schedule": "trapezoid", "seed": seed, "log_steps": 25, "save_steps": 100000,
                     "eval_steps": 100000, "eval_tokens": 32768, "compile": True},
    })  # fmt: skip


def window_for(kept: float, sinks: int = 0) -> int:
    """The window whose share of past pairs at T tokens is nearest to ``kept``: query n sees min(n, w + sinks) keys."""

    def share(w: int) -> float:
        return sum(min(n, w + sinks) for n in range(T)) / (T * (T - 1) / 2)

    return min(range(1, T), key=lambda w: abs(share(w) - kept))


def random_for(kept: float) -> float:
    """The survival probability of random dropping after ``DELAY`` tokens that keeps ``kept`` of the past pairs."""
    young = sum(min(n, DELAY) for n in range(T)) / (T * (T - 1) / 2)
    return round(min(1.0, max(0.0, (kept - young) / (1.0 - young))), 4)


def measure(folder: Path, corpus: Corpus, gated: bool, blocks: int, tasks: int) -> dict[str, Any]:
    """Held-out perplexity of code, recall, and what is kept, with hard masks; the record's soft and hard perplexity."""
    record = json.loads((folder / "record.json").read_text())
    row: dict[str, Any] = {"tokens_seen": record["tokens_seen"]}
    if gated:
        model = load_gated(folder)
        served = AsCausalLM(model, "hard")
        row["ppl"] = held_out_perplexity(served, corpus, T, blocks)
        row["kept"] = float(torch.stack(served.kept).mean())
        row["kept_per_layer"] = [round(x, 4) for x in torch.stack(served.kept).mean(0).tolist()]
        row["live_at_end"] = float(torch.stack(served.live).mean())
        judged: Any = AsCausalLM(model, "hard")
        if "hard_over_soft" in record:
            row["hard_over_soft"] = record["hard_over_soft"]
        if record["recipe"]["gate"]["method"] == "dcp":
            with torch.no_grad():
                expiries = [model(ids, "hard").expiry for ids in held_out_blocks(corpus, T, min(32, blocks))]
            found = explain(draw_pairs(expiries, 40_000))  # type: ignore[arg-type]
            row["distance_only_auc"] = found.mean_auc
    else:
        judged = AutoModelForCausalLM.from_pretrained(folder).eval()
        row["ppl"] = held_out_perplexity(judged, corpus, T, blocks)
    row["recall"] = recall_accuracy(judged, corpus, (T,), tasks)["lookup"][str(T)]
    row["tasks"] = {
        name: found[str(T)] for name, found in task_accuracy(judged, corpus, NAMES[1:], (T,), tasks).items()
    }
    return row


def one_seed(
    seed: int, base: Path, data: Path, corpus: Corpus, work: Path, steps: int, blocks: int, tasks: int
) -> dict[str, Any]:
    """All runs of a seed; rows by name."""
    rows: dict[str, Any] = {}

    def do(name: str, gate: dict[str, Any], **objective: Any) -> dict[str, Any]:
        out, kept = work / f"seed-{seed}" / name, work / f"seed-{seed}" / f"{name}.json"
        if not kept.exists():
            started = time.time()
            if not out.exists():
                run(recipe(data, out, base, gate, steps, seed, **objective))
            row = measure(out, corpus, gate["method"] != "none", blocks, tasks)
            kept.write_text(json.dumps({**row, "seconds": round(time.time() - started, 1)}))
        rows[name] = json.loads(kept.read_text())
        print(seed, name, json.dumps(rows[name]), flush=True)
        return rows[name]

    do("dense", {"method": "none"})
    for keep in KEEPS:
        kept = do(f"dcp-{keep}", {"method": "dcp", "params": {"rank": 32, "beta": 4.0}}, keep=keep)["kept"]
        if keep in MATCHED:
            sinks = {"sinks": SINKS, "window": 0}
            do(f"window-{keep}", {"method": "window", "params": {"window": window_for(kept)}})
            do(f"sinks-{keep}", {"method": "window", "params": {"window": window_for(kept, SINKS)}, "protect": sinks})
            do(
                f"random-{keep}",
                {"method": "random", "params": {"keep": random_for(kept), "delay": DELAY, "seed": seed}},
            )
    return rows


def summary(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each run's figures, perplexity as a ratio to the dense run's."""

    def over(values: list[float]) -> dict[str, float]:
        return {"mean": round(statistics.mean(values), 4),
                "std": round(statistics.stdev(values), 4) if len(values) > 1 else math.nan}  # fmt: skip

    table = {}
    for name in next(iter(seeds.values())):
        rows = [(rows[name], rows["dense"]) for rows in seeds.values()]
        found = {
            "ppl_over_dense": over([row["ppl"] / dense["ppl"] for row, dense in rows]),
            "recall": over([row["recall"] for row, _ in rows]),
            **{task: over([row["tasks"][task] for row, _ in rows]) for task in rows[0][0]["tasks"]},
        }
        if "kept" in rows[0][0]:
            found["kept"] = over([row["kept"] for row, _ in rows])
        if "hard_over_soft" in rows[0][0]:
            found["hard_over_soft"] = over([row["hard_over_soft"] for row, _ in rows])
        if all(row.get("distance_only_auc") is not None for row, _ in rows):
            found["distance_only_auc"] = over([row["distance_only_auc"] for row, _ in rows])
        table[name] = found
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument(
        "--quick", action="store_true", help="one seed and 40 steps: shows that it runs, proves nothing"
    )
    parser.add_argument("--corpus", type=Path, default=Path("build/reference/corpus"))
    parser.add_argument("--work", type=Path, default=Path("build/claims"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--base", type=Path, default=Path("build/reference/base"))
    parser.add_argument("--steps", type=int, default=100, help="of each run, 4,096 tokens a step")
    options = parser.parse_args()
    started = time.perf_counter()
    steps, seeds, blocks, tasks = options.steps, options.seeds, 96, 48
    if options.quick:
        steps, seeds, blocks, tasks = 10, seeds[:1], 8, 2
        options.work = options.work / "quick"
    corpus = load_corpus(options.corpus, options.base)
    rows = {str(seed): one_seed(seed, options.base, options.corpus, corpus, options.work, steps, blocks, tasks)
            for seed in seeds}  # fmt: skip
    values = {"base": str(options.base), "length": T, "steps": steps, "batch_tokens": 4096,
              "summary": summary(rows), "seeds": rows}  # fmt: skip
    text = json.dumps({"quick": options.quick, **values, **origin(torch.get_num_threads(), started)}, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(json.dumps(values["summary"], indent=1))


if __name__ == "__main__":
    main()
