"""Preemption storms: requests that keep more than their checkpoint promised, against stock vLLM on the same trace and pool.

    python benchmarks/storm.py --json benchmarks/results/storm.json

Scheduling alone: vLLM's own scheduler, with the plugin's manager and connector or with stock's, and a worker that counts pages as
the lanes would and computes nothing. Admission plans with ``EXPECTED``; the requests keep what the case says. Time is modelled:
a step takes 1 and 1/256 a token. Every request must end; what a case makes of its computation is compared with stock's.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import arguments, origin, publish, say

LAYERS, KV_HEADS, HEAD_DIM, RANK = 36, 8, 128, 32
MAX_LEN, CHUNK, SEQS, EXPECTED = 2048, 256, 64, 0.2
ARRIVALS = 2
"""Requests a step until all have come: several times what can be served."""


@dataclass(frozen=True)
class Arrival:
    """One request: tokens of its prompt and answer, and the share of its keys that its gates will keep."""

    prompt: int
    answer: int
    kept: float


def trace(count: int, kept: Callable[[random.Random], float], seed: int = 0) -> list[Arrival]:
    """The same lengths whatever the shares."""
    lengths, shares = random.Random(seed), random.Random(seed + 1)
    return [
        Arrival(int(min(lengths.lognormvariate(5.6, 0.9), MAX_LEN - 200)) + 1, lengths.randint(8, 120), kept(shares))
        for _ in range(count)
    ]


@dataclass
class Life:
    """What the counting worker knows of a request: its epoch, its first block, its grants in log order (False: given up)."""

    epoch: int
    first_block: int
    grants: list[bool] = field(default_factory=list)


class CountingWorker:
    """Reports as ``LaneStore`` would if each lane kept the same share of its request's tokens.

    Args:
        spec: of the layers; blocks: of the pool.
        kept: share of its keys that each request keeps, by id.

    Attributes:
        begun: lives so far; doomed: first blocks of requests that can never go on, of the last step.
    """

    def __init__(self, spec: Any, blocks: int, kept: dict[str, float]) -> None:
        self.spec, self.blocks, self.kept = spec, blocks, kept
        self.max_tokens, self.chunk_tokens = MAX_LEN, CHUNK
        self.lives: dict[str, Life] = {}
        self.begun = 0
        self.doomed: set[int] = set()

    def step(self, meta: Any) -> Any:
        """The worker's part of a step: what it reports.

        Raises:
            RuntimeError: a request was granted less than it may need.
        """
        from vllm_prune.attention.step_state import StepState
        from vllm_prune.messages import PruneReports

        for name in meta.ended:
            self.lives.pop(name, None)
        reports, self.doomed = {}, set()
        for name, grant in meta.grants.items():
            life = self.lives.get(name)
            if life is None or life.epoch != grant.epoch:
                life = self.lives[name] = Life(grant.epoch, grant.new_blocks[0])
                self.begun += 1
            life.grants += [True] * len(grant.new_blocks)
            report = self._report(name, life, grant)
            if StepState.doomed(self, name, grant, report, self.blocks):  # type: ignore[arg-type]
                self.doomed.add(life.first_block)
            reports[name] = [report]
        return PruneReports(reports) if reports else None

    def _report(self, name: str, life: Life, grant: Any) -> Any:
        from vllm_prune.cache.grants import LaneReport

        g, (before, held) = self.spec.geometry, (
            round(self.kept[name] * tokens) for tokens in (grant.covered - grant.tokens, grant.covered)
        )  # fmt: skip
        if g.pages_for(before + grant.tokens) > sum(life.grants) * g.pages_per_block:
            raise RuntimeError(f"{name} may need more pages than it was granted")
        pages = [g.pages_for(held + more) for more in range(3)]
        ahead = grant.in_flight
        need = pages[ahead] if ahead < 3 else pages[0] + g.pages_for(ahead)
        live = [i for i, here in enumerate(life.grants) if here]
        blocks = max(g.blocks_for_pages(need), 1)
        for i in live[blocks:]:
            life.grants[i] = False
        keep = live[blocks - 1] + 1 if len(live) > blocks else len(life.grants)
        return LaneReport(
            grant.epoch, grant.covered, tuple(pages), keep, len(life.grants),
            dropped=g.num_layers * (grant.covered - held), held=g.num_layers * held, peak_pages=pages[0],
        )  # fmt: skip


@dataclass
class Outcome:
    """Of one trace: steps, modelled time, tokens computed and answered, preemptions, requests by how they ended."""

    steps: int = 0
    time: float = 0.0
    computed: int = 0
    answered: int = 0
    preemptions: int = 0
    running: int = 0
    ended: dict[str, int] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "modelled_time": round(self.time, 1), "tokens_computed": self.computed,
            "tokens_answered": self.answered, "preemptions": self.preemptions, "ended": self.ended,
            "answered_per_computed": round(self.answered / self.computed, 4),
            "answered_per_time": round(self.answered / self.time, 4),
            "running_mean": round(self.running / self.steps, 2),
        }  # fmt: skip


def run(scheduler: Any, arrivals: list[Arrival], worker: CountingWorker | None, most: int) -> Outcome:
    """Serve a trace to its end. ``worker``: None with stock's manager.

    Raises:
        RuntimeError: it has not ended after ``most`` steps.
    """
    from scheduling import request
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    out, left = Outcome(), _named(arrivals)
    known: dict[str, int] = {}
    waiting = True
    while waiting or scheduler.requests:
        if out.steps > most:
            raise RuntimeError(f"{len(scheduler.requests)} requests are still there after {most} steps")
        for _ in range(ARRIVALS):
            name, arrival = next(left, ("", None))
            waiting = arrival is not None
            if arrival is not None:
                scheduler.add_request(request(name, [3] * arrival.prompt, arrival.answer))
                known[name] = arrival.prompt
        step = scheduler.schedule()
        starts = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        cached = step.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled = [[3] if starts[n] + t == known[n] else [] for n, t in step.num_scheduled_tokens.items()]
        for name, tokens in zip(step.num_scheduled_tokens, sampled, strict=True):
            known[name] += len(tokens)
        told = None
        if worker is not None:
            meta = worker.step(step.kv_connector_metadata)
            told = KVConnectorOutput(kv_connector_worker_meta=meta, invalid_block_ids=worker.doomed)
        names = list(step.num_scheduled_tokens)
        index = {name: i for i, name in enumerate(names)}
        answer = scheduler.update_from_output(step, ModelRunnerOutput(names, index, sampled, kv_connector_output=told))
        out.steps += 1
        out.computed += step.total_num_scheduled_tokens
        out.time += 1 + step.total_num_scheduled_tokens / 256
        out.answered += sum(map(len, sampled))
        out.preemptions += len(step.preempted_req_ids or ())
        out.running += len(names)
        for output in answer[0].outputs if 0 in answer else ():
            if output.finish_reason is not None:
                out.ended[str(output.finish_reason)] = out.ended.get(str(output.finish_reason), 0) + 1
    pool = scheduler.kv_cache_manager.block_pool
    if pool.get_num_free_blocks() != pool.num_gpu_blocks - 1:
        raise RuntimeError("blocks are lost")
    return out


def _named(arrivals: list[Arrival]) -> Iterator[tuple[str, Arrival]]:
    return ((f"r{i}", arrival) for i, arrival in enumerate(arrivals))


def schedulers(folder: Path, blocks: int, gated: bool, late: bool = False) -> tuple[Any, Any]:
    """vLLM's scheduler over a pool of ``blocks`` blocks, and the spec of its layers: the plugin's or stock's. ``late``: its
    asynchronous one."""
    import torch
    from scheduling import cache_of, configuration, scheduler, write_model
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_prune.cache.spec import PruneSpec
    from vllm_prune.gates import DCPGate, GateShape

    shape = GateShape(16, KV_HEADS, LAYERS)
    gates = [DCPGate(shape, rank=RANK) for _ in range(LAYERS)] if gated else []
    section = {"params": {"rank": RANK}, "expected_keep": EXPECTED}
    write_model(folder, LAYERS, 2 * KV_HEADS, KV_HEADS, HEAD_DIM, gates, section)
    config = configuration(folder, MAX_LEN, max_num_seqs=SEQS, max_num_batched_tokens=CHUNK)
    config.scheduler_config.async_scheduling = late  # on CPU vLLM switches it off
    sizes: dict[str, Any] = {"block_size": 32, "num_kv_heads": KV_HEADS, "head_size": HEAD_DIM, "dtype": torch.float32}
    spec: Any = FullAttentionSpec(**sizes)
    if gated:
        spec = PruneSpec(
            **sizes, num_layers=LAYERS, gate_rank=RANK, gate_lanes=1, chunk_tokens=CHUNK, expected_keep=EXPECTED
        )
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
    return scheduler(config, cache_of(names, spec, blocks)), spec


def outcome(arrivals: list[Arrival], blocks: int, gated: bool, learn: bool = True) -> Outcome:
    """Of a trace, with the plugin or with stock vLLM. ``learn``: whether admission corrects the promise."""
    with tempfile.TemporaryDirectory() as folder:
        made, spec = schedulers(Path(folder), blocks, gated)
        if gated and not learn:
            (manager,) = made.kv_cache_manager.coordinator.single_type_managers
            manager.promise.learn = lambda report, keep: None
        kept = {name: arrival.kept for name, arrival in _named(arrivals)}
        worker = CountingWorker(spec, blocks, kept) if gated else None
        return run(made, arrivals, worker, most=200 * len(arrivals))


CASES: dict[str, Callable[[random.Random], float]] = {
    "as promised": lambda shares: EXPECTED,
    "some more": lambda shares: shares.uniform(EXPECTED, 1.0),
    "half": lambda shares: 0.5,
    "everything": lambda shares: 1.0,
}
"""What requests keep."""
UNCORRECTED = "everything, promise not corrected"


def main() -> None:
    args = arguments("Preemption storms, by simulation.")
    started = time.perf_counter()
    count, blocks = (150, 101) if args.quick else (1000, 201)
    found: dict[str, Any] = {}
    stock = outcome(trace(count, CASES["everything"]), blocks, gated=False).told()
    say("stock", stock)
    for name, kept, learn in (
        *((name, kept, True) for name, kept in CASES.items()),
        (UNCORRECTED, CASES["everything"], False),
    ):
        told = outcome(trace(count, kept), blocks, True, learn).told()
        told["of_stock"] = {
            key: round(told[key] / stock[key], 3) for key in ("answered_per_computed", "answered_per_time")
        }
        found[name] = told
        say(name, told)
    publish(args, {
        "requests": count, "pool_blocks": blocks, "max_num_batched_tokens": CHUNK, "max_num_seqs": SEQS,
        "max_model_len": MAX_LEN, "expected_keep": EXPECTED, "arrivals_per_step": ARRIVALS,
        "stock": stock, "cases": found, **origin(args.threads, started),
    })  # fmt: skip


if __name__ == "__main__":
    main()
