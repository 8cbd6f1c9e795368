"""The ``data`` section of a recipe, and the types that all sections are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]  # no file's name has a null byte
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A section of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class Source(Part):
    """One set of files. ``weight``: its share of the sequences, relative to the other sources' weights."""

    path: Text | None = None
    glob: Text | None = None
    format: Literal["text", "jsonl", "parquet"]
    field: Text = "text"
    weight: Positive = 1.0

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.path is None) == (self.glob is None):
            raise ValueError("give exactly one of path and glob")
        if self.format == "text" and "field" in self.model_fields_set:
            raise ValueError("format text has no field")
        return self


class Tasks(Part):
    """Synthetic tasks with known answers. ``share`` of the sequences; ``names`` of ``vllm_prune_training.tasks``."""

    share: Share = 0.25
    names: Annotated[list[Text], Field(min_length=1)]


class Data(Part):
    """Texts.

    Attributes:
        train, held_out: sources; every sequence is drawn from one by weight.
        tasks: mixed into training.
        max_line_chars: a longer line in a text is refused; such lines are rarely text.
        check: ``full`` reads all files once before the run, ``lazy`` finds bad data only where it comes to it.
        shuffle_rows: documents are shuffled within blocks of this many; 1 keeps their order.
    """

    train: Annotated[list[Source], Field(min_length=1)]
    held_out: Annotated[list[Source], Field(min_length=1)]
    tasks: Tasks | None = None
    max_line_chars: Count = 100_000
    check: Literal["full", "lazy"] = "full"
    shuffle_rows: Count = 256
