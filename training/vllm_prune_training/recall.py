"""Synthetic recall tasks written as Python-like text: key lookup and variable tracking, seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["lookup", "variables"]
Count = Callable[[str], int]

WORDS = [
    "amber",
    "anchor",
    "apple",
    "arrow",
    "aspen",
    "badger",
    "bamboo",
    "barley",
    "basil",
    "beacon",
    "birch",
    "bishop",
    "bison",
    "blossom",
    "breeze",
    "bronze",
    "cactus",
    "camel",
    "candle",
    "canyon",
    "castle",
    "cedar",
    "cherry",
    "cipher",
    "clover",
    "cobalt",
    "comet",
    "copper",
    "coral",
    "cotton",
    "crater",
    "cricket",
    "crystal",
    "cypress",
    "daisy",
    "dolphin",
    "dragon",
    "eagle",
    "ember",
    "falcon",
    "feather",
    "fennel",
    "fern",
    "finch",
    "flint",
    "forest",
    "fossil",
    "garnet",
    "ginger",
    "glacier",
    "granite",
    "gravel",
    "harbor",
    "hazel",
    "heron",
    "honey",
    "indigo",
    "iris",
    "island",
    "ivory",
    "jacket",
    "jasmine",
    "jasper",
    "juniper",
    "kernel",
    "kestrel",
    "kettle",
    "lagoon",
    "lantern",
    "lark",
    "laurel",
    "lemon",
    "lichen",
    "lily",
    "linen",
    "lotus",
    "magnet",
    "mango",
    "maple",
    "marble",
    "marlin",
    "meadow",
    "mint",
    "mirror",
    "monsoon",
    "moss",
    "nectar",
    "nickel",
    "oasis",
    "olive",
    "onyx",
    "opal",
    "orchid",
    "osprey",
    "otter",
    "oyster",
    "panda",
    "parrot",
    "pebble",
    "pepper",
    "pine",
    "plum",
    "poplar",
    "prairie",
    "quartz",
    "quill",
    "rabbit",
    "raven",
    "reef",
    "ribbon",
    "river",
    "robin",
    "rocket",
    "saffron",
    "salmon",
    "sandal",
    "sierra",
    "silver",
    "sparrow",
    "spruce",
    "summit",
    "sunset",
    "tamarind",
    "thistle",
    "thunder",
    "tiger",
    "timber",
    "topaz",
    "tulip",
    "tundra",
    "turtle",
    "umber",
    "valley",
    "velvet",
    "violet",
    "walnut",
    "willow",
    "winter",
    "wolf",
    "yarrow",
    "zephyr",
    "zinc",
]
TABLE_NAMES = ("table", "registry", "codes", "settings", "lookup", "index")


@dataclass(frozen=True)
class Answer:
    """One answer: ``text[start:end] == value``; ``key_end`` is where the definition of the value ends."""

    start: int
    end: int
    value: str
    key_end: int


@dataclass(frozen=True)
class Recall:
    """A task text with its answers as character spans; ``query_start`` is where the questions begin."""

    text: str
    answers: tuple[Answer, ...]
    kind: Kind
    query_start: int


def default_count(line: str) -> int:
    """Rough number of tokens of one line, for use without a tokenizer."""
    return max(1, len(line) // 3)


def _digits(rng: random.Random, low: int = 3, high: int = 5) -> str:
    length = rng.randint(low, high)
    return str(rng.randrange(10 ** (length - 1), 10**length))


def _keys(rng: random.Random, number: int) -> list[str]:
    keys: dict[str, None] = {}
    while len(keys) < number:
        key = rng.choice(WORDS)
        if number > 40 or rng.random() < 0.3:
            key = f"{key}_{rng.choice(WORDS)}"
        keys[key] = None
    return list(keys)


def _variables(rng: random.Random, number: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < number:
        names[f"{rng.choice('abcdefghkmnpqrstuvwxyz')}{rng.randrange(1, 100)}"] = None
    return list(names)


def _lookup_lines(rng: random.Random, number: int) -> tuple[list[str], dict[str, tuple[int, str]], str]:
    """Definition lines, ``key -> (line, value)``, and the name of the table."""
    name = rng.choice(TABLE_NAMES)
    keys = _keys(rng, number)
    values = {key: _digits(rng) for key in keys}
    if rng.random() < 0.5:
        lines = [f"{name} = {{}}\n"] + [f'{name}["{key}"] = "{values[key]}"\n' for key in keys]
    else:
        lines = [f"{name} = {{\n", *(f'    "{key}": "{values[key]}",\n' for key in keys), "}\n"]
    return lines, {key: (i + 1, values[key]) for i, key in enumerate(keys)}, name


def _variable_lines(rng: random.Random, number: int) -> tuple[list[str], dict[str, tuple[int, str]]]:
    """Chains of assignments, interleaved; ``name -> (line, value)`` for every variable."""
    names = _variables(rng, number)
    lines: list[str] = []
    where: dict[str, tuple[int, str]] = {}
    for name in names:
        if where and rng.random() < 0.5:
            source = rng.choice(list(where))
            lines.append(f"{name} = {source}\n")
            where[name] = (len(lines) - 1, where[source][1])
        else:
            value = _digits(rng)
            lines.append(f"{name} = {value}\n")
            where[name] = (len(lines) - 1, value)
    return lines, where


def make_recall(
    seed: int,
    tokens: int,
    filler: Sequence[str],
    *,
    kind: Kind | None = None,
    pairs: int | None = None,
    queries: int | None = None,
    filler_share: float | None = None,
    count: Count = default_count,
) -> Recall:
    """One task of about ``tokens`` tokens as ``count`` measures lines.

    The text holds definitions, a contiguous piece of ``filler`` lines of real code (``filler_share`` of the
    tokens that are left, in up to three places), then ``queries`` questions with their answers.
    """
    rng = random.Random(seed)
    kind = kind or rng.choice(("lookup", "lookup", "variables"))
    limit = max(2, min(32, tokens // 24))
    pairs = pairs or min(limit, int(2 ** rng.uniform(1, 5.01)))
    share = rng.random() if filler_share is None else filler_share
    if kind == "lookup":
        lines, where, table = _lookup_lines(rng, pairs)
    else:
        lines, where = _variable_lines(rng, pairs)
        table = ""
    left = tokens - sum(map(count, lines))
    question_cost = 16
    if queries is None:
        queries = max(1, int(left * (1 - share)) // question_cost)
        queries = min(queries, max(4, 2 * pairs))
    budget = max(0, int((left - queries * question_cost) * (1.0 if filler_share is None else share)))

    literal = "}\n" in lines
    splits = [] if literal else sorted(rng.randrange(len(lines) + 1) for _ in range(rng.randint(0, 2)))
    pieces: list[str] = []
    ends: list[int] = []
    size = 0

    def add(line: str) -> None:
        nonlocal size
        pieces.append(line)
        size += len(line)

    def add_filler(amount: int) -> None:
        if not filler or amount <= 0:
            return
        at = rng.randrange(len(filler))
        while amount > 0:
            line = filler[at % len(filler)]
            at += 1
            amount -= count(line)
            if amount >= 0:
                add(line)

    part = budget // (len(splits) + 1)
    for i, line in enumerate(lines):
        for _ in range(splits.count(i)):
            add_filler(part)
        add(line)
        ends.append(size)
    add_filler(budget - part * sum(split < len(lines) for split in splits))

    query_start = size
    names = list(where)
    order: list[str] = []
    while len(order) < queries:
        order.extend(rng.sample(names, len(names)))
    answers = []
    for name in order[:queries]:
        line, value = where[name]
        if kind == "lookup":
            head, tail = f'assert {table}["{name}"] == "', '"\n'
        else:
            head, tail = f"print({name})  # ", "\n"
        start = size + len(head)
        add(f"{head}{value}{tail}")
        answers.append(Answer(start, start + len(value), value, ends[line]))
    return Recall("".join(pieces), tuple(answers), kind, query_start)


def as_chat(recall: Recall) -> Recall:
    """The same task as a ChatML exchange: the code is the user's turn, the questions the assistant's."""
    head = "<|im_start|>user\n"
    middle = "<|im_end|>\n<|im_start|>assistant\n"
    shift = len(head) + len(middle)
    cut = recall.query_start
    text = head + recall.text[:cut] + middle + recall.text[cut:] + "<|im_end|>\n"
    answers = tuple(
        replace(a, start=a.start + shift, end=a.end + shift, key_end=a.key_end + len(head)) for a in recall.answers
    )
    return Recall(text, answers, recall.kind, cut + shift)
