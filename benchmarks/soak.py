"""Mixed load against a live server for minutes or hours: is anything lost, is the pool whole, does memory stay what it was?

Requests of all lengths come at random, streamed and not, with gates at mixed strengths; clients leave before the first token and
midway; one in a hundred asks for what it cannot have, and must be told so. The pool is too small for them, so that vLLM preempts.
The load comes in spells. After each one nothing may be held, and every request that finished in it is compared with a run of the
same request alone, on the same server: tokens, keys dropped, and the query that ended each key's life in each layer. Prefix
caching is on, every other prompt begins as others do, and the run alone computes all of its prompt. Where rounding may have
decided (``rounding.py``) is counted apart. Ends with an error where anything is wrong.

    python benchmarks/soak.py [--minutes 3] [--method dcp] [--seed 0] [--json PATH]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests" / "gpu"), str(ROOT / "training")]

from common import environment, origin, say  # noqa: E402

environment(1)

import flow  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from mixed_load import draw_tokens  # noqa: E402
from rounding import NEAR, TIE, Judge, Run, first_token  # noqa: E402
from serving import Server, serving  # noqa: E402
from soak_client import Answer, Asked, Clients  # noqa: E402
from support import VOCAB, save_base, save_gated, tiny_config  # noqa: E402
from vllm_prune_training.tokenizer import train_tokenizer  # noqa: E402

from vllm_prune.lifetimes import unpack  # noqa: E402

METHODS = {**flow.METHODS, "stock": {}}
"""``stock``: vLLM without gates, to compare memory with."""
LONGEST = 960
POOL = "3M"
RATE = 12.0
"""Requests a second, on average, while fewer than ``soak_client.RUNNING`` are under way."""
SPELL_SECONDS, DISTINCT = 60.0, 40
"""Of load in a spell, and requests of its catalogue: each is run alone once, and under load several times."""
HITS = "vllm:prefix_cache_hits_total"
"""Prompt tokens that requests did not compute."""
FAULT = re.compile(r"\b(ERROR|CRITICAL) \d\d-\d\d |Traceback \(most recent call last\)")


def make_model(folder: Path, method: str) -> Path:
    config = tiny_config("qwen3", layers=2)
    if method == "stock":
        save_base(folder, config, torch.float32)
    else:
        save_gated(folder, config, method.removesuffix("_kv_head"), torch.float32, **METHODS[method])
    train_tokenizer(["one two"], VOCAB).save_pretrained(folder)
    return folder


class Memory:
    """Resident bytes of each process of a server over time."""

    def __init__(self, server: Server) -> None:
        first = psutil.Process(server.process.pid)
        self.processes = {self._name(p): p for p in (first, *first.children(recursive=True)) if self._name(p)}
        self.seen: dict[str, list[tuple[float, int]]] = {name: [] for name in self.processes}
        self.began = time.monotonic()

    @staticmethod
    def _name(process: psutil.Process) -> str:
        """vLLM names its processes; what Python starts beside them is none of these."""
        words = process.cmdline()
        found = re.search(r"VLLM::(\w+)", words[0] if words else "")
        return found[1] if found else "APIServer" if "serve" in words else ""

    async def watch(self, every: float) -> None:
        while True:
            self.note()
            await asyncio.sleep(every)

    def note(self) -> None:
        for name, process in self.processes.items():
            self.seen[name].append((time.monotonic() - self.began, process.memory_info().rss))

    def told(self) -> dict[str, Any]:
        """By process: bytes at the begin and the end, the slope over the second half by least squares, and 25 points at most."""
        found = {}
        for name, points in self.seen.items():
            late = points[len(points) // 2 :]
            slope = statistics.linear_regression(*zip(*late, strict=True)).slope * 60.0 if len(late) > 1 else 0.0
            some = points[:: -(-len(points) // 25)]
            found[name] = {
                "first_bytes": points[0][1], "last_bytes": points[-1][1], "bytes_a_minute": round(slope),
                "bytes_at_second": {round(at): size for at, size in some},
            }  # fmt: skip
        return found


class Comparison:
    """Every finished request against the same one alone."""

    def __init__(self, judge: Judge, strength: float) -> None:
        self.judge, self.strength = judge, strength
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []

    def _run(self, asked: Asked, answer: Answer) -> Run:
        mapped = unpack(answer.told["map"]) if answer.told is not None and "map" in answer.told else None
        return Run([*asked.prompt, *answer.tokens], len(asked.prompt), asked.strength(self.strength), mapped)

    def compare(self, asked: Asked, alone: Answer, loaded: Answer) -> None:
        a, b = self._run(asked, alone), self._run(asked, loaded)
        self.counts["compared"] += 1
        same = first_token(a, b) is None
        if alone.told is not None and loaded.told is not None:
            # A preempted request's last report may be of one token less.
            tokens = min(alone.told["tokens"], loaded.told["tokens"])
            told = ["keys_dropped", "keys_held"]
            if b.expiry is not None:
                told.append("map")
                self.counts["compared key by key"] += 1
                self.counts["keys compared"] += int(a.expiry[..., :tokens].size)  # type: ignore[index]
            if alone.told["tokens"] == loaded.told["tokens"]:
                same = same and all(alone.told[key] == loaded.told[key] for key in told)
                self.counts["compared by numbers of keys"] += 1
            else:
                self.counts["told of other numbers of tokens"] += 1
        if same:
            self.counts["same"] += 1
        elif self.judge.rounding(a, b):
            self.counts["differ by rounding"] += 1
        else:
            self.counts["lost"] += 1
            self.lost.append(
                f"{asked.most} tokens of {len(asked.prompt)} at {asked.wish}: alone {alone}, loaded {loaded}"
            )


async def empty(server: Server, clients: Clients) -> None:
    """Until nothing runs and nothing is held. The gauge is of the last step: what left after it, another step must bury."""
    end = time.monotonic() + 60
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while True:
        await clients.whole(Asked([5, 6, 7], 2, {}))
        left = {name: server.metric(name) for name in names}
        if not any(left.values()):
            return
        if time.monotonic() > end:
            raise RuntimeError(f"something is still held a minute after the last request: {left}")


async def soak(server: Server, seconds: float, seed: int, judge: Judge) -> dict[str, Any]:
    rng = random.Random(seed)
    gated = judge.folder is not None
    clients, comparison, memory = Clients(server.url, rng, gated), Comparison(judge, 1.0), Memory(server)
    watch = asyncio.create_task(memory.watch(max(seconds / 600, 1.0)))
    began, spells, loaded = time.monotonic(), 0, 0.0
    spell_seconds = min(SPELL_SECONDS, seconds / 3)
    while (left := seconds - (time.monotonic() - began)) > 0.2 * spell_seconds:
        first = draw_tokens(rng, LONGEST // 2, VOCAB)
        beginnings = [
            first,
            first[: LONGEST // 6] + draw_tokens(rng, LONGEST // 3, VOCAB),
            draw_tokens(rng, 128, VOCAB),
        ]
        catalogue = [Asked.draw(rng, LONGEST, VOCAB, gated, beginnings) for _ in range(DISTINCT)]
        catalogue[0] = Asked([5], catalogue[0].most, {})
        start = time.monotonic()
        await clients.load(catalogue, min(0.75 * spell_seconds, left), RATE)
        loaded += time.monotonic() - start
        await empty(server, clients)
        finished, clients.finished = clients.finished, []
        alone = {
            number: await clients.whole(catalogue[number]) for number in sorted({number for number, _ in finished})
        }
        for number, answer in finished:
            comparison.compare(catalogue[number], alone[number], answer)
        await empty(server, clients)
        spells += 1  # and twice found empty
        say(f"{time.monotonic() - began:.0f} s", dict(clients.counts), dict(comparison.counts))
    watch.cancel()
    memory.note()
    return {
        "spells": spells, "load_seconds": round(loaded, 1), "requests": dict(clients.counts), "wrong": clients.wrong,
        "comparison": dict(comparison.counts), "lost": comparison.lost, "memory": memory.told(),
        "preemptions": server.metric("vllm:num_preemptions_total"), "pool_found_whole": 2 * spells,
        "cached_tokens": server.metric(HITS),
        "keys_dropped": server.metric("vllm_prune:keys_dropped_total") if gated else 0,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixed load against a live server.")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--method", choices=sorted(METHODS), default="dcp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    begin = time.perf_counter()
    options = ["--served-model-name", "soak", "--dtype", "float32", "--max-model-len", str(LONGEST), "--max-num-seqs", "16",
               "--kv-cache-memory-bytes", POOL, "--max-num-batched-tokens", "256", "--block-size", "32",
               "--enable-prefix-caching"]  # fmt: skip
    if args.method != "stock":
        options += ["--additional-config", '{"vllm_prune": {"maps": true}}']
    with tempfile.TemporaryDirectory() as made:
        folder, log = make_model(Path(made) / "model", args.method), Path(made) / "server.log"
        with serving(folder, log, *options) as server:
            judge = Judge(None if args.method == "stock" else folder)
            try:
                found = asyncio.run(soak(server, args.minutes * 60, args.seed, judge))
            except BaseException:
                say(log.read_text(errors="replace")[-20000:])
                raise
            faults = [line for line in log.read_text(errors="replace").splitlines() if FAULT.search(line)]
    result = {
        "benchmark": "soak", "method": args.method, "seed": args.seed, "minutes": args.minutes, "options": options, **found,
        "faults_in_the_log": faults, "rounding": {"relative_strength": NEAR, "gap_of_logits": TIE}, **origin(1, begin),
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    if found["wrong"] or found["lost"] or faults or not found["preemptions"] or not found["cached_tokens"]:
        seen = "wrong, lost, faults_in_the_log, preemptions, cached_tokens"
        sys.exit(f"soak: something was lost, wrong or never tried: see {seen}")


if __name__ == "__main__":
    main()
