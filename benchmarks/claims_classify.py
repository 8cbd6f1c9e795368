"""Classification claims about the prompt forms of LTP and ACC-style elimination (docs/methods.md), on texts of varying length.

The task is ``marks`` (``vllm_prune_training.tasks``): which of eight marks stands on most of a text's marked lines. Per seed
the reference base first learns it whole (``whole``); from there, for as many steps on the same sequences each, it goes on
without gates (``plain``), with ACC-style elimination at strengths that vary (``acc``), with LTP (``ltp``), and with each of
the two on the shortest texts alone (``acc_short``, ``ltp_short``). Accuracy is of the class among eight, by the first answer
token's logits, on the same held-out texts of 128, 256 and 512 tokens, hard masks; shares are of the prompt's FLOPs and keys.

LTP  A. Learned thresholds against the best-scored tokens, as many at each length (``plain`` weights and ``acc``'s).
     B. Trained on long texts, tested on short ones, and the reverse: what thresholds lose, and what the share of tokens loses
     that they keep at the length of training (``share``).
ACC  A. One fine-tuned checkpoint over strengths against plain weights, random, the first and the last tokens.
     B. The measured profile against a uniform one at equal FLOPs, on plain weights.

    python benchmarks/claims_classify.py --corpus build/reference/corpus-dcp --json benchmarks/results/claims-classify.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch
from claims_ltp_acc import claims_parser, recipe, tell
from claims_prompt import HARD_FROM, KEEP, PROTECT, STRENGTHS, Blind, on_weights, strength_for, tuned
from common import origin, say
from vllm_prune_training import tasks
from vllm_prune_training.acc_profile import flops_share, layer_flops, tune
from vllm_prune_training.masked import GatedModel, load_gated
from vllm_prune_training.packing import Corpus, load_corpus
from vllm_prune_training.prompt_recipe import Prompts
from vllm_prune_training.tasks.marks import MARKS
from vllm_prune_training.train import run

LENGTHS = (128, 256, 512)
UNIFORM = (KEEP, 0.3)
LONG, SHORT = 512, 144
"""Tokens of a training sequence: texts of 128 to 512, or one of 128."""
TRAINED_AT = {"ltp": "512", "ltp_short": "128"}
Row = dict[str, Any]


class Texts:
    """Held-out texts by length, each with the number of its class, and the first token of every class."""

    def __init__(self, corpus: Corpus, count: int, first: int) -> None:
        """``count`` of each length, with seeds from ``first``."""
        filler, counter = corpus.filler("held_out"), tasks.counter(corpus.tokenizer)
        self.classes = torch.tensor(
            [corpus.tokenizer.encode(" " + mark, add_special_tokens=False)[0] for mark in MARKS]
        )
        if len(set(self.classes.tolist())) < len(MARKS):
            raise SystemExit("two marks begin with the same token of this tokenizer: no classes to tell apart")
        self.of: dict[int, list[tuple[torch.Tensor, int]]] = {}
        for length in LENGTHS:
            made = [tasks.make_task("marks", first + i, length, counter, filler=filler) for i in range(count)]
            self.of[length] = [
                (torch.tensor(corpus.tokenizer.encode(task.prompt)), MARKS.index(task.references[0])) for task in made
            ]

    def only(self, length: int) -> Texts:
        """Those of one length."""
        some = copy.copy(self)
        some.of = {length: self.of[length]}
        return some


@torch.no_grad()
def measure(model: GatedModel, texts: Texts, strength: float | None = None) -> Row:
    """By length and over all: accuracy, and shares of keys and of FLOPs computed of the prompts."""
    rows: Row = {}
    for length, some in texts.of.items():
        right, kept, flops = [], [], []
        for ids, label in some:
            out = model(ids[None], "hard", strength=strength, prompt=len(ids), collect=False)
            right.append(float(out.logits[0, -1, texts.classes].argmax() == label))
            shares = torch.stack(out.kept).double().tolist()
            kept.append(statistics.mean(shares))
            flops.append(flops_share(shares, *layer_flops(model.config, len(ids))))
        rows[str(length)] = {
            "accuracy": statistics.mean(right),
            "kept": statistics.mean(kept),
            "flops": statistics.mean(flops),
        }
    rows["all"] = {
        name: statistics.mean(rows[str(length)][name] for length in texts.of) for name in ("accuracy", "kept", "flops")
    }
    return rows


def train_all(options: argparse.Namespace, work: Path, seed: int) -> None:
    """The runs of a seed; a finished one is not repeated."""
    none: Row = {"gate": {"method": "none"}}
    acc: Row = {"gate": {"method": "acc_prompt", "protect": PROTECT}, "prompts": {"strengths": [0.5, 4.0]},
                "objective": {"keep": KEEP}}  # fmt: skip
    ltp: Row = {"gate": {"method": "ltp_prompt", "protect": PROTECT, "params": {"theta": 0.2}},
                "prompts": {"hard_from": HARD_FROM}, "objective": {"keep": KEEP, "ramp": 0.2, "tau": 0.05}}  # fmt: skip
    after = {
        "plain": (none, LONG),
        "acc": (acc, LONG),
        "ltp": (ltp, LONG),
        "acc_short": (acc, SHORT),
        "ltp_short": (ltp, SHORT),
    }
    runs = [("whole", options.base, options.first_steps, none, LONG)]
    runs += [(name, work / "whole", options.steps, what, length) for name, (what, length) in after.items()]
    for name, start, steps, what, length in runs:
        if not (work / name).exists():
            sections = {
                **what,
                "objective": {"next_token": 1.0, "kl_forward": 0.0, "answer_weight": 8.0, **what.get("objective", {})},
                "data": {"tasks": {"share": 1.0, "names": ["marks"]}},
                "training": {"lengths": length, "batch_tokens": 2048 // length * length},
            }
            run(recipe(options.corpus, work / name, start, sections.pop("gate"), steps, seed, **sections))
            say(f"seed {seed}: {name} trained")


def of_seed(options: argparse.Namespace, seed: int, corpus: Corpus, texts: Texts, calibration: torch.Tensor) -> Row:
    """All accuracies of a seed."""
    work = options.work / str(seed)
    train_all(options, work, seed)
    rows: Row = {}

    def note(name: str, model: GatedModel, strength: float | None = None) -> Row:
        rows[name] = measure(model, texts, strength)
        say(f"seed {seed} {name}: {json.dumps(rows[name])}")
        return rows[name]

    acc, plain = load_gated(work / "acc"), on_weights(work / "plain")
    note("plain open", plain, 0.0)
    tuned(plain, acc)
    blind = tuned(on_weights(work / "plain", Blind), acc)
    for strength in STRENGTHS:
        note(f"acc {strength:g}", acc, strength)
        note(f"plain {strength:g}", plain, strength)
        for by in ("random", "first", "last"):
            Blind.by = by
            note(f"{by} {strength:g}", blind, strength)
    for keep in UNIFORM:
        for kind in ("measured", "uniform"):
            prompts = Prompts(profile=kind, budget="flops")  # type: ignore[arg-type]
            tune(plain, calibration, torch.full((len(calibration),), calibration.shape[1]), prompts, keep)
            note(f"{kind} {keep}", plain)
    tuned(plain, acc)
    for name in ("ltp", "ltp_short"):
        ltp, ranks = load_gated(work / name), load_gated(work / name.replace("ltp", "acc"))
        note(f"{name} open", ltp, 0.0)
        note(f"{name.replace('ltp', 'acc')} open", ranks, 0.0)
        same = note(name, ltp)
        for length in LENGTHS:  # as many tokens at each length as the thresholds kept there
            alone = texts.only(length)
            strength = strength_for(ranks, same[str(length)]["kept"])
            for who, model in ((name.replace("ltp", "acc"), ranks), ("plain", plain)):
                rows[f"{who} as {name} {length}"] = measure(model, alone, strength)
        note(f"{name.replace('ltp', 'acc')} share", ranks, strength_for(ranks, same[TRAINED_AT[name]]["kept"]))
    return rows


def main() -> None:
    """See the module."""
    parser = claims_parser(__doc__, "classify")
    parser.add_argument("--first-steps", type=int, default=150, help="2,048 tokens a step, before elimination")
    parser.add_argument("--steps", type=int, default=80, help="2,048 tokens a step, of each run after that")
    parser.add_argument("--texts", type=int, default=100, help="of each length")
    options = parser.parse_args()
    started = time.perf_counter()
    if options.quick:
        options.first_steps = options.steps = 6
        options.texts, options.seeds, options.work = 4, 1, options.work / "quick"
    corpus = load_corpus(options.corpus, options.base)
    texts = Texts(corpus, options.texts, 0)
    calibration = torch.stack([ids[-200:] for ids, _ in Texts(corpus, 16, 10**6).of[256]])
    seeds = {seed: of_seed(options, seed, corpus, texts, calibration) for seed in range(1, options.seeds + 1)}
    result = {"benchmark": "claims_classify", "base": options.base.name, "steps": [options.first_steps, options.steps],
              "texts_a_length": options.texts, "quick": options.quick, "rows": summary(seeds), "seeds": seeds,
              **origin(torch.get_num_threads(), started)}  # fmt: skip
    tell(options, result)


def summary(seeds: dict[int, Row]) -> Row:
    """Mean over seeds of every figure, and of the accuracies the standard deviation."""
    first = next(iter(seeds.values()))
    rows: Row = {}
    for name, by_length in first.items():
        rows[name] = {}
        for length, figures in by_length.items():
            values = {what: [run[name][length][what] for run in seeds.values()] for what in figures}
            rows[name][length] = {what: round(statistics.mean(some), 4) for what, some in values.items()}
            if len(seeds) > 1:
                rows[name][length]["std"] = round(statistics.stdev(values["accuracy"]), 4)
    return rows


if __name__ == "__main__":
    main()
