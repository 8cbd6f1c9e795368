"""Decode speed where attention dominates: 80 % of the keys dropped against stock vLLM, in one process, taking turns.

    python benchmarks/decode.py [--quick] [--json PATH]

``ratio`` is the median over rounds of stock's step time over the plugin's; ``ideal`` the ratio of the bytes each step
must read (weights, keys, values, gate keys). ``kept`` counts the bytes in the lanes, gate keys included.
"""

from __future__ import annotations

import statistics
import time

from common import Engine, Shape, arguments, frame, kept_bytes, publish, say, spread, temporary_models

RANK = 16
KEEP = 0.2


def build_context(engine: Engine, batch: int, context: int, new_tokens: int) -> float:
    """Queue the batch and run until every prompt is computed."""
    engine.add([context] * batch, new_tokens)
    begin = time.perf_counter()
    while True:
        engine.step()
        running = engine.scheduler.running
        if len(running) == batch and all(r.num_computed_tokens >= context for r in running):
            return time.perf_counter() - begin


def main() -> None:
    args = arguments("Decode speed at 80 % dropped, stock and plugin taking turns.")
    started = time.perf_counter()
    shape = Shape(hidden=512, layers=1 if args.quick else 2, heads=32, kv_heads=8, head_dim=128, mlp=1024, vocab=2048)
    batch, context = 4, 2048 if args.quick else 8192
    rounds, steps = (10, 6) if args.quick else (20, 6)
    new_tokens = (rounds + 1) * steps + 8
    longest = context + new_tokens + 32
    engines: dict[str, Engine] = {}
    prefill: dict[str, float] = {}
    with temporary_models(shape, KEEP, RANK) as folders:
        for name, folder in zip(("stock", "plugin"), folders, strict=True):
            engines[name] = Engine(
                folder, shape, blocks=batch * (longest // 32 + 2) + 8,
                max_model_len=longest, max_num_seqs=batch, max_num_batched_tokens=2048,
            )  # fmt: skip
            say(f"{name}: engine after {time.perf_counter() - started:.1f} s")
    for name, engine in engines.items():
        prefill[name] = build_context(engine, batch, context, new_tokens)
        say(f"{name}: {batch} x {context} tokens of context in {prefill[name]:.1f} s")
    held, dense = kept_bytes(engines["plugin"])
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name in sorted(engines, reverse=turn % 2 == 0):
            step = statistics.median(engines[name].step()[0] for _ in range(steps))
            if turn > 0:  # the first round warms up
                times[name].append(step)
    held_end, dense_end = kept_bytes(engines["plugin"])
    for engine in engines.values():
        engine.close()
    ratios = [a / b for a, b in zip(times["stock"], times["plugin"], strict=True)]
    ratio = statistics.median(ratios)
    weights = shape.weight_bytes
    ideal = (weights + dense) / (weights + held)
    result = {
        "benchmark": "decode",
        "kept": held_end / dense_end,
        "ratio": ratio,
        "ideal": ideal,
        "ratio_of_ideal": ratio / ideal,
        "targets": {"ratio": 2.0, "ratio_of_ideal": 0.7},
        "batch": batch,
        "context": context,
        "gate": {"method": "dcp", "rank": RANK, "target_keep": KEEP},
        "bytes_per_step": {"weights": weights, "stock_kv": dense, "plugin_kv_and_gate_keys": held},
        "step_ms": {name: 1000 * statistics.median(values) for name, values in times.items()},
        "tokens_per_s": {name: batch / statistics.median(values) for name, values in times.items()},
        "prefill_s": prefill,
        "repetitions": {"rounds": rounds, "steps_a_round": steps, "order": "alternating, median of a round's steps"},
        "spread": {"ratio": spread(ratios), **{f"{name}_step_s": spread(values) for name, values in times.items()}},
        **frame(args, shape, started),
    }
    say(f"kept {result['kept']:.3f}  ratio {ratio:.2f}  ideal {ideal:.2f}  ({ratio / ideal:.0%})  {result['step_ms']}")
    publish(args, result)


if __name__ == "__main__":
    main()
