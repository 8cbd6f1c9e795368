"""Refuses requests for prompt log-probabilities, one by one, where gates decide about tokens of whole prompts.

An eliminated token has no output of the last layer, and what others get depends on tokens after them: what vLLM would return
means nothing. vLLM asks the logits processors of a model whether they accept a request's parameters, before it is queued; this
one does nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor


class NoPromptLogprobs(LogitsProcessor):
    """See the module."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises VLLMValidationError (HTTP 400) when prompt log-probabilities are asked for."""
        if sampling_params.prompt_logprobs is not None:
            raise VLLMValidationError(
                "vllm-prune: refused (prompt-logprobs): this checkpoint's gates skip tokens of the prompt by what comes after "
                "them, so that these have no log-probabilities. Leave prompt_logprobs (echo with logprobs) out, or serve it at "
                "strength 0.",
                parameter="prompt_logprobs", value=sampling_params.prompt_logprobs,
            )  # fmt: skip

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        return

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        return
