"""Starts the demo's engine runs, each in a process of its own (one vLLM engine a process), and sizes their pool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_prune.cache.geometry import LaneGeometry, cdiv
from vllm_prune.config import parse_drop_gate
from vllm_prune.demo.run import BLOCK_TOKENS, Job, Result
from vllm_prune.errors import PruneError

NUMBER_BYTES = 4
"""Of the widest KV dtype that gated models have on CPU; at two bytes the pool has twice the blocks."""


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """Environment of a run: scheduler and worker in one process, no network, the pool as large as the job says."""
    quiet = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    fixed = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    kept = {name: value for name, value in base.items() if name != "VLLM_CPU_KVCACHE_SPACE"}  # overrides pool_bytes
    return {**quiet, **kept, **fixed}


def pool_bytes(hf_config: Any, tokens: int, chunk_tokens: int) -> int:
    """KV cache that holds ``tokens`` tokens densely, gate keys and one chunk beside them, with room to spare.

    Args:
        hf_config: of the gated checkpoint.
        tokens: longest request.
        chunk_tokens: of one step.

    Raises:
        PruneError: the checkpoint's ``drop_gate`` section is missing or wrong.
    """
    section = parse_drop_gate(hf_config)
    head_size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    rank = section.build_gate().num_remembered
    geometry = LaneGeometry(section.num_layers, section.num_kv_heads, head_size, BLOCK_TOKENS, rank)
    blocks = geometry.blocks_for(tokens + chunk_tokens) + cdiv(geometry.num_lanes, geometry.pages_per_block) + 8
    return blocks * geometry.pages_per_block * 2 * BLOCK_TOKENS * head_size * NUMBER_BYTES


def launch(job: Job, folder: Path, name: str) -> Result:
    """Run a job in a child process.

    Args:
        job: what to run.
        folder: for NAME.job.json, NAME.json (the result) and NAME.log (what the engine wrote).
        name: of the run.

    Raises:
        PruneError: the run failed; the reason it gave, or the end of its log.
    """
    job_path, result_path, log_path = (folder / f"{name}{end}" for end in (".job.json", ".json", ".log"))
    job_path.write_text(json.dumps(asdict(job), separators=(",", ":")) + "\n", encoding="utf-8")
    result_path.unlink(missing_ok=True)
    with log_path.open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "vllm_prune.demo.run", str(job_path), str(result_path)],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment(os.environ), check=False,
        )  # fmt: skip
    if done.returncode or not result_path.is_file():
        lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        refused = [line for line in lines if "vllm-prune: " in line]
        reason = "\n".join(refused[-1:] or lines[-5:])
        raise PruneError(f"the run '{name}' ended with exit code {done.returncode}: {reason}", f"See {log_path}.")
    return Result(**json.loads(result_path.read_text(encoding="utf-8")))
