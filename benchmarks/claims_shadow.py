"""ShadowLLM's claims at small scale, on the reference model (docs/methods.md).

    python benchmarks/claims_shadow.py [--quick] [--json PATH] [--model build/reference/base]

A. At equal shares of heads and neurons removed, predictors of ``plainact`` targets lose less than predictors of ``l2`` targets,
   all else equal. B. One predictor at layer 0 is within 5 % of per-layer predictors (DejaVu's way), which read their own
   layer's attention output, scaled likewise. C. What is chosen for the text beats the mean criterion (static).

Protocol: the choice is made from the prompt alone (its last position), removed structures are off after it, and only tokens
after it are scored. ``leaky`` is the published evaluation's protocol instead: the choice is made from the window's last
position, which has seen what is scored. Heads are ranked over the network, neurons within layers, layer 0 is dense.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch
from common import ROOT, origin, say
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_prune_training.recipe_file import read_recipe
from vllm_prune_training.shadow.criteria import Traces, places, watched
from vllm_prune_training.shadow.measure import continuation_nll
from vllm_prune_training.shadow.predictor import fit, scaled_targets, spearman, split
from vllm_prune_training.shadow.recipe import ShadowRecipe
from vllm_prune_training.shadow.run import trace_all
from vllm_prune_training.text_data import held_out_windows

from vllm_prune.gates.shadow import close_lowest

SHARES = (0.3, 0.5, 0.7)
SEEDS = (1, 2, 3)
HIDDEN = 256
FITTING = {"epochs": 60, "batch": 32, "lr": 1e-3, "weight_decay": 0.01}


def kept(heads: torch.Tensor, neurons: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the highest scores: heads [B, L, N] over the network, neurons [B, L, M] within layers; layer 0 whole."""
    some = torch.ones_like(heads, dtype=torch.bool)
    for row, scores in zip(some, heads, strict=True):
        row[1:] = ~close_lowest(scores[1:], int(share * scores[1:].numel() + 1e-6), 0)
    count = int(share * neurons.shape[2] + 1e-6)
    few = neurons > neurons.kthvalue(count, dim=-1, keepdim=True).values
    few[:, 0] = True
    return some, few


def predicted(traces: Traces, criterion: str, seed: int, inputs: dict[str, torch.Tensor], per_layer: bool) -> tuple[
    dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float]
]:  # fmt: skip
    """Predicted scores (heads, neurons) of the held-out windows for each kind of input, and rank correlations.

    Args:
        inputs: by name, attention outputs of the windows: [B, L, width].
    """
    rows = split(len(traces.leaky), 0.2, seed)
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in inputs}
    quality = {}
    for kind in ("heads", "neurons"):
        target = scaled_targets(traces.target(kind, criterion), "layer")
        layers = target.shape[1]
        if per_layer:
            fits = [fit(traces.attended[:, layer], target[:, layer], HIDDEN, rows, **FITTING, seed=seed)
                    for layer in range(layers)]  # fmt: skip
            quality[kind] = statistics.mean(one.rho for one in fits[1:])
            for name, x in inputs.items():
                scores[name].append(torch.stack([one.predictor(x[:, i]) for i, one in enumerate(fits)], 1))
        else:
            one = fit(traces.attended[:, 0], target.flatten(1), HIDDEN, rows, **FITTING, seed=seed)
            shape = (layers, target.shape[2])
            guess = one.predictor(traces.attended[rows[1], 0]).unflatten(1, shape)
            quality[kind] = statistics.mean(
                spearman(guess[:, layer], target[rows[1], layer]) for layer in range(1, layers)
            )
            for name, x in inputs.items():
                scores[name].append(one.predictor(x[:, 0]).unflatten(1, shape))
    return {name: (both[0], both[1]) for name, both in scores.items()}, quality


@torch.no_grad()
def attended(model: Any, ids: torch.Tensor, at: int) -> torch.Tensor:
    """Every layer's attention output at a position: [B, L, width]."""
    found = []
    for part in ids.split(4):
        with watched(places(model)[0]) as seen:
            model.get_decoder()(input_ids=part[:, : at + 1], use_cache=False)
        found.append(torch.stack([x[:, at] for x in seen], 1))
    return torch.cat(found)


def perplexity(model: Any, ids: torch.Tensor, prompt: int, masks: tuple[torch.Tensor, torch.Tensor] | None) -> float:
    found = []
    for i in range(0, len(ids), 4):
        part = (None, None) if masks is None else (masks[0][i : i + 4], masks[1][i : i + 4])
        found.append(continuation_nll(model, ids[i : i + 4], prompt, *part))
    return math.exp(float(torch.cat(found).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description="ShadowLLM's claims A to C at small scale.")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--quick", action="store_true", help="few samples and one seed")
    parser.add_argument("--model", default="build/reference/base")
    args = parser.parse_args()
    os.chdir(ROOT)
    started = time.perf_counter()
    samples, windows = (32, 8) if args.quick else (240, 32)
    sizes = [f"shadow.samples={samples}", "shadow.prompt=192", "shadow.continuation=64", f"shadow.windows={windows}"]
    recipe = read_recipe(Path("examples/recipes/shadow-reference.yaml"), [*sizes, f"model={args.model}"])
    assert isinstance(recipe, ShadowRecipe)
    prompt, length = recipe.shadow.prompt, recipe.shadow.prompt + recipe.shadow.continuation
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    traces = trace_all(recipe, model, tokenizer)
    say(f"traced after {time.perf_counter() - started:.0f} s")
    ids = held_out_windows(recipe.data, tokenizer, length, windows * length)
    inputs = {"causal": attended(model, ids, prompt - 1), "leaky": attended(model, ids, length - 1)}
    means = {c: tuple(scaled_targets(traces.target(kind, c), "layer").mean(0).expand(len(ids), -1, -1)
                      for kind in ("heads", "neurons")) for c in ("plainact", "l2")}  # fmt: skip
    seeds = SEEDS[:1] if args.quick else SEEDS
    found: dict[str, dict[str, list[float]]] = {}
    quality: dict[str, list[dict[str, float]]] = {}

    def note(name: str, scores: tuple[torch.Tensor, torch.Tensor]) -> None:
        for share in SHARES:
            ppl = perplexity(model, ids, prompt, kept(*scores, share))
            found.setdefault(name, {}).setdefault(str(share), []).append(ppl)

    dense = perplexity(model, ids, prompt, None)
    for criterion in ("plainact", "l2"):
        note(f"static {criterion}", means[criterion])  # type: ignore[arg-type]
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        note("random", tuple(torch.rand(x.shape, generator=rng) for x in means["l2"]))  # type: ignore[arg-type]
        for criterion in ("plainact", "l2"):
            for per_layer in (False, True):
                name = f"{'per-layer' if per_layer else 'single'} {criterion}"
                scores, rho = predicted(traces, criterion, seed, inputs, per_layer)
                quality.setdefault(name, []).append(rho)
                note(name, scores["causal"])
                if not per_layer:
                    note(f"leaky {criterion}", scores["leaky"])
        say(f"seed {seed} after {time.perf_counter() - started:.0f} s")
    middle = {name: {share: statistics.mean(values) for share, values in row.items()} for name, row in found.items()}

    def ratios(one: str, other: str) -> dict[str, float]:
        return {share: middle[one][share] / middle[other][share] for share in map(str, SHARES)}

    claims = {
        "A plainact over l2 (single)": ratios("single plainact", "single l2"),
        "A plainact over l2 (per-layer)": ratios("per-layer plainact", "per-layer l2"),
        "B single over per-layer (plainact)": ratios("single plainact", "per-layer plainact"),
        "C contextual over static (plainact)": ratios("single plainact", "static plainact"),
        "leaky over causal (plainact)": ratios("leaky plainact", "single plainact"),
    }
    most = {"A plainact over l2 (single)": 1.0, "B single over per-layer (plainact)": 1.05,
            "C contextual over static (plainact)": 1.0}  # fmt: skip
    result = {
        "benchmark": "claims_shadow", "model": args.model, "samples": samples, "windows": windows, "prompt": prompt,
        "continuation": length - prompt, "shares": SHARES, "seeds": seeds, "quick": args.quick, "ppl_dense": dense,
        "ppl": middle, "ppl_by_seed": found, "spearman_by_layer": quality, "claims": claims,
        "met": {name: {share: value <= most[name] for share, value in claims[name].items()} for name in most},
        **origin(torch.get_num_threads(), started),
    }  # fmt: skip
    say(json.dumps({"dense": dense, "ppl": middle, "claims": claims, "met": result["met"]}, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
