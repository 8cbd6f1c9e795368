"""Prefill with half of the (prompt token, layer) pairs eliminated, LTP's and ACC-style prompt forms, beside stock vLLM.

    python benchmarks/prompt_forms.py [--quick] [--json PATH]

A compute-bound shape: one prompt, wide layers. Random weights, random tokens; the gates are forced, not trained: both
eliminate after layer 0, which computes everything, what leaves every later layer the same share of the tokens. ``ratio`` is
the median over rounds of stock's seconds for a whole prompt over the plugin's, the engines taking turns. ``limit`` is the
physical one: stock's multiplications over those that are left, attention included, without those of the scores, of the
embedding and of the head (one token). ``kept`` is measured: of the prompt's keys, those that the lanes hold. All is done
twice, with the engines made in either order.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Engine, Shape, arguments, frame, publish, save_models, say
from overhead import summary, take_turns

SHAPE = Shape(hidden=1536, layers=8, heads=12, kv_heads=4, head_dim=128, mlp=4608, vocab=8192)
PAIRS = 0.5
"""Of (prompt token, layer) pairs that are computed."""

FORCED = (
    "Random weights, random tokens. Forced gates: layer 0 eliminates all but the best-scored tokens (ACC-style: by a "
    "retention; LTP: by a threshold at that quantile of another prompt's scores), the other layers none."
)


def later_share(layers: int) -> float:
    """Share of the tokens in all layers but the first, such that ``PAIRS`` of all pairs are computed."""
    return (PAIRS * layers - 1) / (layers - 1)


def save_forms(folder: Path, shape: Shape, prompt: int) -> dict[str, Path]:
    """Stock and two gated folders with the same weights."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm_prune_training.masked import GatedModel

    from vllm_prune.checkpoint import add_gates
    from vllm_prune.config import GATE_FILE, DropGateConfig
    from vllm_prune.gates import ACCPromptGate, GateShape, LTPPromptGate

    stock, _ = save_models(folder, shape, keep=0.5, rank=16, strength=0.0)
    made = {"stock": stock}
    sizes, share = GateShape(shape.hidden, shape.kv_heads, shape.layers), later_share(shape.layers)
    acc = [ACCPromptGate(sizes) for _ in range(shape.layers)]
    ltp = [LTPPromptGate(sizes) for _ in range(shape.layers)]
    for gate in acc:
        gate.tune(1.0, share)
    # Only layer 0's scores are looked for: a model of two layers has them.
    model = AutoModelForCausalLM.from_pretrained(stock, num_hidden_layers=2, dtype=torch.bfloat16)
    section = DropGateConfig(method="ltp_prompt", num_layers=2, num_kv_heads=shape.kv_heads, hidden_size=shape.hidden)
    ids = torch.randint(3, shape.vocab, (prompt,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        out = GatedModel(model, ltp[:2], section).eval()(ids, "hard", prompt=prompt)
        assert out.prompts is not None
        ltp[0].theta.fill_(out.prompts.scores[0][0, :-1].quantile(1.0 - share))
    del model
    for name, gates in (("acc_prompt", acc), ("ltp_prompt", ltp)):
        made[name] = folder / name
        made[name].mkdir()
        for path in stock.iterdir():
            shutil.copy(path, made[name]) if path.suffix == ".json" else (made[name] / path.name).hardlink_to(path)
        add_gates(made[name], list(gates), {"dtype": "float32", "provenance": {"forced": FORCED}})
        assert (made[name] / GATE_FILE).exists()
    return made


def one_pass(folders: dict[str, Path], shape: Shape, prompt: int, rounds: int) -> dict[str, Any]:
    """All engines, made in the order of ``folders``."""
    engines = {
        name: Engine(folder, shape, blocks=prompt // 32 + 8, max_model_len=prompt + 16, max_num_seqs=1,
                     max_num_batched_tokens=prompt + 32, enable_chunked_prefill=False)
        for name, folder in folders.items()
    }  # fmt: skip
    kept: dict[str, list[float]] = {name: [] for name in engines}

    def prefill(engine: Engine, turn: int) -> float:
        engine.add([prompt], new_tokens=3, tag=f"p{turn}-", seed=turn)
        seconds = engine.step()[0]
        (done,) = engine.drain()
        for name, other in engines.items():
            if other is engine and name != "stock":
                kept[name].append(done.kv_transfer_params["vllm_prune"]["kept_fraction"])
        return seconds

    times = take_turns(engines, rounds, prefill)
    for engine in engines.values():
        engine.close()
    return {"made_first": next(iter(folders)), "times": times, "kept": kept}


def both_orders(
    save: Callable[[Path, Shape, int], dict[str, Path]], shape: Shape, prompt: int, rounds: int
) -> list[dict[str, Any]]:
    """Two passes over the engines of the folders that ``save`` makes, made in either order."""
    folder, started = Path(tempfile.mkdtemp(prefix="vllm-prune-bench-")), time.perf_counter()
    passes = []
    try:
        folders = save(folder, shape, prompt)
        for order in (folders, dict(reversed(folders.items()))):
            passes.append(one_pass(order, shape, prompt, rounds))
            say(f"pass {len(passes)} after {time.perf_counter() - started:.1f} s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return passes


def against_stock(passes: list[dict[str, Any]], name: str) -> tuple[float, dict[str, Any]]:
    """Mean share kept by one of the engines, and its prefill beside stock's."""
    parts = [{"made_first": p["made_first"], "prefill": {"stock": p["times"]["stock"], "plugin": p["times"][name]}}
             for p in passes]  # fmt: skip
    return statistics.mean(value for p in passes for value in p["kept"][name]), summary(parts, "prefill")


def limit(shape: Shape, prompt: int, share: float) -> float:
    """Stock's multiplications over those left."""
    from types import SimpleNamespace

    from vllm_prune_training.acc_profile import flops_share, layer_flops

    config = SimpleNamespace(hidden_size=shape.hidden, num_attention_heads=shape.heads, head_dim=shape.head_dim,
                             num_key_value_heads=shape.kv_heads, intermediate_size=shape.mlp)  # fmt: skip
    return 1.0 / flops_share([1.0, *[share] * (shape.layers - 1)], *layer_flops(config, prompt))


def main() -> None:
    args = arguments("Prefill of prompt forms at half the (token, layer) pairs, and stock, taking turns.")
    started = time.perf_counter()
    shape = replace(SHAPE, hidden=1024, mlp=4096, layers=6) if args.quick else SHAPE
    prompt, rounds = (768, 4) if args.quick else (1024, 4)
    passes = both_orders(save_forms, shape, prompt, rounds)
    found: dict[str, Any] = {}
    for name in ("ltp_prompt", "acc_prompt"):
        kept, speed = against_stock(passes, name)
        found[name] = {
            "kept": kept,
            **speed,
            "limit": limit(shape, prompt, later_share(shape.layers)),
        }
        say(f"{name}: ratio {found[name]['ratio']:.3f} of a limit {found[name]['limit']:.2f}, kept {kept:.3f}, "
            f"{found[name]['ms']}")  # fmt: skip
    publish(args, {
        "benchmark": "prompt_forms", "prompt": prompt, "pairs": PAIRS, "target": 1.3, **found,
        "repetitions": {"passes": 2, "rounds": rounds}, **frame(args, shape, started), "forced": FORCED,
    })  # fmt: skip


if __name__ == "__main__":
    main()
