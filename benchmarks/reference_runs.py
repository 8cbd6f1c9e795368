"""The reference model and what was trained from it, on the same held-out windows and tasks: the numbers docs/quality.md quotes.

For each folder: parameters, tokens its run saw, perplexity with open gates and with hard ones, the share of past pairs kept,
and recall by task and length (teacher forced: an answer counts when each of its tokens is the most likely one). Masked
Hugging Face models; the engine's own figures come from ``vllm-prune eval``.

    python benchmarks/reference_runs.py --json benchmarks/results/reference-runs.json base=build/reference/base ...
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch
from common import origin
from transformers import AutoModelForCausalLM
from vllm_prune_training.evaluate import held_out_perplexity, recall_accuracy, task_accuracy
from vllm_prune_training.gate_evaluation import AsCausalLM
from vllm_prune_training.masked import load_gated
from vllm_prune_training.packing import Corpus, load_corpus

TASKS = ("niah_single_1", "niah_multikey_1")


def measure(
    folder: Path, corpus: Corpus, length: int, windows: int, lengths: list[int], samples: int
) -> dict[str, Any]:
    """Figures of one folder, gated or not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    record = folder / "record.json"
    row: dict[str, Any] = {"folder": str(folder)}
    if record.is_file():
        made = json.loads(record.read_text(encoding="utf-8"))
        row["tokens_seen"] = made.get("tokens_seen")
        if "hard_over_soft" in made:
            row["hard_over_soft"] = made["hard_over_soft"]
    if "drop_gate" in config:
        gated = load_gated(folder)
        row["parameters"] = gated.model.num_parameters()
        row["perplexity_open"] = held_out_perplexity(AsCausalLM(gated, "open"), corpus, length, windows)
        model: Any = AsCausalLM(gated, "hard")
        row["perplexity"] = held_out_perplexity(model, corpus, length, windows)
        row["past_pairs_kept"] = float(torch.stack(model.kept).mean())
        row["past_pairs_kept_by_layer"] = [round(x, 4) for x in torch.stack(model.kept).mean(0).tolist()]
    else:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        row["parameters"] = model.num_parameters()
        row["perplexity"] = held_out_perplexity(model, corpus, length, windows)
    row["recall"] = {
        **recall_accuracy(model, corpus, lengths, samples),
        **task_accuracy(model, corpus, TASKS, lengths, samples),
    }
    return row


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--corpus", type=Path, default=Path("build/reference/corpus"))
    parser.add_argument("--length", type=int, default=2048, help="tokens of a held-out window")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="of the tasks")
    parser.add_argument("--samples", type=int, default=16, help="of each task and length")
    options = parser.parse_args()
    started = time.perf_counter()
    folders = {name: Path(folder) for name, _, folder in (item.partition("=") for item in options.folders)}
    corpus = load_corpus(options.corpus, *folders.values())
    rows: dict[str, Any] = {}
    for name, folder in folders.items():
        rows[name] = measure(folder, corpus, options.length, options.windows, options.lengths, options.samples)
        print(name, json.dumps(rows[name]), flush=True)
    result = {"length": options.length, "windows": options.windows, "samples": options.samples, "rows": rows,
              **origin(torch.get_num_threads(), started)}  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
