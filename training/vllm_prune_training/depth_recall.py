"""Recall by depth: exact answers about things that lie at known places of a long context, open and gated.

A context with several questions after it, answers written out, is run once and judged teacher-forced: right when every
token of an answer is the model's first choice. Gates are causal, so what is left of the context was decided before the
first question. Dimension letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import recall, tasks
from .masked import GatedModel, Mode

BINS = 5
TASKS = ("lookup", "niah_multikey_1")
"""Dictionary look-ups in code, and needles in real text."""

QUESTIONS = 8


@dataclass(frozen=True)
class Probe:
    """A text with answers: ids int64 [T], positions of each answer's tokens, and where each was defined, 0 to 1."""

    ids: torch.Tensor
    answers: list[range]
    depths: list[float]


@dataclass
class Recall:
    """Right answers and asked ones of a task at a length, by depth in ``BINS`` equal parts, for each mode."""

    task: str
    length: int
    asked: list[int] = field(default_factory=lambda: [0] * BINS)
    right: dict[Mode, list[int]] = field(default_factory=lambda: {"open": [0] * BINS, "hard": [0] * BINS})

    def share(self, mode: Mode) -> list[float | None]:
        """Exact answers by depth; None where nothing was asked."""
        return [r / a if a else None for r, a in zip(self.right[mode], self.asked, strict=True)]

    def total(self, mode: Mode) -> float:
        return sum(self.right[mode]) / max(1, sum(self.asked))


def make_probe(name: str, tokenizer: Any, length: int, seed: int, filler: Sequence[str], count: tasks.Count) -> Probe:
    """One text of a task of about, and at most, T = ``length`` tokens.

    Args:
        name: of ``tasks.RECALL`` or ``tasks.TASKS``.
        tokenizer: fast.
        length: at least 160.
        seed: everything follows from it.
        filler: lines of real text.
        count: tokens of a line.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length
    while True:  # lines counted one by one can add up to a little less than the text
        text, spans, depths = _text(name, room - 8, seed, filler, count)
        ids, answers = tasks.encode(tokenizer, text, spans)
        over = len(ids) + len(start) - length
        if over <= 0 or room - over < 136:
            break
        room -= over
    shifted = [range(a.start + len(start), a.stop + len(start)) for a in answers]
    keep = [i for i, a in enumerate(shifted) if a.stop <= length]
    ids = torch.tensor([*start, *ids][:length])
    return Probe(ids, [shifted[i] for i in keep], [depths[i] for i in keep])


def _text(
    name: str, tokens: int, seed: int, filler: Sequence[str], count: tasks.Count
) -> tuple[str, list[tuple[int, int]], list[float]]:
    """Text, character spans of the answers, depths."""
    if name in tasks.RECALL:
        pairs = max(2, min(QUESTIONS, tokens // 64))
        made = recall.make_recall(seed, tokens, filler, kind=name, pairs=pairs, queries=pairs, count=count)  # type: ignore[arg-type]
        depths = [answer.key_end / max(1, made.query_start) for answer in made.answers]
        return made.text, [(answer.start, answer.end) for answer in made.answers], depths
    questions = max(1, min(QUESTIONS, tokens // 128))
    stack = tasks.make_haystack(name, seed, tokens, count, questions=questions, filler=filler)
    return *stack.answered(), [sum(item.depths) / max(1, len(item.depths)) for item in stack.items]


@torch.no_grad()
def measure_recall(
    gated: GatedModel,
    tokenizer: Any,
    lengths: Sequence[int],
    texts: int,
    filler: Sequence[str],
    names: Sequence[str] = TASKS,
    say: Callable[[str], None] = lambda _: None,
) -> list[Recall]:
    """Ask ``texts`` texts of each task and length, with gates open and as served."""
    count = tasks.counter(tokenizer)
    found = []
    for name in names:
        for length in lengths:
            row = Recall(name, length)
            say(f"recall: {name}, {length} tokens")
            for seed in range(texts):
                probe = make_probe(name, tokenizer, length, 7_000_003 + seed, filler, count)
                bins = [min(BINS - 1, int(depth * BINS)) for depth in probe.depths]
                for at in bins:
                    row.asked[at] += 1
                # Prompt gates: everything before the first answer is the prompt.
                prompt = min((answer[0] for answer in probe.answers), default=len(probe.ids))
                for mode, right in row.right.items():
                    best = gated(probe.ids, mode, collect=False, prompt=prompt).logits.argmax(-1)
                    for at, answer in zip(bins, probe.answers, strict=True):
                        right[at] += all(best[i - 1] == probe.ids[i] for i in answer)
            if any(row.asked):  # a length can be too small for a task
                found.append(row)
    return found
