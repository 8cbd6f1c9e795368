"""How many requests run at once in the same memory, 80 % of the keys dropped, against stock vLLM.

    python benchmarks/capacity.py [--quick] [--json PATH]

Both engines get the same block pool and a queue of equal requests, twice what they can hold by their bytes. ``ratio`` is the
plugin's steady mean of running requests over stock's (steady: from the first peak until the queue is empty);
``ideal`` is 1 / ``kept``, and ``kept`` the bytes of keys, values and gate keys held over those of dense keys and values.
Then one prompt longer than the whole pool: stock refuses to start with such a context, the plugin serves it.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from common import Engine, Shape, arguments, frame, kept_bytes, publish, say, spread, temporary_models

RANK = 16
KEEP = 0.2
SHAPE = Shape(hidden=256, layers=4, heads=8, kv_heads=4, head_dim=64, mlp=512, vocab=2048)


def fill(engine: Engine, requests: int, prompt: int, new_tokens: int, gated: bool) -> dict[str, Any]:
    """Serve a queue of equal requests, watching the scheduler after every step."""
    engine.add([prompt] * requests, new_tokens)
    running: list[int] = []
    free: list[int] = []
    held: list[int] = []
    dense: list[int] = []
    preemptions: dict[str, int] = {}
    truths: list[dict[str, Any]] = []
    finished = steps = 0
    begin = time.perf_counter()
    while engine.llm.llm_engine.has_unfinished_requests():
        _, outputs = engine.step()
        steps += 1
        for request in engine.scheduler.requests.values():
            preemptions[request.request_id] = request.num_preemptions
        if engine.scheduler.waiting:
            running.append(len(engine.scheduler.running))
            free.append(engine.pool.get_num_free_blocks())
            now = kept_bytes(engine) if gated else (0, 0)
            held.append(now[0])
            dense.append(now[1])
        done = [output for output in outputs if output.finished]
        finished += len(done)
        truths += [output.kv_transfer_params["vllm_prune"] for output in done if gated]
    full = running.index(max(running))
    running, free = running[full:], free[full:]
    result: dict[str, Any] = {
        "requests": requests,
        "finished": finished,
        "steps": steps,
        "seconds": time.perf_counter() - begin,
        "running_mean": statistics.mean(running),
        "running_peak": max(running),
        "steady_steps": len(running),
        "running": spread([float(n) for n in running]),
        "free_blocks": spread([float(n) for n in free]),
        "preemptions": sum(preemptions.values()),
        "pool_whole_at_end": engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1,
    }
    if gated:
        keys = statistics.mean(t["kept_fraction"] for t in truths)
        mean = {
            name: statistics.mean(t[name] for t in truths) for name in ("blocks_held", "blocks_peak", "blocks_dense")
        }
        per_key = 2 * SHAPE.kv_heads * SHAPE.head_dim
        result["truth"] = {"keys_kept": keys, "bytes_kept": keys * (per_key + RANK) / per_key, **mean}
        result["lanes"] = {"bytes_kept": sum(held[full:]) / sum(dense[full:])}
    return result


def beyond_the_pool(folders: tuple[Path, Path], blocks: int) -> dict[str, Any]:
    """A prompt 2.5 times the pool: stock's refusal, and the plugin's account of the served request."""
    prompt = blocks * 32 * 5 // 2
    options = {"max_model_len": prompt + 64, "max_num_seqs": 4, "max_num_batched_tokens": 512}
    found: dict[str, Any] = {"pool_blocks": blocks, "pool_tokens": blocks * 32, "prompt": prompt}
    try:
        Engine(folders[0], SHAPE, blocks, **options).close()
        found["stock"] = "started"
    except ValueError as error:
        found["stock"] = f"refused to start: {error}"
    engine = Engine(folders[1], SHAPE, blocks, **options)
    engine.add([prompt], new_tokens=32, tag="long")
    begin = time.perf_counter()
    (output,) = engine.drain()
    found["plugin"] = {
        "finish_reason": output.outputs[0].finish_reason,
        "new_tokens": len(output.outputs[0].token_ids),
        "seconds": time.perf_counter() - begin,
        **output.kv_transfer_params["vllm_prune"],
    }
    engine.close()
    return found


def main() -> None:
    args = arguments("Requests running at once in the same pool, stock and plugin.")
    started = time.perf_counter()
    dense_requests, prompt, new_tokens, budget = (8, 1536, 96, 1024) if args.quick else (16, 2048, 128, 2048)
    blocks = dense_requests * -(-(prompt + new_tokens) // 32) + 1  # vLLM keeps block 0 for itself
    result: dict[str, Any] = {"benchmark": "capacity"}
    with temporary_models(SHAPE, KEEP, RANK) as folders:
        for name, folder, most in (
            ("stock", folders[0], dense_requests),
            ("plugin", folders[1], dense_requests / KEEP),
        ):
            engine = Engine(folder, SHAPE, blocks, max_model_len=prompt + new_tokens, max_num_seqs=256,
                            max_num_batched_tokens=budget)  # fmt: skip
            say(f"{name}: engine after {time.perf_counter() - started:.1f} s, {engine.pool.num_gpu_blocks} blocks")
            result[name] = fill(engine, int(2 * most), prompt, new_tokens, gated=name == "plugin")
            engine.close()
            say({key: value for key, value in result[name].items() if not isinstance(value, list)})
        result["prompt_longer_than_pool"] = beyond_the_pool(folders, 64 if args.quick else 256)
        say(result["prompt_longer_than_pool"])
    kept = result["plugin"]["lanes"]["bytes_kept"]
    ratio = result["plugin"]["running_mean"] / result["stock"]["running_mean"]
    result = {
        "kept": kept,
        "ratio": ratio,
        "peak_ratio": result["plugin"]["running_peak"] / result["stock"]["running_peak"],
        "ideal": 1 / kept,
        "ratio_of_ideal": ratio * kept,
        "targets": {"ratio_of_ideal": 0.85},
        "pool_blocks": blocks,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "max_num_batched_tokens": budget,
        "gate": {"method": "dcp", "rank": RANK, "target_keep": KEEP, "expected_keep": KEEP},
        "repetitions": {"runs": 1, "note": "counts, not times: a run repeats exactly but for sampled tokens"},
        "spread": {name: result[name]["running"] for name in ("stock", "plugin")},
        **result,
        **frame(args, SHAPE, started),
    }
    say(f"kept {kept:.3f}  ratio {ratio:.2f}  ideal {1 / kept:.2f}  ({ratio * kept:.0%})")
    publish(args, result)


if __name__ == "__main__":
    main()
