"""The benchmark's cases from held-out code, recall tasks and the synthetic tasks of the training package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baselines.case_file import Case, Question
from transformers import PreTrainedTokenizerBase
from vllm_prune_training import recall, tasks
from vllm_prune_training.packing import Corpus, held_out_blocks

SEED = 20_260_001
"""Far from the seeds of training (small) and of its own evaluation (10,000,019)."""


@dataclass(frozen=True)
class CasePlan:
    """How many cases, and how long.

    Attributes:
        tokens: of a context, about.
        texts: windows of held-out code with a continuation.
        continuation: tokens of it.
        tasks: recall tasks of each kind, and contexts of each synthetic task.
        questions: of one context.
        calibration: cases of text and of each kind of task on which strengths are fitted.
        names: synthetic tasks beside recall.
    """

    tokens: int = 2048
    texts: int = 8
    continuation: int = 256
    tasks: int = 4
    questions: int = 4
    calibration: int = 1
    names: tuple[str, ...] = ("niah_single_1", "niah_multikey_1")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def _question(tokenizer: PreTrainedTokenizerBase, before: str, answer: str, after: str) -> Question:
    """Encoded in one piece, so that the answer's tokens are those that a text would have."""
    start = len(before)
    ids, (span,) = tasks.encode(tokenizer, before + answer + after, [(start, start + len(answer))])
    return Question(ids[: span.start], ids[span.start : span.stop])


def recall_case(
    tokenizer: PreTrainedTokenizerBase, kind: recall.Kind, seed: int, plan: CasePlan, filler: Sequence[str], split: str
) -> Case:
    """One ``recall`` task; each of its questions becomes a branch of its own."""
    task = recall.make_recall(seed, plan.tokens, filler, kind=kind, pairs=8, queries=plan.questions,
                              count=tasks.counter(tokenizer))  # fmt: skip
    context = [tokenizer.bos_token_id, *_ids(tokenizer, task.text[: task.query_start])]
    questions, at = [], task.query_start
    for answer in task.answers:
        end = task.text.index("\n", answer.end) + 1
        questions.append(_question(tokenizer, task.text[at : answer.start], answer.value, task.text[answer.end : end]))
        at = end
    return Case(f"{kind}-{split}-{seed}", kind, split, context, questions)


def haystack_case(
    tokenizer: PreTrainedTokenizerBase, name: str, seed: int, plan: CasePlan, filler: Sequence[str], split: str
) -> Case:
    """One synthetic task of ``vllm_prune_training.tasks`` with its own number of needles."""
    stack = tasks.make_haystack(name, seed, plan.tokens, tasks.counter(tokenizer), filler=filler)
    questions = [
        _question(tokenizer, item.question + item.answer_prefix + " ", ", ".join(item.references), ".\n")
        for item in stack.items
    ]
    context = [tokenizer.bos_token_id, *_ids(tokenizer, stack.context)]
    return Case(f"{name}-{split}-{seed}", name, split, context, questions)


def make_cases(corpus: Corpus, plan: CasePlan) -> list[Case]:
    """All cases of a plan: deterministic, and none of the calibration's in the test.

    Raises:
        ValueError: the held-out corpus is too small.
    """
    tokenizer, filler = corpus.tokenizer, corpus.filler("held_out")
    wanted = plan.texts + plan.calibration
    blocks = held_out_blocks(corpus, plan.tokens + plan.continuation, wanted).tolist()
    if len(blocks) < wanted:
        raise ValueError(f"the held-out corpus has {len(blocks)} windows of {plan.tokens + plan.continuation} tokens, "
                         f"the plan wants {wanted}")  # fmt: skip
    cases = []
    for i, row in enumerate(blocks):
        split = "calibration" if i >= plan.texts else "test"
        cases.append(Case(f"text-{i}", "text", split, row[: plan.tokens], continuation=row[plan.tokens :]))
    for k, kind in enumerate(tasks.RECALL):
        for i in range(plan.tasks + plan.calibration):
            split = "calibration" if i >= plan.tasks else "test"
            cases.append(recall_case(tokenizer, kind, SEED + 1000 * k + i, plan, filler, split))
    for k, name in enumerate(plan.names):
        for i in range(plan.tasks + plan.calibration):
            split = "calibration" if i >= plan.tasks else "test"
            cases.append(haystack_case(tokenizer, name, SEED + 100_000 + 1000 * k + i, plan, filler, split))
    return cases
