"""Gates that route tokens: a skipped (token, layer) pair bypasses the layer's computation and stores no KV there.

The decision about token j in a layer is made when j gets there, from *facts* known by then: its position, and attention in the
last layer that computed it. expiry_j = j where it is skipped (never stored), NEVER otherwise. All heads of a layer share it.
Nothing of it reaches the attention op: the layer is simply not run on the token.

Two kinds of facts. *Causal*: from the token's own row of attention, so that it can be decided about as it comes. Of the *whole
prompt* (``whole_prompt``): from what the prompt's later tokens gave it, so that the prompt must be there; what follows the
prompt runs everywhere.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from vllm_prune.gates.base import NEVER, Gate, Protection, Reveal, Scope
from vllm_prune.gates.dcp import LOG_FLOOR
from vllm_prune.gates.prompt import protected_tokens

FACTS = 3
"""Facts of a token: its position j; a score of which 1 is a uniform share; a rank, 0 for the best. Causal: A[j, j] times the
row's live keys, averaged over heads; share of the row's live keys with more weight than its own. Of a whole prompt: attention
received (``prompt.received``); share of the prompt's tokens that the layer ran on with a larger score. All 0 but the position
before the first layer."""


class RoutingGate(Gate):
    """One layer's routing decision. Its features are facts [..., T, 3]; ``forward`` hands them on as they are."""

    reveal: ClassVar[Reveal] = Reveal.AT_WRITE
    scope: Scope = Scope.LAYER
    routes: ClassVar[bool] = True

    @property
    def num_features(self) -> int:
        return FACTS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Facts, not the layer's input: x [..., 3], returned as it is."""
        if x.shape[-1] != FACTS:
            raise ValueError(f"a routing gate takes facts [..., {FACTS}], got {list(x.shape)}")
        return x

    @property
    def keeps_kv(self) -> bool:
        """Whether a skipped token's key and value are made and stored all the same, from the stream that passes by."""
        return False

    @property
    def always_runs(self) -> bool:
        """Whether the layer runs on every token at any strength, so that nobody needs facts for it."""
        return False

    @abstractmethod
    def keep(self, facts: torch.Tensor, strength: float) -> torch.Tensor:
        """Hard decision: facts float32 [..., 3] to bool [...], True where the layer runs. All True at strength 0."""

    @abstractmethod
    def keep_soft(self, facts: torch.Tensor, strength: float = 1.0, **soft: Any) -> torch.Tensor:
        """Its soft twin, in [0, 1], float32 [...]."""

    def exempt(
        self, position: torch.Tensor, protection: Protection, prompt: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens that every layer runs on, whatever the router says: the first ``sinks``; with facts of the whole prompt also
        its last token, the ``window`` before it, and all that follows.

        Args:
            position: [...].
            protection: see ``Protection``.
            prompt: P of each token's request, broadcast to [...]; read where facts are of the whole prompt.

        Returns:
            bool [...].

        Raises:
            ValueError: a window is protected, but facts are causal: a token that is never stored has none; or the prompt's
                length is not told.
        """
        if self.whole_prompt:
            if prompt is None:
                raise ValueError("facts of the whole prompt need its length")
            return protected_tokens(position, prompt, protection)  # those after it are no further from its end
        if protection.window:
            raise ValueError("protect.window means nothing for a method that decides when a token is written")
        return position < protection.sinks

    def runs_on(
        self, facts: torch.Tensor, strength: float, protection: Protection, prompt: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """``keep``, and those that are exempt. Raises as ``exempt``."""
        return self.keep(facts, strength) | self.exempt(facts[..., 0], protection, prompt)

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        """With facts of the whole prompt: of a sequence that is all prompt."""
        position = torch.arange(features.shape[0], device=features.device)
        if self.keeps_kv:
            return torch.full_like(position, NEVER)[None]
        kept = self.runs_on(features.float(), strength, protection, len(position))
        return torch.where(kept, torch.full_like(position, NEVER), position)[None]

    def log_visibility(self, features: torch.Tensor, **soft: float) -> torch.Tensor:
        """log of ``keep_soft`` of the key, for every later query. The row of a skipped token does not exist."""
        kept = self.keep_soft(features, **soft)
        t = kept.shape[-1]
        log_v = kept.clamp_min(1e-30).log().clamp_min(LOG_FLOOR)
        past = torch.ones(t, t, dtype=torch.bool, device=kept.device).tril(-1)
        return torch.where(past, log_v[:, None, None, :], torch.zeros((), dtype=kept.dtype, device=kept.device))
