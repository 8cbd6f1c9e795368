"""Where on a Hugging Face decoder a gate is handed what it reads: the layer's normed input, its unnormed input, or numbers of its
query. Letters as in ``masked``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_prune.errors import PruneError
from vllm_prune.gates import Gate, Reads
from vllm_prune.gates.borrowed import borrowed_numbers, without_borrowed

from .families import LAYERS


def watch(
    model: PreTrainedModel,
    attention: nn.Module,
    gate: Gate,
    begin: Callable[[], None],
    take: Callable[[torch.Tensor], None],
) -> None:
    """Hook one layer.

    Args:
        model: whose layer it is.
        attention: the layer's attention module.
        gate: of the layer. Where it lends a number of the query, attention gets the query without it, whatever is done with it.
        begin: called before anything of the layer's attention.
        take: called with what the gate reads, [B, T, D_model] or [B, T, H].

    Raises:
        PruneError: the layer has no such thing.
    """

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin()
        if gate.reads is not Reads.QUERY:
            take(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    if gate.reads is Reads.STREAM:
        decoder = model.get_decoder()
        layers = next((list(getattr(decoder, name)) for name in LAYERS if hasattr(decoder, name)), [])
        (layer,) = (layer for layer in layers if any(module is attention for module in layer.modules()))
        layer.register_forward_pre_hook(before, with_kwargs=True)
        return
    attention.register_forward_pre_hook(before, with_kwargs=True)
    if gate.reads is not Reads.QUERY:
        return
    source = getattr(attention, "q_norm", None) or getattr(attention, "q_proj", None)
    if source is None:
        raise PruneError(f"{type(attention).__name__} has no query of its own.", "Use a Qwen3 or Llama base.")
    heads, size = gate.shape.num_kv_heads, int(attention.head_dim)  # type: ignore[arg-type]

    def lend(_module: nn.Module, _args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor | None:
        query = out.reshape(*out.shape[:2], -1, size)
        take(borrowed_numbers(query, heads))
        return without_borrowed(query, heads).reshape(out.shape) if gate.borrows else None

    source.register_forward_hook(lend)
