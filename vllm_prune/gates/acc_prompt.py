"""ACC-style elimination, prompt form: after Kachuee and Sharifkhani, "Latency Adjustable Transformer Encoder"
(arXiv 2201.03327), whose exact statistic is not public; what is here is ours in that style.

Per layer a retention, and the best-scored tokens up to it survive:

    keep_l = clip(a / strength * P_l, least, 1)              ceil(keep_l * P) tokens of the prompt, protected ones first

P_l is the layer's profile, measured before training: the share of tokens, best first, that hold 90 % of the attention
received (coverage), made non-increasing in depth. One coefficient a for all layers is solved for a budget. Nothing is
trained here: the base is fine-tuned under the elimination. **Offline tuning**: strength divides the coefficient, so one
checkpoint serves a range of speed-ups, chosen at start. What a score is and what elimination means: ``prompt.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from vllm_prune.gates.base import GateShape, Protection, at_least_float32
from vllm_prune.gates.prompt import LOG_FLOOR, PromptGate, protected_tokens

MOST_COEFFICIENT = 1e6


class ACCPromptGate(PromptGate):
    """A layer's retention.

    Args:
        shape: of the base model.
        least: no layer keeps less than this share of the prompt, at any strength. In (0, 1].

    ``profile`` and ``coefficient``, 1 until ``tune``d or read from a state dict, are two scalars.
    """

    method: ClassVar[str] = "acc_prompt"

    profile: torch.Tensor
    coefficient: torch.Tensor

    def __init__(self, shape: GateShape, least: float = 0.02) -> None:
        super().__init__(shape)
        if not 0.0 < least <= 1.0:
            raise ValueError(f"least must be a share above 0, up to 1, got {least}")
        self.least = float(least)
        self.register_buffer("profile", torch.tensor(1.0))
        self.register_buffer("coefficient", torch.tensor(1.0))

    def keep_at(self, strength: float) -> float:
        """Share of the prompt that is left after this layer."""
        if strength == 0.0:
            return 1.0
        return retention(float(self.coefficient) / strength, float(self.profile), self.least)

    def survives(
        self, scores: torch.Tensor, positions: torch.Tensor, prompt: int, strength: float, protection: Protection
    ) -> torch.Tensor:
        # In float64, and rounded before it is rounded up: 0.3 * 10 must be 3 tokens.
        count = min(len(scores), math.ceil(round(self.keep_at(strength) * prompt, 6)))
        ranked = scores.masked_fill(protected_tokens(positions, prompt, protection), math.inf)
        best = ranked.sort(descending=True, stable=True).indices  # of equals, the earlier ones
        out = protected_tokens(positions, prompt, protection)
        out[best[:count]] = True
        return out

    def log_survival(self, scores: torch.Tensor, **soft: Any) -> torch.Tensor:
        """Nothing is soft about a rank: the hard decision at ``strength`` (default 1)."""
        scores = at_least_float32(scores)
        p = scores.shape[-1]
        positions = torch.arange(p, device=scores.device)
        kept = [self.survives(row, positions, p, float(soft.get("strength", 1.0)), Protection()) for row in scores]
        return torch.where(torch.stack(kept), 0.0, LOG_FLOOR).to(scores.dtype)

    @torch.no_grad()
    def tune(self, profile: float, coefficient: float) -> None:
        """Set what calibration found."""
        self.profile.fill_(profile)
        self.coefficient.fill_(coefficient)

    @classmethod
    def check_states(cls, states: Sequence[dict[str, torch.Tensor]]) -> None:
        profile = [float(state["profile"]) for state in states]
        coefficient = {float(state["coefficient"]) for state in states}
        if not all(0.0 < share <= 1.0 for share in profile):
            raise ValueError(f"profile must be shares above 0, up to 1, got {_shown(profile)}")
        if any(deep > shallow for shallow, deep in itertools.pairwise(profile)):
            raise ValueError(f"profile must not increase with depth, got {_shown(profile)}")
        if len(coefficient) != 1:
            raise ValueError(f"coefficient must be the same in all layers, got {_shown(sorted(coefficient))}")
        if not 0.0 < coefficient.pop() <= MOST_COEFFICIENT:
            raise ValueError(f"coefficient must be above 0, up to {MOST_COEFFICIENT:g}")


def retention(coefficient: float, profile: float, least: float) -> float:
    """clip(a P_l, least, 1)."""
    return min(1.0, max(least, coefficient * profile))


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
