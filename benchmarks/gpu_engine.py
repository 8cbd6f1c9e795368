"""One engine of ``gpu.py`` on a GPU: a real model's shape with random weights made in place, and what it is asked to do.

Variants: ``stock`` (vLLM's own attention), ``open`` (a gated checkpoint at strength 0), ``lanes`` (gates that run but keep all:
what lanes cost), ``drop`` (gates forced to a kept fraction, ``common.FORCED``). Runs in a process of its own.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESERVED, Shape, add_forced_gates

VARIANTS = ("stock", "open", "lanes", "drop")


def shape_of(config: dict[str, Any]) -> Shape:
    c = config
    return Shape(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"],
                 c["intermediate_size"], c["vocab_size"])  # fmt: skip


def reserved_columns(shape: Shape) -> Any:
    """The first columns of the embedding table, which the forced gates read: [vocab, RESERVED]."""
    import torch

    columns = torch.randn(shape.vocab, RESERVED, generator=torch.Generator().manual_seed(5)).bfloat16()
    columns[:, 0] = 1.0
    return columns


def make_folder(folder: Path, config: dict[str, Any], variant: str, keep: float, rank: int) -> Path:
    """A model folder without weights; gated unless stock."""
    (folder / "config.json").write_text(json.dumps(config))
    if variant != "stock":
        shape = shape_of(config)
        kept = 0.999999 if variant == "lanes" else keep
        add_forced_gates(folder, shape, reserved_columns(shape), kept, rank, 0.0 if variant == "open" else 1.0)
    return folder


def fill(model: Any, vllm_config: Any, shape: Shape, gated: bool) -> None:
    """Random weights in place: CUDA graphs hold their addresses. The reserved coordinates of the residual stream stay as the
    embedding has them."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim <= 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "embed_tokens" in name:
                weight.normal_()
                weight[: shape.vocab, :RESERVED] = reserved_columns(shape).to(weight.device)
            else:
                weight.normal_(std=0.7 / weight.shape[1] ** 0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[:RESERVED] = 0
        if gated:
            from vllm_prune.models.loading import load_gate_weights

            load_gate_weights(model, vllm_config)


class Engine:
    """See the module.

    Args:
        config: Hugging Face's, of the model.
        variant: one of ``VARIANTS``.
        keep: fraction of every layer's keys that forced gates keep; rank: r.
        options: of ``vllm.LLM``.
    """

    def __init__(self, config: dict[str, Any], variant: str, keep: float, rank: int, **options: Any) -> None:
        import torch
        from vllm import LLM

        self.shape = shape_of(config)
        self.kv_bytes = self.shape.kv_bytes // (2 if options.get("kv_cache_dtype") == "fp8" else 1)
        """Of one token, all layers."""
        self.folder = tempfile.TemporaryDirectory(prefix="vllm-prune-bench-")
        make_folder(Path(self.folder.name), config, variant, keep, rank)
        begin = time.perf_counter()
        self.llm = LLM(
            self.folder.name, load_format="dummy", skip_tokenizer_init=True, seed=0, disable_log_stats=True, **options
        )
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        runner = core.model_executor.driver_worker.worker.model_runner
        self.runner = type(runner).__module__
        self.gated = variant in ("lanes", "drop")
        fill(runner.model, runner.vllm_config, self.shape, self.gated)
        torch.cuda.synchronize()
        self.start_seconds = time.perf_counter() - begin
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.block_tokens = runner.vllm_config.cache_config.block_size
        self._count = 0

    def add(self, lengths: list[int], new_tokens: int) -> None:
        from vllm import SamplingParams

        for length in lengths:
            self._count += 1
            rng = random.Random(self._count)
            ids = [rng.randrange(3, self.shape.vocab) for _ in range(length)]
            params = SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
            self.llm.llm_engine.add_request(f"r{self._count}", {"prompt_token_ids": ids}, params)

    def bookkeeping(self) -> int:
        """Bytes beside a block that the plugin's tables take."""
        if not self.gated:
            return 0
        from vllm_prune_kernels.lanes import bytes_per_page

        from vllm_prune.attention.step_state import find_state

        store = find_state(self.llm.llm_engine.vllm_config).store
        return int(bytes_per_page(store.lanes.sizes) * store.lanes.sizes.block_pages)

    def chunks(self, tokens: int) -> int:
        """Steps that so many prompt tokens take."""
        most = self.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
        return -(-tokens // most)

    def used_bytes(self) -> int:
        blocks = self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()
        return int(blocks * self.block_tokens * self.kv_bytes)

    def first_token(self, length: int, times: int = 3) -> float:
        """Median seconds from a lone request's arrival to its first token."""
        found = []
        for _ in range(times + 1):
            self.add([length], 1)
            begin = time.perf_counter()
            while self.llm.llm_engine.has_unfinished_requests():
                self.llm.llm_engine.step()
            found.append(time.perf_counter() - begin)
        return statistics.median(found[1:])

    def decode(self, length: int, batch: int, new_tokens: int) -> dict[str, Any]:
        """All requests of a batch past their prompts: seconds a step, bytes of KV blocks held."""
        # The first ones go on while the last prompts come in, chunk by chunk.
        new_tokens += self.chunks(length * batch)
        self.add([length] * batch, new_tokens)
        begin = time.perf_counter()
        counts: dict[str, int] = {}
        stamps: list[tuple[float, int]] = []
        used = 0
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            everyone = len(counts) == batch and min(counts.values()) >= 4
            if everyone and max(counts.values()) < new_tokens - 1:
                stamps.append((time.perf_counter(), sum(counts.values())))
                used = self.used_bytes()
        seconds, tokens = (stamps[-1][i] - stamps[0][i] for i in (0, 1))
        gaps = [b[0] - a[0] for a, b in itertools.pairwise(stamps)]
        return {
            "length": length, "batch": batch, "tokens_per_second": tokens / seconds, "step_ms": 1e3 * seconds * batch / tokens,
            "median_gap_ms": 1e3 * statistics.median(gaps), "kv_bytes": used, "total_seconds": time.perf_counter() - begin,
        }  # fmt: skip

    def profile(self, length: int, batch: int, steps: int = 10) -> str:
        """A table of the kernels of a prompt's step and of some decode steps, by time on the GPU."""
        from torch.profiler import ProfilerActivity, profile

        tables = []
        self.add([length] * batch, steps + 20)
        for count in (1, steps):
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                for _ in range(count):
                    self.llm.llm_engine.step()
            tables.append(found.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=60))
            while any(r.num_output_tokens < 4 for r in self.scheduler.running) or self.scheduler.waiting:
                self.llm.llm_engine.step()
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()
        return "\n".join(tables)

    def concurrency(self, length: int, requests: int, new_tokens: int, memory: float) -> dict[str, Any]:
        """Most requests past their prompts at once, of many that wait for memory; tokens a second over all.

        Args:
            memory: bytes for the KV cache and what page tables need beside it; the pool's other blocks are taken away meanwhile.
        """
        blocks = int(memory / (self.block_tokens * self.kv_bytes + self.bookkeeping()))
        taken = self.pool.get_new_blocks(self.pool.get_num_free_blocks() - blocks)
        self.add([length] * requests, new_tokens)
        most = preempted = 0
        begin = time.perf_counter()
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()
            running = [r for r in self.scheduler.running if r.num_output_tokens > 0]
            most = max(most, len(running))
            preempted = max(preempted, sum(r.num_preemptions for r in self.scheduler.running))
        seconds = time.perf_counter() - begin
        self.pool.free_blocks(taken)
        return {"length": length, "requests": requests, "blocks": blocks, "most_running": most, "preemptions": preempted,
                "new_tokens_per_second": requests * new_tokens / seconds, "seconds": seconds}  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What is worth knowing of the running engine."""
        config = self.llm.llm_engine.vllm_config
        layers = config.compilation_config.static_forward_context.values()
        return {
            "runner": self.runner,
            "impl": sorted({type(layer.impl).__name__ for layer in layers if hasattr(layer, "impl")}),
            "graphs": str(config.compilation_config.cudagraph_mode), "async": config.scheduler_config.async_scheduling,
            "blocks": self.pool.num_gpu_blocks, "block_tokens": self.block_tokens, "start_seconds": self.start_seconds,
        }  # fmt: skip
