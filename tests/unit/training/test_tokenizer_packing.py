"""Tokenizer round trip, single digits, chat template; packed windows of a tiny corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from vllm_prune_training.packing import (
    Corpus,
    MixedWindows,
    TimedBatches,
    encode_recall,
    held_out_blocks,
    load_corpus,
    write_tokens,
)
from vllm_prune_training.recall import make_recall
from vllm_prune_training.tokenizer import train_tokenizer

TEXT = "def area(width, height):\n    if width < 0:\n\n        raise ValueError(width)\n    return width * 2\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder: Path = tmp_path_factory.mktemp("corpus")
    tokenizer = train_tokenizer([TEXT] * 20, vocab_size=330)
    tokenizer.save_pretrained(folder / "tokenizer")
    for split in ("train", "held_out"):
        write_tokens(folder / f"{split}.bin", [TEXT] * 100, tokenizer)
        (folder / f"filler_{split}.txt").write_text(TEXT * 5)
    (folder / "corpus.json").write_text(json.dumps({}))
    return load_corpus(folder)


@pytest.mark.parametrize("text", [TEXT, "\tx = '\u00e9\u4e2d\U0001f600'  # 3.14159\r\n", "a  b\n \n\n"])
def test_round_trip(corpus: Corpus, text: str) -> None:
    ids = corpus.tokenizer(text)["input_ids"]
    assert ids[0] == corpus.tokenizer.bos_token_id
    assert corpus.tokenizer.decode(ids[1:]) == text


def test_digits_are_single_tokens(corpus: Corpus) -> None:
    assert corpus.tokenizer.tokenize('"4821"', add_special_tokens=False) == ['"', "4", "8", "2", "1", '"']


def test_chat_template_uses_the_special_tokens(corpus: Corpus) -> None:
    text = corpus.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|bos|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_answer_spans_are_the_digits_of_the_answers(corpus: Corpus) -> None:
    task = make_recall(4, 400, corpus.filler("train"))
    ids, spans = encode_recall(task, corpus.tokenizer)
    found = [corpus.tokenizer.decode(ids[span.start : span.stop]) for span in spans]
    assert found == [answer.value for answer in task.answers]


def test_windows_are_deterministic_and_of_the_asked_length(corpus: Corpus) -> None:
    windows = MixedWindows(corpus, 256, 50, recall_share=0.5, seed=3)
    items = [windows[i] for i in range(len(windows))]
    again = MixedWindows(corpus, 256, 50, recall_share=0.5, seed=3)
    assert all(torch.equal(item["input_ids"], again[i]["input_ids"]) for i, item in enumerate(items))
    assert all(item["input_ids"].shape == (256,) for item in items)
    assert all(item["input_ids"][0] == corpus.tokenizer.bos_token_id for item in items)
    recalls = [item for item in items if item["is_recall"]]
    assert 10 < len(recalls) < 40
    assert sum(bool(item["answer_mask"].any()) for item in recalls) > 0.7 * len(recalls)
    for item in recalls:
        assert (corpus.tokenizer.decode(item["input_ids"][item["answer_mask"]]) or "0").isdigit()


def test_timed_batches_follow_the_clock(corpus: Corpus) -> None:
    progress = [0.0]
    batches = TimedBatches(
        lambda length: MixedWindows(corpus, length, 1000), ((0.5, 128), (1.0, 256)), lambda: progress[0], 512
    )
    iterator = iter(batches)
    assert next(iterator)["input_ids"].shape == (4, 128)
    progress[0] = 0.7
    assert next(iterator)["input_ids"].shape == (2, 256)


def test_held_out_blocks(corpus: Corpus) -> None:
    blocks = held_out_blocks(corpus, 64, 5)
    assert blocks.shape == (5, 64)
    assert (blocks[:, 0] == corpus.tokenizer.bos_token_id).all()


def test_a_model_of_another_tokenizer_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    corpus.tokenizer.save_pretrained(tmp_path / "same")
    assert load_corpus(corpus.folder, tmp_path / "same").record == {}
    train_tokenizer(["while True: pass\n"] * 20, vocab_size=330).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"another tokenizer.*make_corpus\.py --corpus NEW --model"):
        load_corpus(corpus.folder, tmp_path / "other")
