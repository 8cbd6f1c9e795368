"""Delayed need: a fact is asked for long after it was told, with other questions asked and answered in between.

The text runs like a conversation. Facts come one after another, some are asked for soon after, and only at the end the
questions that count: their facts lie anywhere before, so that the distance between telling and asking varies over the
samples. What permanent eviction costs shows here: every question in between is a reason to forget what it did not ask.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .ruler import DEPTHS, Count, Haystack, Item, _fill, _Words

TOKENS_PER_EXCHANGE = 256
"""One question in between for so many tokens, and at least two."""


def _delayed(
    name: str, rng: random.Random, tokens: int, count: Count, filler: Sequence[str], neutral: bool, questions: int
) -> Haystack:
    """Delayed need, as the module says. Arguments as of every generator (``tasks.ruler.RULER``)."""
    words = _Words(rng)

    def tell(key: str, value: str) -> str:
        return f"One of the special numbers for {key} is: {value}.\n"

    def ask(key: str) -> tuple[str, str]:
        return f"What is the special number for {key} in the text above?\n", (
            f"The special number for {key} in the text above is:"
        )

    head = (
        "Read the following text.\n"
        if neutral
        else "Some special numbers are told in the following text. There are questions about them at any time.\n"
    )
    asked = [(words.key(), words.number()) for _ in range(questions)]
    between = [(words.key(), words.number()) for _ in range(max(2, tokens // TOKENS_PER_EXCHANGE))]
    tells = [tell(key, value) for key, value in asked]
    left = tokens - count(head) - sum(map(count, tells))
    for key, value in asked:
        left -= count("".join(ask(key)) + f" {value}.\n") + 2

    # (place among the filler, order drawn, line): a fact in between is told somewhere before it is asked for
    events: list[tuple[float, int, str]] = []
    grid = [rng.randrange(DEPTHS) / (DEPTHS - 1) for _ in asked]
    events += [(depth, i, line) for i, (depth, line) in enumerate(zip(grid, tells, strict=True))]
    for key, value in between:
        told, answered = sorted((rng.random(), rng.random()))
        exchange = "".join(ask(key)) + f" {value}.\n"
        cost = count(tell(key, value)) + count(exchange)
        if left - cost < 0:
            break
        left -= cost
        events += [(told, len(events), tell(key, value)), (answered, len(events) + 1, exchange)]
    fill = _fill(rng, filler, left, count)
    body: list[str] = []
    done = 0
    for place, _, line in sorted(events):
        body += [*fill[done : round(place * len(fill))], line]
        done = round(place * len(fill))
    items = tuple(Item(*ask(key), (value,), (depth,)) for (key, value), depth in zip(asked, grid, strict=True))
    return Haystack(name, head + "".join(body + fill[done:]), items, 32)


DELAYED: dict[str, Callable[..., Haystack]] = {"delayed_need": _delayed}
"""Generators by name, as ``tasks.ruler.RULER``."""
