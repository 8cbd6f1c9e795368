"""The files of an export: which of a base's are weights, how they get into the new folder, and whether two sets agree."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm_prune.config import GATE_FILE
from vllm_prune.errors import PruneError
from vllm_prune.json_text import parse_object

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".spm", ".vocab")
"""Endings of tokenizer, generation and code files, which are copied: an edit of them must not reach the base."""

LEFT_OUT = {"config.json", INDEX, "record.json", "trainer_state.json", "corpus.json"}
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS}
"""What a file system says that cannot link here."""


@dataclass
class Placed:
    """Names of the weight files by how they got there."""

    linked: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or the shards that its index names.

    Raises:
        PruneError: there are none, the index is damaged, or a shard is missing or no safetensors file.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(parse_object(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise PruneError(f"{index} cannot be read: {error!r}.", "Copy the base model again.") from None
    elif (folder / WHOLE).is_file():
        names = [WHOLE]
    else:
        raise PruneError(
            f"{folder} has no weights in safetensors ({WHOLE} or {INDEX}).",
            "Load it with transformers and save_pretrained it: other formats are never read.",
        )
    for name in names:
        path = folder / str(name)
        if not isinstance(name, str) or Path(name).name != name or not path.is_file():
            raise PruneError(f"{folder} lacks the weight file {name!r} of its index.", "Copy the base model again.")
        try:
            with safe_open(str(path), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise PruneError(f"{path} cannot be read: {error}.", "Copy the base model again.") from None
    return [folder / name for name in names]


def load_model(folder: str | Path, config: Any, dtype: Any) -> Any:
    """The causal language model in a folder: safetensors files in it alone, and none of its code.

    Raises:
        PruneError: as ``weight_files``.
    """
    from transformers import AutoModelForCausalLM

    weight_files(Path(folder))
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )


def weight_hashes(files: list[Path]) -> dict[str, str]:
    """sha256 of each file by name."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def place(base: Path, weights: list[Path], target: Path) -> Placed:
    """Link the weights into ``target`` and copy the small files that go with them. The base is only read."""
    placed = Placed()
    for path in weights:
        source = path.resolve()  # a hub cache holds symbolic links
        try:
            os.link(source, target / path.name)
            placed.linked.append(path.name)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            shutil.copyfile(source, target / path.name)
            placed.copied.append(path.name)
    if (base / INDEX).is_file():
        shutil.copyfile(base / INDEX, target / INDEX)
    for path in sorted(base.iterdir()):
        small = path.suffix in SMALL or path.name.upper().startswith(("LICENSE", "NOTICE"))
        if path.is_file() and small and path.name not in LEFT_OUT and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    return placed


def same_weights(base: Path, gated: Path) -> str | None:
    """Whether a gated folder holds the base's weights, bit for bit.

    Returns:
        None when it does, or when it holds no weights at all; else what differs.
    """
    if not (gated / WHOLE).is_file() and not (gated / INDEX).is_file():
        return None
    ours, theirs = weight_files(base), weight_files(gated)
    if weight_hashes(ours) == weight_hashes(theirs):
        return None
    found, other = _tensors(ours), _tensors(theirs)
    for name in sorted(set(found) ^ set(other)):
        return f"tensor '{name}' is in one only"
    for name in sorted(found):
        with safe_open(found[name], framework="pt") as a, safe_open(other[name], framework="pt") as b:
            x, y = a.get_tensor(name), b.get_tensor(name)
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"'{name}' is {x.dtype} {list(x.shape)} in one, {y.dtype} {list(y.shape)} in the other"
        if not x.equal(y):
            return f"'{name}' has other values"
    return None


def _tensors(files: list[Path]) -> dict[str, str]:
    """The file of each tensor, without gates."""
    found = {}
    for path in files:
        if path.name != GATE_FILE:
            with safe_open(str(path), framework="pt") as file:
                found |= dict.fromkeys(file.keys(), str(path))
    return found
