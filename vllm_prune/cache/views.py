"""The KV cache as vLLM allocates it, seen as head-pages."""

from __future__ import annotations

import torch


def layers_in_one(
    layers: list[torch.Tensor], num_blocks: int, num_heads: int, block_tokens: int, head_size: int
) -> torch.Tensor:
    """The KV cache of all layers as head-pages.

    Args:
        layers: L views [B, H, N, 2 D] of one storage in LBHNC order, as vLLM allocates them.

    Returns:
        [L B H, 2 N D].

    Raises:
        RuntimeError: the layers do not lie back to back in one storage.
    """
    page = 2 * block_tokens * head_size
    stride = num_blocks * num_heads * page * layers[0].element_size()
    base = layers[0].data_ptr()
    for i, layer in enumerate(layers):
        shape = (num_blocks, num_heads, block_tokens, 2 * head_size)
        if tuple(layer.shape) != shape or not layer.is_contiguous() or layer.data_ptr() != base + i * stride:
            raise RuntimeError(
                f"vllm-prune: layer {i} of the KV cache is {tuple(layer.shape)} at an unexpected place; "
                "the layout LBHNC with all layers in one storage is needed"
            )
    pages = len(layers) * num_blocks * num_heads
    return torch.as_strided(layers[0], (pages, page), (page, 1), layers[0].storage_offset())
