"""Mixed load for minutes, on whatever device there is: does the pool stay whole, and does memory stay what it was?

Requests of random lengths come at random and some are aborted; the pool is too small for them, so that vLLM preempts, and now and
then everything is preempted at once. Every other prompt begins as others do, and prefixes are held. From time to time the engine
runs dry: then every block must be free, and what the process and the device hold is noted. A sample of requests is repeated
alone and from its first token at the end, and must have dropped the same keys.

    python tests/gpu/soak.py [--minutes 30] [--method dcp] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import flow

METHODS = {**flow.METHODS, "stock": {}}
"""``stock``: the same without gates, to compare memory with."""
LONGEST = 960


class Load:
    """Requests that come and go. ``rng``: all that is random; ``core``: vLLM's ``LLMEngine``."""

    def __init__(self, core: Any, rng: random.Random, vocab: int) -> None:
        self.core, self.rng, self.vocab = core, rng, vocab
        self.running: dict[str, int] = {}
        self.done = self.aborted = self.tokens = self.steps = self.dropped = self.number = self.cached = 0
        self.beginnings: list[list[int]] = []
        self.sample: list[Any] = []

    def arrive(self) -> None:
        from mixed_load import draw_lengths, draw_prompt, draw_tokens
        from vllm import SamplingParams

        length, most = draw_lengths(self.rng, LONGEST)
        if self.number % 50 == 0:
            first = draw_tokens(self.rng, 400, self.vocab)
            self.beginnings = [first, first[:150] + draw_tokens(self.rng, 300, self.vocab)]
        ids = draw_prompt(self.rng, length, self.vocab, self.beginnings)
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
        name, self.number = f"r{self.number}", self.number + 1
        self.core.add_request(name, {"prompt_token_ids": ids}, params)
        self.running[name] = most

    def step(self) -> None:
        self.steps += 1
        for output in self.core.step():
            if not output.finished or output.request_id not in self.running:
                continue
            wanted = self.running.pop(output.request_id)
            found = len(output.outputs[0].token_ids)
            assert found == wanted, f"{output.request_id} ended after {found} of {wanted} tokens"
            self.done += 1
            self.tokens += found
            self.cached += output.num_cached_tokens
            told = (output.kv_transfer_params or {}).get("vllm_prune")
            self.dropped += told["keys_dropped"] if told else 0
            if told and found > 1 and len(self.sample) < 12 and self.rng.random() < 0.1:
                self.sample.append(output)

    def abort(self) -> None:
        name = self.rng.choice(sorted(self.running))
        self.core.abort_request([name])
        del self.running[name]
        self.aborted += 1

    def run_dry(self) -> None:
        while self.core.has_unfinished_requests():
            self.step()
        assert not self.running, f"never answered: {sorted(self.running)}"


def device_bytes() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def process_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def soak(seconds: float, method: str, seed: int, spells: int = 20) -> dict[str, Any]:
    """Load for about ``seconds`` in ``spells``, after each of which everything must be free. Returns what was counted."""
    import torch
    from support import (
        VOCAB,
        count_preemptions,
        engine,
        generate,
        pool_is_whole,
        prompts,
        save_base,
        save_gated,
        scheduler_of,
        tiny_config,
        token_ids,
    )
    from vllm import SamplingParams

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config("qwen3", layers=2)
        if method == "stock":
            model = save_base(Path(folder), config, torch.float32)
        else:
            model = save_gated(Path(folder), config, method.removesuffix("_kv_head"), torch.float32, **METHODS[method])
        eager = not torch.cuda.is_available()
        with engine(model, enforce_eager=eager, max_num_batched_tokens=256, kv_cache_memory_bytes=6 << 20,
                    enable_prefix_caching=True) as llm:  # fmt: skip
            load = Load(llm.llm_engine, rng, VOCAB)
            preempted = count_preemptions(llm)
            held = []
            for spell in range(spells):
                end = time.monotonic() + seconds / spells
                while time.monotonic() < end:
                    if len(load.running) < 40 and rng.random() < 0.25:
                        load.arrive()
                    if load.running and rng.random() < 0.01:
                        load.abort()
                    if rng.random() < 0.002:
                        scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
                    if load.running:
                        load.step()
                load.run_dry()
                generate(llm, prompts([3]), tokens=2)  # the last ones are buried by a step
                assert pool_is_whole(llm), f"spell {spell}: blocks are missing"
                held.append({"process": process_bytes(), "device": device_bytes()})
            for output in load.sample:
                anew = SamplingParams(temperature=0, max_tokens=len(output.outputs[0].token_ids), ignore_eos=True,
                                      detokenize=False, skip_reading_prefix_cache=True)  # fmt: skip
                again = llm.generate([{"prompt_token_ids": output.prompt_token_ids}], anew, use_tqdm=False)
                first, second = (o.kv_transfer_params["vllm_prune"]["keys_dropped"] for o in (output, again[0]))
                if token_ids(again) == token_ids([output]):
                    assert first == second, f"{output.request_id}: {first} keys dropped under load, {second} alone"
            blocks = scheduler_of(llm).kv_cache_manager.block_pool.num_gpu_blocks
    return {
        "method": method, "seed": seed, "blocks": blocks, "steps": load.steps, "ended": load.done,
        "aborted": load.aborted, "preempted": preempted(), "tokens": load.tokens, "keys_dropped": load.dropped,
        "cached_tokens": load.cached,
        "repeated": len(load.sample), "held": held,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixed load for minutes.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--method", choices=sorted(METHODS), default="dcp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "tests"), str(root / "benchmarks")]
    from common import environment, origin

    environment(1)
    begin = time.perf_counter()
    found = {**soak(args.minutes * 60, args.method, args.seed), **origin(1, begin)}
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
