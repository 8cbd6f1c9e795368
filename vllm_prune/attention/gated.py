"""The attention layer of a gated model: vLLM's own ``Attention`` with a drop gate in front. Runs in the worker.

The gate's features reach the attention op as an argument of an op of ours: were they passed on the side, the compiler
would be free to reorder them.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend

from vllm_prune.attention.serving import ServedGate, rule_of
from vllm_prune.cache.spec import PruneSpec
from vllm_prune.config import DropGateConfig, served_section
from vllm_prune.gates.borrowed import borrowed_numbers, without_borrowed

_LIBRARY = torch.library.Library("vllm_prune", "FRAGMENT")


def _gated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    features: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    metadata, layer, kv_cache, _ = get_attention_context(layer_name)
    impl: Any = layer.impl
    impl.forward(layer, query, key, value, kv_cache, metadata, output=output, features=features)


def _gated_attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    features: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    return


if not hasattr(torch.ops.vllm_prune, "gated_attention"):
    direct_register_custom_op(
        "gated_attention", _gated_attention, mutates_args=["output"], fake_impl=_gated_attention_fake,
        target_lib=_LIBRARY, dispatch_key=current_platform.dispatch_key,
    )  # fmt: skip


def section_of(vllm_config: VllmConfig) -> DropGateConfig:
    """The checkpoint's ``drop_gate`` section as this engine serves it."""
    return served_section(vllm_config)


def backend_class() -> type[AttentionBackend]:
    """Of this platform. Imported here: each needs what the other's machines lack."""
    if current_platform.is_cuda():
        from vllm_prune.attention.cuda_backend import PruneCUDABackend

        return PruneCUDABackend
    from vllm_prune.attention.backend import PruneCPUBackend

    return PruneCPUBackend


class GatedAttention(Attention):
    """Attention whose keys may expire. Holds the layer's gate, as far as it decides about this rank's heads; ``features``
    computes what the op needs of it. H below: of the rank.

    Takes the arguments of vLLM's ``Attention``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["attn_backend"] = backend_class()
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        self.section = section_of(vllm_config)
        self.ranks = vllm_config.parallel_config.tensor_parallel_size
        self.serving = ServedGate.of(self.section, self.ranks, kwargs["attn_backend"].device_lanes)
        # What gates remember is not narrowed with the KV cache: decisions hang on it.
        cached = self.kv_cache_torch_dtype
        self.gate_dtype = self.serving.dtype(cached if cached.is_floating_point else torch.get_default_dtype())
        with torch.device("meta"):
            built = self.section.build_gate()
        self.borrows, self.reads = built.borrows, built.reads
        self.drop_gate: nn.Module | None = None
        if self.serving.reveal is not None:
            gate = self.section.build_gate().at_layer(extract_layer_index(self.layer_name))
            gate = gate.at_rank(get_tensor_model_parallel_rank(), self.ranks)
            self.drop_gate = gate.to(torch.float32 if self.section.dtype == "float32" else torch.get_default_dtype())
            self.drop_gate.requires_grad_(False)
        if current_platform.is_cuda() and extract_layer_index(self.layer_name) == 0:
            from vllm_prune.attention.device_state import bookkeeping_bytes

            self.impl.bookkeeping = partial(  # type: ignore[attr-defined]
                bookkeeping_bytes, vllm_config, self.get_kv_cache_spec(vllm_config), self.serving.num_units
            )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.drop_gate is not None and self.serving.ruled:
            gate: Any = self.drop_gate
            self.impl.rule_at = lru_cache(64)(partial(rule_of, gate, self.section))  # type: ignore[attr-defined]

    @property
    def projection(self) -> nn.Linear | None:
        """The layer that computes ``features`` whole and in their dtype; None where more than that is done."""
        if self.drop_gate is None or not self.serving.ruled:
            return None
        gate: Any = self.drop_gate
        layer: nn.Linear | None = gate.projection
        return layer if layer is not None and layer.weight.dtype == self.gate_dtype else None

    def features(self, x: torch.Tensor) -> torch.Tensor | None:
        """Gate features [T, F] of what the gate ``reads``, the layer's normed input [T, D_model] as a rule; None when gates are
        open, skip computation instead, or have none."""
        if self.drop_gate is None or not self.serving.ruled or not self.drop_gate.num_features:
            return None
        dtype = torch.float32 if self.section.dtype == "float32" else x.dtype
        return self.drop_gate(x.to(dtype)).to(self.gate_dtype)

    def lend(self, query: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Features [T, F] of gates that read numbers of the query, and the query for RoPE. query: [T, H * G * D], unrotated."""
        heads = query.view(-1, self.num_heads, self.head_size)
        features = self.features(borrowed_numbers(heads, self.num_kv_heads))
        return features, without_borrowed(heads, self.num_kv_heads).view(query.shape) if self.borrows else query

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Args: query [T, H * G * D], key and value [T, H * D], features [T, F]. Returns [T, H * G * D]."""
        output = torch.empty((query.shape[0], self.num_heads * self.head_size), dtype=query.dtype, device=query.device)
        query = query.view(-1, self.num_heads, self.head_size)
        torch.ops.vllm_prune.gated_attention(
            without_borrowed(query, self.num_kv_heads) if self.borrows else query,
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size),
            features,
            output.view(-1, self.num_heads, self.head_size),
            self.layer_name,
        )
        return output

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> PruneSpec:
        return PruneSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            num_layers=self.section.num_layers,
            gate_rank=self.serving.rank * self.gate_dtype.itemsize // self.kv_cache_torch_dtype.itemsize,
            gate_lanes=self.serving.gate_lanes,
            chunk_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            expected_keep=1.0 if self.serving.planned_dense else self.section.expected_keep,
            eviction_units=self.serving.num_units * (self.ranks if self.serving.split else 1),
            ranks=self.ranks,
        )
