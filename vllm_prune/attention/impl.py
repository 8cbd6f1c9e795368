"""What gated attention is on every device: its layer's numbers, and what it refuses. Runs in the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backend import AttentionImpl, AttentionType

if TYPE_CHECKING:
    from vllm_prune.attention.serving import Rule, ServedGate


class GatedImpl(AttentionImpl):
    """One gated layer.

    Takes what vLLM gives to every attention implementation.

    Attributes:
        group: G, query heads per KV head.
        index: of the layer; serving: of the gates. Both known once a worker's state is attached.
        rule_at: of the layer's gate, the rule at the strength of a request; None where it is open.

    Raises:
        NotImplementedError: the base's attention has what drop gates cannot be served with.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            "attention sinks": kwargs.get("sinks") is not None,
            "soft-capping of attention logits": bool(logits_soft_cap),
            f"attention type {attn_type}": attn_type != AttentionType.DECODER,
        }
        for what, present in unsupported.items():
            if present:
                raise NotImplementedError(f"vllm-prune: {what} cannot be served with drop gates; serve the base model.")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.group = num_heads // num_kv_heads
        self.scale = float(scale)
        self.serving: ServedGate
        self.index = 0
        self.rule_at: Callable[[float], Rule | None] = drops_nothing


def drops_nothing(strength: float) -> None:
    """Of a layer whose gate drops nothing at any strength."""
