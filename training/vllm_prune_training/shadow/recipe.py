"""The recipe of a ShadowLLM run: a frozen base, a predictor regressed on criteria of its heads (and neurons)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..recipe import Count, Data, NotNegative, Part, Positive, Text

SIZES = ("query_heads", "width", "neurons")
"""Parameters of the gates that follow from the base."""


class ShadowGateRecipe(Part):
    """Which gates.

    Attributes:
        method: shadow (whole lanes close at the prompt's end) or shadow_token (each token skips heads and neurons).
        params: of the gate class, without the sizes that follow from the base.
    """

    method: Literal["shadow", "shadow_token"]
    params: dict[str, int | float | str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> ShadowGateRecipe:
        sizes = sorted(set(SIZES) & set(self.params))
        if sizes:
            raise ValueError(f"params.{sizes[0]} follows from the base: leave it out")
        return self


class Shadow(Part):
    """What is measured and learnt.

    Attributes:
        criterion: ``plainact``, activation times gradient of the continuation's loss (the paper's choice), or ``l2``, the
            norm of the activation (in DejaVu's spirit, no gradients).
        neuron_criterion: of neurons (shadow_token), with criterion plainact: ``activation``, times its gradient (ours), or
            ``weight``, the paper's: weight times gradient, summed over the neuron's rows of the projections into it.
        positions: over which tokens a criterion is summed: those of the ``continuation``, which alone are served without
            the heads (ours), or ``all``, as published.
        scale: targets are stretched to [0, 1] over each ``layer`` or over the whole network (``global``), per sample.
        samples: sequences to trace.
        prompt: longest prompt P in tokens; each batch draws its own, from a quarter of it up.
        continuation: tokens after the prompt, whose loss counts.
        held_out: share of the samples that the predictor does not learn from.
        epochs, batch, lr, weight_decay: of AdamW, lr falling to 0 along a cosine.
        trace_batch: sequences traced together.
        windows: held-out texts of ``prompt + continuation`` tokens that the finished gates are measured on.
        seed: of samples, split and predictor.
    """

    criterion: Literal["plainact", "l2"] = "plainact"
    neuron_criterion: Literal["activation", "weight"] = "activation"
    positions: Literal["continuation", "all"] = "continuation"
    scale: Literal["layer", "global"] = "layer"
    samples: Annotated[int, Field(ge=10, le=1_000_000)]
    prompt: Annotated[int, Field(ge=8)]
    continuation: Annotated[int, Field(ge=2)]
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    epochs: Count = 100
    batch: Count = 32
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.01
    trace_batch: Count = 4
    windows: Count = 32
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1

    @model_validator(mode="after")
    def _check(self) -> Shadow:
        kept = round(self.samples * self.held_out)
        if not 2 <= kept <= self.samples - 2:
            raise ValueError(f"held_out leaves {kept} of {self.samples} samples: both sides need 2")
        if self.neuron_criterion == "weight" and self.criterion != "plainact":
            raise ValueError(f"neuron_criterion weight goes with criterion plainact, not with {self.criterion}")
        return self

    @property
    def of_neurons(self) -> str:
        """Name of the neurons' criterion among the ``Traces``."""
        return "weight" if self.neuron_criterion == "weight" else self.criterion


class ShadowRecipe(Part):
    """A whole run.

    Attributes:
        model: folder of a Hugging Face causal decoder; it stays as it is.
        output: folder to make; it must not exist.
        work: folder of traces; default ``OUTPUT-work``.
        data: ``train`` is traced, ``held_out`` measures the finished gates.
    """

    model: Text
    output: Text
    work: Text | None = None
    gate: ShadowGateRecipe
    shadow: Shadow
    data: Data

    @model_validator(mode="after")
    def _check(self) -> ShadowRecipe:
        if self.gate.method != "shadow_token" and "neuron_criterion" in self.shadow.model_fields_set:
            raise ValueError(f"shadow.neuron_criterion belongs to shadow_token: {self.gate.method} closes no neurons")
        return self

    @property
    def work_folder(self) -> str:
        """``work`` with its default."""
        return self.work or self.output.rstrip("/") + "-work"

    def traced(self) -> dict[str, Any]:
        """All fields that change what is traced."""
        s = self.shadow
        names = ("samples", "prompt", "continuation", "trace_batch", "seed")
        return {"model": self.model, "data": self.data.model_dump(), **{name: getattr(s, name) for name in names}}
