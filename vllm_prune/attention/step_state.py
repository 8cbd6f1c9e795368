"""What a worker holds of its gated model between steps, whatever the device: the connector's view of it.

One per model on a worker, made by the metadata builder, found by the connector through the model's layers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from vllm_prune.cache.grants import LaneReport
from vllm_prune.cache.ranks import Ranks
from vllm_prune.cache.spec import PruneSpec
from vllm_prune.config import server_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_prune.attention.gated import GatedAttention
    from vllm_prune.messages import PruneMetadata, StepGrant

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's logger: only that one has a handler

Told = tuple[dict[str, list[LaneReport]], set[int]]
"""Reports by request, and first blocks of requests that can never go on."""


class StepState(ABC):
    """See the module.

    Args:
        vllm_config: of the engine.
        spec: the cache spec of the gated layers.
        layer_names: of the gated layers, in model order.

    Attributes:
        store: of lanes, once the KV cache is bound.
        ranks: of the tensor parallel group, this worker's among them.
        seconds: spent since they were last taken, by name of ``metrics.SECONDS`` (CPU workers).
    """

    store: Any

    def __init__(self, vllm_config: VllmConfig, spec: PruneSpec, layer_names: list[str]) -> None:
        self.spec = spec
        self.layer_names = layer_names
        self.max_requests = vllm_config.scheduler_config.max_num_seqs
        self.max_tokens = vllm_config.model_config.max_model_len
        self.chunk_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.prefixes = bool(vllm_config.cache_config.enable_prefix_caching)
        self.record = bool(server_options(vllm_config).get("record", False))
        self.layers: list[GatedAttention] = [
            vllm_config.compilation_config.static_forward_context[name] for name in layer_names
        ]
        self.serving = self.layers[0].serving
        self.ranks = Ranks.of_this_worker(self.serving.split)
        self.store = None
        self.seconds: dict[str, float] = {}
        for index, layer in enumerate(self.layers):
            layer.impl.attach(self, index)  # type: ignore[attr-defined]

    def spent(self, name: str, since: float) -> None:
        """Count time from ``since`` (``perf_counter``) until now."""
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - since

    @abstractmethod
    def bind(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Attach the allocated KV cache."""

    @abstractmethod
    def begin_step(self, meta: PruneMetadata) -> None:
        """Bury the dead first: their blocks may be among the new grants."""

    @abstractmethod
    def end_step(self) -> Told:
        """Close the step; says what is known by now."""

    def doomed(self, req_id: str, grant: StepGrant, report: LaneReport, num_blocks: int) -> bool:
        """Whether a request's next step cannot fit into the whole pool, even alone. Logs why."""
        geometry = self.spec.geometry
        if grant.last or grant.covered >= self.max_tokens:
            return False
        more = max(min(grant.remaining, self.chunk_tokens), 1)
        blocks = min(geometry.blocks_for_pages(report.pages[0] + geometry.pages_for(more)),
                     geometry.blocks_for(grant.covered + more))  # fmt: skip
        if more < len(report.pages):
            blocks = min(blocks, geometry.blocks_for_pages(report.pages[more]))
        if blocks <= num_blocks - 1:
            return False
        logger.error(
            "vllm-prune: request %s ends with an error: its gates kept %d head-pages of the first %d tokens, and "
            "the next %d tokens need %d blocks where the pool has %d. Raise the KV cache memory or the gate "
            "strength, or lower max_model_len or max_num_batched_tokens.",
            req_id, report.pages[0], grant.covered, more, blocks, num_blocks - 1,
        )  # fmt: skip
        return True


def find_state(vllm_config: VllmConfig) -> StepState:
    """The state of the gated model that this worker runs.

    Raises:
        RuntimeError: there is none, or vLLM has split the gated layers into several groups.
    """
    layers = vllm_config.compilation_config.static_forward_context.values()
    states = [getattr(getattr(layer, "impl", None), "state", None) for layer in layers]
    found = {id(state): state for state in states if isinstance(state, StepState)}
    if len(found) != 1:
        raise RuntimeError(
            f"vllm-prune: the gated layers on this worker are in {len(found)} KV cache groups, not in one"
        )
    (state,) = found.values()
    return state
