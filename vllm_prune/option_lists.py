"""Lists given to a command as one option, with commas between."""

from __future__ import annotations

from vllm_prune.errors import PruneError


def names(text: str) -> tuple[str, ...]:
    """Names without blanks around them; empty text gives none."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(option: str, text: str) -> tuple[int, ...] | None:
    """Positive whole numbers; None for empty text.

    Raises:
        PruneError: a part is no such number. ``option`` names the option in the message.
    """
    parts = names(text)
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and int(part) > 0)]
    if wrong:
        raise PruneError(f"{option} has {wrong[0]!r}, which is no positive whole number.", "Write it like 512,1024.")
    return tuple(map(int, parts)) or None
