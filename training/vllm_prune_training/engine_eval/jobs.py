"""What travels between the command and its engine process, as JSON. Works on token ids only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BLOCK_TOKENS = 32
LEAST_NEW_TOKENS = 2
"""vLLM sums a request up before it reads the report of its last step: with two new tokens the prompt is covered."""


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        prompt: token ids.
        new_tokens: most to generate; at least ``LEAST_NEW_TOKENS`` are.
        scored: whether the negative log-likelihood of the prompt itself is wanted.
    """

    prompt: list[int]
    new_tokens: int
    scored: bool = False


@dataclass(frozen=True)
class Engine:
    """Settings of one engine; a dense run differs from a gated one in ``options`` only.

    Attributes:
        model: folder of the gated checkpoint.
        options: the plugin's server options: ``{"strength": 0}`` opens every gate.
        dtype: of weights and KV cache.
        max_model_len: longest prompt and its new tokens.
        pool_bytes: of the KV cache.
        chunk_tokens: most prompt tokens in one step.
        concurrency: most requests at once.
        stop_ids: tokens that end a text.
    """

    model: str
    options: dict[str, Any]
    dtype: str
    max_model_len: int
    pool_bytes: int
    chunk_tokens: int
    concurrency: int
    stop_ids: list[int] = field(default_factory=list)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``."""
        return {
            "model": self.model, "dtype": self.dtype, "max_model_len": self.max_model_len,
            "max_num_seqs": self.concurrency, "max_num_batched_tokens": self.chunk_tokens,
            "kv_cache_memory_bytes": self.pool_bytes, "block_size": BLOCK_TOKENS, "seed": 0, "enforce_eager": True,
            "skip_tokenizer_init": True, "disable_log_stats": True, "additional_config": {"vllm_prune": self.options},
            "enable_prefix_caching": False,  # questions about one context: what each takes must not hang on their order
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What the engine made of a request.

    Attributes:
        index: of the request.
        token_ids: generated, without the token that ended the text.
        nll: sum over prompt tokens but the first, in nats; None unless scored.
        memory: the plugin's numbers of the request (``vllm_prune.connector``): tokens, kept_fraction, keys, blocks.
    """

    index: int
    token_ids: list[int]
    nll: float | None
    memory: dict[str, float]
