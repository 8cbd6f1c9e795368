"""The contract between a drop gate and the machinery that serves or trains it.

For one request, layer and KV head, key j has an *expiry*: the first query position that can no longer see it.
Query i sees key j iff ``j <= i < expiry[j]``. A gate proposes expiries; they are only ever lowered.
Gates know nothing of blocks or pages, the cache knows nothing of gates. Torch only: vLLM's worker and the trainer
import the same files, so that what was trained is what is served.

Dimension letters: B batch, T tokens, D_model hidden size, H KV heads, F features a token, r remembered numbers a token,
E eviction units of a layer (1 for a layer-wide gate, H for one decision per KV head).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import nn

NEVER = 2**31 - 1
"""Expiry of a key that no query has rejected. Fits int32."""


class Reveal(StrEnum):
    """When the expiry of key j becomes known."""

    AT_WRITE = "at_write"
    DELAYED = "delayed"
    BY_QUERY = "by_query"
    AT_BOUNDARY = "at_boundary"
    PER_REQUEST = "per_request"
    NONE = "none"  # no key ever expires: the method skips computation alone


def by_token(reveal: Reveal | None, routes: bool) -> bool:
    """Whether gates of this kind decide about single keys from nothing but features of tokens: not from attention or outputs of
    heads, nor about many keys at once, nor about what is computed."""
    return not routes and reveal in (Reveal.BY_QUERY, Reveal.DELAYED, Reveal.AT_WRITE)


def on_gpu(reveal: Reveal | None, routes: bool) -> bool:
    """Whether gates of this kind are served on a GPU: those that decide about single keys from features, and those that do so at
    boundaries from attention."""
    return by_token(reveal, routes) or (reveal is Reveal.AT_BOUNDARY and not routes)


class Reads(StrEnum):
    """What a gate's ``forward`` is given of a token: the layer's normed input, its unnormed input (the residual stream), or
    the borrowed numbers of its query, after projection and q_norm and before RoPE (``borrowed.py``)."""

    INPUT = "input"
    STREAM = "stream"
    QUERY = "query"


class Scope(StrEnum):
    """Who shares one decision: all KV heads of a layer, or each KV head for itself."""

    LAYER = "layer"
    KV_HEAD = "kv_head"


@dataclass(frozen=True)
class GateShape:
    """What a gate must know of the base model. Units: D_model numbers, H heads, L layers."""

    hidden_size: int
    num_kv_heads: int
    num_layers: int


@dataclass(frozen=True)
class Protection:
    """Keys that no gate may drop: the first ``sinks`` tokens, and every key younger than ``window`` tokens
    (query n may drop key j only if ``n - j > window``). Both 0 in the published DCP. And the positions that a request
    spares."""

    sinks: int = 0
    window: int = 0
    spared: frozenset[int] = frozenset()


def decision_shift(strength: float) -> float:
    """Shift of the decision for a strength, in units of the gate's own scale.

    0 opens every gate (+inf), 1 is as trained (0), larger values drop more (down to -1, never reached).

    Raises:
        ValueError: strength is negative or not a number.
    """
    if not strength >= 0.0:
        raise ValueError(f"strength must be >= 0, got {strength}")
    return math.inf if strength == 0.0 else 1.0 / strength - 1.0


class Gate(nn.Module, ABC):
    """One layer's drop gate. ``forward`` maps the layer's normed input to features, from which expiries follow.

    Class attributes declare how it is served: ``reveal``, ``scope``, ``unit`` (scale of ``decision_shift``), and whether
    rows of soft visibility depend on earlier rows (``row_carry``). ``scope``, ``reads``, ``unit``, ``borrows`` and
    ``whole_prompt`` may depend on the gate's parameters; ``borrows``: attention must ignore a number of each group's first
    query head (``borrowed.py``); ``routes``: what it decides is which tokens a layer runs on (``routing.py``);
    ``whole_prompt``: and it must see a prompt whole (``prompt.py``).
    """

    method: ClassVar[str]
    reveal: ClassVar[Reveal]
    scope: Scope
    reads: Reads = Reads.INPUT
    unit: float = 1.0
    row_carry: ClassVar[bool] = False
    borrows: bool = False
    routes: ClassVar[bool] = False
    whole_prompt: bool = False
    softens: ClassVar[bool] = True
    """Whether there is a soft twin, so that the gate can be trained through attention."""
    protects: ClassVar[bool] = True
    """Whether the gate honours a ``Protection``."""

    shape: GateShape

    @property
    @abstractmethod
    def num_features(self) -> int:
        """F: numbers a token hands to the attention op."""

    @property
    def projection(self) -> nn.Linear | None:
        """The layer that is all of ``forward``, so that it may be computed together with the base's projections; None where
        more is done."""
        return None

    @property
    def num_remembered(self) -> int:
        """r: of these, numbers kept per token for later queries; they live in a lane of their own. 0 = none."""
        return 0

    @property
    def num_units(self) -> int:
        """E: independent decisions per key in this layer."""
        return 1 if self.scope is Scope.LAYER else self.shape.num_kv_heads

    def at_layer(self, index: int) -> Gate:
        """Tell a fresh gate which layer it is, 0 to L - 1; returns it. Few gates want to know."""
        return self

    def at_rank(self, rank: int, ranks: int) -> Gate:
        """Cut a gate down to what one of several tensor parallel ranks decides; returns it.

        A decision that all KV heads share stays whole, on every rank. Where each KV head decides for itself, the gate keeps
        the heads of the rank, ``own_heads``, with their parameters: its shape, features and units are then the rank's.

        Raises:
            ValueError: the KV heads do not divide among the ranks.
            NotImplementedError: the method cannot be split.
        """
        if ranks == 1:
            return self
        heads = own_heads(self.shape, rank, ranks)
        if self.scope is Scope.KV_HEAD:
            self.keep_heads(heads)
            self.shape = replace(self.shape, num_kv_heads=heads.stop - heads.start)
        return self

    def keep_heads(self, heads: slice) -> None:
        """Drop the parameters of all KV heads but these, of a gate in which each decides for itself; the shape is still the
        base's. See ``at_rank``."""
        raise NotImplementedError(f"{self.method} gates cannot be split among ranks")

    def misfit(self, config: Any) -> str | None:
        """What of the gate's parameters does not fit a base's Hugging Face config, in a sentence; None when all does."""
        return None

    @classmethod
    def state_problem(cls, state: dict[str, torch.Tensor]) -> str | None:
        """Why a layer's tensors, finite and of the right shapes, cannot be served; None when they can."""
        return None

    @classmethod
    def check_states(cls, states: Sequence[dict[str, torch.Tensor]]) -> None:
        """Refuse gate tensors that do not go together: one state dict a layer, names and shapes checked already.

        Raises:
            ValueError: saying which and why.
        """
        return

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of each token.

        Args:
            x: [..., D_model], the output of the layer's first norm (what feeds Q, K and V), or what ``reads`` says: the
                stream [..., D_model], or numbers of the query [..., H].

        Returns:
            [..., F], in the dtype of ``x``.
        """

    @abstractmethod
    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        """Naive hard expiries of a whole sequence: the definition that every fast path is tested against.

        Args:
            features: [T, F].
            strength: see ``decision_shift``.
            protection: keys exempt from dropping.

        Returns:
            int64 [E, T], NEVER where no query of the sequence dropped the key.
        """

    @abstractmethod
    def log_visibility(self, features: torch.Tensor, **soft: float) -> torch.Tensor:
        """The soft twin: log V[n, j], added to the attention logits while training.

        Args:
            features: [B, T, F].
            soft: the method's own knobs (``alpha`` and ``leak`` for DCP, ``tau`` for DMS).

        Returns:
            float32 [B, E, T, T] (query, key), <= 0, non-increasing in the query; 0 for j >= n. Its hard limit is
            the expiry mask. Float64 for float64 features.
        """

    def soft_inputs(self, features: torch.Tensor) -> torch.Tensor:
        """All that ``visibility_rows`` depends on, token by token: features, and the gate's own parameters if it has any.

        The rows are computed again in the backward pass, and gradients reach the gate's parameters through here only.

        Args:
            features: [B, T, F].

        Returns:
            float32 [B, T, F'] (float64 for float64 features).
        """
        return at_least_float32(features)

    def visibility_rows(
        self, inputs: torch.Tensor, start: int, carry: torch.Tensor | None, **soft: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``log_visibility`` for the query rows from ``start``, in a form that needs no T x T tensor. Torch operations
        only, and no parameter of the gate: see ``soft_inputs``.

        The default computes all rows and slices: right for any gate that has no parameters but those of ``forward``,
        lean for none.

        Args:
            inputs: [B, S, F'], ``soft_inputs`` of tokens 0 to S - 1: rows see no later token.
            start: first query row, 0 <= start < S.
            carry: [B, E, S] as returned for the rows before ``start``, 0 for keys from ``start``; zeros at first. None
                without ``row_carry``.
            soft: as for ``log_visibility``.

        Returns:
            log V [B, E, S - start, S] and the carry [B, E, S] for the next rows (None without ``row_carry``).
        """
        return self.log_visibility(inputs, **soft)[:, :, start:], None


def own_heads(shape: GateShape, rank: int, ranks: int) -> slice:
    """KV heads of a tensor parallel rank, as vLLM deals them out: in order, equally many each.

    Raises:
        ValueError: they do not divide.
    """
    each, rest = divmod(shape.num_kv_heads, ranks)
    if rest:
        raise ValueError(f"{shape.num_kv_heads} KV heads do not divide among {ranks} ranks")
    return slice(rank * each, (rank + 1) * each)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is already."""
    return x if x.dtype == torch.float64 else x.float()


def expiry_mask(expiry: torch.Tensor) -> torch.Tensor:
    """Visibility of each key to each query: ``j <= i < expiry[j]``.

    Args:
        expiry: int [E, T].

    Returns:
        bool [E, T, T] (query, key).
    """
    t = expiry.shape[-1]
    pos = torch.arange(t, device=expiry.device)
    return (pos[None, None, :] <= pos[None, :, None]) & (pos[None, :, None] < expiry[:, None, :])


def protected_from(protection: Protection, num_tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """First query position at which each key may be dropped at all: int64 [T], NEVER for sinks and what is spared."""
    pos = torch.arange(num_tokens, device=device)
    never = pos < protection.sinks
    if protection.spared:
        never |= torch.isin(pos, torch.tensor(sorted(protection.spared), device=device))
    first = pos + protection.window + 1
    return torch.where(never, torch.full_like(first, NEVER), first)
