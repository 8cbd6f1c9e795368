"""The one exception of the plugin's own: something is refused, with the reason and the way out."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


class PruneError(ValueError):
    """A checkpoint, option or combination that vllm-prune refuses.

    Args:
        problem: what is wrong, naming the file, field or option.
        way_out: what the user can do about it.
    """

    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(f"vllm-prune: {problem} {way_out}")
        self.problem = problem
        self.way_out = way_out

    def __reduce__(self) -> tuple[type[PruneError], tuple[str, str]]:
        return type(self), (self.problem, self.way_out)


@contextmanager
def writing(place: Path, way_out: str) -> Iterator[None]:
    """Around what writes to a place: no room there, or no right to.

    Raises:
        PruneError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise PruneError(f"{place} cannot be written: {error}.", way_out) from None


def short(value: Any) -> str:
    """A value for a message: its repr, cut to a line, whatever was sent."""
    try:
        return _SHOWN.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} too long to show"
