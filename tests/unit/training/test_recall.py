"""Recall tasks: right answers, deterministic by seed."""

from __future__ import annotations

import re

import pytest
from vllm_prune_training.recall import as_chat, make_recall

FILLER = [f"    value_{i} = compute(value_{i - 1}, scale={i})\n" for i in range(300)]


def solve(text: str, kind: str) -> list[str]:
    """The answers to the questions of a task, found by reading its definitions."""
    values: dict[str, str] = {}
    answers = []
    for line in text.splitlines():
        if kind == "lookup":
            if match := re.match(r'assert \w+\["(\w+)"\] == "(\d+)"', line):
                answers.append(values[match[1]])
            elif match := re.match(r'(?:\w+\[|    )"(\w+)"(?:\] =|:) "(\d+)",?$', line):
                values[match[1]] = match[2]
        elif match := re.match(r"print\((\w+)\)  # ", line):
            answers.append(values[match[1]])
        elif match := re.match(r"([a-z]\d+) = (\w+)$", line):
            values[match[1]] = values.get(match[2], match[2])
    return answers


@pytest.mark.parametrize("kind", ["lookup", "variables"])
@pytest.mark.parametrize("seed", range(12))
def test_answers_are_those_of_the_definitions(kind: str, seed: int) -> None:
    task = make_recall(seed, 600, FILLER, kind=kind)
    assert task.answers
    assert [answer.value for answer in task.answers] == solve(task.text, kind)
    for answer in task.answers:
        assert task.text[answer.start : answer.end] == answer.value
        assert answer.key_end <= task.query_start <= answer.start


def test_same_seed_gives_the_same_task() -> None:
    assert make_recall(7, 500, FILLER) == make_recall(7, 500, FILLER)
    assert make_recall(7, 500, FILLER).text != make_recall(8, 500, FILLER).text


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_task_takes_about_the_asked_length(tokens: int) -> None:
    task = make_recall(3, tokens, FILLER, pairs=8, queries=4)
    size = sum(max(1, len(line) // 3) for line in task.text.splitlines(keepends=True))
    assert 0.8 * tokens <= size <= tokens
    assert len(task.answers) == 4


def test_chat_form_keeps_the_answer_spans() -> None:
    task = make_recall(5, 400, FILLER)
    chat = as_chat(task)
    assert chat.text.startswith("<|im_start|>user\n")
    assert [chat.text[a.start : a.end] for a in chat.answers] == [a.value for a in task.answers]
