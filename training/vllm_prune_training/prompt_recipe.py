"""The ``prompts`` section of a recipe: how gates that decide about whole prompts are trained (``gates/prompt.py``, and FTP's
prompt mode).

Every sequence is cut into a prompt of P tokens and a continuation. Scores read later queries of the prompt, so that a loss
on the prompt would see the future: only tokens from P on are predicted.

Letters: T tokens of a sequence, P of its prompt.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

PROMPT_METHODS = ("ltp_prompt", "acc_prompt")
FTP_PROMPT = "ftp with params.form prompt"
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class Prompts(BaseModel):
    """See the module.

    Attributes:
        share: P lies between these shares of T, uniformly. In a sequence with synthetic tasks it is the place before one
            of their answers instead.
        hard_from: LTP: share of the run from which thresholds stay and the base is trained under the hard mask; 1 never.
        strengths: ACC-style: of each step, between these, log-uniformly; None is 1, one coefficient.
        coverage: ACC-style: share of the attention received that the profile's tokens hold.
        statistic: ACC-style: of the coverage over sequences.
        profile: ACC-style: ``measured``, or ``uniform``, the same retention in all layers, for comparison.
        budget: ACC-style: what ``objective.keep`` is a share of: keys stored of the prompt, or its layers' FLOPs at T.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    share: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [0.25, 0.9])
    hard_from: Share = 0.7
    strengths: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    statistic: Literal["mean", "median"] = "mean"
    profile: Literal["measured", "uniform"] = "measured"
    budget: Literal["kv", "flops"] = "kv"

    @model_validator(mode="after")
    def _check(self) -> Prompts:
        if self.share[0] > self.share[1]:
            raise ValueError("share must be [low, high]")
        if self.strengths is not None and not 0.0 < self.strengths[0] <= self.strengths[1] <= 16.0:
            raise ValueError("strengths must be [low, high], above 0, up to 16")
        return self

    def check(self, gate: Any) -> None:
        """Raises ValueError when the section, or a field of it, belongs to another method than that of a ``GateRecipe``."""
        owners = {"hard_from": "ltp_prompt"} | dict.fromkeys(
            ("strengths", "coverage", "statistic", "profile", "budget"), "acc_prompt"
        )
        if not whole_prompts(gate):
            raise ValueError(f"prompts belongs to {', '.join(PROMPT_METHODS)} and {FTP_PROMPT}, not to {_named(gate)}")
        for name, owner in owners.items():
            if owner != gate.method and name in self.model_fields_set:
                raise ValueError(f"prompts.{name} belongs to {owner}, not to {_named(gate)}")

    def length(self, rng: np.random.Generator, tokens: int, answers: list[int]) -> int:
        """P of a sequence of T tokens, 2 to T - 1.

        Args:
            rng: of the sequence.
            tokens: T.
            answers: positions of answer tokens, if it has any.
        """
        if starts := [at for at in answers if at - 1 not in answers and at > 1]:
            return min(int(rng.choice(starts)), tokens - 1)
        low, high = (min(max(round(share * tokens), 2), tokens - 1) for share in self.share)
        return int(rng.integers(low, high + 1))

    def strength_at(self, seed: int, step: int) -> float:
        """ACC-style: strength of a step, the same on any number of processes and after a resume."""
        if self.strengths is None:
            return 1.0
        low, high = map(math.log, self.strengths)
        return math.exp(low + (high - low) * float(np.random.default_rng([seed, 77, step]).random()))


def whole_prompts(gate: Any) -> bool:
    """Whether the gates of a ``GateRecipe`` decide about whole prompts."""
    return gate.method in PROMPT_METHODS or (gate.method == "ftp" and gate.params.get("form") == "prompt")


def _named(gate: Any) -> str:
    """Method, with its form where that matters."""
    return f"ftp with params.form {gate.params.get('form', 'causal')}" if gate.method == "ftp" else str(gate.method)


def check_prompts(gate: Any, training: Any, launch: Any, prompts: Prompts) -> None:
    """Raises ValueError when other sections of a recipe (``GateRecipe``, ``Training``, ``Launch``) do not go with it."""
    if training.compile:
        raise ValueError(f"training.compile is not supported with method {gate.method}: who is left of a prompt is known "
                         "while it runs only")  # fmt: skip
    if gate.method == "ltp_prompt" and launch.workers > 1:
        raise ValueError(
            "launch.workers must be 1 with method ltp_prompt, whose thresholds have no gradient in the hard stage"
        )
    if gate.method == "ltp_prompt" and not gate.train_base and prompts.hard_from < 1.0:
        raise ValueError("gate.train_base false leaves nothing to train in the hard stage: set prompts.hard_from 1")
