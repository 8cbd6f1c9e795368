"""Multi-instruction retention: rules at the start, long filler, then each rule's case comes up.

A synthetic form of instruction following under eviction (arXiv 2510.00231: some of several instructions are silently
lost). A rule is "when you see KEY, write VALUE.", which a tiny language model can obey by copying, so that what is
measured is the memory. One haystack holds k rules and asks for each: how many are obeyed, and which by their position.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .ruler import Count, Haystack, Item, _fill, _Words

RULES = 8
TOKENS_PER_RULE = 64
"""Fewer rules in a text of fewer tokens than ``RULES`` times this, and at least two."""


def rules_in(tokens: int) -> int:
    """k: rules in a haystack of so many tokens."""
    return max(2, min(RULES, tokens // TOKENS_PER_RULE))


def _instructions(
    name: str, rng: random.Random, tokens: int, count: Count, filler: Sequence[str], neutral: bool, questions: int
) -> Haystack:
    """k rules, filler, and a question for ``questions`` of them (all in their order when there are enough)."""
    words = _Words(rng)
    head = (
        "Read the following text.\n"
        if neutral
        else "Here are some rules. Remember each of them, they hold until the end.\n"
    )
    rules = [(words.key(), words.number(5)) for _ in range(rules_in(tokens))]
    lines = [f"When you see {key}, write {value}.\n" for key, value in rules]
    question = "Now follow the rules above.\n"

    def prefix(key: str) -> str:
        return f"When you see {key}, write"

    left = tokens - count(head) - sum(map(count, lines))
    left -= questions * (count(question) + max(map(count, lines)) + 2)
    fill = _fill(rng, filler, left, count)
    context = head + "".join(lines) + "".join(fill)
    wanted = range(len(rules)) if questions >= len(rules) else rng.sample(range(len(rules)), questions)
    starts = [len(head) + sum(map(len, lines[:i])) for i in range(len(rules))]  # characters, as the depth of a rule
    items = tuple(
        Item(question, prefix(rules[i][0]), (rules[i][1],), (starts[i] / max(1, len(context)),)) for i in wanted
    )
    return Haystack(name, context, items, 16)


INSTRUCTIONS: dict[str, Callable[..., Haystack]] = {"instructions": _instructions}
"""Generators by name, as ``tasks.ruler.RULER``."""
