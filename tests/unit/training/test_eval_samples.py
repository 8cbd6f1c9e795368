"""Prompts for the engine: they fit, hold what is asked for, and keep the question out of the context."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm_prune_training import tasks
from vllm_prune_training.engine_eval import samples
from vllm_prune_training.held_text import Text

from vllm_prune.errors import PruneError

REFERENCE = Path(__file__).parents[3] / "examples" / "reference-dcp"
FILLER = [f"def function_{i}(x):\n" if i % 3 else f"    return x + {i}\n" for i in range(200)]
TASK_NAMES = [name for name in samples.NAMES if name != samples.PERPLEXITY]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REFERENCE)


@pytest.fixture(scope="module")
def count(tokenizer: PreTrainedTokenizerBase) -> tasks.Count:
    return tasks.counter(tokenizer)


@pytest.mark.parametrize("name", TASK_NAMES)
@given(length=st.integers(512, 2500))
@settings(max_examples=6, deadline=None)
def test_requests_fill_their_length_and_hold_what_is_asked(
    name: str, length: int, tokenizer: PreTrainedTokenizerBase, count: tasks.Count
) -> None:
    made = samples.task_samples(name, length, 3, tokenizer, count, FILLER)
    assert len(made) >= 3
    longest: dict[int, int] = {}
    for each in made:
        used = len(each.request.prompt) + each.request.new_tokens
        assert used <= length
        longest[each.context] = max(used, longest.get(each.context, 0))
        prompt = tokenizer.decode(each.request.prompt)
        assert prompt.startswith(tokenizer.bos_token) and prompt.count(tokenizer.bos_token) == 1
        assert each.references and all(reference in prompt for reference in each.references)
        assert not prompt.endswith(" ")  # a blank would split the answer's first token
        assert each.score("nothing") == 0.0 and each.score(" " + ", ".join(each.references).upper()) == 1.0
    assert min(longest.values()) >= length - 2 * count(f"One of the special identifiers for {'0' * 36} {'0' * 36}\n")


def test_samples_differ_but_stay_the_same_from_run_to_run(
    tokenizer: PreTrainedTokenizerBase, count: tasks.Count
) -> None:
    first = samples.task_samples("niah_single_2", 512, 6, tokenizer, count, FILLER)
    assert first[:3] == samples.task_samples("niah_single_2", 512, 3, tokenizer, count, FILLER)
    assert len({tuple(each.request.prompt) for each in first}) == 6
    noise = samples.task_samples("niah_single_1", 512, 1, tokenizer, count, FILLER)[0]
    assert "def function" in tokenizer.decode(first[0].request.prompt)
    assert "def function" not in tokenizer.decode(noise.request.prompt)


def test_questions_of_one_context_share_its_tokens(tokenizer: PreTrainedTokenizerBase, count: tasks.Count) -> None:
    """Query-agnostic: whatever is asked, the engine has read the same context when the question starts."""
    made = samples.task_samples("instructions", 1024, 9, tokenizer, count, FILLER)
    assert [each.context for each in made] == [0] * 8 + [1] * 8
    texts = {tuple(each.request.prompt) for each in made[:8]}
    assert len(texts) == 8
    shared = next(i for i, ids in enumerate(zip(*texts, strict=False)) if len(set(ids)) > 1)
    question = tokenizer.decode(made[0].request.prompt[shared - 16 :])
    assert "Now follow the rules above" in question
    assert [each.depths for each in made[:8]] == sorted(each.depths for each in made[:8])


def test_neutral_prefaces_do_not_tell(tokenizer: PreTrainedTokenizerBase, count: tasks.Count) -> None:
    for name in tasks.TASKS:
        plain, neutral = (
            tokenizer.decode(samples.task_samples(name + end, 600, 1, tokenizer, count, FILLER)[0].request.prompt)
            for end in ("", samples.NEUTRAL)
        )
        assert "Read the following text." in neutral or "Read the following coded text." in neutral
        assert "Read the following" not in plain


def test_too_small_a_length_is_refused(tokenizer: PreTrainedTokenizerBase, count: tasks.Count) -> None:
    with pytest.raises(PruneError, match="niah_multikey_3 does not fit into 256 tokens"):
        samples.task_samples("niah_multikey_3", 256, 1, tokenizer, count, FILLER)


def test_names() -> None:
    assert {"ppl", "niah_single_1", "niah_multikey_3_neutral", "delayed_need", "instructions"} <= set(samples.NAMES)
    with pytest.raises(PruneError, match=r"unknown task 'niah'.*Known: ppl, niah_single_1"):
        samples.check_names(["ppl", "niah"])
    with pytest.raises(PruneError, match="no task"):
        samples.check_names([])


def test_windows_leave_room_at_the_last_position(tokenizer: PreTrainedTokenizerBase) -> None:
    text = samples.HeldOut([Text("".join(FILLER) * 3, "a.py")], "test")
    made = samples.window_samples(text, 512, 4, tokenizer, 512)
    assert [len(each.request.prompt) for each in made] == [510] * len(made)
    assert len(samples.window_samples(text, 512, 4, tokenizer, 4096)[0].request.prompt) == 512
    assert all(each.request.scored and not each.references for each in made)
    with pytest.raises(PruneError, match="one window needs"):
        samples.window_samples(samples.HeldOut([Text("short", "a")], "test"), 512, 4, tokenizer, 4096)


def test_lines_of_the_text_are_whole_and_printable() -> None:
    text = samples.HeldOut([Text("one\n\n\x00two\nthree", "a")], "test")
    assert text.lines == ["one\n", "three\n"]
