"""The attention backend of gated layers on a GPU, as vLLM sees it. Runs in the worker. Why it bears a known name: ``backend``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_prune.attention.cuda import PruneCUDAImpl
from vllm_prune.attention.device_state import DeviceAttentionMetadata, DeviceState
from vllm_prune.cache.spec import PruneSpec
from vllm_prune.compat import BLOCK_SIZES, HEAD_SIZES, KV_DTYPES


class PruneCUDABackend(AttentionBackend):
    """Lanes on a GPU: kernels of ours on vLLM's KV cache."""

    forward_includes_kv_cache_update = True
    device_lanes: ClassVar[bool] = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *KV_DTYPES["cuda"]]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return list(BLOCK_SIZES["cuda"])

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES["cuda"])

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # the tokens of one head of one block lie together: a head-page

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PruneCUDAImpl]:
        return PruneCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[PruneCUDAMetadataBuilder]:
        return PruneCUDAMetadataBuilder


class PruneCUDAMetadataBuilder(AttentionMetadataBuilder[DeviceAttentionMetadata]):
    """Hands vLLM's batch on as it lies on the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: PruneSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.state = DeviceState(vllm_config, kv_cache_spec, layer_names, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> DeviceAttentionMetadata:
        return self.state.metadata(common_attn_metadata)
