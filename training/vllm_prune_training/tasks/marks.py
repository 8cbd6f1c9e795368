"""Classification by scattered marks: five lines of a text carry one of eight marks; which one is there most often?

The class of a text is a property of several places in it, of which none is needed: what elimination of tokens was first
measured on (classification of texts of varying length: LTP, arXiv 2107.00910; ACC, arXiv 2201.03327), without any download.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .ruler import Count, Haystack, Item, _fill, _spread

MARKS = ("amber", "birch", "cobalt", "falcon", "ginger", "harbor", "indigo", "jasper")
OFTEN, OTHERS = 3, 2
"""Lines with the mark that is asked for, and lines with another one each."""


def _marks(
    name: str, rng: random.Random, tokens: int, count: Count, filler: Sequence[str], neutral: bool, questions: int
) -> Haystack:
    """Marks in filler, and one question however many are wanted. Arguments as of every generator (``ruler.RULER``)."""
    often, *others = rng.sample(MARKS, 1 + OTHERS)
    lines = [f"Mark: {mark}.\n" for mark in [often] * OFTEN + others]
    head = (
        "Read the following text.\n"
        if neutral
        else "Some lines carry a mark. There will be a question about the marks.\n"
    )
    question, prefix = "Which mark is there most often in the text above?\n", "The mark that is there most often is:"
    left = tokens - count(head + question + prefix + f" {often}.\n") - sum(map(count, lines)) - 4
    body, depths = _spread(rng, _fill(rng, filler, left, count), lines)
    item = Item(question, prefix, (often,), tuple(depths[:OFTEN]))
    return Haystack(name, head + "".join(body), (item,), 8)


CLASSES: dict[str, Callable[..., Haystack]] = {"marks": _marks}
"""Generators by name, as ``tasks.ruler.RULER``."""
