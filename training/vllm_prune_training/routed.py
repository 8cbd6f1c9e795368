"""Token routing on a Hugging Face decoder: the naive twin of the server's gather and scatter, differentiable.

Every layer computes every token; what a token's decision g in {0, 1} does to it is arithmetic:

    x_out = x_in + g (layer(x_in) - x_in),    and its key has weight g in every later row's softmax.

In training g is straight-through: hard forward, soft backward. A row's own key always counts: the row of a skipped token
is thrown away, but its gradient asks what it would have been. Facts have no gradient.

Letters: B batch, T tokens, L layers, H KV heads, G query heads a KV head, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_prune.errors import PruneError
from vllm_prune.gates.base import Protection, at_least_float32
from vllm_prune.gates.prompt import larger_share, received_in
from vllm_prune.gates.routing import FACTS, RoutingGate

from .prompt_lengths import prompt_lengths


@dataclass
class Routes:
    """What routing knows and did in one forward pass.

    Attributes:
        facts: float32 [B, T, 3], of the last layer that computed each token.
        prompt: int64 [B], P of each row, where facts are of the whole prompt; else None.
        exempt: bool [B, T], tokens that every layer runs on, whatever is decided; None where there is none.
        kept: [B, T] a layer, the decisions g.
        seen: facts that each layer's decision was made from, [B, T, 3].
    """

    facts: torch.Tensor
    prompt: torch.Tensor | None = None
    exempt: torch.Tensor | None = None
    kept: list[torch.Tensor] = field(default_factory=list)
    seen: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, batch: int, tokens: int, device: torch.device, prompt: torch.Tensor | None = None) -> Routes:
        facts = torch.zeros(batch, tokens, FACTS, device=device)
        facts[..., 0] = torch.arange(tokens, device=device)
        return cls(facts, prompt)

    @property
    def counted(self) -> torch.Tensor:
        """Tokens that are decided about: bool [B, T], the prompts', or all."""
        position = self.facts[..., 0]
        return position >= 0 if self.prompt is None else position < self.prompt[:, None]

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of x [..., B, T] over the tokens of each row that are decided about: [..., B]."""
        counted = self.counted.to(x.dtype)
        return (x * counted).sum(-1) / counted.sum(-1)

    def stored_share(self, stored: torch.Tensor) -> torch.Tensor:
        """What a layer keeps: the mean share of past pairs whose key is stored, or of the prompts' tokens.

        Args:
            stored: float32 [B, T], 1 for tokens whose key is stored.
        """
        if self.prompt is not None:
            counted = self.counted.float()
            return (stored * counted).sum() / counted.sum()
        t = stored.shape[1]
        later = torch.arange(t - 1, -1, -1, device=stored.device)  # queries after each key
        return (stored * later).sum() / max(1, stored.shape[0] * t * (t - 1) // 2)

    def update(self, weights: torch.Tensor, live: torch.Tensor, ran: torch.Tensor) -> None:
        """Take in a layer's attention.

        Args:
            weights: [B, H * G, T, T] (query, key), softmax.
            live: [B, T], keys that each row sees, its own included.
            ran: bool [B, T], tokens that the layer computed.
        """
        mean = weights.detach().float().mean(1)
        if self.prompt is None:
            own = mean.diagonal(dim1=1, dim2=2)
            score, rank = own * live, (mean > own[..., None]).sum(-1) / live
        else:
            asked = ran & self.counted
            score = received_in(mean, asked, live)
            rank = larger_share(score, asked)
        fresh = torch.stack([self.facts[..., 0], score, rank], dim=-1)
        self.facts = torch.where(ran[..., None], fresh, self.facts)


Decide = Callable[[int, Routes], torch.Tensor | None]
"""(layer, what is known by then) to decisions g [B, T] with values 0 and 1, or None for all ones."""


def routed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, gate: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal grouped-query attention in which key j weighs g_j in rows after its own.

    Args:
        query: [B, H * G, T, D]; key, value: [B, H, T, D].
        scaling: of the logits.
        gate: [B, T] in [0, 1], 0 or 1 when straight-through; None where all are 1.

    Returns:
        Output [B, T, H * G, D], weights [B, H * G, T, T], and the keys that each row sees [B, T].
    """
    b, heads, t, d = query.shape
    h = key.shape[1]
    grouped = query.reshape(b, h, heads // h, t, d)
    logits = at_least_float32(grouped @ key[:, :, None].transpose(-1, -2)) * scaling  # [B, H, G, T, T]
    causal = torch.ones(t, t, dtype=torch.bool, device=query.device).tril()
    logits = logits.masked_fill(~causal, float("-inf"))
    if gate is None:
        weights = logits.softmax(-1)
        live = torch.arange(1, t + 1, device=query.device).float().expand(b, t)
    else:
        own = torch.eye(t, dtype=torch.bool, device=query.device)
        seen = torch.where(own, 1.0, gate[:, None, :].to(logits.dtype))  # [B, T, T]
        live = (seen.detach() * causal).sum(-1)
        if not gate.requires_grad:
            weights = (logits + seen.log()[:, None, None]).softmax(-1)
        else:  # a hidden key needs a finite gradient: no logarithm of 0
            raw = (logits - logits.detach().amax(-1, keepdim=True)).exp() * seen[:, None, None]
            weights = raw / raw.sum(-1, keepdim=True).clamp_min(1e-30)
    out = weights.to(value.dtype) @ value[:, :, None]
    return out.reshape(b, heads, t, d).transpose(1, 2), weights.reshape(b, heads, t, t), live


def bypass(x: torch.Tensor, ran: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The stream after a layer: x_in and the layer's output [B, T, D_model], decisions [B, T]."""
    g = gate[..., None].to(x.dtype)
    mixed = x + g * (ran - x)
    if gate.requires_grad:
        return mixed
    return torch.where(g == 1, ran, torch.where(g == 0, x, mixed))  # to the bit


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Layers whose forward takes and returns the stream itself.

    Raises:
        PruneError: the family is not one whose layers can be bypassed.
    """
    layers: Any = getattr(model.get_decoder(), "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in layers):
        raise PruneError(
            f"the layers of {type(model).__name__} cannot be bypassed token by token.",
            "Routing methods need a Qwen3- or Llama-like base.",
        )
    return list(layers)


class RoutedLayers:
    """Hooks around each decoder layer, silent until ``start``.

    Args:
        model: whose layers to route.
        calls: what each layer's attention reads (``masked._LayerCall``).
        gate: any layer's.
    """

    def __init__(self, model: PreTrainedModel, calls: Sequence[Any], gate: RoutingGate) -> None:
        self.calls, self.gate, self.keep_kv = calls, gate, gate.keeps_kv
        self.routes: Routes | None = None
        self.decide: Decide = lambda layer, routes: None
        self._stream: torch.Tensor | None = None
        self._gate: torch.Tensor | None = None
        for index, layer in enumerate(decoder_layers(model)):
            layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
            layer.register_forward_hook(self._after)

    def start(
        self, ids: torch.Tensor, decide: Decide, protection: Protection, prompt: int | torch.Tensor | None
    ) -> Routes:
        """Route the next forward pass; the result fills while it runs.

        Args:
            ids: [B, T].
            decide: exempt tokens run whatever it says.
            protection: of the section.
            prompt: P of each row, where facts are of whole prompts; else not read.

        Raises:
            PruneError, ValueError: as ``prompt_lengths``; as ``RoutingGate.exempt``.
        """
        lengths = prompt_lengths(prompt, *ids.shape, ids.device) if self.gate.whole_prompt else None
        self.routes, self.decide = Routes.start(*ids.shape, ids.device, lengths), decide
        position = self.routes.facts[..., 0]
        exempt = self.gate.exempt(position, protection, None if lengths is None else lengths[:, None])
        self.routes.exempt = exempt if bool(exempt.any()) else None
        return self.routes

    def stop(self) -> None:
        """Layers run on everything again."""
        self.routes = self._stream = self._gate = None
        for call in self.calls:
            call.clear()

    def _before(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def route(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.routes is None:
                return
            routes = self.routes
            gate = self.decide(index, routes)
            if gate is not None and routes.exempt is not None:
                gate = torch.where(routes.exempt, 1.0, gate)
            self._stream, self._gate = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], gate
            ones = torch.ones(routes.facts.shape[:2], device=routes.facts.device)
            routes.seen.append(routes.facts)
            routes.kept.append(ones if gate is None else gate)

            def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
                out, weights, live = routed_attention(q, k, v, scaling, None if self.keep_kv else gate)
                routes.update(weights, live, (ones if gate is None else gate.detach()) > 0)
                return out

            self.calls[index].routed = attention

        return route

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if self.routes is None or self._gate is None or self._stream is None:
            return None
        return bypass(self._stream, output, self._gate)
