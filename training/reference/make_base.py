"""Makes the reference base model: corpus cache, tokenizer, training, export and final evaluation."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_prune_training.base import BaseSettings, train_base
from vllm_prune_training.evaluate import held_out_perplexity, recall_accuracy, task_accuracy
from vllm_prune_training.packing import build_corpus
from vllm_prune_training.provenance import git_commit


def main() -> None:
    """Runs all the steps; a second call with the same ``--work`` continues from the last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and logs (default: OUT-work)")
    parser.add_argument("--corpus", type=Path, help="corpus cache (default: beside OUT)")
    parser.add_argument("--minutes", type=float, default=BaseSettings.minutes, help="training time")
    parser.add_argument("--seed", type=int, default=BaseSettings.seed)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--save-seconds", type=float, default=BaseSettings.save_seconds)
    parser.add_argument("--start", type=Path, help="folder of a model to go on from (default: random weights)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="overrides of BaseSettings")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    started, commit = datetime.now(UTC), git_commit()
    work = options.work or options.out.with_name(options.out.name + "-work")
    corpus = build_corpus(options.corpus or options.out.parent / "corpus")
    counts = {key: corpus.record[key] for key in ("data_hash", "files", "train_tokens", "held_out_tokens")}
    print(json.dumps(counts), flush=True)
    settings = BaseSettings(
        minutes=options.minutes,
        seed=options.seed,
        compile=not options.no_compile,
        save_seconds=options.save_seconds,
        start=str(options.start) if options.start else None,
        **{name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)},
    )
    model, training = train_base(corpus, work, settings)

    model.to(torch.bfloat16)
    tokenizer = corpus.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": commit,
        "started": started.isoformat(timespec="seconds"),
        **training,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "accelerate")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "held_out_ppl": {str(n): held_out_perplexity(model, corpus, n, 65536 // n) for n in (512, 1024, 4096)},
        "recall_accuracy": recall_accuracy(model, corpus),
        "task_accuracy": task_accuracy(model, corpus, settings.names),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "corpus": corpus.record,
    }
    (options.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    log = work / "log.jsonl"
    (options.out / "log.jsonl").write_text(log.read_text())
    print(json.dumps({key: record[key] for key in ("held_out_ppl", "recall_accuracy")}), flush=True)


if __name__ == "__main__":
    main()
