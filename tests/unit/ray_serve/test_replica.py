"""What an engine replica refuses before it starts anything."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vllm_prune.errors import PruneError
from vllm_prune.ray.config import parse_config

pytest.importorskip("ray.serve", reason="Ray Serve is an extra")

REFERENCE = Path(__file__).parents[3] / "examples" / "reference-dcp"


def test_a_refusal_of_the_plugin_is_the_replicas() -> None:
    """As it is, without vLLM's configuration around it: this is what `serve run` prints."""
    from vllm_prune.ray.replica import EngineReplica

    engine = {"max_model_len": 256, "additional_config": {"vllm_prune": {"strength": 99}}}
    config = parse_config({"model": str(REFERENCE), "engine": engine, "gpus_per_rank": 0})
    replica = EngineReplica.__new__(EngineReplica)
    with pytest.raises(PruneError, match=r"^vllm-prune: .*strength must lie in 0\.\.16, got 99"):
        asyncio.run(replica.__init__(config))  # type: ignore[misc]
