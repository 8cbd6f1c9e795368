"""Makes a reference gated checkpoint from the reference base: gate training, export, measurement, record."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vllm_prune_training.gate_export import measure, readme, set_expected_keep, write_gated
from vllm_prune_training.gate_objectives import reference_settings
from vllm_prune_training.gate_training import train_gates
from vllm_prune_training.packing import load_corpus
from vllm_prune_training.provenance import git_commit


def main() -> None:
    """Runs all the steps; a second call with the same ``--work`` continues from the last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--method", choices=("dcp", "dms"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the gated checkpoint")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and logs (default: OUT-work)")
    parser.add_argument("--corpus", type=Path, help="corpus cache (default: beside BASE)")
    parser.add_argument("--minutes", type=float, default=35.0, help="training time")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="overrides of GateSettings")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="of the measurement")
    parser.add_argument("--measure-tokens", type=int, default=32768, help="held-out tokens a length")
    parser.add_argument("--tasks", type=int, default=8, help="recall tasks a kind and length")
    options = parser.parse_args()
    started = datetime.now(UTC)
    work = options.work or options.out.with_name(options.out.name + "-work")
    corpus = load_corpus(options.corpus or options.base.parent / "corpus")
    changes = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)}
    settings = replace(reference_settings(options.method, options.minutes), **changes)
    model, gates, training = train_gates(options.base, corpus, work, settings)

    write_gated(options.out, model, corpus.tokenizer, gates, {"params": dict(settings.params)})
    measured = measure(options.out, corpus, tuple(options.lengths), options.measure_tokens, options.tasks)
    long = [measured["held_out"][f"hard_kept_{n}"] for n in options.lengths if n >= 2048 or n == max(options.lengths)]
    base_record = options.base / "record.json"
    base = json.loads(base_record.read_text()) if base_record.exists() else {}
    record = {
        "method": options.method,
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": git_commit(),
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "accelerate")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "data_hash": corpus.record["data_hash"],
        "base_tokens_seen": base.get("tokens_seen", 0),
        "base_held_out_ppl": base.get("held_out_ppl", {}),
        "base_recall_accuracy": base.get("recall_accuracy", {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "expected_keep": sum(long) / len(long),
        "training": training,
        **measured,
    }
    keys = ("command", "git_commit", "data_hash", "base_tokens_seen", "versions", "held_out")
    provenance = {**{key: record[key] for key in keys}, "tokens_seen": training["tokens_seen"],
                  "last_step": training["last_step"]}  # fmt: skip
    set_expected_keep(options.out, record["expected_keep"], provenance)
    (options.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "README.md").write_text(readme(record), encoding="utf-8")
    shutil.copy(work / "log.jsonl", options.out / "log.jsonl")
    print(json.dumps({key: record[key] for key in ("expected_keep", "held_out", "recall_accuracy")}), flush=True)


if __name__ == "__main__":
    main()
