"""What of a prompt is protected: the words, and where a template's messages lie."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vllm_prune.chat import find_markers
from vllm_prune.protect import DEFAULT, Protect, join, parse_protect

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "<|bos|>{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] }}<|eot|>{% endfor %}"
              "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
    "mistral": "<|bos|>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
               "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}<|eot|>"
               "{% endif %}{% endfor %}",
    "plain": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
}  # fmt: skip
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|head|>", "<|/head|>", "<|eot|>", "[INST]", "[/INST]"]
CHAT = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "Is the system a user?"},
    {"role": "assistant", "content": "no\n"},
    {"role": "user", "content": "And the assistant?"},
]


def tokenizer(template: str | None) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        ["system user assistant answer in one word " * 3],
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                            show_progress=False),
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.chat_template = template
    return fast


def rendered(fast: Any, chat: list[Any], ask: bool = True) -> list[int]:
    return fast.apply_chat_template(chat, add_generation_prompt=ask, return_dict=True)["input_ids"]


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_where_the_system_message_ends(name):
    """That begins a chat; not in a chat without one, nor where nothing follows it, nor in a text."""
    fast = tokenizer(TEMPLATES[name])
    markers = find_markers(fast)
    assert markers is not None
    ids = rendered(fast, CHAT)
    (role, (_, end)), *_ = markers.messages(ids)
    assert role == "system" and markers.system_end(ids) == end
    assert ids[:end] == rendered(fast, CHAT[:1], ask=False)
    assert markers.system_end(rendered(fast, CHAT[1:])) == 0
    assert markers.system_end(rendered(fast, CHAT[:1], ask=False)) == 0
    assert markers.system_end(fast("one word")["input_ids"]) == markers.system_end([]) == 0


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_messages_are_found(name):
    fast = tokenizer(TEMPLATES[name])
    markers = find_markers(fast)
    assert markers is not None and [role for role, _ in markers.headers] == ["system", "user", "assistant"]
    ids = rendered(fast, CHAT)
    found = markers.messages(ids)
    assert [role for role, _ in found] == [m["role"] for m in CHAT]
    for (_, (begin, end)), message in zip(found, CHAT, strict=True):
        assert message["content"] in fast.decode(ids[begin:end])
    spans = [span for _, span in found]
    assert all(a[1] == b[0] for a, b in pairwise(spans)), "one after another"
    assert len(markers.messages(rendered(fast, CHAT[1:], ask=False))) == 3
    assert markers.messages(fast("no chat at all: system user").input_ids) == []


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_marks_are_all_that_is_not_text(name):
    fast = tokenizer(TEMPLATES[name])
    markers = find_markers(fast)
    ids = rendered(fast, CHAT)
    marked = {i for begin, end in markers.marks(ids) for i in range(begin, end)}
    left = fast.decode([token for i, token in enumerate(ids) if i not in marked])
    assert "<|" not in left and all(m["content"].strip() in left for m in CHAT)
    assert left.count("assistant") == 1, "the text's own word stays text"


def test_a_template_without_a_system_role():
    """Mistral's: the header of an answer is what ends the question; there is no system message to find."""
    fast = tokenizer(TEMPLATES["mistral"])
    markers = find_markers(fast)
    assert [role for role, _ in markers.headers] == ["user", "assistant"]
    ids = rendered(fast, CHAT[1:])
    assert [role for role, _ in markers.messages(ids)] == ["user", "assistant", "user"]
    assert parse_protect("system").spans(ids, markers) == ()


@pytest.mark.parametrize("template", [None, TEMPLATES["plain"]])
def test_no_markers(template):
    assert find_markers(tokenizer(template)) is None


def test_words():
    assert parse_protect(DEFAULT) == Protect(system=True, markers=True)
    assert parse_protect("none") == Protect() and not parse_protect("none")
    asked = parse_protect("message:2, message:0-1,10:20, 3:5")
    assert asked == Protect(messages=((2, 2), (0, 1)), tokens=((10, 20), (3, 5)))
    assert asked.asks_for_chat and not parse_protect("0:4").asks_for_chat
    assert parse_protect("message:0-1,4:6,2:5").spans(range(100), None) == ((2, 6),)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("sytem", "has the word 'sytem'"), ("", "has the word ''"), ("none,system", "has the word 'none'"),
        ("5:3", "ends before it begins"), ("message:3-1", "ends before"), ("-1:4", "has the word"), (7, "must be text"),
        (["system"], "must be text"), ("message:x", "has the word"),
    ],
)  # fmt: skip
def test_wrong_words(value, words):
    with pytest.raises(ValueError, match=words):
        parse_protect(value)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8))
def test_join_keeps_positions(spans):
    joined = join(spans)
    assert {i for a, b in joined for i in range(a, b)} == {i for a, b in spans for i in range(a, b)}
    assert all(a < b for a, b in joined)
    assert all(first[1] < second[0] for first, second in pairwise(joined))


def test_a_prompt_that_is_no_chat_has_no_markers():
    fast = tokenizer(TEMPLATES["llama3"])
    markers = find_markers(fast)
    assert parse_protect(DEFAULT).spans(fast("<|bos|>system says no").input_ids, markers) == ()
    assert parse_protect(DEFAULT).spans(rendered(fast, CHAT[1:2]), markers) != ()


def test_spans_end_with_the_prompt():
    assert parse_protect("2:50").spans([5] * 10, None) == ((2, 10),)
    assert parse_protect("20:50").spans([5] * 10, None) == ()
