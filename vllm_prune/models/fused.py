"""On a GPU the gate's projection joins the base's QKV projection: one matrix product a layer, where a second costs a launch.

The merged weight is [QKV rows; gate rows; padding], the gate's own parameter a view of its part: made before weights are loaded,
whatever loads them fills both in place.
``split`` takes the product apart again. Runs in the worker. Letters: T tokens, F gate features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

ROWS = 64
"""The merged weight's rows are a multiple of this: matrix kernels are slow on ragged ones."""


def may_fuse(vllm_config: VllmConfig) -> bool:
    """Not with LoRA, whose layers know the QKV projection's own width; nor on CPU, where weights are packed away."""
    return current_platform.is_cuda() and vllm_config.lora_config is None


def fuse(attention: Any) -> None:
    """Merge the projections of a gated attention module, where they are of one kind; else leave it as it is.

    Args:
        attention: has ``qkv_proj``, vLLM's layer, ``attn``, ours, and ``fused``, set when they are merged: both widths.
    """
    project, gate = attention.qkv_proj, attention.attn.projection
    if gate is None or gate.bias is not None or not isinstance(project.quant_method, UnquantizedLinearMethod):
        return
    if gate.weight.dtype != project.weight.dtype:
        return
    width, features = project.weight.shape[0], gate.weight.shape[0]
    spare = -(width + features) % ROWS
    merged = pad(torch.cat([project.weight.data, gate.weight.data]), (0, 0, 0, spare))
    project.weight.data = merged  # the parameters stay vLLM's, with what loads them
    gate.weight.data = merged[width : width + features]
    if project.bias is not None:
        project.bias.data = pad(project.bias.data, (0, features + spare))
    attention.fused = (width, features)


def split(product: torch.Tensor, fused: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """QKV [T, (H G + 2 H) D] and features [T, F] of the merged product; ``fused``: both widths."""
    width, features = fused
    return product[..., :width], product[..., width : width + features]
