"""Long-context tasks after RULER (Hsieh et al. 2024, arXiv 2404.06654) that need no download, in our own words.

A *haystack* is a text with questions about it. Each task grows filler until the text just fits a number of tokens, and puts
what must be found at depths drawn from 40 evenly spaced places. The same haystack serves evaluation (one question, asked
after the whole context) and training (many questions on one context).
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..recall import WORDS

Count = Callable[[str], int]
DEPTHS = 40
ADJECTIVES = (
    "ancient", "bitter", "brave", "bright", "calm", "clever", "cold", "curious", "dusty", "eager", "early", "faint",
    "fierce", "fragile", "gentle", "golden", "grand", "hollow", "humble", "icy", "jolly", "keen", "late", "lively",
    "loud", "lucky", "mellow", "misty", "narrow", "noble", "pale", "patient", "proud", "quick", "quiet", "rapid",
    "rough", "shiny", "silent", "slow", "soft", "spare", "steep", "stormy", "swift", "tall", "tender", "warm",
)  # fmt: skip
NOISE = (
    "The road is long and the hills are green.\n",
    "A cart goes by and the day goes on.\n",
    "Rain falls on the roof and runs down to the river.\n",
    "Nobody waits at the gate, and the birds are still.\n",
    "There is bread on the table and light in the window.\n",
)


@dataclass(frozen=True)
class Item:
    """One question: ``answer_prefix`` follows it, an answer is right in so far as it holds the references.

    ``depths``: where in the context, 0 to 1, the things to be found lie."""

    question: str
    answer_prefix: str
    references: tuple[str, ...]
    depths: tuple[float, ...]


@dataclass(frozen=True)
class Haystack:
    """A context with questions about it."""

    name: str
    context: str
    items: tuple[Item, ...]
    max_new_tokens: int

    def answered(self) -> tuple[str, list[tuple[int, int]]]:
        """The text with every question and its answer written out, and the (start, end) of each answer's characters."""
        text, answers = self.context, []
        for item in self.items:
            text += item.question + item.answer_prefix + " "
            answer = ", ".join(item.references)
            answers.append((len(text), len(text) + len(answer)))
            text += answer + ".\n"
        return text, answers


@dataclass(frozen=True)
class Task:
    """One question about one context. The prompt is context + question + answer_prefix."""

    name: str
    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    depths: tuple[float, ...]
    max_new_tokens: int

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.answer_prefix

    @property
    def answer(self) -> str:
        """The expected continuation of the prompt."""
        return " " + ", ".join(self.references) + ".\n"


class _Words:
    """Draws keys and values that do not repeat within one haystack."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.used = rng, set[str]()

    def _new(self, draw: Callable[[], str]) -> str:
        while (word := draw()) in self.used:
            pass
        self.used.add(word)
        return word

    def key(self) -> str:
        return self._new(lambda: f"{self.rng.choice(ADJECTIVES)}-{self.rng.choice(WORDS)}")

    def number(self, digits: int = 7) -> str:
        return self._new(lambda: str(self.rng.randrange(10 ** (digits - 1), 10**digits)))

    def uuid(self) -> str:
        return self._new(lambda: str(uuid.UUID(int=self.rng.getrandbits(128), version=4)))

    def name(self) -> str:
        return self._new(lambda: "".join(self.rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)))

    def code(self) -> str:
        return self._new(lambda: "".join(self.rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)))


def _fill(rng: random.Random, filler: Sequence[str], tokens: int, count: Count) -> list[str]:
    """Lines in a row of at most so many tokens together: of the filler from a place drawn from it, or of the noise."""
    at = rng.randrange(len(filler)) if filler else 0
    source = filler or NOISE
    lines: list[str] = []
    while tokens > 0:
        line = source[(at + len(lines)) % len(source)]
        tokens -= count(line)
        if tokens >= 0:
            lines.append(line)
    return lines


def _spread(rng: random.Random, filler: list[str], needles: list[str]) -> tuple[list[str], list[float]]:
    """Puts needles between filler lines, at depths from the grid; lines, and each needle's depth."""
    grid = [rng.randrange(DEPTHS) / (DEPTHS - 1) for _ in needles]
    places = sorted((round(depth * len(filler)), i) for i, depth in enumerate(grid))
    lines: list[str] = []
    at = 0
    for place, i in places:
        lines += [*filler[at:place], needles[i]]
        at = place
    return lines + filler[at:], grid


def _needles(
    name: str,
    rng: random.Random,
    tokens: int,
    count: Count,
    filler: Sequence[str],
    neutral: bool,
    questions: int,
    *,
    needles: int = 1,
    haystack: str = "noise",
    uuids: bool = False,
) -> Haystack:
    """Needles in filler. ``haystack``: ``noise`` (repeated sentences), ``text`` (the filler), or ``needles``.

    More questions than needles (training) add needles."""
    words = _Words(rng)
    kind = "identifier" if uuids else "number"

    def needle() -> tuple[str, str, str]:
        key, value = (words.uuid(), words.uuid()) if uuids else (words.key(), words.number())
        return key, value, f"One of the special {kind}s for {key} is: {value}.\n"

    def item(key: str, value: str, depth: float) -> Item:
        ask = f"What is the special {kind} for {key} in the text above?\n"
        return Item(ask, f"The special {kind} for {key} in the text above is:", (value,), (depth,))

    head = (
        "Read the following text.\n"
        if neutral
        else f"Some special {kind}s are hidden in the following text. Remember them, there will be questions.\n"
    )
    first = [needle() for _ in range(max(needles, questions))]
    asked = first[:questions]
    asking = [item(key, value, 0.0) for key, value, _ in asked]
    left = tokens - count(head) - sum(count(line) for _, _, line in first)
    left -= sum(count(i.question) + count(i.answer_prefix) + count(f" {i.references[0]}.\n") for i in asking)
    if haystack == "needles":
        while left > 0:
            more = needle()
            left -= count(more[2])
            if left >= 0:
                first.append(more)
        rng.shuffle(first)
        lines = [line for _, _, line in first]
        depths = [i / max(1, len(lines) - 1) for i in range(len(lines))]
    else:
        fill = _fill(rng, filler if haystack == "text" else (), left, count)
        lines, depths = _spread(rng, fill, [line for _, _, line in first])
    where = {key: depth for (key, _, _), depth in zip(first, depths, strict=True)}
    items = tuple(item(key, value, where[key]) for key, value, _ in asked)
    return Haystack(name, head + "".join(lines), items, 96 if uuids else 32)


def _chain(words: _Words, hops: int) -> tuple[list[str], list[str], str]:
    """Assignment lines of one chain, its names, its value."""
    value, names = words.number(5), [words.name() for _ in range(hops + 1)]
    lines = [f"VAR {names[0]} = {value}\n"]
    lines += [f"VAR {b} = VAR {a}\n" for a, b in pairwise(names)]
    return lines, names, value


def _tracking(
    name: str, rng: random.Random, tokens: int, count: Count, filler: Sequence[str], neutral: bool, questions: int
) -> Haystack:
    """Variable tracking: one chain of four hops in noise, after a small solved example."""
    words = _Words(rng)

    def ask(value: str) -> tuple[str, str]:
        return f"Which variables hold the value {value}?\n", f"The variables that hold the value {value} are:"

    small, small_names, small_value = _chain(words, 2)
    question, prefix = ask(small_value)
    example = "".join(small) + question + prefix + " " + ", ".join(small_names) + ".\n"
    head = "Read the following text.\n" if neutral else "Follow the chain of assignments in the following text.\n"
    lines, names, value = _chain(words, 4)
    question, prefix = ask(value)
    left = tokens - count(head + example + question + prefix + " " + ", ".join(names) + ".\n") - 4
    left -= sum(map(count, lines))
    noise: list[str] = []
    while left > 0:
        noise.append(NOISE[len(noise) % len(NOISE)])
        left -= count(noise[-1])
    noise = noise[:-1]
    grid = sorted(rng.randrange(DEPTHS) / (DEPTHS - 1) for _ in lines)
    body: list[str] = []
    at = 0
    for depth, line in zip(grid, lines, strict=True):
        place = round(depth * len(noise))
        body += [*noise[at:place], line]
        at = place
    body += noise[at:]
    return Haystack(name, example + head + "".join(body), (Item(question, prefix, tuple(names), tuple(grid)),), 48)


def _frequent(
    name: str, rng: random.Random, tokens: int, count: Count, filler: Sequence[str], neutral: bool, questions: int
) -> Haystack:
    """Frequent words: rank k appears N k^-2 / zeta(2) times; rank 1 is dots; ranks 2 to 4 are asked for."""
    words = _Words(rng)
    head = "Read the following coded text.\n" if neutral else "Find the frequent words of the following coded text.\n"
    question = "Apart from the dots, which three words appear most often in the text above?\n"
    prefix = "The three words that appear most often are:"
    vocabulary = ["...", *(words.code() for _ in range(max(4, tokens // 50)))]
    shares = [1.0 / (rank * rank * 1.6449340668) for rank in range(1, len(vocabulary) + 1)]
    cost = sum(share * count(" " + word) for share, word in zip(shares, vocabulary, strict=True))
    left = tokens - count(head + question + prefix + " " + ", ".join(vocabulary[1:4]) + ".\n") - 4
    total = int(left / cost)
    drawn = [word for share, word in zip(shares, vocabulary, strict=True) for _ in range(int(total * share))]
    rng.shuffle(drawn)
    item = Item(question, prefix, tuple(vocabulary[1:4]), ())
    return Haystack(name, head + " ".join(drawn) + "\n", (item,), 48)


def _needle_task(**settings: object) -> Callable[..., Haystack]:
    return lambda *args: _needles(*args, **settings)  # type: ignore[arg-type]


RULER: dict[str, Callable[..., Haystack]] = {
    "niah_single_1": _needle_task(),
    "niah_single_2": _needle_task(haystack="text"),
    "niah_multikey_1": _needle_task(needles=4, haystack="text"),
    "niah_multikey_2": _needle_task(haystack="needles"),
    "niah_multikey_3": _needle_task(haystack="needles", uuids=True),
    "variable_tracking": _tracking,
    "frequent_words": _frequent,
}
"""Generators by name: (name, rng, tokens, count, filler, neutral, questions) -> Haystack."""


def make_haystack(
    name: str,
    seed: int,
    tokens: int,
    count: Count,
    *,
    neutral: bool = False,
    questions: int = 1,
    filler: Sequence[str] = (),
    generators: Mapping[str, Callable[..., Haystack]] = RULER,
) -> Haystack:
    """A context with up to ``questions`` questions that together take about ``tokens`` tokens (at most, as ``count``
    measures lines one by one).

    Args:
        name: a key of ``generators``.
        seed: everything follows from it and the name.
        tokens: of context, questions and answers.
        count: tokens of a string.
        neutral: a preface that does not tell what will be asked.
        questions: about this context, where the task has several to ask.
        filler: lines for haystacks of real text; without them these fall back to noise sentences.
        generators: by name.

    Raises:
        ValueError: no such task, or ``tokens`` too small for it.
    """
    if name not in generators:
        raise ValueError(f"unknown task {name!r}: known are {', '.join(generators)}")
    if tokens < 128:
        raise ValueError(f"{name} needs at least 128 tokens, got {tokens}")
    rng = random.Random(f"{name}:{seed}")
    return generators[name](name, rng, tokens, count, filler, neutral, questions)
