"""Prefill with half of the (token, block) pairs skipped by an FTP router, beside stock vLLM.

    python benchmarks/ftp.py [--quick] [--json PATH]

A compute-bound shape: one prompt, wide layers. Random weights, random tokens; the router is forced, not trained: a block
runs on a token iff at most a share 1 - s_i of its row's keys outweighs its own, s_i set block by block on another prompt, so that
half of all pairs are left. What a trained router costs is paid in full: the second pass over the keys, the MLP, gather and
scatter. ``ratio`` is the median over rounds of stock's seconds for a whole prompt over the plugin's, the engines taking
turns. ``limit`` is the physical one: stock's multiplications over those left at the measured share, attention included. All
is done twice, with the engines made in either order.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Shape, arguments, frame, publish, save_models, say
from prompt_forms import PAIRS, SHAPE, against_stock, both_orders, later_share, limit

FORCED = (
    "Random weights, random tokens. Forced router: run - skip = 4 (1 - rank share - s_i), s_i a quantile of another "
    "prompt's rank shares at that block; block 0 runs on everything."
)


def save_ftp(folder: Path, shape: Shape, prompt: int) -> dict[str, Path]:
    """Stock and FTP folders with the same weights."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm_prune_training.masked import GatedModel

    from vllm_prune.checkpoint import add_gates
    from vllm_prune.config import DropGateConfig
    from vllm_prune.gates import FTPGate, GateShape
    from vllm_prune.gates.ftp import share_router

    stock, _ = save_models(folder, shape, keep=0.5, rank=16, strength=0.0)
    share = later_share(shape.layers)
    gates = [FTPGate(GateShape(shape.hidden, shape.kv_heads, shape.layers)) for _ in range(shape.layers)]
    share_router(gates)
    hidden, out = gates[0].router[0], gates[0].router[2]
    with (
        torch.no_grad()
    ):  # factors: rank is 4 rank share - 2, the requirement 4 s: z = 4 (1 - rank share - s) in two units
        for weight in gates[0].router.parameters():
            weight.zero_()
        hidden.weight[0] = torch.tensor([0.0, 0.0, -1.0, -1.0])
        hidden.weight[1] = -hidden.weight[0]
        hidden.bias[0], hidden.bias[1] = 2.0, -2.0
        out.weight[0, 0] = out.weight[1, 1] = 1.0

    def decide(layer: int, facts: torch.Tensor) -> torch.Tensor | None:
        if layer == 0:
            return None
        ranks = facts[..., 2]
        gates[layer].sparsity.fill_(float(1.0 - ranks.flatten().quantile(share)))
        return gates[layer].keep(facts, 1.0).float()

    model = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.bfloat16)
    section = DropGateConfig(
        method="ftp", num_layers=shape.layers, num_kv_heads=shape.kv_heads, hidden_size=shape.hidden
    )
    ids = torch.randint(3, shape.vocab, (prompt,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        GatedModel(model, gates, section).eval()(ids, "hard", decide=decide)
    del model
    made = folder / "ftp"
    made.mkdir()
    for path in stock.iterdir():
        shutil.copy(path, made) if path.suffix == ".json" else (made / path.name).hardlink_to(path)
    add_gates(made, list(gates), {"dtype": "float32", "provenance": {"forced": FORCED}})
    return {"stock": stock, "ftp": made}


def main() -> None:
    args = arguments("Prefill with half of the (token, block) pairs skipped, and stock, taking turns.")
    started = time.perf_counter()
    shape = replace(SHAPE, hidden=1024, mlp=4096, layers=6) if args.quick else SHAPE
    prompt, rounds = (768, 4) if args.quick else (1536, 5)
    kept, speed = against_stock(both_orders(save_ftp, shape, prompt, rounds), "ftp")
    left = (kept * shape.layers - 1) / (shape.layers - 1)
    found: dict[str, Any] = {"kept": kept, **speed, "limit": limit(shape, prompt, left)}
    say(f"ratio {found['ratio']:.3f} of a limit {found['limit']:.2f}, pairs computed {kept:.3f}, {found['ms']}")
    publish(args, {
        "benchmark": "ftp", "prompt": prompt, "pairs": PAIRS, "target": 1.3, **found,
        "repetitions": {"passes": 2, "rounds": rounds}, **frame(args, shape, started), "forced": FORCED,
    })  # fmt: skip


if __name__ == "__main__":
    main()
