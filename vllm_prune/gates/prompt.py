"""Whole-prompt elimination: tokens of a prompt that leave the computation at some depth, by the attention they received.

What the prompt forms of LTP (arXiv 2107.00910) and ACC-style elimination (after arXiv 2201.03327) share. In layer l the
surviving prompt tokens attend to each other; the score of token j is the attention that it receives there,

    s_j = mean over query heads and over surviving prompt queries n, j < n < P, of A[n, j] * c_n

with c_n the surviving tokens up to n, itself included: 1 is a uniform share, whatever the length. A token that is
eliminated in layer l is not computed in any layer > l and stores no key there: its expiry is j in those, NEVER in the
others. (Ours: the papers drop it before the same layer's FFN.) Eliminated tokens neither query nor receive. Protected: the
first ``sinks`` tokens, and those with P - 1 - j <= ``window``, so the last prompt token always. Tokens from P on are
never eliminated. The last layer's decision would have no layer to take effect in: it is not taken.

Scores read later queries of the prompt, so that they are not causal within it: the whole prompt must be computed at once, and
logits before the prompt's last token mean nothing.

FTP's prompt mode (``ftp.py``) reads the same scores, of the tokens that a block ran on.

Letters: B batch, T tokens, P of them of the prompt, N that this layer runs on, M whose keys are seen there (N, unless keys of
skipped tokens are kept), H KV heads, G query heads a KV head, D head size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from vllm_prune.gates.base import NEVER, Gate, GateShape, Protection, Reveal, Scope, at_least_float32

LOG_FLOOR = -30.0
"""Clamp of summed log survival, as for DCP: exp(-30) is nothing to a softmax, and finite in every dtype."""


class PromptGate(Gate):
    """One layer's decision about the prompt's tokens. Its features are the scores, which come from attention and not
    from the layer's input: ``forward`` has nothing to add.

    Args:
        shape: of the base model.
    """

    reveal: ClassVar[Reveal] = Reveal.AT_WRITE
    scope: Scope = Scope.LAYER
    routes: ClassVar[bool] = True
    whole_prompt: bool = True

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.shape = shape

    @property
    def num_features(self) -> int:
        return 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :0]

    @abstractmethod
    def survives(
        self, scores: torch.Tensor, positions: torch.Tensor, prompt: int, strength: float, protection: Protection
    ) -> torch.Tensor:
        """Who is left after this layer: the definition.

        Args:
            scores: float32 [N], of the prompt's survivors so far, in order; the last one's means nothing.
            positions: int64 [N], where they stand in the prompt.
            prompt: P.
            strength: 0 lets all survive.
            protection: see the module.

        Returns:
            bool [N].
        """

    @abstractmethod
    def log_survival(self, scores: torch.Tensor, **soft: Any) -> torch.Tensor:
        """The soft twin: log of how far a token with this score survives, in this layer alone. Protection is the
        caller's.

        Args:
            scores: [B, P].
            soft: ``tau``, a temperature in units of the score.

        Returns:
            float32 [B, P] (float64 for float64 scores), <= 0. Its hard limit is ``survives``.
        """

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        """Expiries in all later layers of a prompt of which everyone was left: int64 [1, P], j or NEVER.

        Args:
            features: [P, 1], the scores.
            strength, protection: see ``survives``.
        """
        p = features.shape[0]
        positions = torch.arange(p, device=features.device)
        return torch.where(self.survives(features[:, 0], positions, p, strength, protection), NEVER, positions)[None]

    def log_visibility(self, features: torch.Tensor, **soft: Any) -> torch.Tensor:
        """log V in the next layer, float32 [B, 1, P, P]: of the key alone, 0 for j >= n. Nobody is protected but
        the last token.

        Args:
            features: [B, P, 1], the scores.
        """
        log_s = self.log_survival(features[..., 0], **soft).clamp_min(LOG_FLOOR)
        p = log_s.shape[-1]
        past = torch.ones(p, p, dtype=torch.bool, device=log_s.device).tril(-1)
        return torch.where(past, log_s[:, None, None, :], 0.0)


def protected_tokens(positions: torch.Tensor, prompt: int | torch.Tensor, protection: Protection) -> torch.Tensor:
    """bool, the shape of ``positions``: tokens of a prompt of P tokens (a number, or one that broadcasts) that stay whatever
    their score; those after the prompt do."""
    return (positions < protection.sinks) | (prompt - 1 - positions <= protection.window)


def received_in(weights: torch.Tensor, asked: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Scores from whole attention rows: the definition.

    Args:
        weights: [..., T, T] (query, key), softmax, mean over query heads.
        asked: bool [..., T], queries that count.
        live: [..., T], keys that each query sees, its own included.

    Returns:
        [..., T], in the dtype of the weights; 0 where no query that counts follows.
    """
    later = weights.tril(-1) * (live * asked)[..., None]
    after = asked.flip(-1).cumsum(-1).flip(-1) - asked.long()
    return later.sum(-2) / after.clamp_min(1)


def received_naive(
    query: torch.Tensor, key: torch.Tensor, scale: float, own: torch.Tensor | None = None
) -> torch.Tensor:
    """Scores of the tokens of one prompt that a layer runs on, with the whole attention matrix.

    Args:
        query: [N, H * G, D], of these tokens; key: [M, H, D], all that they see, both in order.
        scale: of the logits.
        own: int64 [N], which key is each query's own, rising; None where M = N.

    Returns:
        float32 [N] (float64 for float64 inputs); 0 for the last one, whom nobody follows.
    """
    m, heads = key.shape[:2]
    place = torch.arange(m, device=query.device)
    own = place if own is None else own
    q = at_least_float32(query).transpose(0, 1)
    k = at_least_float32(key).repeat_interleave(query.shape[1] // heads, dim=1).transpose(0, 1)
    weights = (q @ k.transpose(1, 2) * scale).masked_fill(place > own[:, None], float("-inf")).softmax(-1).mean(0)
    whole = weights.new_zeros(m, m).index_copy(0, own, weights)
    asked = torch.zeros(m, dtype=torch.bool, device=query.device).index_fill(0, own, True)
    return received_in(whole, asked, (place + 1).to(weights.dtype))[own]


TILE = 128
"""Queries whose attention rows are held at a time by ``received``."""


def received(query: torch.Tensor, key: torch.Tensor, scale: float, own: torch.Tensor | None = None) -> torch.Tensor:
    """``received_naive``, ``TILE`` query rows at a time, each over the keys that it can see. Same arguments and result."""
    n, all_heads, d = query.shape
    m, heads = key.shape[:2]
    group = all_heads // heads
    dtype = torch.promote_types(torch.float32, query.dtype)
    k = key.to(dtype).permute(1, 2, 0).contiguous()  # [H, D, M]
    q = (query.to(dtype) * scale).view(n, heads, group, d).permute(1, 2, 0, 3)  # [H, G, N, D]
    total = torch.zeros(m, dtype=torch.float64, device=query.device)
    place = torch.arange(m, device=query.device)
    own = place if own is None else own
    for start in range(0, n, TILE):
        at = own[start : start + TILE]
        count, first, seen = len(at), int(at[0]), int(at[-1]) + 1  # keys before the first are seen by the whole tile
        rows = q[:, :, start : start + count].reshape(heads, group * count, d)
        logits = torch.bmm(rows, k[:, :, :seen]).view(heads * group, count, seen)
        logits[:, :, first:].masked_fill_(place[first:seen] > at[:, None], float("-inf"))
        weights = logits.softmax(-1)
        weights[:, :, first:].masked_fill_(place[first:seen] >= at[:, None], 0.0)  # nobody receives from itself
        total[:seen] += torch.einsum("hns,n->s", weights, (at + 1).to(dtype)).double()
    after = torch.arange(n - 1, -1, -1, device=query.device).clamp_min(1)
    return (total[own] / all_heads / after).to(dtype)


def larger_share_naive(scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """``larger_share``, every pair compared."""
    larger = (scores[..., None, :] > scores[..., None]) & among[..., None, :]
    return larger.sum(-1) / among.sum(-1, keepdim=True)


def larger_share(scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Share of some tokens whose score is larger than a token's: its rank, 0 for the best.

    Args:
        scores: [..., T].
        among: bool [..., T], the tokens that are counted, at least one.

    Returns:
        float32 [..., T].
    """
    rising = scores.masked_fill(~among, float("-inf")).sort(dim=-1).values
    not_larger = torch.searchsorted(rising, scores.contiguous(), right=True)
    return (scores.shape[-1] - not_larger) / among.sum(-1, keepdim=True)
