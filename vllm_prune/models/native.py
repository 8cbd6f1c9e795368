"""Gated Qwen3 and Llama over vLLM's own classes.

The base class builds the model; then each attention module of it is given a gated attention layer and a forward that
hands the gate what it reads: the layer's normed input, numbers of its query, or its unnormed input, which the decoder layer
then passes on. Where the gates route tokens, decoder layers get a router in front (``routing``).
To add a family: subclass its attention module (``projected`` only), its decoder layer and its model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM

from vllm_prune.attention.gated import GatedAttention
from vllm_prune.attention.serving import ServedGate
from vllm_prune.config import gate_reads, served_section, serves_stock
from vllm_prune.gates import PromptGate, Reads, Reveal
from vllm_prune.gates.routing import RoutingGate
from vllm_prune.models.fused import fuse, may_fuse, split
from vllm_prune.models.loading import load_gate_weights, without_gates
from vllm_prune.models.prompt_facts import PromptFactsRouter
from vllm_prune.models.prompt_router import PromptRouter
from vllm_prune.models.routing import GateRouter, RoutedLayer, Router


class GatedForward:
    """An attention module's forward with a drop gate: the same weights and maths until keys are dropped."""

    attn: Any
    qkv_proj: Any
    o_proj: Any
    rotary_emb: Any
    projected: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Query, key and value [T, heads * D] of their projections [T, (H G + 2 H) D], normed and not yet rotated."""
    fused: tuple[int, int] | None = None

    def rotated(self, positions: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value [T, heads * D] of the layer's normed input [T, D_model]."""
        q, k, v = self.projected(self.qkv_proj(x)[0])
        q, k = self.rotary_emb(positions, q, k)
        return q, k, v

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, stream: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Args: positions [T]; hidden_states [T, D_model], normed; stream [T, D_model], unnormed, where gates read it."""
        qkv, features = self.qkv_proj(hidden_states)[0], None
        if self.fused is not None:
            qkv, features = split(qkv, self.fused)
        q, k, v = self.projected(qkv)
        if self.attn.reads is Reads.QUERY:
            features, q = self.attn.lend(q)
        elif self.fused is None:
            features = self.attn.features(hidden_states if stream is None else stream)
        q, k = self.rotary_emb(positions, q, k)
        output: torch.Tensor = self.o_proj(self.attn(q, k, v, features))[0]
        return output


class PrunedQwen3Attention(GatedForward, Qwen3Attention):
    """Qwen3's attention with a drop gate."""

    def projected(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # type: ignore[override]
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.view(*q.shape[:-1], -1, self.head_dim)).view(q.shape)
        k = self.k_norm(k.view(*k.shape[:-1], -1, self.head_dim)).view(k.shape)
        return q, k, v


class PrunedLlamaAttention(GatedForward, LlamaAttention):
    """Llama's attention with a drop gate."""

    def projected(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # type: ignore[override]
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        return q, k, v


class StreamLayer:
    """A decoder layer that hands its attention the unnormed input too."""

    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any
    mlp: Any

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """vLLM's interface: the stream is hidden_states + residual, [T, D_model] each."""
        if residual is None:
            stream, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, stream = self.input_layernorm(hidden_states, residual)
        attended = self.self_attn(positions, hidden_states, stream)
        hidden_states, stream = self.post_attention_layernorm(attended, stream)
        return self.mlp(hidden_states), stream


class StreamQwen3Layer(StreamLayer, Qwen3DecoderLayer):
    """Qwen3's decoder layer for gates that read the stream."""


class StreamLlamaLayer(StreamLayer, LlamaDecoderLayer):
    """Llama's decoder layer for gates that read the stream."""


class RoutedQwen3Layer(RoutedLayer, Qwen3DecoderLayer):
    """Qwen3's decoder layer on the tokens that a router keeps."""


class RoutedLlamaLayer(RoutedLayer, LlamaDecoderLayer):
    """Llama's decoder layer on the tokens that a router keeps."""


ROUTED: dict[type[nn.Module], type[nn.Module]] = {
    Qwen3DecoderLayer: RoutedQwen3Layer,
    LlamaDecoderLayer: RoutedLlamaLayer,
}


STREAMED: dict[type[nn.Module], type[nn.Module]] = {
    Qwen3DecoderLayer: StreamQwen3Layer,
    LlamaDecoderLayer: StreamLlamaLayer,
}


def route_layers(model: nn.Module, router: Router) -> None:
    """Put a router in front of every decoder layer of a loaded gated model."""
    layers = [module for module in model.modules() if type(module) in ROUTED]
    for index, layer in enumerate(layers):
        layer.__class__ = ROUTED[type(layer)]
        layer.router, layer.index = router, index  # type: ignore[assignment]
        impl = layer.self_attn.attn.impl  # type: ignore[union-attr]
        impl.router = router  # type: ignore[union-attr]
        router.impls.append(impl)  # type: ignore[arg-type]


def router_of(model: nn.Module) -> Router | None:
    """The router that a loaded model's gates want; None when every layer runs on all tokens."""
    layers = [module for module in model.modules() if isinstance(module, GatedAttention)]
    gates: list[Any] = [layer.drop_gate for layer in layers]
    section = layers[0].section
    if isinstance(gates[0], PromptGate):
        return PromptRouter(gates, section)
    if isinstance(gates[0], RoutingGate):
        kind = PromptFactsRouter if gates[0].whole_prompt else GateRouter
        return kind(gates, section.protection)
    return None


class GatedModelMixin:
    """Swaps attention layers after the base class has built the model, and loads gates after its weights."""

    gated_attention: ClassVar[dict[type[nn.Module], type[nn.Module]]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._vllm_config = vllm_config
        if serves_stock(vllm_config):
            return
        layers = vllm_config.compilation_config.static_forward_context
        for module in self.modules():  # type: ignore[attr-defined]
            gated = self.gated_attention.get(type(module))
            if gated is None:
                continue
            name = module.attn.layer_name
            del layers[name]
            module.attn = GatedAttention(
                module.num_heads, module.head_dim, module.scaling, num_kv_heads=module.num_kv_heads,
                cache_config=vllm_config.cache_config, quant_config=vllm_config.quant_config, prefix=name,
            )  # fmt: skip
            module.__class__ = gated
            if may_fuse(vllm_config):
                fuse(module)
        if gate_reads(vllm_config) is Reads.STREAM:
            for module in self.modules():  # type: ignore[attr-defined]
                if type(module) in STREAMED:
                    module.__class__ = STREAMED[type(module)]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        public: dict[str, torch.Tensor] = {}  # gates that lie among the base's weights
        loaded: set[str] = super().load_weights(without_gates(weights, public))  # type: ignore[misc]
        if serves_stock(self._vllm_config):
            return loaded
        loaded |= load_gate_weights(self, self._vllm_config, public)  # type: ignore[arg-type]
        router = router_of(self)  # type: ignore[arg-type]
        if router is not None:
            route_layers(self, router)  # type: ignore[arg-type]
        section = served_section(self._vllm_config)
        if ServedGate.of(section).reveal is Reveal.NONE:
            from vllm_prune.models.sparse import make_sparse

            self.chooser = make_sparse(self)  # type: ignore[arg-type]
        return loaded


class PrunedQwen3ForCausalLM(GatedModelMixin, Qwen3ForCausalLM):
    gated_attention: ClassVar = {Qwen3Attention: PrunedQwen3Attention}


class PrunedLlamaForCausalLM(GatedModelMixin, LlamaForCausalLM):
    gated_attention: ClassVar = {LlamaAttention: PrunedLlamaAttention}
