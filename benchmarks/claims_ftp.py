"""FTP's small-scale claims on the frozen reference model: similarity first, then schedules and routers.

    python benchmarks/claims_ftp.py [--quick] [--json PATH] [--gated build/reference/ftp]

Similarity: cosine of each block's input and output, all (token, block) pairs. Claim A: a searched schedule against a uniform
one, static router. Claim C: static against random tokens at the same schedules; with ``--gated`` also the trained router
against both at the sparsity that it achieves, block by block. KL(dense || routed) per token and held-out perplexity; the
search's rows are training text. Claim B (four factors against hidden states) is not answered here.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, environment, origin, publish, say

SPARSITIES = (0.05, 0.1, 0.2, 0.3)


def similarity(model: Any, ids: Any) -> dict[str, Any]:
    """Share of pairs above 0.8 and the deciles, over all blocks and per block."""
    import torch

    found: list[torch.Tensor] = []

    def look(_module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        found.append(torch.cosine_similarity(x.float(), output.float(), dim=-1).flatten())

    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in model.get_decoder().layers]
    with torch.no_grad():
        model.get_decoder()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    every = torch.cat(found)
    return {
        "pairs": every.numel(), "share_above_0.8": float((every > 0.8).float().mean()),
        "deciles": [round(float(q), 4) for q in every.quantile(torch.linspace(0.1, 0.9, 9))],
        "share_above_0.8_per_block": [round(float((part > 0.8).float().mean()), 4) for part in found],
    }  # fmt: skip


def measure(gated: Any, ids: Any, dense: Any, decide: Any = None) -> dict[str, float]:
    """KL(dense || routed), perplexity and the share of pairs skipped over rows ids [N, T]."""
    import torch

    kl = nll = skipped = 0.0
    with torch.no_grad():
        for row, log_p in zip(ids, dense, strict=True):
            out = gated(row[None], "hard", strength=1.0, collect=False, decide=decide)
            log_q = out.logits[0, :-1].float().log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            nll -= float(log_q.gather(1, row[1:, None]).mean())
            skipped += 1.0 - float(torch.stack(out.runs).mean())
    n = len(ids)
    return {"kl": kl / n, "perplexity": float(torch.tensor(nll / n).exp()), "skipped": skipped / n}


def main() -> None:
    parser = argparse.ArgumentParser(description="FTP's claims on the reference model.")
    parser.add_argument("--json", metavar="PATH", help="write the result there ('-': standard output)")
    parser.add_argument("--quick", action="store_true", help="less text, a smaller search")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--base", default=str(ROOT / "build/reference/base"))
    parser.add_argument("--corpus", default=str(ROOT / "build/reference/corpus"))
    parser.add_argument("--gated", help="folder of a trained FTP checkpoint of that base")
    args = parser.parse_args()
    environment(args.threads)
    sys.path.insert(0, str(ROOT / "training"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm_prune_training.data_recipe import Data, Source
    from vllm_prune_training.families import gate_shape
    from vllm_prune_training.ftp import random_decisions, schedule_of, static_decisions
    from vllm_prune_training.ftp_search import kl_cost, search, uniform_plan
    from vllm_prune_training.masked import GatedModel, load_gated
    from vllm_prune_training.recipe_ftp import FTPSearch
    from vllm_prune_training.text_data import held_out_windows

    from vllm_prune.config import DropGateConfig
    from vllm_prune.gates import FTPGate

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    sources = {kind: [Source(path=f"{args.corpus}/{kind}.parquet", format="parquet")] for kind in ("train", "held_out")}
    rows, length = (4, 256) if args.quick else (16, 256)

    def windows(kind: str, tokens: int) -> torch.Tensor:
        data = Data(train=sources["train"], held_out=sources[kind], check="lazy")
        return held_out_windows(data, tokenizer, length, tokens)

    held, calibration = windows("held_out", rows * length), windows("train", (2 if args.quick else 4) * length)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    like = similarity(model, held)
    say(f"cosine > 0.8 for {like['share_above_0.8']:.3f} of {like['pairs']} pairs")
    shape = gate_shape(model.config)
    section = DropGateConfig(method="ftp", num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads,
                             hidden_size=shape.hidden_size)  # fmt: skip
    gated = GatedModel(model, [FTPGate(shape) for _ in range(shape.num_layers)], section).eval()
    with torch.no_grad():
        dense = [gated(row, "open").logits[:-1].float().log_softmax(-1) for row in held]
    nll = -sum(float(p.gather(1, row[1:, None]).mean()) for p, row in zip(dense, held, strict=True)) / len(held)
    options = FTPSearch(population=8 if args.quick else 24, elite=2 if args.quick else 4)
    generations = 4 if args.quick else 20
    table: list[dict[str, Any]] = []
    for sparsity in SPARSITIES[1:2] if args.quick else SPARSITIES:
        uniform = uniform_plan(shape.num_layers, sparsity)
        searched, history = search(uniform, kl_cost(gated, calibration, False), options, generations, 1)
        for name, schedule in (("uniform", uniform), ("searched", searched)):
            for router, decide in (("static", static_decisions(schedule)), ("random", random_decisions(schedule, 1))):
                row = {"sparsity": sparsity, "schedule": name, "router": router, "plan": schedule,
                       **measure(gated, held, dense, decide)}  # fmt: skip
                if name == "searched" and router == "static":
                    row["search_kl"] = history
                table.append(row)
                say(f"{sparsity:g} {name} {router}: KL {row['kl']:.3f}, perplexity {row['perplexity']:.2f}")
    trained: dict[str, Any] = {}
    if args.gated:
        ftp = load_gated(args.gated, torch.float32)
        trained["router"] = measure(ftp, held, dense)
        with torch.no_grad():
            runs = [torch.stack(ftp(row, "hard", strength=1.0, collect=False).runs).mean(-1) for row in held]
        achieved = (1.0 - torch.stack(runs).mean(0)).tolist()
        trained.update(plan=schedule_of(list(ftp.gates)), achieved=achieved,
                       static=measure(gated, held, dense, static_decisions(achieved)),
                       random=measure(gated, held, dense, random_decisions(achieved, 1)))  # fmt: skip
        for name in ("router", "static", "random"):
            say(f"trained plan, {name}: {trained[name]}")
    publish(args, {
        "benchmark": "claims_ftp", "base": Path(args.base).name, "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_tokens": held.numel(), "length": length, "dense_perplexity": float(torch.tensor(nll).exp()),
        "similarity": like, "static_routers": table, "trained": trained,
        "search": {"population": options.population, "generations": generations, "tokens": calibration.numel()},
        "quick": args.quick, **origin(args.threads, started),
    })  # fmt: skip


if __name__ == "__main__":
    main()
