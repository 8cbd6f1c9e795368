"""Synthetic tasks whose answers are known: for training data and for evaluation, without any download."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from .. import recall
from .delayed import DELAYED
from .instructions import INSTRUCTIONS
from .marks import CLASSES
from .ruler import RULER, Count, Haystack, Item, Task
from .ruler import make_haystack as _make_haystack

RECALL: tuple[recall.Kind, ...] = ("lookup", "variables")
GENERATORS = {**RULER, **DELAYED, **INSTRUCTIONS, **CLASSES}
TASKS = (*GENERATORS,)
"""Names that ``make_task`` knows."""

__all__ = ["RECALL", "TASKS", "Count", "Haystack", "Item", "Task", "counter", "make_haystack", "make_sample",
           "make_task", "score"]  # fmt: skip


def make_haystack(name: str, seed: int, tokens: int, count: Count, *, neutral: bool = False, questions: int = 1,
                  filler: Sequence[str] = ()) -> Haystack:  # fmt: skip
    """``ruler.make_haystack`` over every task of ``TASKS``."""
    return _make_haystack(name, seed, tokens, count, neutral=neutral, questions=questions, filler=filler,
                          generators=GENERATORS)  # fmt: skip


def make_task(
    name: str, seed: int, tokens: int, count: Count, neutral: bool = False, filler: Sequence[str] = ()
) -> Task:
    """One question about one context of together at most ``tokens`` tokens, answer included."""
    stack = make_haystack(name, seed, tokens, count, neutral=neutral, filler=filler)
    item = stack.items[0]
    return Task(name, stack.context, item.question, item.answer_prefix, item.references, item.depths,
                stack.max_new_tokens)  # fmt: skip


def score(task: Task, output: str) -> float:
    """Share of the task's references that the output contains, case-insensitive."""
    text = output.lower()
    return sum(reference.lower() in text for reference in task.references) / len(task.references)


def counter(tokenizer: PreTrainedTokenizerBase) -> Count:
    """Counts tokens with ``tokenizer``; lines that repeat are counted once."""
    backend = tokenizer.backend_tokenizer
    known: dict[str, int] = {}

    def count(text: str) -> int:
        if text not in known:
            if len(known) > 50_000:
                known.clear()
            known[text] = len(backend.encode(text, add_special_tokens=False).ids)
        return known[text]

    return count


def encode(tokenizer: PreTrainedTokenizerBase, text: str, answers: Sequence[tuple[int, int]]) -> tuple[
    list[int], list[range]
]:  # fmt: skip
    """Token ids of ``text`` (no bos), and for each (start, end) of characters the positions its tokens take."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    offsets = np.asarray(encoding.offsets).reshape(-1, 2)
    spans = [
        range(int(np.searchsorted(offsets[:, 1], start, side="right")), int(np.searchsorted(offsets[:, 0], end)))
        for start, end in answers
    ]
    return encoding.ids, spans


def make_sample(
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    tokens: int,
    seed: int,
    *,
    filler: Sequence[str] = (),
    count: Count | None = None,
    questions: int | None = None,
) -> tuple[list[int], list[range]]:
    """A training text of about ``tokens`` tokens: one of the named tasks with its answers written out.

    Args:
        names: of ``TASKS`` and ``RECALL``; one is drawn.
        tokens: to aim at; the caller cuts what is longer. At least 128.
        filler: lines of real text for haystacks.
        questions: about the same context; drawn from 1 to a quarter of the tokens' worth by default.

    Returns:
        Token ids without bos and eos, and the positions of each answer's tokens.
    """
    rng = random.Random(seed)
    count = count or counter(tokenizer)
    name = rng.choice(list(names))
    if name in RECALL:
        task = recall.make_recall(seed, tokens - 8, filler, kind=name, count=count)  # type: ignore[arg-type]
        return encode(tokenizer, task.text, [(answer.start, answer.end) for answer in task.answers])
    if questions is None:
        questions = max(1, int(2 ** rng.uniform(0.0, 1.0 + np.log2(max(1, tokens / 256)))))
    stack = make_haystack(name, rng.getrandbits(60), tokens, count, neutral=rng.random() < 0.3, questions=questions,
                          filler=filler)  # fmt: skip
    return encode(tokenizer, *stack.answered())
