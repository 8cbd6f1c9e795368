"""Many requests at once with one system prompt, in a pool that holds few of them: how many run together, and tokens a second.

    python benchmarks/sharing.py [--quick] [--json PATH]

Stock vLLM shares the prompt's blocks, densely. Of the plugin's gates, each keeping 20 % of the keys, ``random`` (per KV head,
settled once decided, as DMS's keys are) shares the thinned prompt's pages; ``dcp`` gives each request a copy of its own. The
prompt is held before anybody comes; engines of one process take turns on equal pools; requests are counted after each step.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from common import Engine, arguments, frame, publish, say, spread, temporary_models
from prefix import KEEP, RANK, SHAPE, ask, drawn

DELAY, SAID, ANSWER = 16, 64, 64


def crowd(engine: Engine, system: list[int], people: int, turn: int) -> tuple[float, int, int]:
    """``people`` come at once: seconds until all are answered, most that ran together, preemptions."""
    from vllm import SamplingParams

    rng, most = random.Random(turn), 0
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
    for i in range(people):
        engine.llm.llm_engine.add_request(f"c{turn}_{i:04d}", {"prompt_token_ids": system + drawn(rng, SAID)}, params)
    waiting = list(engine.scheduler.requests.values())
    begin = time.perf_counter()
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        most = max(most, len(engine.scheduler.running))
    thrown = sum(request.num_preemptions for request in waiting)
    return time.perf_counter() - begin, most, thrown


def main() -> None:
    args = arguments("Requests with one system prompt, at once, in a pool for few.")
    from vllm_prune_training.baseline_gates import make_baseline

    started = time.perf_counter()
    length, people, rounds = (1024, 24, 2) if args.quick else (2048, 64, 5)
    blocks = length // 32 * 3
    options = {"max_model_len": length + SAID + ANSWER + 32, "max_num_seqs": people, "max_num_batched_tokens": 512,
               "enable_prefix_caching": True}  # fmt: skip
    found: dict[str, Any] = {}
    with temporary_models(SHAPE, KEEP, RANK) as (base, dcp):
        drop = make_baseline(base, base.with_name("random"), "random", {"keep": KEEP, "delay": DELAY})
        engines = {name: Engine(folder, SHAPE, blocks, **options)
                   for name, folder in (("stock", base), ("random", drop), ("dcp", dcp))}  # fmt: skip
        runs: dict[str, list[tuple[float, int, int]]] = {name: [] for name in engines}
        for turn in range(rounds):
            system = drawn(random.Random(100 + turn), length)
            for name, engine in engines.items():
                ask(engine, [[*system, 5, 6, 7]], 1, f"s{turn}")
                runs[name].append(crowd(engine, system, people, turn))
        for engine in engines.values():
            engine.close()
    tokens = people * (length + SAID + ANSWER)
    for name, each in runs.items():
        speeds = [tokens / seconds for seconds, _, _ in each]
        found[name] = {"at_work": statistics.median(most for _, most, _ in each), "preemptions": sum(x for *_, x in each),
                       "tokens_per_second": statistics.median(speeds), "spread": spread(speeds)}  # fmt: skip
    over = {
        f"{name}_{figure}_over_stock": found[name][figure] / found["stock"][figure]
        for name in ("random", "dcp")
        for figure in ("at_work", "tokens_per_second")
    }
    say({key: round(value, 3) for key, value in over.items()})
    publish(args, {
        "benchmark": "sharing", **over, "system_prompt": length, "people": people, "said": SAID, "answer": ANSWER,
        "pool_blocks": blocks, "rounds": rounds, "keep": KEEP, "random_delay": DELAY, "dcp_rank": RANK, **found,
        **frame(args, SHAPE, started),
    })  # fmt: skip


if __name__ == "__main__":
    main()
