"""ShadowLLM's token form on a Hugging Face decoder: the naive twin of the server, every product dense and then masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_prune.gates import ShadowTokenGate

from .criteria import places


class TokenTwin:
    """Hooks on a model that mask, from layer 1 on, what each token past the prompt did not choose.

    Args:
        model: any Llama-like decoder.
        gate: layer 0's, with the predictors.

    ``prompt`` and ``strength`` are those of the next forward pass; no prompt leaves the model dense. Afterwards ``chosen``
    holds KV groups bool [B, T - P, L, H] and neurons bool [B, T - P, L, M].
    """

    def __init__(self, model: PreTrainedModel, gate: ShadowTokenGate) -> None:
        self.gate = gate
        self.prompt: int | None = None
        self.strength = 0.0
        self.chosen: tuple[torch.Tensor, torch.Tensor] | None = None
        out, down = places(model)
        out[0].register_forward_pre_hook(self._choose)
        for layer in range(1, len(out)):
            out[layer].register_forward_pre_hook(self._mask(0, layer))
            down[layer].register_forward_pre_hook(self._mask(1, layer))

    def _choose(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.chosen = None
        if self.prompt is not None and self.strength > 0.0 and self.prompt < args[0].shape[1]:
            later = args[0][:, self.prompt :]
            groups, neurons = self.gate.choose(later.flatten(0, 1), self.strength)
            self.chosen = groups.unflatten(0, later.shape[:2]), neurons.unflatten(0, later.shape[:2])

    def _mask(self, kind: int, layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self.chosen is None:
                return None
            keep = self.chosen[kind][:, :, layer]
            x = args[0].clone()
            later = x[:, self.prompt :].unflatten(-1, (keep.shape[2], -1))
            x[:, self.prompt :] = later.masked_fill(~keep[..., None], 0.0).flatten(-2)
            return (x, *args[1:])

        return hook
