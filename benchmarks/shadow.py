"""ShadowLLM against stock vLLM, in one process, taking turns: decode speed of the token form, memory of the request form.

    python benchmarks/shadow.py [--quick] [--json PATH]

Token form: one request, half of the KV groups and half of the neurons of every layer but the first, chosen anew for each
token by predictors with random weights, which cost what trained ones do. ``ratio`` is the median over rounds of stock's step
time over the plugin's, ``cpu_ratio`` that of processor times, for machines that others use too; ``ideal`` the ratio of the
bytes each step must read (weights, predictors; keys and values of the context are few here): the physical limit where memory
bounds the step. ``rows`` gives the same for two and four requests: two have the union of their rows read, four go by dense
products and save nothing.

Request form: blocks and bytes that a request holds before and after its prompt ends, half of the lanes of layers 1 and up
closed; ``ideal`` is what the open lanes alone would hold.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Engine, Shape, arguments, frame, kept_bytes, publish, say, spread, temporary_models

SHAPE = Shape(hidden=2048, layers=6, heads=16, kv_heads=8, head_dim=128, mlp=8192, vocab=4096)
HIDDEN = 128
CONTEXT, STEPS = 128, 4


def put_gates(folder: Path, shape: Shape, method: str, **params: Any) -> None:
    """Turn the folder's gates into random ones of a method."""
    from vllm_prune.checkpoint import add_gates
    from vllm_prune.config import DropGateConfig

    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    sizes = {"query_heads": shape.heads, "width": shape.heads * shape.head_dim, "hidden": HIDDEN}
    section = DropGateConfig(method=method, params={**sizes, **params}, num_layers=shape.layers,
                             num_kv_heads=shape.kv_heads, hidden_size=shape.hidden)  # fmt: skip
    add_gates(folder, section.build_gates(), {"params": section.params})


def step_bytes(shape: Shape) -> dict[str, int]:
    """Weights that a decode step of one request reads: of stock, of the token form at a half, of its predictors."""
    rows = (2 * shape.heads * shape.head_dim + 3 * shape.mlp) * shape.hidden  # Q, output, gate, up, down
    width = shape.heads * shape.head_dim
    predictors = HIDDEN * (2 * width + shape.layers * shape.heads + (shape.layers - 1) * shape.mlp)
    return {
        "stock": shape.weight_bytes,
        "plugin": shape.weight_bytes - 2 * (shape.layers - 1) * rows // 2 + 2 * predictors,
        "predictors": 2 * predictors,
    }


def steps(engine: Engine, spent: list[float]) -> float:
    """Median seconds of a round's steps; their processor seconds are noted: what counts where others share the machine."""
    wall, busy = [], []
    for _ in range(STEPS):
        begin = time.process_time()
        wall.append(engine.step()[0])
        busy.append(time.process_time() - begin)
    spent.append(statistics.median(busy))
    return statistics.median(wall)


def token_form(shape: Shape, rounds: int, batches: tuple[int, ...]) -> dict[str, Any]:
    """Decode steps of both engines, for each batch."""
    from overhead import take_turns

    found: dict[str, Any] = {}
    with temporary_models(shape, 1.0, 16) as (stock, plugin):
        half = {"closed": 0.5, "closed_neurons": 0.5}
        put_gates(plugin, shape, "shadow_token", neurons=shape.mlp, neuron_hidden=HIDDEN, **half)
        engines = {
            name: Engine(folder, shape, blocks=512, max_model_len=2048, max_num_seqs=max(batches),
                         max_num_batched_tokens=1024)
            for name, folder in (("stock", stock), ("plugin", plugin))
        }  # fmt: skip
        for batch in batches:
            for engine in engines.values():
                engine.add([CONTEXT] * batch, (rounds + 1) * STEPS + 2, tag=f"b{batch}-")
                engine.step()
            spent: dict[int, list[float]] = {id(engine): [] for engine in engines.values()}
            times = take_turns(engines, rounds, lambda engine, _: steps(engine, spent[id(engine)]))  # noqa: B023
            busy = {name: spent[id(engine)][1:] for name, engine in engines.items()}
            ratios, busy_ratios = ([a / b for a, b in zip(x["stock"], x["plugin"], strict=True)] for x in (times, busy))
            found[str(batch)] = {
                "ratio": statistics.median(ratios),
                "cpu_ratio": statistics.median(busy_ratios),
                "step_ms": {name: 1000 * statistics.median(values) for name, values in times.items()},
                "cpu_ms": {name: 1000 * statistics.median(values) for name, values in busy.items()},
                "spread": {"ratio": spread(ratios), "cpu_ratio": spread(busy_ratios)},
            }
            say(f"batch {batch}: {found[str(batch)]}")
            for engine in engines.values():
                engine.drain()
        for engine in engines.values():
            engine.close()
    return found


def request_form(shape: Shape, context: int) -> dict[str, Any]:
    """Blocks and bytes of one request around its prompt's end."""
    with temporary_models(shape, 1.0, 16) as (_, plugin):
        put_gates(plugin, shape, "shadow", closed=0.5)
        engine = Engine(plugin, shape, blocks=context // 32 + 16, max_model_len=context + 64, max_num_seqs=1,
                        max_num_batched_tokens=context // 4)  # fmt: skip
        engine.add([context], 16)
        blocks = []
        while not blocks or engine.scheduler.running:
            engine.step()
            logs = list(engine.scheduler.kv_cache_manager.coordinator.single_type_managers[0].grants.values())
            if not logs:
                break
            blocks.append(logs[0].live)
            peak = logs[0].peak
            if len(blocks) == 6:  # four chunks, two tokens
                held, dense = kept_bytes(engine)
        engine.drain()
        engine.close()
    lanes = shape.layers * shape.kv_heads
    closed = (shape.layers - 1) * shape.kv_heads // 2
    return {
        "context": context, "lanes": lanes, "lanes_closed": closed, "blocks_by_step": blocks[:8],
        "blocks": {"peak": peak, "after": blocks[5], "returned": peak - blocks[5]},
        "kv_bytes": {"dense": dense, "held": held}, "kept": held / dense, "ideal": 1 - closed / lanes,
    }  # fmt: skip


def main() -> None:
    args = arguments("ShadowLLM: decode speed of the token form, memory of the request form.")
    started = time.perf_counter()
    shape = replace(SHAPE, layers=3) if args.quick else SHAPE
    token = token_form(shape, 8 if args.quick else 24, (1,) if args.quick else (1, 2, 4))
    request = request_form(replace(shape, mlp=1024, layers=4), 1024 if args.quick else 4096)
    moved = step_bytes(shape)
    ideal = moved["stock"] / moved["plugin"]
    ratio, cpu_ratio = token["1"]["ratio"], token["1"]["cpu_ratio"]
    result = {
        "benchmark": "shadow",
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "ideal": ideal,
        "ratio_of_ideal": ratio / ideal,
        "targets": {"ratio": 1.2},
        "bytes_per_step": moved,
        "rows": token,
        "gate": {"closed": 0.5, "closed_neurons": 0.5, "hidden": HIDDEN},
        "request_form": request,
        "repetitions": {"steps_a_round": STEPS, "order": "alternating, median of a round's steps"},
        **{**frame(args, shape, started), "forced": "Random weights, random tokens, random predictors."},
    }
    say(f"token form: ratio {ratio:.2f} (cpu {cpu_ratio:.2f}), ideal {ideal:.2f}")
    say(f"request form: {request['blocks']}, kept {request['kept']:.3f}, ideal {request['ideal']:.3f}")
    publish(args, result)


if __name__ == "__main__":
    main()
