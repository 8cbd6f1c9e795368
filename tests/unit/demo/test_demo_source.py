"""The demo's text: choice of the file, cutting it, text of single tokens, and refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from vllm_prune_training import data as corpus
from vllm_prune_training.tokenizer import train_tokenizer

from vllm_prune.demo import source
from vllm_prune.errors import PruneError

TEXT = Path(hashlib.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([TEXT], 512)


def test_the_rule_of_held_out_files_is_the_corpus_own():
    hashes = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(500)]
    assert [source.is_held_out(each) for each in hashes] == [corpus.is_held_out(each) for each in hashes]
    assert sum(map(source.is_held_out, hashes)) > 0


def test_pieces_join_to_the_text_with_characters_of_several_tokens(tokenizer: Any):
    text = "  naïve § 東京 😀\n\n    return x\n"
    ids = source.encode(tokenizer, text)
    parts = source.pieces(tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == "<|bos|>" + text


def test_a_held_out_file_comes_first_and_any_long_one_else(tokenizer: Any, tmp_path: Path):
    paths = []
    for number in range(200):
        path = tmp_path / f"m{number:03}.py"
        path.write_text(f"# {number}\n" + TEXT[:600])
        paths.append(path)
    held_out = [path for path in paths if source.is_held_out(source.digest(path.read_text()))]
    assert held_out
    assert source.choose(tokenizer, 100, paths) == (held_out[0], True)
    rest = [path for path in paths if path not in held_out]
    assert source.choose(tokenizer, 100, rest) == (rest[0], False)
    with pytest.raises(PruneError, match="--source"):
        source.choose(tokenizer, 100_000, paths)


def test_library_modules_leave_tests_out(tmp_path: Path):
    for name in ("b.py", "a.py", "test/c.py", "pkg/tests/d.py", "pkg/e.py", "site-packages/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in source.library_modules(tmp_path)]
    assert found == ["a.py", "b.py", "pkg/e.py"]


def test_the_source_is_cut_to_the_prompt(tokenizer: Any, tmp_path: Path):
    path = tmp_path / "x.py"
    path.write_bytes(TEXT.replace("\n", "\r\n").encode())
    cut = source.load_source(tokenizer, path, 50, 20)
    ids = source.encode(tokenizer, TEXT)
    assert (cut.prompt, cut.continuation, cut.held_out) == (ids[:50], ids[50:70], None)


def test_missing_short_or_binary_sources_are_refused(tokenizer: Any, tmp_path: Path):
    with pytest.raises(PruneError, match="does not exist"):
        source.load_source(tokenizer, tmp_path / "none.py", 10, 5)
    short = tmp_path / "short.py"
    short.write_text("x = 1\n")
    with pytest.raises(PruneError, match=r"tokens, the prompt needs 1000.*--prompt-tokens"):
        source.load_source(tokenizer, short, 1000, 5)
    short.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PruneError, match="cannot be read"):
        source.load_source(tokenizer, short, 10, 5)
