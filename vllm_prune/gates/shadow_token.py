"""ShadowLLM (Akhauri et al., EMNLP 2024, arXiv 2406.16635), token form: each generated token skips some heads and neurons.

Two predictors as in ``shadow``, of heads and of MLP neurons, read layer 0's attention output of the token itself; from
layer 1 on the token runs on the structures that were chosen for it. Heads by KV group, ranked over the network; neurons by
layer, each keeping the same share (the paper has both rankings). Tokens of the prompt are dense.

No key expires: K and V of every token are made and stored, so that a later token may choose a head that this one skipped
(the paper recomputes them from stored inputs). Computation and weight traffic are saved, memory is not.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from vllm_prune.gates.base import NEVER, Gate, GateShape, Protection, Reveal, Scope
from vllm_prune.gates.shadow import Predictor, close_lowest, head_misfit, share_at


class ShadowTokenGate(Gate):
    """ShadowLLM's token form in one layer. Layer 0's gate holds the predictors of all layers, the others hold nothing.

    Args:
        shape: of the base model.
        query_heads: H * G, of the base; must match.
        width: H * G * D, of its attention output; must match.
        neurons: M, of each MLP of the base; must match.
        hidden, neuron_hidden: of the predictors of heads and of neurons.
        closed: share of the KV groups of layers 1 to L - 1 that a token skips at strength 1. In [0, 1].
        closed_neurons: share of each of these layers' neurons. In [0, 1].
        least: KV groups of each layer that are never skipped.
    """

    method: ClassVar[str] = "shadow_token"
    reveal: ClassVar[Reveal] = Reveal.NONE
    softens: ClassVar[bool] = False
    protects: ClassVar[bool] = False
    scope: Scope = Scope.LAYER

    def __init__(
        self, shape: GateShape, query_heads: int, width: int, neurons: int, hidden: int = 256, neuron_hidden: int = 256,
        closed: float = 0.3, closed_neurons: float = 0.3, least: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        h = shape.num_kv_heads
        if query_heads < 1 or query_heads % h or width < 1 or width % query_heads:
            raise ValueError(f"query_heads {query_heads} and width {width} do not fit {h} KV heads")
        if min(hidden, neuron_hidden, neurons) < 1:
            raise ValueError(
                f"hidden, neuron_hidden and neurons must be >= 1, got {hidden}, {neuron_hidden}, {neurons}"
            )
        if not (0.0 <= closed <= 1.0 and 0.0 <= closed_neurons <= 1.0):
            raise ValueError(f"closed and closed_neurons must be shares in [0, 1], got {closed} and {closed_neurons}")
        if not 0 <= least <= h:
            raise ValueError(f"least must be between 0 and the {h} KV heads of a layer, got {least}")
        self.shape = shape
        self.query_heads, self.width, self.neurons = query_heads, width, neurons
        self.hidden, self.neuron_hidden = hidden, neuron_hidden
        self.closed, self.closed_neurons, self.least = float(closed), float(closed_neurons), least
        self.predictor: Predictor | None = None
        self.neuron_predictor: Predictor | None = None

    @property
    def num_features(self) -> int:
        return 0

    def at_layer(self, index: int) -> ShadowTokenGate:
        if index == 0:
            self.predictor = Predictor(self.width, self.hidden, self.shape.num_layers * self.query_heads)
            outputs = (self.shape.num_layers - 1) * self.neurons  # layer 0 is dense, and this is the large matrix
            self.neuron_predictor = Predictor(self.width, self.neuron_hidden, max(1, outputs))
        return self

    def misfit(self, config: Any) -> str | None:
        found = head_misfit(config, self.query_heads, self.width)
        if found is not None:
            return found
        return mlp_misfit(config, self.neurons)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :0]

    @torch.no_grad()
    def choose(self, attended: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens run on.

        Args:
            attended: [R, H * G * D], layer 0's attention output.
            strength: see ``share_at``.

        Returns:
            KV groups bool [R, L, H] and neurons bool [R, L, M]; all of layer 0.

        Raises:
            ValueError: this is not layer 0's gate.
        """
        if self.predictor is None or self.neuron_predictor is None:
            raise ValueError("only layer 0's gate holds the predictors: see at_layer()")
        layers, h = self.shape.num_layers, self.shape.num_kv_heads
        rows = attended.shape[0]
        groups = torch.ones(rows, layers, h, dtype=torch.bool)
        neurons = torch.ones(rows, layers, self.neurons, dtype=torch.bool)
        scores = self.predictor(attended).float().unflatten(-1, (layers, h, -1)).sum(-1)[:, 1:]
        count = int(share_at(self.closed, strength) * (layers - 1) * h + 1e-6)
        for row in range(rows):
            groups[row, 1:] = ~close_lowest(scores[row], count, self.least)
        shut = int(share_at(self.closed_neurons, strength) * self.neurons + 1e-6)
        if shut and layers > 1:
            values = self.neuron_predictor(attended).float().unflatten(-1, (layers - 1, self.neurons)).numpy()
            bound = np.partition(values, shut - 1, axis=-1)[
                ..., shut - 1 : shut
            ]  # 40 times as fast as torch's kthvalue
            neurons[:, 1:] = torch.from_numpy(values > bound)
        return groups, neurons

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        """All NEVER."""
        return torch.full((self.num_units, features.shape[0]), NEVER, dtype=torch.int64, device=features.device)

    def log_visibility(self, features: torch.Tensor, **soft: float) -> torch.Tensor:
        raise NotImplementedError("ShadowLLM has no soft visibility: its predictor learns from gradients of the loss")


def mlp_misfit(config: Any, neurons: int) -> str | None:
    """What of a base's MLP is not as the token form needs it, in a sentence; None when all is."""
    experts = next((name for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
                    if getattr(config, name, None)), None)  # fmt: skip
    if experts is not None:
        return f"the base model is a mixture of experts ({experts}): method 'shadow_token' needs dense gated MLPs."
    if getattr(config, "hidden_act", None) != "silu":
        return f"the base model's MLP has hidden_act {getattr(config, 'hidden_act', None)}: 'shadow_token' needs silu."
    if getattr(config, "mlp_bias", False) or getattr(config, "attention_bias", False):
        return "the base model's projections have biases, which method 'shadow_token' does not know."
    if neurons != config.intermediate_size:
        return f"drop_gate.params.neurons is {neurons} but the base model's MLPs have {config.intermediate_size}."
    return None
