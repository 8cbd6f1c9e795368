"""Claims about the prompt forms of LTP and ACC-style elimination (docs/methods.md), on the reference base, under hard masks.

T tokens of held-out text of which the first half is the prompt; perplexity is of the second half. From the same base, for
the same steps and on the same sequences each: ACC-style (at strengths that vary), LTP (soft then hard stage), and no gates.
Then, without training: the profile over depth against a uniform one, one checkpoint at several strengths against plain
weights and against choices without attention (random, the first, the last), LTP against ranks at what it kept, other lengths.
Means and standard deviations over seeds stand under ``over_seeds``.

    python benchmarks/claims_prompt.py --json benchmarks/results/claims-prompt.json      # --quick: shows that it runs
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch
import torch.nn.functional as F
from claims_ltp_acc import T, claims_parser, over_seeds, recipe, tell
from common import origin
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm_prune_training.acc_profile import flops_share, layer_flops, solve_coefficient, tune
from vllm_prune_training.masked import GatedModel, load_gated
from vllm_prune_training.packing import Corpus, held_out_blocks, load_corpus
from vllm_prune_training.prompt_recipe import Prompts
from vllm_prune_training.train import run

from vllm_prune.config import GATE_FILE, DropGateConfig
from vllm_prune.gates import ACCPromptGate, Protection

KEEP = 0.5
HARD_FROM = 0.6
PROTECT = {"sinks": 4, "window": 16}
LEARN = {"next_token": 1.0, "kl_forward": 0.0}
STRENGTHS = (0.5, 1.0, 2.0, 4.0)


class Blind(ACCPromptGate):
    """As many tokens as ACC-style keeps, chosen without attention: ``by`` random, first or last."""

    by = "random"

    def survives(
        self, scores: torch.Tensor, positions: torch.Tensor, prompt: int, strength: float, protection: Protection
    ) -> torch.Tensor:
        order = {"first": -positions, "last": positions, "random": (positions * 2654435761 + 97) % 1000003}[self.by]
        return super().survives(order.to(scores.dtype), positions, prompt, strength, protection)


def on_weights(folder: Path, kind: type[ACCPromptGate] = ACCPromptGate) -> GatedModel:
    """Fresh gates on a dense folder's weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = model.config
    section = DropGateConfig(method="acc_prompt", protect=PROTECT, num_layers=config.num_hidden_layers, dtype="float32",
                             num_kv_heads=config.num_key_value_heads, hidden_size=config.hidden_size)  # fmt: skip
    gates = [kind(section.shape) for _ in range(section.num_layers)]
    return GatedModel(model, gates, section).eval()


@torch.no_grad()
def measure(model: GatedModel, ids: torch.Tensor, strength: float | None = None) -> dict[str, Any]:
    """Perplexity of the second half of each window, and the shares of (prompt token, layer) pairs and FLOPs computed.

    Args:
        ids: int64 [N, T].
    """
    half = ids.shape[1] // 2
    loss, kept = 0.0, []
    for row in ids:
        out = model(row[None], "hard", strength=strength, prompt=half, collect=False)
        loss += F.cross_entropy(out.logits[0, half - 1 : -1].float(), row[half:], reduction="sum").item()
        kept.append(torch.stack(out.kept))
    shares = torch.stack(kept).double().mean(0).tolist()
    flops = flops_share(shares, *layer_flops(model.config, half))
    return {"ppl": round(math.exp(loss / (len(ids) * (ids.shape[1] - half))), 4), "kept": round(sum(shares) / len(shares), 4),
            "flops": round(flops, 4), "kept_per_layer": [round(share, 3) for share in shares]}  # fmt: skip


def tuned(model: GatedModel, source: GatedModel) -> GatedModel:
    """The same counts of tokens as another model's gates keep."""
    for gate, other in zip(model.gates, source.gates, strict=True):
        gate.tune(float(other.profile), float(other.coefficient))  # type: ignore[union-attr,arg-type,operator]
    return model


def strength_for(model: GatedModel, kept: float) -> float:
    """Strength at which ACC-style gates keep a share of the pairs."""
    gates: list[Any] = list(model.gates)

    def share(coefficient: float) -> float:
        strength = 1.0 / coefficient
        return sum([1.0, *(gate.keep_at(strength) for gate in gates[:-1])]) / len(gates)

    return 1.0 / solve_coefficient(share, kept)


def untrained(base: Path, text: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """ACC-style's claim B on the base: coverage by depth, measured profile against a uniform one at equal FLOPs."""
    model = on_weights(base)
    rows: dict[str, Any] = {"dense": measure(model, ids, 0.0)}
    for keep in (KEEP, 0.3):
        for kind in ("measured", "uniform"):
            prompts = Prompts(profile=kind, budget="flops")  # type: ignore[arg-type]
            found = tune(model, text, torch.full((len(text),), text.shape[1]), prompts, keep)
            rows[f"{kind}-{keep}"] = measure(model, ids)
            rows["coverage"] = [round(x, 4) for x in found["coverage"]]
        print(json.dumps(rows), flush=True)
    return rows


def train_all(options: argparse.Namespace, work: Path, seed: int) -> None:
    """The three runs of a seed; a finished one is not repeated."""
    runs: dict[str, dict[str, Any]] = {
        "acc": {"gate": {"method": "acc_prompt", "protect": PROTECT}, "objective": {"keep": KEEP, **LEARN},
                "prompts": {"share": [0.4, 0.6], "strengths": [0.5, 4.0]}},
        "ltp": {"gate": {"method": "ltp_prompt", "protect": PROTECT, "params": {"theta": 0.2}},
                "objective": {"keep": KEEP, "ramp": 0.2, "tau": 0.05, **LEARN},
                "prompts": {"share": [0.4, 0.6], "hard_from": HARD_FROM}},
        "none": {"gate": {"method": "none"}, "objective": LEARN},
    }  # fmt: skip
    for name, sections in runs.items():
        out = work / name
        if not out.exists():
            gate = sections.pop("gate")
            run(recipe(options.corpus, out, options.base, gate, options.steps, seed, **sections))


def main() -> None:
    """See the module."""
    parser = claims_parser(__doc__, "prompt")
    parser.add_argument("--steps", type=int, default=120, help="of each run, 2,048 tokens a step")
    parser.add_argument("--untrained", action="store_true", help="only what the base alone says")
    options = parser.parse_args()
    started = time.perf_counter()
    windows = 32
    if options.quick:
        options.steps, windows, options.work = 6, 2, options.work / "quick"
        options.seeds = 1
    corpus = load_corpus(options.corpus, options.base)
    ids, text = held_out_blocks(corpus, T, windows), held_out_blocks(corpus, T, 2 * windows)[1::2]
    found: dict[str, Any] = {"untrained": untrained(options.base, text, ids)}
    if not options.untrained:
        seeds = {seed: trained(options, corpus, ids, windows, seed) for seed in range(1, options.seeds + 1)}
        found |= {"over_seeds": over_seeds(list(seeds.values())), "seeds": seeds}
    tell(options, {"quick": options.quick, "base": str(options.base), "length": T, "steps": options.steps,
                   "batch_tokens": 2048, "windows": windows, **found, **origin(torch.get_num_threads(), started)})  # fmt: skip


def trained(options: argparse.Namespace, corpus: Corpus, ids: torch.Tensor, windows: int, seed: int) -> dict[str, Any]:
    """The three runs of a seed, and what follows from them without further training."""
    found: dict[str, Any] = {}
    work = options.work / str(seed)
    train_all(options, work, seed)
    acc, ltp, none = load_gated(work / "acc"), load_gated(work / "ltp"), work / "none"
    sweep: dict[str, Any] = {"none-open": measure(on_weights(none), ids, 0.0)}
    plain = tuned(on_weights(none), acc)
    blind = tuned(on_weights(none, Blind), acc)
    for strength in STRENGTHS:
        sweep[f"tuned-{strength}"], sweep[f"plain-{strength}"] = (measure(m, ids, strength) for m in (acc, plain))
        for by in ("random", "first", "last"):
            Blind.by = by
            sweep[f"plain-{by}-{strength}"] = measure(blind, ids, strength)
        print(json.dumps(sweep), flush=True)
    found["offline_tuning"] = sweep
    others = ("plain", "plain-random", "plain-first", "plain-last")
    found["tuned over"] = {f"{other}-{s}": round(sweep[f"tuned-{s}"]["ppl"] / sweep[f"{other}-{s}"]["ppl"], 4)
                           for other in others for s in STRENGTHS}  # fmt: skip

    state = load_file(work / "ltp" / GATE_FILE)
    log = [json.loads(line) for line in (work / "ltp/log.jsonl").read_text().splitlines()]
    stages = [row for row in log if "ppl_soft" in row]
    lengths: dict[str, Any] = {}
    same = strength_for(acc, measure(ltp, ids)["kept"])
    for length in (T // 2, T, 2 * T):
        other = held_out_blocks(corpus, length, max(2, windows * T // length))
        lengths[str(length)] = {"ltp": measure(ltp, other), "ltp-open": measure(ltp, other, 0.0),
                                "acc": measure(acc, other, same), "acc-open": measure(acc, other, 0.0)}  # fmt: skip
    found["ltp"] = {"theta": [round(float(state[f"drop_gate.layers.{i}.theta"]), 4) for i in range(len(state))],
                    "stages": stages, "acc_strength": same, "lengths": lengths}  # fmt: skip
    return found


if __name__ == "__main__":
    main()
