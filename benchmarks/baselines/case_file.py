"""Cases of the quality benchmark as a file, and how an answer is judged. Imports nothing of this project: two environments
share it (ours, and the one of kvpress).

A case is one context, read before anything is known of what follows. What follows are *branches*, each from the context
alone: questions with their answers, or the text's own continuation. Dimension letters: B branches, Q tokens of the longest
branch, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

VERSION = 1


@dataclass(frozen=True)
class Question:
    """Token ids of a question, up to where the answer starts, and of the answer."""

    ids: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Case:
    """One context and what follows it: questions, or a continuation; never both.

    Attributes:
        name: unique in its file.
        task: what kind; ``text`` for continuations.
        split: ``test``, or ``calibration`` for what strengths are fitted on.
        context: token ids, bos included.
    """

    name: str
    task: str
    split: str
    context: list[int]
    questions: list[Question] = field(default_factory=list)
    continuation: list[int] = field(default_factory=list)

    def branches(self) -> list[tuple[list[int], range]]:
        """Token ids of each branch and the positions in it that are judged, each from the token before it.

        A continuation's first token is not judged: it follows from the context's last query, which some methods run
        before they compress anything.
        """
        if self.continuation:
            return [(self.continuation, range(1, len(self.continuation)))]
        return [(q.ids + q.answer, range(len(q.ids), len(q.ids) + len(q.answer))) for q in self.questions]

    def padded(self) -> torch.Tensor:
        """int64 [B, Q], zeros behind each branch's end."""
        rows = [torch.tensor(ids) for ids, _ in self.branches()]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@dataclass(frozen=True)
class Row:
    """What one method did on one case.

    Attributes:
        method: its name.
        budget: fraction of the context's keys that was asked for; 1 for dense.
        case, task: of the case.
        kept: fraction of the context's keys held when the branches begin, mean over layers and KV heads.
        answers, right: questions, and those whose answer was right token by token (which greedy decoding would write).
        nll, tokens: summed negative log-likelihood (nats) of the judged tokens, and their number.
        past_kept: visible share of past pairs within the context; None where the context is read densely.
    """

    method: str
    budget: float
    case: str
    task: str
    kept: float
    answers: int
    right: int
    nll: float
    tokens: int
    past_kept: float | None = None


def judge(case: Case, logits: torch.Tensor) -> dict[str, Any]:
    """``answers``, ``right``, ``nll`` and ``tokens`` of a ``Row``.

    Args:
        case: with B branches.
        logits: [B, Q, V] of ``case.padded()``.
    """
    right, nll, tokens = 0, 0.0, 0
    branches = case.branches()
    for row, (ids, judged) in zip(logits, branches, strict=True):
        want = torch.tensor(ids[judged.start : judged.stop])
        found = row[judged.start - 1 : judged.stop - 1].float()
        right += bool((found.argmax(-1) == want).all())
        nll += float(torch.nn.functional.cross_entropy(found, want, reduction="sum"))
        tokens += len(want)
    if case.continuation:
        return {"answers": 0, "right": 0, "nll": nll, "tokens": tokens}
    return {"answers": len(branches), "right": right, "nll": nll, "tokens": tokens}


def save_cases(path: Path, cases: Iterable[Case], check: dict[str, Any], record: dict[str, Any]) -> None:
    """``check``: ids and our last logits for them, which the other environment must reproduce before it measures."""
    data = {"version": VERSION, "record": record, "check": check, "cases": [asdict(case) for case in cases]}
    path.write_text(json.dumps(data), encoding="utf-8")


def load_cases(path: Path) -> tuple[list[Case], dict[str, Any]]:
    """Cases and the logit check. Raises ValueError for a file of another version or with an unusable case."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("version") != VERSION:
        raise ValueError(f"{path} has version {data.get('version')}, this code reads {VERSION}: write the cases again")
    cases = []
    for item in data["cases"]:
        questions = [Question(**question) for question in item.pop("questions")]
        case = Case(**item, questions=questions)
        if bool(case.questions) == bool(case.continuation) or len(case.context) < 2:
            raise ValueError(f"case {case.name} in {path} needs a context and either questions or a continuation")
        if any(not q.ids or not q.answer for q in case.questions) or len(case.continuation) == 1:
            raise ValueError(f"case {case.name} in {path} has nothing to judge")
        cases.append(case)
    return cases, data["check"]
