"""ShadowLLM (Akhauri et al., EMNLP 2024, arXiv 2406.16635), request form: whole KV heads close at the prompt's end.

One predictor for the network, a two-layer ReLU MLP, reads layer 0's attention output (all heads, before the output
projection) at the prompt's last position P - 1, scaled to [0, 1] (section 3 of the paper), and scores every query head of
every layer: the loss expected from removing it. Ours, so that memory comes free: heads are ranked by KV group (sum of its
members' scores) over layers 1 to L - 1, and the lowest share of these lanes closes, once and for all:

    expiry_j = max(P, j) in a closed lane, NEVER in the others                 per (layer, KV head)

A later token is never stored there, not even for itself: its heads of that group say nothing (0). Layer 0 stays dense.
There is no soft twin: the predictor learns from gradients of the loss (``vllm_prune_training.shadow``).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_prune.gates.base import NEVER, Gate, GateShape, Protection, Reveal, Scope


class Predictor(nn.Module):
    """Scores of structures from layer 0's attention output.

    Args:
        width: numbers of the attention output, H * G * D.
        hidden: of the MLP.
        outputs: structures.
    """

    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, attended: torch.Tensor) -> torch.Tensor:
        """Args: attended [..., width]. Returns [..., outputs] in the weights' dtype."""
        x = scaled(attended.float()).to(self.fc1.weight.dtype)
        return self.fc2(torch.relu(self.fc1(x)))  # type: ignore[no-any-return]


def scaled(x: torch.Tensor) -> torch.Tensor:
    """x [..., n], each row moved and stretched to [0, 1]; a constant row becomes 0."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-12)


def share_at(closed: float, strength: float) -> float:
    """The share that is closed at a strength: ``closed`` at 1, none at 0, rising without end towards all.

    Raises:
        ValueError: the strength is negative or not a number.
    """
    if not strength >= 0.0:
        raise ValueError(f"strength must be >= 0, got {strength}")
    return 1.0 - (1.0 - closed) ** strength


def close_lowest(scores: torch.Tensor, count: int, least: int) -> torch.Tensor:
    """Close ``count`` lanes, lowest score first, equal ones in order; a layer's last ``least`` lanes stay open.

    Args:
        scores: [L, H] of layers that may close.
        count: lanes to close; fewer close when ``least`` forbids more.
        least: lanes of each layer that stay open.

    Returns:
        bool [L, H], a subset of what a greater count closes.
    """
    layers, heads = scores.shape
    place = scores.argsort(dim=1, stable=True).argsort(dim=1)  # of each lane among its own layer's, lowest first
    ranked = scores.float().masked_fill(place >= heads - least, math.inf).flatten()
    chosen = ranked.argsort(stable=True)[: min(count, layers * (heads - least))]
    return torch.zeros(layers * heads, dtype=torch.bool, device=scores.device).index_fill(0, chosen, True).view(
        layers, heads
    )  # fmt: skip


class ShadowGate(Gate):
    """ShadowLLM's request form in one layer. Layer 0's gate holds the predictor of all layers, the others hold nothing.

    Args:
        shape: of the base model.
        query_heads: H * G, of the base; must match.
        width: H * G * D, of its attention output; must match.
        hidden: of the predictor.
        closed: share of the lanes (layer, KV head) of layers 1 to L - 1 that close at strength 1. In [0, 1].
        least: KV heads of each layer that stay open whatever their scores.
    """

    method: ClassVar[str] = "shadow"
    reveal: ClassVar[Reveal] = Reveal.PER_REQUEST
    softens: ClassVar[bool] = False
    protects: ClassVar[bool] = False
    scope: Scope = Scope.KV_HEAD

    def __init__(
        self, shape: GateShape, query_heads: int, width: int, hidden: int = 256, closed: float = 0.3, least: int = 0
    ) -> None:
        super().__init__()
        h = shape.num_kv_heads
        if query_heads < 1 or query_heads % h or width < 1 or width % query_heads:
            raise ValueError(f"query_heads {query_heads} and width {width} do not fit {h} KV heads")
        if hidden < 1:
            raise ValueError(f"hidden must be >= 1, got {hidden}")
        if not 0.0 <= closed <= 1.0:
            raise ValueError(f"closed must be a share between 0 and 1, got {closed}")
        if not 0 <= least <= h:
            raise ValueError(f"least must be between 0 and the {h} KV heads of a layer, got {least}")
        self.shape = shape
        self.query_heads, self.width, self.hidden = query_heads, width, hidden
        self.closed, self.least = float(closed), least
        self.predictor: Predictor | None = None

    @property
    def num_features(self) -> int:
        return 0

    def at_layer(self, index: int) -> ShadowGate:
        if index == 0:
            self.predictor = Predictor(self.width, self.hidden, self.shape.num_layers * self.query_heads)
        return self

    def misfit(self, config: Any) -> str | None:
        return head_misfit(config, self.query_heads, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :0]

    def scores(self, attended: torch.Tensor) -> torch.Tensor:
        """Score of every lane, layer 0 included: float32 [..., L, H], from its attention output [..., H * G * D].

        Raises:
            ValueError: this is not layer 0's gate.
        """
        if self.predictor is None:
            raise ValueError("only layer 0's gate holds the predictor: see at_layer()")
        groups = (self.shape.num_layers, self.shape.num_kv_heads, -1)
        return self.predictor(attended).float().unflatten(-1, groups).sum(-1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def close(self, attended: torch.Tensor, strength: float) -> torch.Tensor:
        """Which lanes close for a request.

        Args:
            attended: [H * G * D], layer 0's attention output at the prompt's last position.
            strength: see ``share_at``.

        Returns:
            bool [L, H]; none of layer 0.
        """
        scores = self.scores(attended)
        closed = torch.zeros_like(scores, dtype=torch.bool)
        lanes = (self.shape.num_layers - 1) * self.shape.num_kv_heads
        closed[1:] = close_lowest(scores[1:], int(share_at(self.closed, strength) * lanes + 1e-6), self.least)
        return closed

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        """All NEVER: the features of a layer say nothing, see ``close`` and ``closed_expiry``."""
        return torch.full((self.num_units, features.shape[0]), NEVER, dtype=torch.int64, device=features.device)

    def log_visibility(self, features: torch.Tensor, **soft: float) -> torch.Tensor:
        raise NotImplementedError("ShadowLLM has no soft visibility: its predictor learns from gradients of the loss")


def closed_expiry(closed: torch.Tensor, prompt: int, tokens: int) -> torch.Tensor:
    """Expiries of a sequence under a request's decision.

    Args:
        closed: bool [..., H].
        prompt: P, tokens of the prompt.
        tokens: T of the sequence.

    Returns:
        int64 [..., H, T].
    """
    at = torch.arange(tokens, device=closed.device).clamp_min(prompt)
    return torch.where(closed[..., None], at, NEVER)


def head_misfit(config: Any, query_heads: int, width: int) -> str | None:
    """What does not fit a base's Hugging Face config, or None."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if query_heads != heads:
        return f"drop_gate.params.query_heads is {query_heads} but the base model has {heads} attention heads."
    if width != heads * size:
        return f"drop_gate.params.width is {width} but the base model's attention output has {heads * size} numbers."
    return None
