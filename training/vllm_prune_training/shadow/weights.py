"""The paper's criterion of a neuron: sum over its weights of | W1 * dLoss/dW1 | (arXiv 2406.16635, section 3), sample by sample.

W1 is what makes the neuron: in a gated MLP its row of ``gate_proj`` and its row of ``up_proj``. No backward pass over weights
is needed: with x [T, D_model] what goes into a projection and delta [T, M] the loss's gradient of what comes out,
dLoss/dW1 = delta^T x.

Letters: B samples, T tokens, M neurons a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def into_neurons(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """Each layer's projections into its neurons: gate and up, or up alone in an MLP without a gate. Empty where a layer has them
    in another form (fused, for instance)."""
    found = []
    for layer in getattr(model.get_decoder(), "layers", []):
        mlp = getattr(layer, "mlp", None)
        gate, up = getattr(mlp, "gate_proj", None), getattr(mlp, "up_proj", None)
        modules = [module for module in (gate, up) if module is not None]
        sizes = {getattr(module, "out_features", None) for module in modules}
        known = isinstance(up, nn.Linear) and sizes == {getattr(mlp.down_proj, "in_features", None)}
        found.append(modules if known else [])
    return found  # type: ignore[return-value]


@contextmanager
def inputs_and_outputs(modules: list[nn.Linear]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What goes into these modules and what comes out of them during a forward pass, in the modules' order."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    ordered: list[tuple[torch.Tensor, torch.Tensor]] = []

    def take(index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            seen[index] = (args[0], output)
            if len(seen) == len(modules):
                ordered[:] = [seen[i] for i in range(len(modules))]

        return hook

    hooks = [module.register_forward_hook(take(index)) for index, module in enumerate(modules)]
    try:
        yield ordered
    finally:
        for hook in hooks:
            hook.remove()


def weight_scores(weight: torch.Tensor, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Sum over a row of | W * dLoss/dW |, for each sample by itself.

    Args:
        weight: [M, D_model].
        x: [B, T, D_model], into the projection; delta: [B, T, M], gradient of its output. Only their tokens count.

    Returns:
        float32 [B, M].
    """
    # A sample at a time: its dLoss/dW is as large as the weight.
    return torch.stack(
        [(weight.float() * (d.float().T @ a.float())).abs().sum(1) for a, d in zip(x, delta, strict=True)]
    )
