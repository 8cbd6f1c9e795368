"""``vllm bench serve`` (random dataset, all requests at once) against two servers: stock vLLM and gates that drop 80 %.

    python benchmarks/serve.py [--quick] [--json PATH]

Both run on the same machine with the same options and the same pool and are asked in turns; ``ratio`` is the median over rounds
of the plugin's output tokens a second over stock's. Once with a pool for three of the requests, once with room for all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, Shape, arguments, frame, publish, say, spread, temporary_models

RANK = 16
KEEP = 0.2
SHAPE = Shape(hidden=512, layers=2, heads=32, kv_heads=8, head_dim=128, mlp=1024, vocab=4096)
VLLM = str(Path(sys.executable).with_name("vllm"))
READY_SECONDS = 300


def environment() -> dict[str, str]:
    """A server's: its engine in a process of its own."""
    return {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@contextmanager
def server(folder: Path, memory: int, longest: int, most: int) -> Iterator[str]:
    """A running ``vllm serve``; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [
        VLLM, "serve", str(folder), "--served-model-name", "bench", "--host", "127.0.0.1", "--port", port,
        "--max-model-len", str(longest), "--max-num-seqs", str(most), "--kv-cache-memory-bytes", str(memory),
        "--enforce-eager", "--no-enable-prefix-caching", "--block-size", "32", "--max-num-batched-tokens", "2048",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        try:
            end = time.monotonic() + READY_SECONDS
            while not answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start:\n{log.read().decode()[-3000:]}")
                time.sleep(0.5)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def ask(port: str, folder: Path, requests: int, prompt: int, new_tokens: int, seed: int) -> dict[str, Any]:
    """What ``vllm bench serve`` says."""
    with tempfile.TemporaryDirectory() as results:
        command = [
            VLLM, "bench", "serve", "--backend", "openai", "--base-url", f"http://127.0.0.1:{port}", "--endpoint",
            "/v1/completions", "--model", "bench", "--tokenizer", str(folder), "--dataset-name", "random",
            "--random-input-len", str(prompt), "--random-output-len", str(new_tokens), "--num-prompts", str(requests),
            "--request-rate", "inf", "--ignore-eos", "--temperature", "1", "--seed", str(seed), "--disable-tqdm", "--save-result",
            "--result-dir", results, "--result-filename", "found.json",
        ]  # fmt: skip
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"vllm bench serve failed:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads((Path(results) / "found.json").read_text())
    names = ("completed", "duration", "output_throughput", "total_token_throughput", "mean_ttft_ms", "mean_tpot_ms")
    return {name: found[name] for name in names}


def main() -> None:
    args = arguments("vllm bench serve against stock and gated servers of the same pool.")
    started = time.perf_counter()
    requests, prompt, new_tokens, rounds = (8, 1024, 64, 1) if args.quick else (16, 2048, 256, 3)
    longest = prompt + new_tokens + 32
    dense = -(-longest // 32) * 32 * SHAPE.kv_bytes
    result: dict[str, Any] = {"benchmark": "serve", "requests": requests, "prompt": prompt, "new_tokens": new_tokens}
    with temporary_models(SHAPE, KEEP, RANK) as folders:
        for folder in folders:  # a tokenizer of as many tokens
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ROOT / "examples" / "reference-dcp" / name, folder)
        for name, hold in (("scarce", 3), ("ample", requests + 1)):
            found: dict[str, list[dict[str, Any]]] = {"stock": [], "plugin": []}
            with ExitStack() as stack:
                ports = [stack.enter_context(server(folder, hold * dense, longest, requests)) for folder in folders]
                both = list(zip(("stock", "plugin"), folders, ports, strict=True))
                for _, folder, port in both:  # warm
                    ask(port, folder, 2, prompt, 8, seed=99)
                for turn in range(rounds):
                    for who, folder, port in both if turn % 2 == 0 else both[::-1]:
                        found[who].append(ask(port, folder, requests, prompt, new_tokens, seed=turn))
                        say(name, who, found[who][-1])
            pairs = zip(found["plugin"], found["stock"], strict=True)
            ratios = [mine["output_throughput"] / theirs["output_throughput"] for mine, theirs in pairs]
            result[name] = {"pool_holds": hold, "ratio": statistics.median(ratios), "ratios": spread(ratios), **found}
            say(name, result[name]["ratio"])
    publish(args, {**result, "targets": {"scarce": 1.5, "ample": 0.97},
                   "gate": {"method": "dcp", "rank": RANK, "target_keep": KEEP}, **frame(args, SHAPE, started)})  # fmt: skip


if __name__ == "__main__":
    main()
