"""Delayed need and multi-instruction retention: what their texts must be to measure what they are for."""

from __future__ import annotations

import re

import pytest
from vllm_prune_training import tasks
from vllm_prune_training.tasks.instructions import RULES, rules_in

TELL = re.compile(r"^One of the special numbers for (\S+) is: (\d{7})\.$")
ASK = re.compile(r"^What is the special number for (\S+) in the text above\?$")
ANSWER = re.compile(r"^The special number for (\S+) in the text above is: (\d{7})\.$")
FILLER = [f"def function_{i}(x):\n" for i in range(200)]


@pytest.mark.parametrize("neutral", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_questions_in_between_are_answered_after_their_facts_and_never_ask_for_the_last_one(
    seed: int, neutral: bool
) -> None:
    task = tasks.make_task("delayed_need", seed, 8000, len, neutral=neutral)
    told: dict[str, str] = {}
    asked = []
    lines = task.context.splitlines()
    for at, line in enumerate(lines):
        if found := TELL.match(line):
            assert found[1] not in told
            told[found[1]] = found[2]
        elif found := ASK.match(line):
            answer = ANSWER.match(lines[at + 1])
            assert answer and answer[1] == found[1] and told[found[1]] == answer[2]
            asked.append(found[1])
    (target,) = re.findall(r"number for (\S+) in", task.question)
    assert told[target] == task.references[0] and target not in asked
    assert len(asked) >= 8000 // 256 - 2 and len(told) == len(asked) + 1


def test_distances_of_delayed_need_cover_the_context_and_filler_is_real_text() -> None:
    made = [tasks.make_task("delayed_need", seed, 8000, len, filler=FILLER) for seed in range(60)]
    depths = sorted(task.depths[0] for task in made)
    assert depths[0] < 0.1 and depths[-1] > 0.9 and len({round(depth, 1) for depth in depths}) == 11
    for task in made:
        at = task.context.index(f"{task.references[0]}") / len(task.context)
        assert abs(at - task.depths[0]) < 0.3  # the depth is among filler lines; exchanges are spread between them
        assert "def function_" in task.context


def test_rules_stand_at_the_start_in_order_and_each_is_asked_for() -> None:
    stack = tasks.make_haystack("instructions", 3, 8000, len, questions=RULES, filler=FILLER)
    rules = re.findall(r"^When you see (\S+), write (\d{5})\.$", stack.context, flags=re.M)
    assert len(rules) == len(set(rules)) == RULES == len({value for _, value in rules})
    assert stack.context.index("def function_") > stack.context.rindex("When you see")
    assert [(item.answer_prefix, item.references) for item in stack.items] == [
        (f"When you see {key}, write", (value,)) for key, value in rules
    ]
    for (key, _), item in zip(rules, stack.items, strict=True):
        assert item.depths[0] == pytest.approx(stack.context.index(f"When you see {key}") / len(stack.context))


def test_short_texts_have_fewer_rules() -> None:
    assert [rules_in(tokens) for tokens in (128, 256, 512, 100_000)] == [2, 4, 8, 8]
    assert len(tasks.make_haystack("instructions", 0, 300, lambda s: len(s) // 3, questions=RULES).items) == 4
