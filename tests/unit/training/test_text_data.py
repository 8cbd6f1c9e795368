"""Documents out of files, streams against their naive twin, and batches that can be gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import plain_recipe, recipe_of, write_texts
from transformers import PreTrainedTokenizerBase
from vllm_prune_training.data_recipe import Data, Source, Tasks
from vllm_prune_training.recipe import Training
from vllm_prune_training.text_data import Batches, Stream, held_out_windows
from vllm_prune_training.text_files import documents, find_files, inspect
from vllm_prune_training.tokenizer import train_tokenizer

from vllm_prune.errors import PruneError

TEXTS = [f"def f{i}(x):\n" + "    return x\n" * (i % 5) for i in range(11)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 320)


def save(folder: Path, kind: str, texts: list[str]) -> Source:
    if kind == "text":
        for i, text in enumerate(texts):
            (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")
        return Source(glob=f"{folder}/*.txt", format="text")
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"other": 1, "body": text}) for text in texts) + "\n\n", encoding="utf-8")
    else:
        pq.write_table(pa.table({"body": texts, "other": [1] * len(texts)}), path, row_group_size=3)
    return Source(path=str(path), format=kind, field="body")


def read(source: Source, limit: int = 1000) -> list[str]:
    files = find_files(source, limit)
    return [row["text"] for row in documents(files.paths, files.format, files.field, limit)]


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    texts = [*TEXTS, "grün\u2028 ok\n"]
    source = save(tmp_path, kind, texts)
    assert read(source) == texts
    totals = inspect(find_files(source, 1000), read=True)
    assert totals.documents == len(texts) and totals.chars == sum(map(len, texts))


def _bytes(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt is no valid UTF-8 at line 2, byte 8"),
        ("a.txt", b"ok\n" + b"x" * 101, r"a\.txt, line 2 has 101 characters, more than data\.max_line_chars 100"),
        ("a.jsonl", b'{"body": "x"}\n{"body": \n', r"a\.jsonl, line 2 is no JSON"),
        ("a.jsonl", b'{"body": "x"}\n{"text": "y", "id": 1}\n', r"line 2 has no text in field 'body' \(it has: id, text\)"),
        ("a.jsonl", b'{"body": 3}\n', r"line 1 has no text in field 'body'"),
        ("a.jsonl", b'{"body": "x"}\n{"body": "\xc3\x28"}\n', r"a\.jsonl is no valid UTF-8 at line 2, byte 24"),
        ("a.jsonl", b'{"body": "a\\n' + b"x" * 101 + b'"}\n', r"row 1, line 2 has 101 characters"),
        ("a.jsonl", b"\n\n", r"hold no text"),
        ("a.parquet", b"nothing like it", r"a\.parquet is no Parquet file"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_the_place(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    path = _bytes(tmp_path / name, raw)
    kind = {"txt": "text"}.get(path.suffix[1:], path.suffix[1:])
    fields: Any = {} if kind == "text" else {"field": "body"}
    with pytest.raises(PruneError, match=said):
        inspect(find_files(Source(path=str(path), format=kind, **fields), 100), read=True)


def test_bad_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    source = Source(path=str(path), format="parquet", field="body")
    pq.write_table(pa.table({"text": ["x"], "n": [1]}), path)
    with pytest.raises(PruneError, match=r"no column 'body' \(it has: text, n\)"):
        read(source)
    pq.write_table(pa.table({"body": [1, 2]}), path)
    with pytest.raises(PruneError, match="holds int64, not text"):
        read(source)
    pq.write_table(pa.table({"body": ["x", None]}), path)
    with pytest.raises(PruneError, match="row 2 has no text"):
        read(source)
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xc3(")]
    )
    pq.write_table(pa.table({"body": broken}), path)
    with pytest.raises(PruneError, match="row 1 is no valid UTF-8 at byte 0"):
        read(source)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(PruneError, match="does not exist"):
        find_files(Source(path=str(tmp_path / "x"), format="text"), 10)
    with pytest.raises(PruneError, match="matches no file"):
        find_files(Source(glob=f"{tmp_path}/*.py", format="text"), 10)
    (tmp_path / "a.py").touch()
    (tmp_path / "b.py").write_text("x = 1\n")
    assert find_files(Source(glob=f"{tmp_path}/*.py", format="text"), 10).paths == (str(tmp_path / "b.py"),)


def naive_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, rows: int, seed: int, epochs: int) -> list[int]:
    """All tokens of some epochs, held at once."""
    out: list[int] = []
    for epoch in range(epochs):
        for block, start in enumerate(range(0, len(texts), rows)):
            part = texts[start : start + rows]
            for i in np.random.default_rng([seed, epoch, block]).permutation(len(part)):
                ids = tokenizer(part[i], add_special_tokens=False)["input_ids"]
                out += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return out


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 13), sizes=st.lists(st.integers(1, 150), min_size=1, max_size=6), cut=st.integers(0, 5))
def test_a_stream_is_its_naive_twin_from_wherever_it_is_resumed(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, rows: int, sizes: list[int], cut: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "stream"
    if not folder.exists():
        folder.mkdir()
        save(folder, "parquet", TEXTS)
    files = find_files(Source(path=str(folder / "data.parquet"), format="parquet", field="body"), 1000)
    expected = naive_tokens(TEXTS, tokenizer, rows, 5, 9)
    stream = Stream(files, tokenizer, rows, seed=5)
    at = 0
    for number, size in enumerate(sizes):
        if number == cut:
            state = json.loads(json.dumps(stream.state))
            stream = Stream(files, tokenizer, rows, seed=5)
            stream.load(state)
        assert stream.take(size) == expected[at : at + size]
        at += size


def test_sequences_begin_with_bos_and_lose_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    files = find_files(save(tmp_path, "jsonl", TEXTS), 1000)
    expected = naive_tokens(TEXTS, tokenizer, 4, 0, 9)
    stream, at = Stream(files, tokenizer, 4, seed=0), 0
    for _ in range(20):
        row = stream.sequence(24)
        assert len(row) == 24 and row[0] == tokenizer.bos_token_id
        own = row if expected[at] == row[0] else row[1:]  # its bos is the text's own, or was put there
        assert own == expected[at : at + len(own)]
        at += len(own)


def test_batches_resume_and_are_weighted(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    tokenizer = train_tokenizer([path.read_text() for path in (tmp_path / "texts").glob("*.txt")], 400)
    data = Data(
        train=[Source(glob=f"{tmp_path}/texts/*.txt", format="text", weight=3.0),
               Source(path=f"{tmp_path}/texts/rows.jsonl", format="jsonl")],
        held_out=[Source(path=f"{tmp_path}/texts/rows.jsonl", format="jsonl")],
        tasks=Tasks(share=0.5, names=["lookup", "niah_single_1"]), shuffle_rows=3,
    )  # fmt: skip
    training = Training(steps=6, lengths=[(0.5, 256), (1.0, 512)], batch_tokens=1024, accumulation=2)
    batches = Batches(data, training, tokenizer, answer_weight=4.0)
    steps, states = [], []
    for _ in range(6):
        states.append(json.loads(json.dumps(batches.state())))
        steps.append(batches.next_step())
    assert [tuple(parts[0]["input_ids"].shape) for parts in steps] == [(4, 256)] * 3 + [(2, 512)] * 3
    for start in (2, 5):
        again = Batches(data, training, tokenizer, answer_weight=4.0)
        again.load(states[start])
        for expected in steps[start:]:
            for one, other in zip(again.next_step(), expected, strict=True):
                assert all(torch.equal(one[name], other[name]) for name in other)
    keys = torch.cat([part["row_key"] for step in steps[:3] for part in step])
    assert keys.tolist() == list(range(24))
    answers = 0
    for step in steps:
        weight = torch.cat([part["loss_weight"] for part in step])
        assert all(bool((part["weight_total"] == weight.sum()).all()) for part in step)
        assert set(weight.unique().tolist()) <= {0.0, 1.0, 4.0} and bool((weight[:, 0] == 0).all())
        answers += int((weight == 4.0).sum())
    assert answers > 50
    first = steps[0][0]
    row = next(i for i in range(4) if bool((first["loss_weight"][i] == 4.0).any()))
    span = tokenizer.decode(first["input_ids"][row][first["loss_weight"][row] == 4.0])
    assert any(char.isdigit() for char in span)  # answers of both tasks are numbers

    windows = held_out_windows(data, tokenizer, 64, 640)
    assert windows.shape == (10, 64) and windows.dtype == torch.int64
    assert torch.equal(windows, held_out_windows(data, tokenizer, 64, 640))


def test_unknown_tasks_and_short_sequences_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = recipe_of(plain_recipe(tmp_path))
    for tasks, training, said in (
        (Tasks(names=["niah"]), Training(steps=1, lengths=256, batch_tokens=256), "'niah', which is no task"),
        (Tasks(names=["lookup"]), recipe.training, "tasks need at least 136 tokens"),
    ):
        data = recipe.data.model_copy(update={"tasks": tasks})
        with pytest.raises(PruneError, match=said):
            Batches(data, training, tokenizer, 1.0)
