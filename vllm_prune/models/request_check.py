"""Checks each request's parameters in the front end, before it is queued: a bad one gets HTTP 400, all others go on.

vLLM asks the logits processors of a model whether they accept a request; these classes do nothing else. They are named by
strings and made when they are looked up, one for each gated model that this process configures, since several engines may
live in one process: in workers, where nothing is checked, the same name gives a class that knows nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from vllm_prune.config import DropGateConfig
from vllm_prune.refusals import refused
from vllm_prune.requests import MAP, PROTECT, BadField, RequestGates, request_gates

_PREFIX = "RequestCheckOf"


@dataclass(frozen=True)
class Served:
    """What a check knows of its model.

    Attributes:
        section: as served.
        floor: see ``request_gates``.
        chat: whether messages can be found in a prompt.
        whole_prompt: gates skip tokens of the prompt by what comes after them: these have no log-probabilities.
        maps: see ``request_gates``.
    """

    section: DropGateConfig
    floor: float
    whole_prompt: bool
    chat: bool = False
    maps: bool = False

    def gates(self, params: SamplingParams) -> RequestGates:
        """Raises VLLMValidationError (HTTP 400) for what cannot be served."""
        try:
            found = request_gates(params.extra_args, self.section, self.floor, self.maps)
        except BadField as error:
            raise VLLMValidationError(str(error), parameter=error.field) from None
        if found.protect and found.protect.asks_for_chat and not self.chat:
            raise VLLMValidationError(str(refused("protect-of-chat")), parameter=PROTECT)
        if self.whole_prompt and found.strength > 0.0 and params.prompt_logprobs is not None:
            raise VLLMValidationError(
                str(refused("prompt-logprobs")), parameter="prompt_logprobs", value=params.prompt_logprobs
            )
        if found.map and params.n > 1:
            raise VLLMValidationError(str(refused("map-of-several")), parameter=MAP, value=params.n)
        return found


class RequestCheck(LogitsProcessor, LogitsProcessorV2):
    """See the module. A logits processor of both model runners that never touches a logit."""

    served: Served | None = None

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        return

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises VLLMValidationError (HTTP 400)."""
        if cls.served is not None:
            cls.served.gates(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply(self, logits: Any, *rest: Any) -> Any:  # type: ignore[override]
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        return


_CLASSES: dict[str, type[RequestCheck]] = {}


def name_check(served: Served) -> str:
    """The name under which vLLM finds the check of a model."""
    name = _PREFIX + hashlib.sha256(repr(served).encode()).hexdigest()[:16]
    __getattr__(name).served = served
    return f"{__name__}:{name}"


def is_check(processor: Any) -> bool:
    """Whether a name among a model's logits processors is one of ours."""
    return isinstance(processor, str) and processor.startswith(f"{__name__}:{_PREFIX}")


def __getattr__(name: str) -> type[RequestCheck]:
    if not name.startswith(_PREFIX):
        raise AttributeError(name)
    if name not in _CLASSES:
        _CLASSES[name] = type(name, (RequestCheck,), {"__module__": __name__})
    return _CLASSES[name]
