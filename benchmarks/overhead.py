"""What the plugin costs when it drops nothing: gates loaded at strength 0 against stock vLLM, taking turns.

    python benchmarks/overhead.py [--quick] [--json PATH]

A weight-bound shape (short context, small batch), where all of stock's time is matrices and any cost a layer shows.
``ratio`` is the median over rounds of stock's decode step time over the plugin's (1 is no overhead), ``prefill.ratio`` the
same for whole prompts; ``ideal`` is 1: the bytes are the same. Law 1 asks for at least 0.97 of both. Where an engine's
memory lies moves its speed by some percent, so all is done twice, with the engines made in either order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Engine, Shape, arguments, frame, kept_bytes, publish, say, spread, temporary_models

QWEN3_0_6B = Shape(hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, mlp=3072, vocab=151936)
RANK = 16
BATCH, CONTEXT, PROMPT = 4, 128, 256
STEPS = 4


def take_turns(
    engines: dict[str, Engine], rounds: int, measure: Callable[[Engine, int], float]
) -> dict[str, list[float]]:
    """Seconds of each engine and round; who goes first alternates, the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name in sorted(engines, reverse=turn % 2 == 0):
            seconds = measure(engines[name], turn)
            if turn > 0:
                times[name].append(seconds)
    return times


def one_pass(folders: dict[str, Path], shape: Shape, decode_rounds: int, prefill_rounds: int) -> dict[str, Any]:
    """Both engines, made in the order of ``folders``: prompts first, then decode."""
    new_tokens = (decode_rounds + 1) * STEPS + 8
    engines = {
        name: Engine(folder, shape, blocks=128, max_model_len=768, max_num_seqs=BATCH, max_num_batched_tokens=1024)
        for name, folder in folders.items()
    }

    def prefill(engine: Engine, turn: int) -> float:
        engine.add([PROMPT], new_tokens=1, tag=f"p{turn}-")
        return engine.step()[0]

    def decode(engine: Engine, turn: int) -> float:
        return statistics.median(engine.step()[0] for _ in range(STEPS))

    prefills = take_turns(engines, prefill_rounds, prefill)
    for engine in engines.values():
        engine.add([CONTEXT] * BATCH, new_tokens)
        engine.step()
    decodes = take_turns(engines, decode_rounds, decode)
    held, dense = kept_bytes(engines["plugin"])
    for engine in engines.values():
        engine.close()
    return {"made_first": next(iter(folders)), "kept": held / dense, "prefill": prefills, "decode": decodes}


def summary(passes: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """Ratios by round; the mean of the passes' medians cancels what the order of making the engines does."""
    ratios = [[a / b for a, b in zip(p[what]["stock"], p[what]["plugin"], strict=True)] for p in passes]
    medians = [statistics.median(values) for values in ratios]
    times = {name: [seconds for p in passes for seconds in p[what][name]] for name in ("stock", "plugin")}
    return {
        "ratio": statistics.geometric_mean(medians),
        "ratio_by_pass": {p["made_first"] + " made first": m for p, m in zip(passes, medians, strict=True)},
        "ms": {name: 1000 * statistics.median(values) for name, values in times.items()},
        "spread": {"ratio": spread([r for values in ratios for r in values]),
                   **{f"{name}_s": spread(values) for name, values in times.items()}},
    }  # fmt: skip


def main() -> None:
    args = arguments("Cost of gates at strength 0, stock and plugin taking turns.")
    started = time.perf_counter()
    shape = replace(QWEN3_0_6B, layers=8, vocab=8192) if args.quick else QWEN3_0_6B
    rounds = (16, 10) if args.quick else (30, 16)
    passes = []
    with temporary_models(shape, keep=0.2, rank=RANK, strength=0.0) as (stock, plugin):
        folders = {"stock": stock, "plugin": plugin}
        for order in (folders, dict(reversed(folders.items()))):
            passes.append(one_pass(order, shape, *rounds))
            say(f"pass {len(passes)} after {time.perf_counter() - started:.1f} s")
    decode, prefill = summary(passes, "decode"), summary(passes, "prefill")
    result = {
        "benchmark": "overhead",
        "kept": passes[0]["kept"],
        "ratio": decode["ratio"],
        "ideal": 1.0,
        "targets": {"ratio": 0.97, "prefill.ratio": 0.97},
        "decode": {"batch": BATCH, "context": CONTEXT, **decode},
        "prefill": {"batch": 1, "prompt": PROMPT, **prefill},
        "gate": {"method": "dcp", "rank": RANK, "strength": 0.0},
        "repetitions": {"passes": 2, "decode_rounds": rounds[0], "steps_a_round": STEPS, "prefill_rounds": rounds[1],
                        "order": "alternating within a pass; passes differ in which engine is made first"},
        "spread": {"decode_ratio": decode["spread"]["ratio"], "prefill_ratio": prefill["spread"]["ratio"]},
        **frame(args, shape, started),
    }  # fmt: skip
    for what in ("decode", "prefill"):
        say(f"{what}: ratio {result[what]['ratio']:.3f} {result[what]['ratio_by_pass']} {result[what]['ms']}")
    publish(args, result)


if __name__ == "__main__":
    main()
