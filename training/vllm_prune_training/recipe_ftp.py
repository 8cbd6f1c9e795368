"""FTP's part of a recipe: ``objective.ftp``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from .data_recipe import Count, NotNegative, Part, Positive


class FTPSearch(Part):
    """Genetic search of FTP's per-block sparsities. The numbers are ours.

    Attributes:
        population, generations, elite: of the search with the static router; 0 generations keep the uniform schedule.
        tune_generations: of the search with the trained router, after training.
        tokens: calibration tokens of one fitness, from the training data.
        length: tokens of a calibration row; default the longest of training.lengths.
    """

    population: Annotated[int, Field(ge=4, le=1024)] = 32
    generations: Annotated[int, Field(ge=0)] = 30
    elite: Count = 4
    tune_generations: Annotated[int, Field(ge=0)] = 5
    tokens: Count = 2048
    length: Annotated[int, Field(ge=8)] | None = None

    @model_validator(mode="after")
    def _check(self) -> FTPSearch:
        if self.elite >= self.population:
            raise ValueError("elite must be less than population")
        return self


class FTPObjective(Part):
    """FTP's schedule and losses; L_d is ``kl_forward``.

    Attributes:
        sparsity: mean share of (token, block) pairs to skip, over all blocks; the first skips none.
        search: of the schedule.
        scale_low, scale_high: the schedule of each row is scaled by a random factor between, so that strength works.
        tau_start, tau_end: temperature of the straight-through decision, falling geometrically.
        guide_weight: of L_g at the start.
        guide_until: share of the run at which L_g's weight and the noise of decisions are 0.
        sparsity_weight: of L_s.
    """

    sparsity: Annotated[float, Field(gt=0.0, lt=0.9)]
    search: FTPSearch = Field(default_factory=FTPSearch)
    scale_low: NotNegative = 0.25
    scale_high: Positive = 1.5
    tau_start: Positive = 1.0
    tau_end: Positive = 0.1
    guide_weight: NotNegative = 1.0
    guide_until: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    sparsity_weight: Positive = 1.0

    @model_validator(mode="after")
    def _check(self) -> FTPObjective:
        if self.scale_low > self.scale_high:
            raise ValueError("scale_low must not be above scale_high")
        return self
