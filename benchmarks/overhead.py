"""What the plugin costs when it drops nothing: gates loaded at strength 0 against stock vLLM, taking turns.

    python benchmarks/overhead.py [--quick] [--json PATH]

A weight-bound shape (short context, small batch), where all of stock's time is matrices and any cost a layer shows.
``ratio`` is the median over rounds of stock's decode step time over the plugin's (1 is no overhead), ``prefill.ratio`` the
same for whole prompts; ``ideal`` is 1: the bytes are the same. Law 1 asks for at least 0.97 of both.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from common import Engine, Shape, arguments, frame, kept_bytes, publish, say, spread, temporary_models

QWEN3_0_6B = Shape(hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, mlp=3072, vocab=151936)
RANK = 16


def median_ratio(times: dict[str, list[float]]) -> float:
    return statistics.median(a / b for a, b in zip(times["stock"], times["plugin"], strict=True))


def take_turns(engines: dict[str, Engine], rounds: int, measure) -> dict[str, list[float]]:  # type: ignore[no-untyped-def]
    """Seconds of each engine and round; who goes first alternates, the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name in sorted(engines, reverse=turn % 2 == 0):
            seconds = measure(engines[name], turn)
            if turn > 0:
                times[name].append(seconds)
    return times


def main() -> None:
    args = arguments("Cost of gates at strength 0, stock and plugin taking turns.")
    started = time.perf_counter()
    shape = replace(QWEN3_0_6B, layers=8, vocab=8192) if args.quick else QWEN3_0_6B
    batch, context, prompt, steps = 4, 128, 256, 4
    decode_rounds, prefill_rounds = (30, 16) if args.quick else (40, 24)
    new_tokens = (decode_rounds + 1) * steps + 8
    engines: dict[str, Engine] = {}
    with temporary_models(shape, keep=0.2, rank=RANK, strength=0.0) as folders:
        for name, folder in zip(("stock", "plugin"), folders, strict=True):
            engines[name] = Engine(folder, shape, blocks=128, max_model_len=768, max_num_seqs=batch,
                                   max_num_batched_tokens=1024)  # fmt: skip
            say(f"{name}: engine after {time.perf_counter() - started:.1f} s")

    def prefill(engine: Engine, turn: int) -> float:
        engine.add([prompt], new_tokens=1, tag=f"p{turn}-")
        return engine.step()[0]

    def decode(engine: Engine, turn: int) -> float:
        return statistics.median(engine.step()[0] for _ in range(steps))

    prefills = take_turns(engines, prefill_rounds, prefill)
    for engine in engines.values():
        engine.add([context] * batch, new_tokens)
        engine.step()
    decodes = take_turns(engines, decode_rounds, decode)
    held, dense = kept_bytes(engines["plugin"])
    for engine in engines.values():
        engine.close()

    ratio, prefill_ratio = median_ratio(decodes), median_ratio(prefills)
    result = {
        "benchmark": "overhead",
        "kept": held / dense,
        "ratio": ratio,
        "ideal": 1.0,
        "prefill": {"ratio": prefill_ratio, "prompt": prompt,
                    "ms": {name: 1000 * statistics.median(values) for name, values in prefills.items()}},
        "decode": {"batch": batch, "context": context,
                   "step_ms": {name: 1000 * statistics.median(values) for name, values in decodes.items()}},
        "targets": {"ratio": 0.97, "prefill.ratio": 0.97},
        "gate": {"method": "dcp", "rank": RANK, "strength": 0.0},
        "repetitions": {"decode_rounds": decode_rounds, "steps_a_round": steps, "prefill_rounds": prefill_rounds,
                        "order": "alternating, median of a round's steps"},
        "spread": {
            "ratio": spread([a / b for a, b in zip(decodes["stock"], decodes["plugin"], strict=True)]),
            "prefill_ratio": spread([a / b for a, b in zip(prefills["stock"], prefills["plugin"], strict=True)]),
            **{f"{name}_step_s": spread(values) for name, values in decodes.items()},
            **{f"{name}_prefill_s": spread(values) for name, values in prefills.items()},
        },
        **frame(args, shape, started),
    }  # fmt: skip
    say(
        f"decode ratio {ratio:.3f} {result['decode']['step_ms']}  prefill ratio {prefill_ratio:.3f} {result['prefill']['ms']}"
    )
    publish(args, result)


if __name__ == "__main__":
    main()
