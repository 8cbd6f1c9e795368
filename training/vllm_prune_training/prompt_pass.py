"""One forward pass under prompt gates: who is left of each prompt after each layer, soft or hard.

The naive twin of what the server does with whole prompts (``gates/prompt.py``). Nothing is gathered here: eliminated
tokens are computed on, but no one sees their keys in later layers and their queries count nowhere, which is the same for
everybody else. In the soft form a token's queries count by how far it survives, so that the hard limit is the hard form.
Where there is no prompt left to decide about (from the last layer on), nothing is computed.

Dimension letters: B batch, T tokens, H KV heads, G query heads a KV head, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_prune.gates.base import NEVER, Protection, at_least_float32
from vllm_prune.gates.prompt import LOG_FLOOR, PromptGate, protected_tokens, received

from .prompt_lengths import prompt_lengths

Attend = Callable[..., Tensor]


@dataclass
class PromptPass:
    """State of the pass.

    Attributes:
        gates: one a layer.
        prompt: int64 [B], P.
        tokens: T.
        mode: soft or hard.
        strength, protection: as served; the soft form is at strength 1.
        soft: temperatures.
        again: soft attention is computed again in the backward pass instead of kept.
        alive: bool [B, T], hard: tokens that the layer to come computes. True from P on.
        log_s: [B, T], soft: log survival so far.
        kept: mean survival of the prompts' tokens in each layer, so far.
        expiry: int64 [B, 1, T] of each layer, so far (hard).
        scores: what each layer's decision was about, for analysis: [B, T], 0 where there is none.
    """

    gates: Sequence[PromptGate]
    prompt: Tensor
    tokens: int
    mode: Literal["soft", "hard"]
    strength: float
    protection: Protection
    soft: dict[str, Any]
    again: bool = True
    alive: Tensor = field(init=False)
    log_s: Tensor = field(init=False)
    kept: list[Tensor] = field(default_factory=list)
    expiry: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.positions = torch.arange(self.tokens, device=self.prompt.device)
        self.alive = torch.ones(len(self.prompt), self.tokens, dtype=torch.bool, device=self.prompt.device)
        self.log_s = torch.zeros(self.alive.shape, device=self.prompt.device)
        self.in_prompt = self.positions < self.prompt[:, None]
        self.protected = torch.stack([protected_tokens(self.positions, int(p), self.protection) for p in self.prompt])

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, masked: Attend) -> Tensor:
        """Attention of layer ``index``, which then decides about the next.

        Args:
            query: [B, H * G, T, D]; key, value: [B, H, T, D].
            scaling: of the logits.
            masked: attention under a bool mask (``masked.attend_masked``).

        Returns:
            [B, T, H * G, D].
        """
        last = index == len(self.gates) - 1
        if self.mode == "soft":
            self.kept.append(self._mean(self.log_s.exp()))
            run: Any = self._soft
            args = (query, key, value, scaling, self.log_s)
            out, scores = checkpoint(run, *args, use_reentrant=False) if self.again else run(*args)
            if not last:
                step = self.gates[index].log_survival(scores, **self.soft)
                free = self.in_prompt & ~self.protected
                self.log_s = (self.log_s + torch.where(free, step, 0.0)).clamp_min(LOG_FLOOR)
            return out  # type: ignore[no-any-return]
        self.kept.append(self._mean(self.alive.float()))
        self.expiry.append(torch.where(self.alive, NEVER, self.positions)[:, None])
        seen = self.alive[:, None, None, :] & (self.positions <= self.positions[:, None])
        seen = seen | torch.eye(self.tokens, dtype=torch.bool, device=seen.device)  # or a gone query's row were empty
        out = masked(query, key, value, scaling, seen)
        if not last and self.strength > 0.0:
            self._decide(self.gates[index], query, key, scaling)
        return out

    def _mean(self, survival: Tensor) -> Tensor:
        return torch.where(self.in_prompt, survival, 0.0).sum() / self.in_prompt.sum()

    @torch.no_grad()
    def _decide(self, gate: PromptGate, query: Tensor, key: Tensor, scaling: float) -> None:
        alive = self.alive.clone()
        found = torch.zeros(alive.shape, device=alive.device)
        for row, prompt in enumerate(self.prompt.tolist()):
            at = self.alive[row, :prompt].nonzero()[:, 0]
            q, k = query[row][:, at].transpose(0, 1), key[row][:, at].transpose(0, 1)
            scores = received(q, k, scaling)
            alive[row, at] = gate.survives(scores, at, prompt, self.strength, self.protection)
            found[row, at] = scores.float()
        self.alive = alive
        self.scores.append(found)

    def _soft(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, log_s: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, T, H * G, D] and scores [B, T]: attention to past keys is biased by their log survival."""
        b, heads, t, d = query.shape
        h = key.shape[1]
        past = self.positions < self.positions[:, None]
        bias = torch.where(past, log_s[:, None, :], 0.0)
        bias = bias.masked_fill(self.positions > self.positions[:, None], float("-inf"))  # [B, T, T]
        logits = at_least_float32(query.reshape(b, h, heads // h, t, d) @ key[:, :, None].transpose(-1, -2))
        weights = (logits * scaling + bias[:, None, None]).softmax(dim=-1)  # [B, H, G, T, T]
        out = (weights.to(value.dtype) @ value[:, :, None]).reshape(b, heads, t, d).transpose(1, 2)
        s = log_s.exp()
        live = 1.0 + s.cumsum(-1) - s  # a token counts whole to itself
        counts = torch.where(self.in_prompt, s, 0.0)[:, :, None] * past  # queries, by how far they survive
        mean = weights.mean(dim=(1, 2))
        scores = (mean * counts * live[:, :, None]).sum(1) / counts.sum(1).clamp_min(1e-9)
        return out, scores


def start_prompts(
    gates: list[Any],
    ids: Tensor,
    prompt: int | Tensor | None,
    mode: Literal["soft", "hard"],
    strength: float,
    protection: Protection,
    soft: dict[str, Any],
    again: bool,
) -> PromptPass | None:
    """The pass over ids [B, T]; None for gates that do not decide about whole prompts. Others: see ``PromptPass``.

    Raises:
        PruneError, ValueError: as ``prompt_lengths``.
    """
    if not isinstance(gates[0], PromptGate):
        return None
    lengths = prompt_lengths(prompt, *ids.shape, ids.device)
    return PromptPass(gates, lengths, ids.shape[1], mode, strength, protection, soft, again)
