"""Sliding window, with sinks through ``protect.sinks`` (StreamingLLM, Xiao et al., ICLR 2024, arXiv 2309.17453).

A baseline without parameters: every key of a layer is dropped w tokens after it was written,

    expiry_j = j + w' + 1,    w' = floor(w / strength)

so that with c sinks a layer holds at most c + w' + 1 keys. Known when the key is written (``Reveal.AT_WRITE``).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_prune.gates.base import NEVER, GateShape, Protection, Reveal, Scope, protected_from
from vllm_prune.gates.hard import HardGate

MOST_TOKENS = 2**30
"""Positions plus a window must fit int32."""


class WindowGate(HardGate):
    """A window over the last tokens, for one layer. Needs no training and holds no weights.

    Args:
        shape: of the base model.
        window: w, tokens that a key stays visible after its own at strength 1. >= 0.
    """

    method: ClassVar[str] = "window"
    reveal: ClassVar[Reveal] = Reveal.AT_WRITE
    scope: Scope = Scope.LAYER

    def __init__(self, shape: GateShape, window: int = 512) -> None:
        super().__init__()
        if not 0 <= window <= MOST_TOKENS:
            raise ValueError(f"window must be between 0 and {MOST_TOKENS}, got {window}")
        self.shape = shape
        self.window = window

    def window_at(self, strength: float) -> int:
        """w' in tokens for a strength above 0: 1 is as given, 2 half of it, 0.5 twice as much.

        Raises:
            ValueError: strength is not above 0 (0 opens the gate, which has no window).
        """
        if not strength > 0.0:
            raise ValueError(f"a window needs a strength above 0, got {strength}")
        return int(min(self.window / strength, MOST_TOKENS))

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        t = features.shape[0]
        pos = torch.arange(t, device=features.device)
        if strength == 0.0:
            return torch.full((1, t), NEVER, dtype=torch.int64, device=features.device)
        return (pos + self.window_at(strength) + 1).maximum(protected_from(protection, t, features.device))[None]
