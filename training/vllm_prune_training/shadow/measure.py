"""What a frozen model loses without some of its heads and neurons, after the prompt.

Masks multiply the inputs of the output and down projections at positions from P on. For heads of whole KV groups this is
exactly what the request form serves: the prompt's positions are dense, and a closed group says nothing afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .criteria import places, watched


@contextmanager
def masked(
    model: PreTrainedModel, prompt: int, heads: torch.Tensor | None, neurons: torch.Tensor | None
) -> Iterator[None]:
    """Within: the model without some structures from position P on.

    Args:
        heads: bool [B, L, N], kept; None keeps all.
        neurons: bool [B, L, M].
    """
    out, down = places(model)
    hooks = []

    def hide(keep: torch.Tensor, repeat: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            factor = keep.to(args[0].dtype).repeat_interleave(repeat, dim=-1)[:, None]
            return (torch.cat([args[0][:, :prompt], args[0][:, prompt:] * factor], 1), *args[1:])

        return hook

    for kept, modules in ((heads, out), (neurons, down)):
        if kept is not None:
            for layer, module in enumerate(modules):
                repeat = module.in_features // kept.shape[2]  # type: ignore[operator]
                hooks.append(module.register_forward_pre_hook(hide(kept[:, layer], repeat)))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def continuation_nll(
    model: PreTrainedModel,
    ids: torch.Tensor,
    prompt: int,
    heads: torch.Tensor | None = None,
    neurons: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean negative log likelihood of each row's tokens after the prompt, in nats: float32 [B].

    The first of them is predicted by the prompt's last position, which is dense: it is left out.
    """
    with masked(model, prompt, heads, neurons):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return nll_after(model.get_output_embeddings()(hidden), ids, prompt)


def nll_after(logits: torch.Tensor, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """The same from logits [B, T, V] of a whole pass."""
    each = cross_entropy(logits[:, prompt:-1].float().flatten(0, 1), ids[:, prompt + 1 :].flatten(), reduction="none")
    return each.view(ids.shape[0], -1).mean(1)


@torch.no_grad()
def attended_at(model: PreTrainedModel, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Layer 0's attention output at the prompt's last position: float32 [B, N * D]."""
    with watched(places(model)[0][:1]) as seen:
        model.get_decoder()(input_ids=ids[:, :prompt], use_cache=False)
    return seen[0][:, -1].float()
