"""``vllm-prune train``: read the recipe, start what it wants to run in, and say how it ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from .launch import launch
from .recipe_file import read_recipe
from .shadow.recipe import ShadowRecipe
from .shadow.run import run as shadow_run


def train_command(path: Path, overrides: Sequence[str], resume: bool) -> int:
    """Run a recipe. Returns the exit code: 0 when the folder is made, 128 + signal when stopped and saved.

    Raises:
        PruneError: refused (2), a loss that is no number (3), something that could not be written (4: ``exit_code``).
    """
    recipe = read_recipe(path, overrides)
    outcome = shadow_run(recipe, resume) if isinstance(recipe, ShadowRecipe) else launch(recipe, resume)
    first = os.environ.get("RANK", "0") == "0"  # of those that an outer launcher started
    if outcome.signal:
        name = signal.Signals(outcome.signal).name
        if first:
            print(f"stopped by {name}: step {outcome.steps} is saved in {outcome.work}; the same command goes on")
        return 128 + outcome.signal
    if first:
        print(f"made {outcome.output}")
    return 0
