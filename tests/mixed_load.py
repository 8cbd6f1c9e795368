"""What a mixed load asks for, of one engine (``tests/gpu/soak.py``) or over HTTP (``benchmarks/soak.py``)."""

from __future__ import annotations

import random


def draw_lengths(rng: random.Random, longest: int) -> tuple[int, int]:
    """Tokens of a prompt, 1 to ``longest`` - 2, and to generate: lognormal, together at most ``longest``."""
    prompt = min(int(rng.lognormvariate(4.5, 1.2)) + 1, longest - 2)
    return prompt, min(int(rng.lognormvariate(4.0, 0.8)) + 1, longest - prompt)


def draw_tokens(rng: random.Random, count: int, vocab: int) -> list[int]:
    """Any tokens but the three special ones of ``support.tiny_config``."""
    return [rng.randrange(3, vocab) for _ in range(count)]


def draw_prompt(rng: random.Random, length: int, vocab: int, beginnings: list[list[int]]) -> list[int]:
    """Every other one has one of the beginnings, as far as it goes."""
    begin = rng.choice(beginnings)[:length] if rng.random() < 0.5 else []
    return begin + draw_tokens(rng, length - len(begin), vocab)
