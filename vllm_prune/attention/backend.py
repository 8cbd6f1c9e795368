"""The attention backend of gated layers, as vLLM sees it. Runs in the worker.

Passed as a class to each ``Attention`` layer (a backend under a new name cannot cross to the spawned engine core), so its
name must be one that vLLM knows.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_prune.attention.cpu import PruneCPUImpl
from vllm_prune.attention.state import PruneAttentionMetadata, WorkerState
from vllm_prune.cache.spec import PruneSpec


class PruneCPUBackend(AttentionBackend):
    """Lanes on CPU: vLLM's own attention kernel with heads as batch."""

    forward_includes_kv_cache_update = True
    device_lanes: ClassVar[bool] = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(32)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [32, 64, 96, 128, 160, 192, 224, 256]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # the tokens of one head of one block lie together: a head-page

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[PruneCPUImpl]:
        return PruneCPUImpl

    @staticmethod
    def get_builder_cls() -> type[PruneMetadataBuilder]:
        return PruneMetadataBuilder


class PruneMetadataBuilder(AttentionMetadataBuilder[PruneAttentionMetadata]):
    """Turns vLLM's batch into rows of request slots."""

    def __init__(
        self, kv_cache_spec: PruneSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.state = WorkerState(vllm_config, kv_cache_spec, layer_names)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PruneAttentionMetadata:
        m = common_attn_metadata
        return self.state.metadata(
            m.block_table_tensor, m.query_start_loc_cpu.numpy(), m.seq_lens[: m.num_reqs].numpy()
        )
