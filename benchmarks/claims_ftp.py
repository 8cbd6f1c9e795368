"""FTP's claims at small scale, on a frozen reference model (docs/methods.md).

    python benchmarks/claims_ftp.py [--quick] [--json PATH] [--seeds 3] [--form causal|prompt] [--base examples/reference-dcp]

First the similarity of block inputs and outputs: where less than half of the pairs exceed 0.8 there is little to skip.
A. A searched schedule loses less than a uniform one, static router, at sparsities that this model bears and at 20 %.
B. A router of the four factors loses no more than one of hidden states with the same losses, steps and schedule.
C. The static router loses less than random tokens, the trained router less than the static one, block by block as many.
Besides: keys of skipped tokens kept or not, and whole blocks taken out (greedily, by KL on calibration rows) at equal FLOPs.

Quality is KL(dense || routed) a token and perplexity of held-out rows; with ``--form prompt`` the first half of each row is the
prompt: its tokens alone are routed and counted (blocks are taken out for them, but the last), and what follows is judged.
Achieved sparsity and FLOPs are measured beside the target. A trained router skips what it likes, so it is also *matched*: one
constant is added to all its outputs so that it skips the target's share of the judged rows, or computes the FLOPs of the
blocks taken out. Results whose shares differ by more than 0.02, or that hardly skip, are not compared.
Seeds change calibration rows, search, batches, router and chance.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from common import ROOT, environment, origin, publish, say

SPARSITIES = (0.05, 0.1, 0.2)
TRAINED = 0.1
"""Target of the trained routers."""
REMOVED = (1, 2)
"""Blocks taken out; routing at equal FLOPs is searched for each."""
CLOSE, COMPARABLE = 0.002, 0.02
"""Of shares: how well a router is matched; how far apart two results may lie to be compared."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of a run: rows of a judgement, and of the search; steps of the trainer None: the recipe's."""

    held: int = 16
    calibration: int = 4
    length: int = 256
    population: int = 16
    generations: int = 12
    steps: int | None = None
    halvings: int = 18


QUICK = Sizes(held=4, calibration=1, length=128, population=6, generations=2, steps=8, halvings=14)


class Claims:
    """All that one seed measures.

    Args:
        args: of the command line.
        seed: from 1.
    """

    def __init__(self, args: argparse.Namespace, sizes: Sizes, seed: int) -> None:
        import torch
        from ftp_measure import Judge
        from transformers import AutoTokenizer
        from vllm_prune_training.ftp_search import Rows
        from vllm_prune_training.recipe_file import read_recipe

        self.sizes, self.seed, self.base, self.form = sizes, seed, args.base, args.form
        name = "ftp-reference" if args.form == "causal" else "ftp-prompt-reference"
        paths = {
            kind: f'[{{"path": "{args.corpus}/{kind}.parquet", "format": "parquet"}}]' for kind in ("train", "held_out")
        }
        steps = [] if sizes.steps is None else [f"training.steps={sizes.steps}"]
        self.recipe: Any = read_recipe(ROOT / f"examples/recipes/{name}.yaml", [
            f"model={args.base}", f"data.train={paths['train']}", f"data.held_out={paths['held_out']}",
            f"training.seed={seed}", f"objective.ftp.sparsity={TRAINED}", f"training.lengths={sizes.length}", *steps,
        ])  # fmt: skip
        self.tokenizer = AutoTokenizer.from_pretrained(args.base)
        self.plain = {kv: self.model(kv, args.form) for kv in ("skip", "keep")}
        count = sizes.calibration
        every = self.rows("train", count * seed).ids[-count:]  # other rows for each seed
        cut = torch.full((count,), sizes.length // 2) if args.form == "prompt" else None
        self.held = Judge.of(self.plain["skip"], self.rows("held_out", sizes.held))
        self.calibration = Judge.of(self.plain["skip"], Rows(every, cut))
        self.found: dict[str, Row] = {}
        self.plans: dict[str, list[float]] = {}

    def rows(self, kind: str, count: int) -> Any:
        import torch
        from vllm_prune_training.ftp_search import Rows
        from vllm_prune_training.text_data import held_out_windows

        data = self.recipe.data.model_copy(update={"held_out": getattr(self.recipe.data, kind)})
        ids = held_out_windows(data, self.tokenizer, self.sizes.length, count * self.sizes.length)
        return Rows(ids, torch.full((count,), self.sizes.length // 2) if self.form == "prompt" else None)

    def model(self, kv: str, form: str) -> Any:
        """The base with fresh gates, for decisions that are given."""
        import torch
        from transformers import AutoModelForCausalLM
        from vllm_prune_training.families import gate_shape
        from vllm_prune_training.masked import GatedModel

        from vllm_prune.config import DropGateConfig

        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).requires_grad_(False)
        shape = gate_shape(model.config)
        section = DropGateConfig(method="ftp", params={"kv": kv, "form": form}, num_layers=shape.num_layers,
                                 num_kv_heads=shape.num_kv_heads, hidden_size=shape.hidden_size)  # fmt: skip
        return GatedModel(model, section.build_gates(), section).eval()

    def note(self, name: str, gated: Any, decide: Any = None, **more: Any) -> Row:
        self.found[name] = row = {**self.held.measure(gated, decide), **more}
        say(f"seed {self.seed} {name}: KL {row['kl']:.3f}, perplexity {row['perplexity']:.2f}, skipped {row['skipped']:.3f}, "
            f"FLOPs {row['flops']:.3f}")  # fmt: skip
        return row

    def schedules(self, target: str, sparsity: float) -> None:
        """Claims A and C without training, and what keeping keys changes."""
        from vllm_prune_training.ftp import random_decisions, static_decisions
        from vllm_prune_training.ftp_search import kl_cost, search, uniform_plan
        from vllm_prune_training.recipe_ftp import FTPSearch

        skip, keep = self.plain["skip"], self.plain["keep"]
        options = FTPSearch(population=self.sizes.population, elite=max(1, self.sizes.population // 6))
        uniform = uniform_plan(len(skip.gates), sparsity)
        cost = kl_cost(skip, self.calibration.rows, trained=False)
        searched, history = search(uniform, cost, options, self.sizes.generations, self.seed)
        self.plans[target] = searched
        for name, plan in (("uniform", uniform), ("searched", searched)):
            more = {"target": sparsity, "plan": plan}
            static = static_decisions(plan)
            self.note(
                f"{target} {name} static", skip, static, **more, **({"search": history} if name == "searched" else {})
            )
            self.note(f"{target} {name} random", skip, random_decisions(plan, self.seed), **more)
            if name == "searched":
                self.note(f"{target} {name} static, keys kept", keep, static, **more)

    def blocks_out(self) -> dict[int, float]:
        """The depth-pruned baseline; the mean sparsity at which uniform routing has its FLOPs, for each number of blocks."""
        from ftp_measure import falling_at, removed_greedily, without
        from vllm_prune_training.acc_profile import flops_share, layer_flops

        whole = self.plain["skip"]
        blocks = len(whole.gates)
        order = removed_greedily(whole, self.calibration, max(REMOVED))
        sizes = layer_flops(whole.config, self.sizes.length if self.form == "causal" else self.sizes.length // 2)
        equal = {}
        for count in REMOVED:
            row = self.note(f"{count} blocks out", whole, without(set(order[:count])), removed=order[:count])

            def share(sparsity: float) -> float:
                return flops_share([1.0, *[1.0 - sparsity * blocks / (blocks - 1)] * (blocks - 1)], *sizes)

            equal[count] = round(falling_at(share, row["flops"], 0.0, 0.8, 20), 4)
        return equal

    def routers(self) -> None:
        """Claim B, the trained half of C, and a router trained with keys kept."""
        from ftp_measure import falling_at
        from ftp_routers import HiddenGate, train_router
        from vllm_prune_training.ftp import random_decisions, static_decisions

        from vllm_prune.gates import FTPGate

        plan, form = self.plans[f"{TRAINED:g}"], {"params": {"form": self.form}}
        kinds: dict[str, tuple[type[FTPGate], str]] = {
            "four factors": (FTPGate, "skip"), "hidden states": (HiddenGate, "skip"),
            "four factors, keys kept": (FTPGate, "keep"),
        }  # fmt: skip
        for name, (kind, kv) in kinds.items():
            gate = self.recipe.gate.model_copy(update={"params": {**form["params"], "kv": kv}})
            router = train_router(self.recipe.model_copy(update={"gate": gate}), self.tokenizer, plan, kind)

            def at(metric: str, wanted: float, falls: bool, router: Any = router) -> Any:
                """Decisions shifted to a share of the judged rows: fitted to the share, never to KL."""
                sign = 1.0 if falls else -1.0
                shift = falling_at(
                    lambda x: sign * self.held.measure(router.gated, router.decide(x))[metric],
                    sign * wanted, -20.0, 20.0, self.sizes.halvings, CLOSE,
                )  # fmt: skip
                return router.decide(shift), {"target": wanted, "shift": shift}

            self.note(f"{name}, as trained", router.gated, router.decide(), target=TRAINED)
            decide, more = at("skipped", TRAINED, falls=True)
            achieved = self.note(f"{name}, matched", router.gated, decide, **more)["skipped_per_block"]
            if kv == "skip":
                self.note(f"static like {name}", self.plain["skip"], static_decisions(achieved))
                self.note(f"random like {name}", self.plain["skip"], random_decisions(achieved, self.seed))
            if name == "four factors":
                for count in REMOVED:
                    decide, more = at("flops", self.found[f"{count} blocks out"]["flops"], falls=False)
                    self.note(f"{name} at the FLOPs of {count} blocks out", router.gated, decide, **more)

    def run(self) -> dict[str, Row]:
        """All rows by name."""
        equal = self.blocks_out()
        for sparsity in SPARSITIES:
            self.schedules(f"{sparsity:g}", sparsity)
        for count, sparsity in equal.items():
            self.schedules(f"FLOPs of {count} blocks out", sparsity)
        self.routers()
        return self.found


def claims_of(targets: list[str]) -> dict[str, tuple[str, str, str]]:
    """Claim to (what should lose less, than what, which claim of docs/methods.md)."""
    out = {f"searched over uniform, {t}": (f"{t} searched static", f"{t} uniform static", "A") for t in targets}
    out |= {f"static over random, {t}": (f"{t} searched static", f"{t} searched random", "C") for t in targets}
    out |= {f"keys kept over not, static, {t}": (f"{t} searched static, keys kept", f"{t} searched static", "KV")
            for t in targets}  # fmt: skip
    for how in ("as trained", "matched"):
        out[f"four factors over hidden states, {how}"] = (f"four factors, {how}", f"hidden states, {how}", "B")
        out[f"keys kept over not, router, {how}"] = (f"four factors, keys kept, {how}", f"four factors, {how}", "KV")
    out["router over static"] = ("four factors, matched", "static like four factors", "C")
    out["router over random"] = ("four factors, matched", "random like four factors", "C")
    for count in REMOVED:
        where, row = f"FLOPs of {count} blocks out", f"{count} blocks out"
        out[f"searched static over {row}"] = (f"{where} searched static", row, "depth")
        out[f"router over {row}"] = (f"four factors at the {where}", row, "depth")
    return out


def over(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds; the latter None of one."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def summary(seeds: dict[int, dict[str, Row]], targets: list[str]) -> dict[str, Any]:
    """Rows over seeds, and the claims as ratios of KL: met where the mean is below 1, None where the two skipped (for blocks
    taken out: saved of the FLOPs) shares that are not comparable."""
    runs = list(seeds.values())
    metrics = ("target", "skipped", "flops", "kl", "perplexity")
    rows = {name: {m: over([run[name][m] for run in runs]) for m in metrics if m in runs[0][name]} for name in runs[0]}
    claims = {}
    for name, (one, other, kind) in claims_of(targets).items():
        shares = [
            [1.0 - run[row]["flops"] if kind == "depth" else run[row]["skipped"] for row in (one, other)]
            for run in runs
        ]
        alike = all(abs(a - b) <= COMPARABLE < min(a, b) for a, b in shares)
        ratios = [run[one]["kl"] / run[other]["kl"] for run in runs if run[other]["kl"] > 1e-6]
        ratio = over(ratios) if len(ratios) == len(runs) else None
        met = None if ratio is None or not alike else bool(ratio["mean"] < 1.0)  # type: ignore[operator]
        claims[name] = {"claim": kind, "kl_ratio": ratio, "shares": shares, "met": met}
    return {"rows": rows, "claims": claims}


def told(name: str, claim: dict[str, Any]) -> str:
    """A claim in a line."""
    shares = ", ".join(f"{one:.3f} and {other:.3f}" for one, other in claim["shares"])
    verdict = {True: "met", False: "not met", None: f"not comparable ({shares})"}[claim["met"]]
    ratio, spread = "no KL to compare with", ""
    if claim["kl_ratio"] is not None:
        std = claim["kl_ratio"]["std"]
        ratio, spread = f"KL ratio {claim['kl_ratio']['mean']:.3f}", "" if std is None else f" +- {std:.3f}"
    return f"{claim['claim']}: {name}: {ratio}{spread}, {verdict}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="FTP's claims on the reference model.")
    parser.add_argument("--json", metavar="PATH", help="write the result there ('-': standard output)")
    parser.add_argument(
        "--quick", action="store_true", help="few short rows and steps: shows that it runs, proves nothing"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument(
        "--form", choices=("causal", "prompt"), default="causal", help="whose attention the router reads"
    )
    parser.add_argument("--base", default=str(ROOT / "examples/reference-dcp"), help="its gates, if any, are not read")
    parser.add_argument("--corpus", default=str(ROOT / "build/reference/corpus"))
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    environment(args.threads)
    import torch
    from ftp_measure import similarity

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    sizes = QUICK if args.quick else Sizes()
    found: dict[int, dict[str, Row]] = {}
    like: dict[str, Any] = {}
    dense = math.nan
    for seed in range(1, args.seeds + 1):
        claims = Claims(args, sizes, seed)
        if not like:
            like, dense = similarity(claims.plain["skip"].model, claims.held.rows.ids), claims.held.dense_perplexity()
            say(
                f"cosine > 0.8 for {like['share_above_0.8']:.3f} of {like['pairs']} pairs; dense perplexity {dense:.2f}"
            )
        found[seed] = claims.run()
    targets = [*(f"{s:g}" for s in SPARSITIES), *(f"FLOPs of {count} blocks out" for count in REMOVED)]
    result = summary(found, targets)
    for name, claim in result["claims"].items():
        say(told(name, claim))
    publish(args, {
        "benchmark": "claims_ftp", "base": Path(args.base).name, "form": args.form, "held_out_tokens": sizes.held * sizes.length,
        "sizes": sizes.__dict__, "recipe": claims.recipe.model_dump(by_alias=True), "dense_perplexity": dense,
        "similarity": like, **result, "seeds": found, "quick": args.quick, **origin(args.threads, started),
    })  # fmt: skip


if __name__ == "__main__":
    main()
