"""Corpus: licence check, filters, held-out split."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from vllm_prune_training.data import (
    Document,
    Source,
    corpus_hash,
    is_held_out,
    is_permissive,
    is_usable_text,
    read_documents,
)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", True),
        ("Apache 2.0 License", True),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-2-Clause AND BSL-1.0 AND MIT", True),
        ("Python Software Foundation License", True),
        ("MPL-2.0 AND MIT", False),
        ("GNU Lesser General Public License v2", False),
        ("Intel End User License Agreement for Developer Tools", False),
        ("", False),
    ],
)
def test_only_permissive_licences_pass(licence: str, expected: bool) -> None:
    assert is_permissive(licence) is expected


def test_held_out_split_is_stable_and_about_one_in_fifty() -> None:
    hashes = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(5000)]
    chosen = [i for i, digest in enumerate(hashes) if is_held_out(digest)]
    assert chosen == [i for i, digest in enumerate(hashes) if is_held_out(digest)]
    assert 60 < len(chosen) < 140
    assert is_held_out(f"{100:064x}")
    assert not is_held_out(f"{101:064x}")


def test_filters() -> None:
    code = "def area(width: float, height: float) -> float:\n    return width * height\n\n" * 10
    assert is_usable_text(code)
    assert not is_usable_text("x = 1\n")
    assert not is_usable_text(code + "data = '" + "a" * 1000 + "'\n")
    assert not is_usable_text("1234, 5678, 9012,\n" * 100)
    assert not is_usable_text(code + "marker = '<|im_start|>'\n")


def test_duplicates_are_read_once_and_splits_do_not_share_files(tmp_path: Path) -> None:
    paths = []
    for i in range(200):
        path = tmp_path / f"m{i}.py"
        path.write_text(f"class Thing{'abcdefghij'[i % 10]}{i // 20}:\n" + "    name: str = 'thing'\n" * 30)
        paths.append(path)
    documents = list(read_documents([Source("demo", "1", "MIT", tmp_path, tuple(paths))]))
    hashes = [document.sha256 for document in documents]
    assert len(hashes) == len(set(hashes)) == 100
    train = {d.text for d in documents if not is_held_out(d.sha256)}
    held_out = {d.text for d in documents if is_held_out(d.sha256)}
    assert not train & held_out
    assert corpus_hash(documents) == corpus_hash(list(reversed(documents)))
    assert corpus_hash([Document("", hashes[0], "demo")]) != corpus_hash(documents)
