"""Held-out text as windows of token ids: what calibration and the report card are measured on.

Reads plain text, JSONL (field ``text``), Parquet (column ``text``), or a folder of such. Dimension letters: N windows,
T tokens a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_prune.errors import PruneError

from .text_files import documents

FIELD = "text"
SUFFIXES = {".txt", ".md", ".rst", ".py", ".jsonl", ".parquet"}
"""What is taken from a folder; a file given by name is read as text whatever it is called."""

KINDS = {".jsonl": "jsonl", ".parquet": "parquet"}
NO_LIMIT = 2**31
"""Characters a line: long lines are an error of training data, not here."""

GIVE_TEXT = "Give UTF-8 text, JSONL or Parquet with a 'text' field, or a folder of such files."


@dataclass(frozen=True)
class Text:
    """One document and the file that it comes from."""

    text: str
    name: str

    @property
    def is_python(self) -> bool:
        return self.name.endswith(".py")


@dataclass(frozen=True)
class Windows:
    """Token ids int64 [N, T], and for each token its document's index and character span there.

    Attributes:
        ids: each window starts with the tokenizer's first special token where it has one.
        document: int64 [N, T], -1 for special tokens.
        span: int64 [N, T, 2], start and end in the document's text; None without offsets (slow tokenizers).
        texts: the documents.
    """

    ids: torch.Tensor
    document: np.ndarray
    span: np.ndarray | None
    texts: list[Text]

    @property
    def sha256(self) -> str:
        """Of the ids."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()


def read_texts(path: Path) -> list[Text]:
    """All documents of a file or folder (sorted by name), empty ones left out.

    Raises:
        PruneError: nothing there, no text in it, or text that is no UTF-8 or JSON.
    """
    if not path.exists():
        raise PruneError(f"the data {path} does not exist.", GIVE_TEXT)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    texts = [text for file in files for text in _read(file) if text.text.strip()]
    if not texts:
        raise PruneError(f"the data {path} holds no text.", GIVE_TEXT)
    return texts


def _read(file: Path) -> Iterator[Text]:
    kind = KINDS.get(file.suffix, "text")
    try:
        for number, row in enumerate(documents([str(file)], kind, FIELD, NO_LIMIT), 1):
            yield Text(row["text"], file.name if kind == "text" else f"{file.name}:{number}")
    except PruneError as error:  # its way out speaks of recipes
        raise PruneError(error.problem, GIVE_TEXT) from None
    except OSError as error:
        raise PruneError(f"{file} cannot be read: {error}.", GIVE_TEXT) from None


def library_texts() -> list[Text]:
    """Modules of the standard library that the reference corpus holds out, for reports without data of their own."""
    from vllm_prune.demo.source import digest, is_held_out, library_modules, read_text

    found = []
    for path in library_modules():
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError):
            continue
        if is_held_out(digest(text)):
            found.append(Text(text, path.name))
    return found


def make_windows(texts: Iterable[Text], tokenizer: Any, length: int, tokens: int) -> Windows:
    """Evenly spread windows of T = ``length`` tokens over the documents, about ``tokens`` in all, at least one.

    Documents follow each other with the tokenizer's end token between them, where it has one.

    Raises:
        PruneError: the documents hold less than one window.
    """
    texts = list(texts)
    ids, documents, spans = _encode(texts, tokenizer)
    bos = tokenizer.bos_token_id
    own = length - (bos is not None)  # tokens of text in a window
    if own < 1 or len(ids) < own:
        raise PruneError(
            f"the data holds {len(ids)} tokens; one window needs {length}.", "Give more text, or a smaller --length."
        )
    count = max(1, min(tokens // length, len(ids) // own))
    starts = np.linspace(0, len(ids) - own, count).astype(np.int64)
    rows = starts[:, None] + np.arange(own)
    taken, document = ids[rows], documents[rows]
    span = None if spans is None else spans[rows]
    if bos is not None:
        taken = np.concatenate([np.full((count, 1), bos), taken], axis=1)
        document = np.concatenate([np.full((count, 1), -1), document], axis=1)
        if span is not None:
            span = np.concatenate([np.zeros((count, 1, 2), dtype=np.int64), span], axis=1)
    return Windows(torch.from_numpy(taken), document, span, texts)


def _encode(texts: list[Text], tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Ids [M] of all documents in a row, the document of each (-1: end token), and spans [M, 2] or None."""
    ids, documents, spans = [], [], []
    eos = tokenizer.eos_token_id
    fast = bool(tokenizer.is_fast)
    for index, text in enumerate(texts):
        made = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids += [*made["input_ids"], *([] if eos is None else [eos])]
        documents += [index] * len(made["input_ids"]) + ([] if eos is None else [-1])
        if fast:
            spans += [*made["offset_mapping"], *([] if eos is None else [(0, 0)])]
    found = np.asarray(spans, dtype=np.int64).reshape(-1, 2) if fast else None
    return np.asarray(ids, dtype=np.int64), np.asarray(documents, dtype=np.int64), found
