"""Classes of characters and tokens, and what each keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_language as tiny
import torch
from vllm_prune_training.held_text import Text, make_windows
from vllm_prune_training.token_classes import CLASSES, class_shares, classes_of, classify

from vllm_prune.gates import NEVER

CODE = '''import re  # why
def f(x_1):
    """Doc
    string"""
    return f"{x_1}" + 'é' * 0x1F
'''


def classes(code: str, name: str = "a.py") -> dict[str, str]:
    """What each class covers of a text, joined."""
    found = classify(Text(code, name))
    assert len(found) == len(code)
    return {CLASSES[i]: "".join(c for c, k in zip(code, found, strict=True) if k == i) for i in np.unique(found)}


def test_python() -> None:
    found = classes(CODE)
    assert found["keyword"] == "importdefreturn"
    assert found["comment"] == "# why"
    assert found["number"] == "0x1F"
    assert found["identifier"].startswith("refx_1")
    assert '"""Doc\n    string"""' in found["string"] and "'é'" in found["string"]
    assert found["operator"].startswith("():") and found["operator"].endswith("+*")
    assert not found["whitespace"].strip()


def test_other_text_and_python_that_does_not_parse() -> None:
    found = classes("The 12 cats_ (é!)\n", "a.txt")
    assert found == {"word": "Thecats_é", "digit": "12", "punctuation": "(!)", "whitespace": "    \n"[1:]}
    assert classes("def f(:\n  '''open", "a.py")["word"] == "deffopen"


def test_tokens_and_shares(tmp_path: Path) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path)
    code = CODE * 12
    windows = make_windows([Text(code, "a.py")], tokenizer, 64, 256)
    found = classes_of(windows)
    assert found is not None and found.shape == (4, 64) and windows.span is not None
    assert (found[:, 0] == CLASSES.index("special")).all()
    chars, checked = classify(Text(code, "a.py")), 0
    for kind, (start, end) in zip(found[:, 1:].flatten(), windows.span[:, 1:].reshape(-1, 2), strict=True):
        piece = code[start:end]
        if piece.strip():
            at = start + len(piece) - len(piece.lstrip())
            assert kind == chars[at]
            checked += 1
        else:
            assert CLASSES[kind] == "whitespace" or (start == end and CLASSES[kind] == "special")
    assert checked > 150 and {CLASSES[k] for k in np.unique(found)} >= {"keyword", "identifier", "operator", "string"}
    operators = torch.from_numpy(found == CLASSES.index("operator"))
    expiries = []
    for row in operators:  # operators die at once, all else lives
        expiry = torch.where(row, torch.arange(64) + 1, NEVER)
        expiries.append(expiry.expand(2, 3, 64))
    shares = {share.name: share for share in class_shares(found, expiries)}
    assert shares["operator"].kept == shares["operator"].live == 0
    assert all(share.kept == share.live == 1 for name, share in shares.items() if name != "operator")
    assert sum(share.share for share in shares.values()) == pytest.approx(1)
    half = [torch.full((2, 3, 64), NEVER), *expiries[1:]]
    mixed = {share.name: share.kept for share in class_shares(found, half)}
    seen = sum(63 - j for j in range(64) if operators[0, j])
    assert mixed["operator"] == pytest.approx(seen / sum(63 - j for row in operators for j in range(64) if row[j]))
