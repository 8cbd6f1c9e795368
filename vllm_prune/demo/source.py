"""The text of the demo: which file, its tokens, and the text of each token. Needs the checkpoint's tokenizer only."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_prune.errors import PruneError

HELD_OUT_MODULUS = 50
"""The training corpus (``vllm_prune_training.data``) holds out a file iff the sha256 of its text is a multiple."""

SKIPPED = {"test", "tests", "site-packages", "lib2to3", "idlelib", "_vendor", "__pycache__"}
BROKEN = "\ufffd"


@dataclass(frozen=True)
class SourceText:
    """A file cut to the prompt.

    Attributes:
        path: of the file.
        sha256: of its whole text.
        held_out: by the training corpus' rule; None when the file was given by the user.
        prompt: token ids.
        continuation: the file's own next tokens, at most as many as asked for.
    """

    path: Path
    sha256: str
    held_out: bool | None
    prompt: list[int]
    continuation: list[int]


def read_text(path: Path) -> str:
    """The file as the training corpus reads it. Raises OSError, UnicodeDecodeError."""
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_held_out(sha256: str) -> bool:
    return int(sha256, 16) % HELD_OUT_MODULUS == 0


def library_modules(root: Path | None = None) -> list[Path]:
    """Modules of the standard library without its tests, in order of their path."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts))


def choose(tokenizer: Any, tokens: int, paths: Sequence[Path]) -> tuple[Path, bool]:
    """The first held-out file that is long enough; without one, the first that is long enough at all.

    Args:
        tokenizer: of the checkpoint.
        tokens: that the file must hold.
        paths: in order of preference.

    Returns:
        The file, and whether it was held out from training.

    Raises:
        PruneError: no file is long enough.
    """
    fallback = None
    for path in paths:
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError):
            continue
        held_out = is_held_out(digest(text))
        if len(text) < tokens or (fallback and not held_out):
            continue
        if len(encode(tokenizer, text)) >= tokens:
            if held_out:
                return path, True
            fallback = path
    if fallback is None:
        raise PruneError(f"no standard-library module holds {tokens} tokens.", "Name a text with --source FILE.")
    return fallback, False


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids with what the tokenizer puts in front of a text; no limit, no warning about length."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def require_file(path: Path) -> None:
    """Raises PruneError when the source file is missing."""
    if not path.is_file():
        raise PruneError(f"the source file {path} does not exist.", "Name an existing text file with --source.")


def load_source(tokenizer: Any, path: Path | None, prompt_tokens: int, new_tokens: int) -> SourceText:
    """Read and cut the text.

    Args:
        tokenizer: of the checkpoint.
        path: of a UTF-8 file; None chooses a module of the standard library (``choose``).
        prompt_tokens: length of the prompt.
        new_tokens: length of the continuation to look up.

    Raises:
        PruneError: the file is missing, no text, or too short.
    """
    held_out = None
    if path is None:
        path, held_out = choose(tokenizer, prompt_tokens + new_tokens, library_modules())
    require_file(path)
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise PruneError(f"the source file {path} cannot be read: {error}.", "Name a UTF-8 text file.") from None
    ids = encode(tokenizer, text)
    if len(ids) < prompt_tokens:
        raise PruneError(
            f"the source file {path} has {len(ids)} tokens, the prompt needs {prompt_tokens}.",
            "Name a longer file with --source, or lower --prompt-tokens.",
        )
    ahead = ids[prompt_tokens : prompt_tokens + new_tokens]
    return SourceText(path, digest(text), held_out, ids[:prompt_tokens], ahead)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token; joined they are the text.

    Each is decoded behind a fixed token, since some tokenizers strip a leading blank at the start. Tokens that are
    parts of one character share it: the first has it, the others are empty.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    skip = len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))

    def text(part: Sequence[int]) -> str:
        return tokenizer.decode([*anchor, *part], clean_up_tokenization_spaces=False)[skip:]

    cache = {token: text([token]) for token in set(ids)}
    out = [cache[token] for token in ids]
    start = 0
    while start < len(ids):
        end = start + 1
        if BROKEN in out[start]:
            while end < len(ids) and end - start < 8 and BROKEN in text(ids[start:end]) and BROKEN in out[end]:
                end += 1
            out[start:end] = [text(ids[start:end]), *[""] * (end - start - 1)]
        start = end
    return out
