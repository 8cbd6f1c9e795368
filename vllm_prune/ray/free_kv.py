"""How much of an engine's KV cache is in use, as its scheduler says after every step. In an engine replica."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class KvUse(StatLoggerBase):
    """Keeps the last figure: blocks that the pool has given out, so with gates what requests really hold."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self.used = 0.0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.used = float(scheduler_stats.kv_cache_usage)

    def log_engine_initialized(self) -> None:
        return
