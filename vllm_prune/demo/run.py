"""One engine run of the demo, in a process of its own: ``python -m vllm_prune.demo.run JOB.json RESULT.json``.

Scheduler, worker and plugin all live in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``, see ``launch``), so that
the block pool and the record of drops can be read directly. Works on token ids only; the parent has the tokenizer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 32


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        model: folder of the gated checkpoint.
        prompt: token ids.
        new_tokens: to generate, whatever the model says about ending.
        evict: gates as trained; otherwise open (strength 0), which keeps every key.
        max_model_len: of the engine, in tokens.
        pool_bytes: of the KV cache.
        chunk_tokens: most prompt tokens in one step.
        repetition_penalty: of the greedy sampling; 1 is none.
        repeats: times the same request runs; the fastest counts.
    """

    model: str
    prompt: list[int]
    new_tokens: int
    evict: bool
    max_model_len: int
    pool_bytes: int
    chunk_tokens: int
    repetition_penalty: float
    repeats: int

    def engine_args(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``; the same for both runs but for the gates."""
        options = {"record": True} if self.evict else {"strength": 0}
        return {
            "model": self.model, "max_model_len": self.max_model_len, "max_num_seqs": 1, "block_size": BLOCK_TOKENS,
            "kv_cache_memory_bytes": self.pool_bytes, "max_num_batched_tokens": self.chunk_tokens, "seed": 0,
            "enforce_eager": True, "skip_tokenizer_init": True, "disable_log_stats": True,
            "enable_prefix_caching": False,  # the same prompt comes again and again
            "additional_config": {"vllm_prune": options},
        }  # fmt: skip


@dataclass
class Result:
    """What a run measured. Times in seconds, blocks as vLLM's pool counts them.

    Attributes:
        token_ids: generated.
        prefill_seconds: of each repeat, from the request's arrival to its first token.
        decode_seconds: of each repeat, from the first token to the last.
        peak_blocks: most blocks out of the pool at any sample.
        pool_blocks: blocks of the pool.
        timeline: (tokens computed, blocks held) after each step.
        summary: the plugin's per-request numbers from the response.
        expiry: [L][E][T] recorded expiry of each key of the T tokens computed, NEVER where none; None with open gates.
    """

    token_ids: list[int]
    prefill_seconds: list[float]
    decode_seconds: list[float]
    peak_blocks: int
    pool_blocks: int
    timeline: list[tuple[int, int]]
    summary: dict[str, Any]
    expiry: list[list[list[int]]] | None


class PoolWatch:
    """Samples the blocks in use in vLLM's own pool: right after each step is scheduled, when its blocks have just been
    granted and nothing of it is freed yet, and after each step. The peak is over both."""

    def __init__(self, scheduler: Any) -> None:
        self.pool = scheduler.kv_cache_manager.block_pool
        self.peak = 0
        schedule: Callable[..., Any] = scheduler.schedule

        def sampled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.sample()
            return output

        scheduler.schedule = sampled  # on this one object, in the demo's own process

    def sample(self) -> int:
        used = self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()  # block 0 is vLLM's null block
        self.peak = max(self.peak, used)
        return used


@dataclass
class Pass:
    """One repeat: the finished request's output, its id inside the engine, times in seconds, blocks held by tokens."""

    output: Any
    request_id: str
    prefill: float
    decode: float
    timeline: list[tuple[int, int]]


def run_once(engine: Any, scheduler: Any, watch: PoolWatch, job: Job, name: str) -> Pass:
    """Step the engine until the one request is done."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=job.new_tokens, ignore_eos=True, detokenize=False,
        repetition_penalty=job.repetition_penalty,
    )  # fmt: skip
    computed = len(job.prompt) + job.new_tokens - 1  # the last token is never fed back
    timeline = [(0, 0)]
    started = time.perf_counter()
    first = None
    engine.add_request(name, {"prompt_token_ids": job.prompt}, params)
    (request,) = scheduler.requests.values()
    while True:
        outputs = engine.step()
        now = time.perf_counter()
        held = watch.sample()
        if outputs and first is None:
            first = now
        for output in outputs:
            if output.finished:
                assert first is not None
                return Pass(output, request.request_id, first - started, now - first, timeline)
        timeline.append((min(request.num_computed_tokens, computed), held))


def execute(job: Job) -> Result:
    """Load the engine and run the job.

    Raises:
        PruneError: the checkpoint or its configuration is refused.
        RuntimeError: repeats of the same greedy request differ, or help each other, or the engine ended one early.
    """
    from vllm import LLM

    llm = LLM(**job.engine_args())
    client: Any = llm.llm_engine.engine_core
    core = client.engine_core  # in this process
    watch = PoolWatch(core.scheduler)
    passes = [run_once(llm.llm_engine, core.scheduler, watch, job, f"demo-{i}") for i in range(job.repeats)]
    if any(each.output.num_cached_tokens for each in passes):
        raise RuntimeError("a run took its prompt's beginning from another: nothing would be measured")
    texts = {tuple(each.output.outputs[0].token_ids) for each in passes}
    if len(texts) != 1 or len(passes[-1].output.outputs[0].token_ids) != job.new_tokens:
        lengths = sorted(map(len, texts))
        raise RuntimeError(f"{job.repeats} runs of one greedy request gave {len(texts)} texts of {lengths} tokens")
    last = passes[-1]
    return Result(
        token_ids=list(last.output.outputs[0].token_ids),
        prefill_seconds=[each.prefill for each in passes],
        decode_seconds=[each.decode for each in passes],
        peak_blocks=watch.peak,
        pool_blocks=watch.pool.num_gpu_blocks - 1,
        timeline=last.timeline,
        summary=dict((last.output.kv_transfer_params or {}).get("vllm_prune", {})),
        expiry=_expiry(core, last.request_id, len(job.prompt) + job.new_tokens - 1) if job.evict else None,
    )


def _expiry(core: Any, request_id: str, tokens: int) -> list[list[list[int]]]:
    """The record of drops; must be read before another step, which ends the request on the worker."""
    from vllm_prune.attention.step_state import find_state

    runner = core.model_executor.driver_worker.worker.model_runner
    store = find_state(runner.vllm_config).store
    assert store is not None
    return store.expiries(request_id, tokens).tolist()


def main() -> None:
    job_path, result_path = map(Path, sys.argv[1:3])
    job = Job(**json.loads(job_path.read_text(encoding="utf-8")))
    result = execute(job)
    result_path.write_text(json.dumps(asdict(result), separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
