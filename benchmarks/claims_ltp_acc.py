"""Claims about LTP by age and ACC-style eviction (docs/methods.md), on the reference base at T = 512 with hard masks.

From the same base, for the same steps and on the same text each: LTP (soft then hard stage), ACC-style (one coefficient),
and window and random dropping, matched on the past-pair kept fraction that LTP reached; all learn from the base as it was
(KL). Then, without training: what ACC-style measures of the base, its profile against a uniform one, and the sweep of the
coefficient on the fine-tuned and on the plain weights. A seed sets the order of the text and what is random; what is
compared, within a seed, is a ratio; the ratios' means and standard deviations over seeds stand under ``over_seeds``.

    python training/reference/make_corpus.py --corpus build/reference/corpus-dcp --model examples/reference-dcp
    python benchmarks/claims_ltp_acc.py --json benchmarks/results/claims-ltp-acc.json      # --quick: shows that it runs
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch
from claims import DELAY, T, random_for, window_for
from common import origin
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm_prune_training.boundary_profile import tune_boundaries
from vllm_prune_training.boundary_recipe import Boundaries
from vllm_prune_training.evaluate import held_out_perplexity, recall_accuracy
from vllm_prune_training.gate_evaluation import AsCausalLM
from vllm_prune_training.masked import GatedModel, load_gated
from vllm_prune_training.packing import Corpus, held_out_blocks, load_corpus
from vllm_prune_training.recipe import Recipe
from vllm_prune_training.train import run

from vllm_prune.config import GATE_FILE, DropGateConfig

KEEP = 0.5
HARD_FROM = 0.6
ACC = {"grid": 32, "sinks": 4, "window": 32}
LTP = {"span": 64, "grid": 32, "theta": 0.8}
STRENGTHS = (0.5, 1.0, 2.0)


def recipe(
    data: Path, out: Path, base: Path, gate: dict[str, Any], steps: int, seed: int, /, **sections: Any
) -> Recipe:
    """One run; all of a seed see the same sequences. ``sections`` of the recipe; what is not in them is as here."""
    parts: dict[str, dict[str, Any]] = {
        "objective": {"kl_forward": 1.0},
        "data": {"train": [{"path": str(data / "train.parquet"), "format": "parquet"}],
                 "held_out": [{"path": str(data / "held_out.parquet"), "format": "parquet"}], "check": "lazy"},
        "training": {"steps": steps, "lengths": T, "batch_tokens": 2048, "lr": 1e-4, "bias_lr": 0.03, "precision": "bf16",
                     "schedule": "trapezoid", "seed": seed, "log_steps": 5, "save_steps": 100000,
                     "eval_steps": max(1, round(HARD_FROM * steps)), "eval_tokens": 4096},
    }  # fmt: skip
    merged = {name: {**part, **sections.get(name, {})} for name, part in parts.items()}
    return Recipe.model_validate({"model": str(base), "output": str(out), "gate": gate, **sections, **merged})


def claims_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """What every benchmark of claims about LTP and ACC-style elimination is told. ``name``: of its folder of runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--quick", action="store_true", help="6 steps: shows that it runs, proves nothing")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--corpus", type=Path, default=Path("build/reference/corpus-dcp"))
    parser.add_argument("--base", type=Path, default=Path("examples/reference-dcp"), help="a gated folder: its weights")
    parser.add_argument("--work", type=Path, default=Path(f"build/claims-{name}"))
    return parser


def over_seeds(runs: list[Any]) -> Any:
    """Results of equal form, one a seed: of every number in them the mean and the standard deviation (None of one)."""
    first = runs[0]
    if isinstance(first, dict):
        return {name: over_seeds([run[name] for run in runs]) for name in first}
    if isinstance(first, list):
        return [over_seeds(list(values)) for values in zip(*runs, strict=True)]
    if isinstance(first, bool) or not isinstance(first, int | float):
        return runs
    return {"mean": round(statistics.mean(runs), 4), "std": round(statistics.stdev(runs), 4) if len(runs) > 1 else None}


def tell(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the result, and write it where ``--json`` says."""
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


def measure(model: Any, corpus: Corpus, blocks: int, tasks: int, strength: float | None = None) -> dict[str, Any]:
    """Held-out perplexity, what was kept of past pairs meanwhile, and recall."""
    judged = AsCausalLM(model, "hard", strength) if isinstance(model, GatedModel) else model
    row: dict[str, Any] = {"ppl": held_out_perplexity(judged, corpus, T, blocks)}
    if isinstance(judged, AsCausalLM):
        kept = torch.stack(judged.kept)
        row |= {"kept": float(kept.mean()), "kept_per_layer": [round(x, 4) for x in kept.mean(0).tolist()],
                "live_at_end": float(torch.stack(judged.live).mean())}  # fmt: skip
    if tasks:
        row["recall"] = recall_accuracy(judged, corpus, (T,), tasks)["lookup"][str(T)]
    return row


def on_base(base: Path, method: str, params: dict[str, Any]) -> GatedModel:
    """Fresh gates on the base's weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = model.config
    section = DropGateConfig(method=method, params=params, num_layers=config.num_hidden_layers, dtype="float32",
                             num_kv_heads=config.num_key_value_heads, hidden_size=config.hidden_size)  # fmt: skip
    return GatedModel(model, section.build_gates(), section, cache_dtype=torch.bfloat16).eval()


@torch.no_grad()
def padding(model: GatedModel, windows: torch.Tensor) -> dict[str, Any]:
    """Whether what follows a text changes a decision that its own queries see: 64 and 128 tokens of another text."""
    ids, other = windows[0][: T // 2], windows[1]
    alone = model(ids, "hard").expiry
    assert alone is not None
    seen, found = alone.clamp(max=len(ids)), {}
    for extra in (64, 128):
        longer = model(torch.cat([ids, other[:extra]]), "hard").expiry
        assert longer is not None
        found[str(extra)] = bool(torch.equal(longer[..., : len(ids)].clamp(max=len(ids)), seen))
    return {"equal_decisions_with_more_behind": found, "dropped": float((seen < len(ids)).float().mean())}


def trained(options: argparse.Namespace, corpus: Corpus, blocks: int, tasks: int, seed: int) -> dict[str, Any]:
    """The four runs of a seed, measured."""
    rows: dict[str, Any] = {}
    work = options.work / str(seed)

    def do(name: str, gate: dict[str, Any], **sections: Any) -> GatedModel:
        out = work / name
        if not out.exists():
            run(recipe(options.corpus, out, options.base, gate, options.steps, seed, **sections))
        record, model = json.loads((out / "record.json").read_text()), load_gated(out)
        rows[name] = {**measure(model, corpus, blocks, tasks), "tokens_seen": record["tokens_seen"]}
        rows[name]["trained_by"] = record["held_out"]
        print(name, json.dumps(rows[name]), flush=True)
        return model

    objective = {"keep": KEEP, "ramp": 0.3, "gamma": None}
    ltp = do("ltp", {"method": "ltp", "params": LTP}, objective=objective, boundaries={"hard_from": HARD_FROM})
    state = load_file(work / "ltp" / GATE_FILE)
    rows["ltp"]["theta"] = [round(float(state[f"drop_gate.layers.{i}.theta"]), 4) for i in range(len(state))]
    log = [json.loads(line) for line in (work / "ltp/log.jsonl").read_text().splitlines()]
    (before,) = [row for row in log if "ppl_soft" in row and row["step"] < options.steps][-1:]
    rows["ltp"]["end_of_soft_stage"] = {
        name: before[name] for name in ("ppl_open", "ppl_soft", "ppl_hard", "kept_hard")
    }
    rows["ltp"]["padding"] = padding(ltp, held_out_blocks(corpus, T, 2))
    kept = rows["ltp"]["kept"]
    do("window", {"method": "window", "params": {"window": window_for(kept)}})
    do("random", {"method": "random", "params": {"keep": random_for(kept), "delay": DELAY, "seed": seed}})
    acc = do("acc", {"method": "acc", "params": ACC}, objective={"keep": KEEP})
    rows["acc"]["sweep"] = {str(s): measure(acc, corpus, blocks, 0, s) for s in STRENGTHS}
    return rows


def ratios(rows: dict[str, Any], untrained: dict[str, Any]) -> dict[str, float]:
    """What the claims of a seed compare: perplexities, one over the other."""
    stage, end = rows["ltp"]["end_of_soft_stage"], rows["ltp"]["trained_by"]
    found = {"ltp over window": rows["ltp"]["ppl"] / rows["window"]["ppl"],
             "ltp over random": rows["ltp"]["ppl"] / rows["random"]["ppl"],
             "ltp hard over soft, after the soft stage": stage["ppl_hard"] / stage["ppl_soft"],
             "ltp hard over soft, at the end": end["ppl_hard"] / end["ppl_soft"]}  # fmt: skip
    for strength, row in rows["acc"]["sweep"].items():
        found[f"acc tuned over plain at strength {strength}"] = row["ppl"] / untrained["sweep"][strength]["ppl"]
        found[f"acc tuned over window at strength {strength}"] = row["ppl"] / untrained[f"window-as-{strength}"]["ppl"]
    return {name: round(value, 4) for name, value in found.items()}


def untrained(options: argparse.Namespace, corpus: Corpus, blocks: int) -> dict[str, Any]:
    """What the base alone says."""
    windows = held_out_blocks(corpus, T, 8)
    model = on_base(options.base, "acc", ACC)
    rows: dict[str, Any] = {"dense": measure(model.model, corpus, blocks, 0)}
    for keep in (KEEP, 0.3):
        for kind in ("measured", "uniform"):
            found = tune_boundaries(model, windows, Boundaries(profile=kind), keep)  # type: ignore[arg-type]
            rows[f"{kind}-{keep}"] = {**measure(model, corpus, blocks, 0), "keep_per_layer": found["keep"]}
            rows["coverage"] = [round(x, 4) for x in found["coverage"]]
        print(keep, json.dumps(rows), flush=True)
    tune_boundaries(model, windows, Boundaries(), KEEP)
    rows["sweep"] = {str(s): measure(model, corpus, blocks, 0, s) for s in STRENGTHS}
    for s, row in rows["sweep"].items():
        plain = on_base(options.base, "window", {"window": window_for(row["kept"])})
        rows[f"window-as-{s}"] = measure(plain, corpus, blocks, 0)
    return rows


def main() -> None:
    """See the module."""
    parser = claims_parser(__doc__, "ltp-acc")
    parser.add_argument("--steps", type=int, default=120, help="of each run, 2,048 tokens a step")
    options = parser.parse_args()
    started = time.perf_counter()
    blocks, tasks = 32, 12
    if options.quick:
        options.steps, blocks, tasks, options.work = 6, 2, 1, options.work / "quick"
        options.seeds = 1
    corpus = load_corpus(options.corpus, options.base)
    plain = untrained(options, corpus, blocks)
    seeds = {seed: trained(options, corpus, blocks, tasks, seed) for seed in range(1, options.seeds + 1)}
    for rows in seeds.values():
        rows["ratios"] = ratios(rows, plain)
    values = {"base": str(options.base), "length": T, "steps": options.steps, "batch_tokens": 2048, "windows": blocks,
              "recall_texts": tasks, "untrained": plain,
              "over_seeds": over_seeds(list(seeds.values())), "seeds": seeds}  # fmt: skip
    tell(options, {"quick": options.quick, **values, **origin(torch.get_num_threads(), started)})


if __name__ == "__main__":
    main()
