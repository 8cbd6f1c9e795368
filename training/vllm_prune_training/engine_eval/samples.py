"""Prompts with known answers, and windows of held-out text, as requests to the engine.

A prompt is context + question + answer prefix in one request, and that is query-agnostic: a gate is causal, so by the
time the question's first token comes, what is left of the context has been decided by the context alone. Context and
question are tokenized apart, so that the context's tokens do not depend on the question either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_prune.errors import PruneError

from .. import tasks
from ..held_text import library_texts, make_windows, read_texts
from ..tasks.instructions import RULES
from .jobs import LEAST_NEW_TOKENS, Request

PERPLEXITY = "ppl"
NEUTRAL = "_neutral"
"""Ending of a task's name that asks for the preface which does not tell what will be asked."""

NAMES = (PERPLEXITY, *(name + end for name in tasks.TASKS for end in ("", NEUTRAL)))
MANY_QUESTIONS = {"instructions": RULES}
"""Tasks that ask everything of one context: questions, each a request of its own."""

LEAST_LENGTH = 256
FIT_ATTEMPTS = 10
SLACK = 32
"""Tokens that a request may fall short of its length: less than a block's worth is not worth another attempt."""


@dataclass(frozen=True)
class Sample:
    """One request and how to judge it.

    Attributes:
        task: a name of ``NAMES``.
        length: that was asked for, in tokens: prompt and new tokens fit into it.
        context: number of its haystack or window; requests of one share it.
        request: for the engine.
        references: that the answer should hold; none for perplexity.
        depths: where in the context, 0 to 1, they lie.
    """

    task: str
    length: int
    context: int
    request: Request
    references: tuple[str, ...] = ()
    depths: tuple[float, ...] = ()

    def score(self, output: str) -> float:
        """Share of the references that the output holds, case-insensitive (``tasks.score``)."""
        return tasks.score(tasks.Task(self.task, "", "", "", self.references, self.depths, 0), output)


def check_names(names: Sequence[str]) -> None:
    """Raises PruneError for a task that does not exist, or none at all."""
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        what = f"unknown task {', '.join(map(repr, unknown))}" if unknown else "no task is named"
        raise PruneError(f"{what}.", f"Known: {PERPLEXITY}, {', '.join(tasks.TASKS)}, each of these with {NEUTRAL}.")


def task_samples(
    name: str, length: int, number: int, tokenizer: Any, count: tasks.Count, filler: Sequence[str]
) -> list[Sample]:
    """``number`` samples of a task, or as many more as fill its last context.

    Args:
        name: of ``NAMES``, not perplexity.
        length: tokens that the prompt and its new tokens may take.
        number: of samples; sample i follows from its name, length and i.
        tokenizer: of the checkpoint, fast.
        count: ``tasks.counter`` of it.
        filler: lines of real text for the haystacks that want it.

    Raises:
        PruneError: the task does not fit into so few tokens.
    """
    base = name.removesuffix(NEUTRAL)
    found: list[Sample] = []
    context = 0
    while len(found) < number:
        found += _context_samples(name, base, length, context, tokenizer, count, filler)
        context += 1
    return found


def _context_samples(
    name: str, base: str, length: int, context: int, tokenizer: Any, count: tasks.Count, filler: Sequence[str]
) -> list[Sample]:
    """Samples of one haystack, grown or shrunk until its longest request fills the length but for ``SLACK`` tokens."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    best: list[Sample] = []
    budget, least = length, length
    fits, bursts = 0, 2 * length  # budgets: the largest known to fit, the smallest known not to
    for attempt in range(FIT_ATTEMPTS):
        try:
            stack = tasks.make_haystack(
                base, context, budget, count, neutral=name != base, filler=filler, questions=MANY_QUESTIONS.get(base, 1)
            )
        except ValueError:  # too few tokens for anything
            break
        head = [*start, *_encode(tokenizer, stack.context)]
        tails = [_encode(tokenizer, item.question + item.answer_prefix) for item in stack.items]
        room = length - len(head) - max(map(len, tails)) - stack.max_new_tokens
        if 0 <= room < least:
            least = room
            best = [
                Sample(
                    name, length, context, Request([*head, *tail], stack.max_new_tokens), item.references, item.depths
                )
                for item, tail in zip(stack.items, tails, strict=True)
            ]
        if 0 <= room <= SLACK:
            break
        fits, bursts = (max(fits, budget), bursts) if room >= 0 else (fits, min(bursts, budget))
        step = room if room >= 0 else min(room, -(4 << attempt))  # lines may be long: small steps change nothing
        budget = budget + step if fits < budget + step < bursts else (fits + bursts) // 2
    if not best:
        raise PruneError(f"task {name} does not fit into {length} tokens.", "Raise --lengths.")
    return best


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class HeldOut:
    """Held-out text: its documents, and where they come from."""

    texts: list[Any]
    source: str

    @property
    def lines(self) -> list[str]:
        """Printable lines with their line breaks, for haystacks of real text."""
        lines = (line for text in self.texts for line in text.text.split("\n"))
        return [line + "\n" for line in lines if line.strip() and line.isprintable()]


def held_out(data: Path | None) -> HeldOut:
    """Documents of a file or folder; without one, the standard library's modules that the reference corpus holds out.

    Raises:
        PruneError: nothing there, or no text (``held_text.read_texts``).
    """
    if data is not None:
        return HeldOut(read_texts(data), str(data))
    return HeldOut(library_texts(), "modules of Python's standard library that the reference corpus holds out")


def window_samples(text: HeldOut, length: int, number: int, tokenizer: Any, positions: int) -> list[Sample]:
    """Up to ``number`` evenly spread windows of ``length`` tokens (less the new tokens at the last positions).

    Raises:
        PruneError: the text is shorter than one window.
    """
    own = min(length, positions - LEAST_NEW_TOKENS)
    ids = make_windows(text.texts, tokenizer, own, number * own).ids.tolist()
    return [Sample(PERPLEXITY, length, i, Request(row, LEAST_NEW_TOKENS, scored=True)) for i, row in enumerate(ids)]
