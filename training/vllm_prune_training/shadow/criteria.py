"""How much each head and neuron of a frozen model matters for the continuation of a text: one backward pass a sample.

With C [T, D] a head's attention output before the output projection, a [T] a neuron's activation before the down projection,
and the loss of the tokens after the prompt, summed (section 3 of the paper, labels of the context left out):

- ``plainact``: sum over t of | sum over i C[t, i] dLoss/dC[t, i] |, and of | a[t] dLoss/da[t] |: first-order estimates of
  the loss when the structure is removed. The neuron's form is ours; the paper's is ``weight``: | W1 * dLoss/dW1 | summed over
  the neuron's weights (``weights.py``).
- ``l2``: sum over t of |C[t]|_2, and of | a[t] |.

Letters: B samples, T tokens, L layers, N query heads, D head size, M neurons a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from vllm_prune.errors import PruneError

from ..families import attention_modules
from .weights import inputs_and_outputs, into_neurons, weight_scores


@dataclass
class Traces:
    """What predictors learn from, float32, one row a sample.

    Attributes:
        attended: [B, L, N * D], every layer's attention output at the prompt's last position. Layer 0's is what
            ShadowLLM's predictor reads; the others feed per-layer predictors.
        leaky: [B, N * D], layer 0's at the last position of all, which has seen the continuation.
        heads_plainact, heads_l2: [B, L, N].
        neurons_plainact, neurons_l2, neurons_weight: [B, L, M]; the last [B, L, 0] where the projections into the neurons
            are not known (``into_neurons``).
    """

    attended: torch.Tensor
    leaky: torch.Tensor
    heads_plainact: torch.Tensor
    heads_l2: torch.Tensor
    neurons_plainact: torch.Tensor
    neurons_l2: torch.Tensor
    neurons_weight: torch.Tensor

    @classmethod
    def together(cls, parts: list[Traces]) -> Traces:
        """Rows of several."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def target(self, kind: str, criterion: str) -> torch.Tensor:
        """[B, L, structures] of ``heads`` or ``neurons``."""
        return getattr(self, f"{kind}_{criterion}")  # type: ignore[no-any-return]


def places(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """Each layer's output projection and down projection: their inputs are the heads' outputs and the neurons.

    Raises:
        PruneError: the model's layers are of another make.
    """
    attention = attention_modules(model)
    layers = getattr(model.get_decoder(), "layers", [])
    out = [getattr(module, "o_proj", None) for module in attention]
    down = [getattr(getattr(layer, "mlp", None), "down_proj", None) for layer in layers]
    if len(down) != len(out) or not all(isinstance(module, nn.Linear) for module in (*out, *down)):
        raise PruneError(
            f"{type(model).__name__} has not the layers that ShadowLLM is known for: o_proj, and mlp.down_proj.",
            "Use a dense Llama-like decoder (Llama, Qwen2, Qwen3, Mistral, ...).",
        )
    return out, down  # type: ignore[return-value]


@contextmanager
def watched(modules: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The inputs of these modules during a forward pass, in order."""
    seen: list[torch.Tensor] = []

    def take(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    hooks = [module.register_forward_pre_hook(take) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def trace(
    model: PreTrainedModel, ids: torch.Tensor, weight: torch.Tensor, prompt: int, positions: str = "continuation"
) -> Traces:
    """Criteria of a batch.

    Args:
        model: frozen, in evaluation mode.
        ids: int64 [B, T].
        weight: float32 [B, T] of predicting each token; those of the prompt do not count.
        prompt: P, 0 < P < T.
        positions: see ``Shadow.positions``.

    Raises:
        ValueError: nothing follows the prompt.
    """
    if not 0 < prompt < ids.shape[1]:
        raise ValueError(f"the prompt has {prompt} of {ids.shape[1]} tokens; some must come before and after")
    out, down = places(model)
    heads = model.config.num_attention_heads
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    into = into_neurons(model)
    known = all(into)
    made_by = [module for modules in into for module in modules] if known else []
    with torch.enable_grad(), watched(out) as attended, watched(down) as neurons, inputs_and_outputs(made_by) as made:
        hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, prompt - 1 : -1]).float()
        each = cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten(), reduction="none")
        loss = (each * weight[:, prompt:].flatten()).sum()  # a sum: samples do not touch each other
    count = len(attended)
    grads = torch.autograd.grad(loss, [*attended, *neurons, *(after for _, after in made)])
    since = prompt if positions == "continuation" else 0

    def summed(x: torch.Tensor) -> torch.Tensor:
        return x[:, since:].float().sum(1)

    def by_weight() -> torch.Tensor:
        if not known:
            return torch.zeros(len(ids), count, 0)
        each = [
            weight_scores(module.weight, x.detach()[:, since:], delta[:, since:])
            for module, (x, _), delta in zip(made_by, made, grads[2 * count :], strict=True)
        ]
        return torch.stack(each, 1).unflatten(1, (count, -1)).sum(2)  # a gated MLP has two projections

    with torch.no_grad():
        by_head = [x.detach().unflatten(-1, (heads, -1)) for x in attended]
        grad_by_head = [g.unflatten(-1, (heads, -1)) for g in grads[:count]]
        return Traces(
            torch.stack([x[:, prompt - 1].detach().float() for x in attended], 1),
            attended[0][:, -1].detach().float(),
            torch.stack([summed((c * g).sum(-1).abs()) for c, g in zip(by_head, grad_by_head, strict=True)], 1),
            torch.stack([summed(c.norm(dim=-1)) for c in by_head], 1),
            torch.stack(
                [summed((a.detach() * g).abs()) for a, g in zip(neurons, grads[count : 2 * count], strict=True)], 1
            ),
            torch.stack([summed(a.detach().abs()) for a in neurons], 1),
            by_weight(),
        )
