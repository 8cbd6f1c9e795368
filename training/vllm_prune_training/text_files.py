"""Documents out of text, JSONL and Parquet files, with every fault named by file and place.

A text file is one document; a line of a JSONL file and a row of a Parquet file are one each. Units: lines and rows count
from 1, bytes from 0.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vllm_prune.errors import PruneError

from .data_recipe import Source

CORRECT = "Correct the file, or take it out of the recipe."


@dataclass(frozen=True)
class Files:
    """The files of one source: plain values, so that ``datasets`` can hash and pickle them."""

    paths: tuple[str, ...]
    format: str
    field: str
    max_line_chars: int


def find_files(source: Source, max_line_chars: int) -> Files:
    """Resolve a source. Raises PruneError when there is no such file, or one is empty."""
    if source.path is not None:
        paths = [source.path]
        if not Path(source.path).is_file():
            raise PruneError(f"data file {source.path} does not exist.", "Correct data.*.path; folders go with glob.")
    else:
        paths = sorted(path for path in glob.glob(source.glob or "", recursive=True) if Path(path).is_file())
        if not paths:
            raise PruneError(f"data glob {source.glob!r} matches no file.", "Correct data.*.glob; ** needs a folder.")
    for path in paths:
        # Empty files among many (a package's __init__.py) hold nothing and are skipped; an empty source is an error.
        if Path(path).stat().st_size == 0 and (source.path is not None or len(paths) == 1):
            raise PruneError(f"data file {path} is empty.", CORRECT)
    paths = [path for path in paths if Path(path).stat().st_size > 0]
    if not paths:
        raise PruneError(f"all files of data glob {source.glob!r} are empty.", "Name other files.")
    return Files(tuple(paths), source.format, source.field, max_line_chars)


def _decode(raw: bytes, path: str, line: int, offset: int) -> str:
    """UTF-8 text of bytes that start at ``line`` and byte ``offset`` of a file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line + raw.count(b"\n", 0, error.start)
        raise PruneError(
            f"data file {path} is no valid UTF-8 at line {at}, byte {offset + error.start}.", CORRECT
        ) from None


def _check_lines(text: str, path: str, place: str, limit: int) -> str:
    """The text, if no line of it is too long. Most texts are cleared without being split."""
    if len(text) > limit:
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > limit:
                raise PruneError(
                    f"data file {path}, {place}line {number} has {len(line)} characters, more than "
                    f"data.max_line_chars {limit}.",
                    "Raise data.max_line_chars, or take the file out of the recipe.",
                )
    return text


def _text(path: str, limit: int) -> Iterator[str]:
    text = _decode(Path(path).read_bytes(), path, 1, 0).replace("\r\n", "\n")
    yield _check_lines(text, path, "", limit)


def _jsonl(path: str, field: str, limit: int) -> Iterator[str]:
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decode(raw, path, number, offset)
            offset += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise PruneError(f"data file {path}, line {number} is no JSON: {error.msg}.", CORRECT) from None
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                fields = ", ".join(sorted(row)) if isinstance(row, dict) else "no object"
                raise PruneError(
                    f"data file {path}, line {number} has no text in field '{field}' (it has: {fields}).",
                    "Set data.*.field to the field that holds the text.",
                )
            yield _check_lines(row[field], path, f"row {number}, ", limit)


def _parquet(path: str, field: str, limit: int) -> Iterator[str]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise PruneError(f"data file {path} is no Parquet file: {error}.", CORRECT) from None
    schema = file.schema_arrow
    if field not in schema.names:
        raise PruneError(
            f"data file {path} has no column '{field}' (it has: {', '.join(schema.names)}).",
            "Set data.*.field to the column that holds the text.",
        )
    kind = schema.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise PruneError(f"column '{field}' of {path} holds {kind}, not text.", "Name a column of strings.")
    row = 0
    for batch in file.iter_batches(batch_size=256, columns=[field]):
        for value in batch.column(0):
            row += 1
            if not value.is_valid:
                raise PruneError(f"data file {path}, row {row} has no text in column '{field}'.", CORRECT)
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise PruneError(
                    f"data file {path}, row {row} is no valid UTF-8 at byte {error.start}.", CORRECT
                ) from None
            yield _check_lines(text, path, f"row {row}, ", limit)


def documents(files: Sequence[str], format: str, field: str, max_line_chars: int) -> Iterator[dict[str, str]]:
    """All documents of some files, ``{"text": ...}`` each: a generator for ``datasets``. Raises PruneError."""
    for path in files:
        if format == "text":
            texts = _text(path, max_line_chars)
        elif format == "jsonl":
            texts = _jsonl(path, field, max_line_chars)
        else:
            texts = _parquet(path, field, max_line_chars)
        for text in texts:
            yield {"text": text}


@dataclass(frozen=True)
class Totals:
    """What a source holds; documents and characters are 0 where they were not counted."""

    files: int
    bytes: int
    sha256: str
    documents: int = 0
    chars: int = 0


def inspect(files: Files, read: bool) -> Totals:
    """Hash of a source's bytes, and with ``read`` one pass over all its documents, which finds every fault.

    Raises:
        PruneError: a fault, or no document with any text.
    """
    total = hashlib.sha256()
    size = 0
    for path in files.paths:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                size += len(chunk)
        total.update(digest.digest())
    count = chars = 0
    if read:
        for row in documents(files.paths, files.format, files.field, files.max_line_chars):
            count += 1
            chars += len(row["text"])
        if chars == 0:
            raise PruneError(f"data files {files.paths[0]} ... hold no text.", "Name other files.")
    return Totals(len(files.paths), size, total.hexdigest(), count, chars)
