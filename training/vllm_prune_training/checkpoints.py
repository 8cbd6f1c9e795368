"""Checkpoints that are either whole or not there, and what must be equal for a run to go on from one."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from vllm_prune.errors import PruneError

from .recipe_file import differences

UNFINISHED = ".unfinished"
RUN_FILE = "run.json"


class SaveFailed(PruneError):
    """A checkpoint or the exported folder could not be written; what was there before is untouched."""

    exit_code = 4


def checkpoints(work: Path) -> list[Path]:
    """Whole checkpoints in a work folder, oldest first."""
    found = [path for path in work.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def sync_folder(folder: Path) -> None:
    """Make sure that a folder's files are on the disk before its name says so."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def publish(made: Path, place: Path) -> None:
    """Give a finished folder its name, in one step."""
    sync_folder(made)
    if place.exists():
        shutil.rmtree(place)
    os.replace(made, place)


def forget_old(work: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in checkpoints(work)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write a checkpoint's own part: recipe, data hashes, and where data and controller stand."""
    (folder / RUN_FILE).write_text(json.dumps(run), encoding="utf-8")


def read_run(folder: Path) -> dict[str, Any]:
    """Read it. Raises PruneError when it is not readable."""
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise PruneError(f"checkpoint {folder} cannot be read: {error}.", "Delete it; an older one is used.") from None


def check_same(saved: dict[str, Any], recipe: dict[str, Any], data: list[dict[str, Any]], folder: Path) -> None:
    """Refuse to go on with another recipe or other data.

    Args:
        saved: of ``read_run``.
        recipe: ``Recipe.same_run()``.
        data: hashes of the sources.

    Raises:
        PruneError: naming the fields that differ.
    """
    plain = json.loads(json.dumps(recipe))
    changed = differences(saved["recipe"], plain)
    if changed:
        raise PruneError(
            f"the recipe differs from that of the run in {folder}: {'; '.join(changed)}.",
            "Restore these fields to go on, give another output, or start over with --no-resume.",
        )
    if saved["data"] != data:
        other = [row["source"] for row, old in zip(data, saved["data"], strict=True) if row["sha256"] != old["sha256"]]
        raise PruneError(
            f"the data differ from those of the run in {folder}: files changed since in {', '.join(other)}.",
            "Restore them to go on, give another output, or start over with --no-resume.",
        )


def put_aside(work: Path) -> Path | None:
    """Move an earlier run's work folder out of the way; returns its new name, None when there was nothing."""
    if not work.exists() or not any(work.iterdir()):
        return None
    number = 1
    while (place := work.with_name(f"{work.name}.old-{number}")).exists():
        number += 1
    os.replace(work, place)
    return place
