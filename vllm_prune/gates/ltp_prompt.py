"""Learned Token Pruning, prompt form (Kim et al., KDD 2022, arXiv 2107.00910, section 3).

Per layer a learned threshold; a token of the prompt is eliminated when it receives less attention,

    survives iff s_j >= strength * theta_l                   theta_l starts at theta * l / L, as published
    soft: log sigmoid((s_j - theta_l) / tau)                 summed over the layers that a token has passed

What a score is and what elimination means: ``prompt.py``. Ours: the score is 1 for a uniform share at any length (the
paper's is 1 / length); layer 0 may learn a threshold too (the published code's never prunes); the soft mask is on the
logits of attention, not on the hidden state, whose scale a pre-norm decoder ignores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from vllm_prune.gates.base import GateShape, Protection, at_least_float32
from vllm_prune.gates.prompt import PromptGate, protected_tokens

MOST_THETA = 1e6


class LTPPromptGate(PromptGate):
    """A layer's threshold.

    Args:
        shape: of the base model.
        theta: threshold that the last layer's would have at first, in uniform shares. >= 0.
    """

    method: ClassVar[str] = "ltp_prompt"

    def __init__(self, shape: GateShape, theta: float = 0.2) -> None:
        super().__init__(shape)
        if not 0.0 <= theta <= MOST_THETA:
            raise ValueError(f"theta must be between 0 and {MOST_THETA:g}, got {theta}")
        self.first_theta = float(theta)
        self.theta = nn.Parameter(torch.tensor(0.0))

    def at_layer(self, index: int) -> LTPPromptGate:
        with torch.no_grad():
            self.theta.fill_(self.first_theta * index / self.shape.num_layers)
        return self

    def survives(
        self, scores: torch.Tensor, positions: torch.Tensor, prompt: int, strength: float, protection: Protection
    ) -> torch.Tensor:
        # A threshold below 0 would turn around with the strength's sign only: it drops nothing at any strength.
        threshold = strength * self.theta.detach().to(scores.dtype)
        return (scores >= threshold) | protected_tokens(positions, prompt, protection)

    def log_survival(self, scores: torch.Tensor, **soft: Any) -> torch.Tensor:
        scores = at_least_float32(scores)
        return F.logsigmoid((scores - self.theta.to(scores.dtype)) / soft["tau"])

    @classmethod
    def check_states(cls, states: Sequence[dict[str, torch.Tensor]]) -> None:
        for layer, state in enumerate(states):
            if abs(float(state["theta"])) > MOST_THETA:
                raise ValueError(f"theta of layer {layer} is {float(state['theta']):g}, beyond {MOST_THETA:g}")
