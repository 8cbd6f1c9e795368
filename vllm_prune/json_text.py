"""JSON from folders and servers that nobody vouches for: a value, or a ValueError that says what is wrong."""

from __future__ import annotations

import json
from typing import Any


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError: it is no JSON, or nested too deep for Python's stack."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The same of a text that must hold an object. Raises ValueError also where it holds something else."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"it must hold an object, not {type(value).__name__}")
    return value
