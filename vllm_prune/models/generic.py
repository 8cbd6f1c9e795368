"""Any Hugging Face decoder with full attention, over vLLM's Transformers backend.

A hook on each Hugging Face attention module computes the gate's features from its input and hands them through the
module's keyword arguments to the attention function, which is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.transformers import TransformersForCausalLM

from vllm_prune.attention.gated import GatedAttention
from vllm_prune.config import serves_stock
from vllm_prune.models.loading import load_gate_weights, without_gates

_FEATURES = "drop_gate_features"


def gated_attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface. query [1, H * G, T, D], key and value [1, H, T, D]. Returns [T, H * G * D]."""
    tokens = query.shape[-2]
    q, k, v = (x.transpose(1, 2).reshape(tokens, -1) for x in (query, key, value))
    attn = cast(GatedAttention, module.attn)
    return attn(q, k, v, kwargs.get(_FEATURES)), None


def _add_features(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    features = cast(GatedAttention, module.attn).features(hidden.view(-1, hidden.shape[-1]))
    return args, {**kwargs, _FEATURES: features}


class PrunedTransformersForCausalLM(TransformersForCausalLM):
    """See the module."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if serves_stock(vllm_config):
            return
        # Only now: while building, vLLM recognises attention modules by its own name here.
        ALL_ATTENTION_FUNCTIONS.register("vllm_prune", gated_attention_forward)
        self.text_config._attn_implementation = "vllm_prune"
        for module in self.modules():
            if isinstance(getattr(module, "attn", None), GatedAttention):
                module.register_forward_pre_hook(_add_features, with_kwargs=True)

    def _get_attn_cls(self) -> type[AttentionLayerBase]:
        return super()._get_attn_cls() if serves_stock(self.vllm_config) else GatedAttention

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = super().load_weights(without_gates(weights))
        return loaded if serves_stock(self.vllm_config) else loaded | load_gate_weights(self, self.vllm_config)
