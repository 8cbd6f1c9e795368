"""Which kinds of token survive: a class for every token, and the share of pairs that each class keeps.

Python source is classed by ``tokenize``, other text by its characters. A token belongs to the class of its first
character that is no blank. Dimension letters: N windows, T tokens, L layers, E eviction units of a layer.
"""

from __future__ import annotations

import io
import keyword
import token as kinds
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .gate_evaluation import live_pairs
from .held_text import Text, Windows

PYTHON = ("keyword", "identifier", "number", "string", "operator", "comment")
PLAIN = ("word", "digit", "punctuation")
CLASSES = (*PYTHON, *PLAIN, "whitespace", "special")
WHITESPACE, SPECIAL = CLASSES.index("whitespace"), CLASSES.index("special")

_STRINGS = {getattr(kinds, name) for name in dir(kinds) if name in ("STRING", "FSTRING_START", "FSTRING_MIDDLE",
                                                                    "FSTRING_END")}  # fmt: skip
_WORDS = {*keyword.kwlist, *keyword.softkwlist} - {"_"}


@dataclass(frozen=True)
class ClassShare:
    """What is kept of one class of tokens, over all layers and heads.

    Attributes:
        name: of ``CLASSES``.
        share: of all tokens.
        kept: of its past pairs (this token as the key).
        live: of its tokens, to the last query of the window.
    """

    name: str
    share: float
    kept: float
    live: float


def classify(text: Text) -> np.ndarray:
    """The class of every character: int64 [characters], an index of ``CLASSES``."""
    if text.is_python:
        try:
            return _python(text.text)
        except (tokenize.TokenError, SyntaxError, ValueError):  # a fragment, or Python of another version
            pass
    return _plain(text.text)


def _plain(text: str) -> np.ndarray:
    word, digit, other = (CLASSES.index(name) for name in PLAIN)
    found = [
        WHITESPACE if c.isspace() else digit if c.isdigit() else word if c.isalpha() or c == "_" else other
        for c in text
    ]
    return np.asarray(found, dtype=np.int64)


def _python(text: str) -> np.ndarray:
    found = np.full(len(text), WHITESPACE, dtype=np.int64)
    starts = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))])
    for item in tokenize.generate_tokens(io.StringIO(text).readline):
        if item.type == kinds.COMMENT:
            name = "comment"
        elif item.type in _STRINGS:
            name = "string"
        elif item.type == kinds.NUMBER:
            name = "number"
        elif item.type == kinds.NAME:
            name = "keyword" if item.string in _WORDS else "identifier"
        elif item.type == kinds.OP:
            name = "operator"
        else:
            continue
        start = starts[item.start[0] - 1] + item.start[1]
        end = starts[item.end[0] - 1] + item.end[1]
        found[start:end] = CLASSES.index(name)
    return found


def classes_of(windows: Windows) -> np.ndarray | None:
    """The class of every token: int64 [N, T]; None when the tokenizer gives no offsets."""
    if windows.span is None:
        return None
    chars = [classify(text) for text in windows.texts]
    blank = [np.asarray([c.isspace() for c in text.text], dtype=bool) for text in windows.texts]
    flat = np.full(windows.document.size, SPECIAL, dtype=np.int64)
    spans = windows.span.reshape(-1, 2)
    for at, document in enumerate(windows.document.reshape(-1)):
        if document >= 0:
            start, end = spans[at]
            seen = np.flatnonzero(~blank[document][start:end])
            first = start + (seen[0] if len(seen) else 0)
            flat[at] = chars[document][first] if len(seen) else WHITESPACE
    return flat.reshape(windows.document.shape)


def class_shares(classes: np.ndarray, expiries: Sequence[torch.Tensor]) -> list[ClassShare]:
    """What each class that occurs keeps, in the order of ``CLASSES``.

    Args:
        classes: int64 [N, T].
        expiries: int [L, E, T] of each window.
    """
    t = classes.shape[1]
    possible = torch.arange(t - 1, -1, -1, dtype=torch.float64)  # queries after each key
    ids = torch.from_numpy(classes)
    kept = torch.stack([live_pairs(expiry).double().mean(dim=(0, 1)) for expiry in expiries])  # [N, T]
    live = torch.stack([(expiry >= t).double().mean(dim=(0, 1)) for expiry in expiries])
    found = []
    for index, name in enumerate(CLASSES):
        mine = ids == index
        pairs = (mine * possible).sum()
        if mine.any() and pairs > 0:
            found.append(
                ClassShare(
                    name, mine.double().mean().item(), ((kept * mine).sum() / pairs).item(), live[mine].mean().item()
                )
            )
    return found
