"""Forced decoding in vLLM: a request writes given tokens, and what the model thought of each comes back.

So any gate can be judged through the live engine on what follows a context, under its own eviction, token by token; also
gates that decide at the prompt's end, for which prompt log-probabilities have no meaning. Runs in the worker.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FIELD = "forced_tokens"


class ForceTokens(AdapterLogitsProcessor):
    """Leaves only the token that ``extra_args["forced_tokens"]`` has for this place. vLLM's log-probabilities are those
    from before any processor."""

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Raises ValueError unless the field is a list of token ids, or absent."""
        forced = (params.extra_args or {}).get(FIELD, [])
        if not isinstance(forced, list) or not all(isinstance(token, int) for token in forced):
            raise ValueError(f"{FIELD} must be a list of token ids")

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        forced = (params.extra_args or {}).get(FIELD)
        if not forced:
            return None

        def process(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            only = torch.full_like(logits, float("-inf"))
            only[forced[min(len(output_ids), len(forced) - 1)]] = 0.0
            return only

        return process


def forced_params(tokens: list[int]) -> SamplingParams:
    """Sampling parameters of a request that writes exactly ``tokens``, with log-probability and rank of each."""
    return SamplingParams(temperature=0.0, max_tokens=len(tokens), min_tokens=len(tokens), ignore_eos=True,
                          detokenize=False, logprobs=0, extra_args={FIELD: tokens})  # fmt: skip


def judged(output: Any, tokens: list[int]) -> list[tuple[float, bool]]:
    """(log-probability in nats, whether it was the model's first choice) of each forced token of a finished request.

    Raises:
        RuntimeError: the engine wrote something else, so that nothing could be concluded.
    """
    (completion,) = output.outputs
    if list(completion.token_ids) != tokens:
        raise RuntimeError("the engine did not write the forced tokens")
    found = [row[token] for row, token in zip(completion.logprobs, tokens, strict=True)]
    return [(float(x.logprob), x.rank == 1) for x in found]
