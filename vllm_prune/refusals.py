"""Combinations that are refused once it is known which gates a checkpoint has: each declared here, decided where its facts are.

``models/hook.py`` and what it calls decide those of a server, ``models/request_check.py`` those of single requests. What depends
on vLLM's configuration alone is in ``compat.py``. ``vllm-prune compat`` lists all of them (``compat_table.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_prune.errors import PruneError

BY_TOKEN = "DCP, DMS, window or random gates"
ON_GPU = "DCP, DMS, LTP, ACC-style, window or random gates"


@dataclass(frozen=True)
class GateRefusal:
    """One combination of gates with something else that cannot be served.

    Attributes:
        name: short, stable, for tests and the documentation table.
        reason: why it cannot work (yet), with ``{fields}`` for what is at hand.
        way_out: what the user can do, likewise.
    """

    name: str
    reason: str
    way_out: str


OF_SERVERS: tuple[GateRefusal, ...] = (
    GateRefusal(
        "method-on-gpu", "{method} is served on CPU only so far.",
        f"Serve {ON_GPU} on a GPU, or run on the CPU build of vLLM.",
    ),
    GateRefusal(
        "method-on-ranks", "{method} decides from what all heads do, and a rank of {ranks} has its own.",
        f"Serve {BY_TOKEN} with --tensor-parallel-size, or leave that at 1 and use more replicas.",
    ),
    GateRefusal(
        "dms-per-layer-on-ranks", "the first KV head decides for its whole layer (per: layer), and other ranks do not have it.",
        "Leave --tensor-parallel-size at 1 and use more replicas.",
    ),
    GateRefusal(
        "rotary-op-of-its-own",
        "gates of form {form} read queries before they are rotated; a compiled model that rotates in place, by one op, may read "
        "them after it.",
        "Leave +rotary_embedding, all and enable_qk_norm_rope_fusion out of --compilation-config, or pass --enforce-eager.",
    ),
    GateRefusal(
        "borrowed-at-strength-0",
        "on a GPU stock vLLM's attention serves strength 0, and it would attend to the number of each query that these gates "
        "have taken.",
        "Serve at a strength above 0 and let requests open their gates (prune.off), or train gates of form 'separate'.",
    ),
    GateRefusal(
        "generic-class-skips", "{method} skips part of the computation of layers, which the generic class cannot do.",
        "Serve a Qwen3 or Llama base with it, or train another method for this base.",
    ),
    GateRefusal(
        "generic-class-reads", "gates that read the {reads} cannot be served by the generic class.", "Use Qwen3 or Llama.",
    ),
    GateRefusal(
        "whole-prompts",
        "{method} gates need each prompt in one step, but max_num_batched_tokens {tokens} is less than max_model_len {least}.",
        "Leave --max-num-batched-tokens out, make it at least {least}, or lower --max-model-len.",
    ),
    GateRefusal(
        "whole-prompts-cut",
        "{method} gates need each prompt in one step, but long_prefill_token_threshold {tokens} cuts prompts.",
        "Leave --long-prefill-token-threshold out.",
    ),
    GateRefusal(
        "pressure", "{method} decides by what happened at its strength before, which must not change.",
        f"Leave additional_config.vllm_prune.pressure out, or serve {BY_TOKEN}.",
    ),
    GateRefusal(
        "pressure-at-strength-0", "this server's gates are open (strength 0).",
        "Leave additional_config.vllm_prune.pressure out, or serve at a strength above 0.",
    ),
    GateRefusal(
        "protect", "{method} gates decide about many keys at once.", "Leave additional_config.vllm_prune.protect out.",
    ),
    GateRefusal(
        "protect-chat", "the tokenizer has no chat template that sets messages apart by special tokens.",
        "Leave additional_config.vllm_prune.protect out, or give token ranges (A:B).",
    ),
    GateRefusal(
        "maps-on-gpu", "a GPU's reports do not list which keys were dropped, so there are no eviction maps.",
        "Leave additional_config.vllm_prune.maps out, or run on the CPU build of vLLM.",
    ),
    GateRefusal(
        "maps-on-ranks", "only the first of {ranks} ranks reports, and each knows the drops of its own heads.",
        "Leave additional_config.vllm_prune.maps out, or run on one rank.",
    ),
    GateRefusal(
        "public-dms-model-impl", "public DMS checkpoints cannot be served with --model-impl {model_impl}.", "Leave it out.",
    ),
)  # fmt: skip
"""Refused at start."""

OF_REQUESTS: tuple[GateRefusal, ...] = (
    GateRefusal(
        "prompt-logprobs",
        "this checkpoint's gates skip tokens of the prompt by what comes after them, so that these have no log-probabilities.",
        "Leave prompt_logprobs (echo with logprobs) out, or open the gates for the request (prune.off).",
    ),
    GateRefusal("map-of-several", "prune.map maps one sequence.", "Ask for n = 1."),
    GateRefusal(
        "protect-of-chat",
        "prune.protect: messages cannot be found in this server's prompts: its tokenizer has no chat template that sets them "
        "apart by special tokens.",
        "Give token ranges (A:B).",
    ),
)  # fmt: skip
"""Refused for one request, with HTTP 400."""

_BY_NAME = {refusal.name: refusal for refusal in (*OF_SERVERS, *OF_REQUESTS)}


def refused(name: str, **facts: object) -> PruneError:
    """The error to raise for a declared combination. ``facts``: its fields."""
    refusal = _BY_NAME[name]
    return PruneError(f"refused ({name}): {refusal.reason.format(**facts)}", refusal.way_out.format(**facts))
