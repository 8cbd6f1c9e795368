"""Corpus of permissively licensed Python source found in the installed packages."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_MODULUS = 50
MIN_CHARS, MAX_CHARS = 500, 200_000
MAX_LINE_CHARS = 400
MAX_DIGIT_SHARE = 0.20
PACKAGE_CHAR_CAP = 16_000_000
FORBIDDEN_MARKERS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>")

_PERMISSIVE = (
    "mit", "mit-0", "mit-cmu", "bsd", "0bsd", "bsd-2-clause", "bsd-3-clause", "3-clause bsd", "apache",
    "apache-2.0", "apache 2.0", "apache software", "apache-2.0 with llvm-exception", "psf-2.0", "isc",
    "python software foundation", "bsl-1.0", "cnri-python", "isc (iscl)", "hpnd",
)  # fmt: skip
_SKIPPED_DIRS = {"_vendor", "site-packages", "__pycache__", "lib2to3", "idlelib", "node_modules"}


@dataclass(frozen=True)
class Source:
    """One package whose Python files may be used."""

    name: str
    version: str
    licence: str
    root: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Document:
    """One source file: text and the sha256 of its UTF-8 bytes."""

    text: str
    sha256: str
    package: str


def is_held_out(sha256: str) -> bool:
    """Whether the file with this content hash belongs to the held-out split."""
    return int(sha256, 16) % HELD_OUT_MODULUS == 0


def is_permissive(licence: str) -> bool:
    """True when every term of a licence expression or name is a known permissive licence."""
    text = licence.strip().lower()
    if not text or len(text) > 120:
        return False
    terms = re.split(r"\s+(?:and|or)\s+|,|/", text.replace("(", " ").replace(")", " "))
    cleaned = [re.sub(r"\b(the|licen[cs]e)\b", "", term).strip() for term in terms]
    cleaned = [re.sub(r"\s+", " ", term) for term in cleaned if term]
    return bool(cleaned) and all(term in _PERMISSIVE for term in cleaned)


def distribution_licence(dist: metadata.Distribution) -> str:
    """The licence a distribution declares: expression, else classifiers, else the short licence field."""
    meta = dist.metadata
    if expression := meta.get("License-Expression"):
        return expression
    rows = [row for row in meta.get_all("Classifier") or [] if row.startswith("License ::")]
    names = [row.split("::")[-1].strip() for row in rows if row.split("::")[-1].strip() != "OSI Approved"]
    if names:
        return " AND ".join(re.sub(r"\s*\(.*\)", "", name) for name in names)
    return (meta.get("License") or "").strip().split("\n")[0].rstrip(".")


def find_sources() -> list[Source]:
    """The standard library and each installed distribution under a permissive licence, sorted by name."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    version = ".".join(str(part) for part in sys.version_info[:3])
    sources = [Source("python-stdlib", version, "PSF-2.0", stdlib, tuple(sorted(stdlib.rglob("*.py"))))]
    seen: set[str] = set()
    for dist in metadata.distributions():
        name = (dist.metadata["Name"] or "").lower()
        licence = distribution_licence(dist)
        if not name or name in seen or not is_permissive(licence):
            continue
        seen.add(name)
        root = Path(str(dist.locate_file("")))
        files = sorted(root / str(file) for file in dist.files or [] if str(file).endswith(".py"))
        if files:
            sources.append(Source(name, dist.version, licence, root, tuple(files)))
    return sorted(sources, key=lambda source: source.name)


def is_usable_text(text: str) -> bool:
    """Rejects files too short or long, with very long lines, mostly numbers, or with special markers."""
    if not MIN_CHARS <= len(text) <= MAX_CHARS:
        return False
    if max(map(len, text.splitlines()), default=0) > MAX_LINE_CHARS:
        return False
    if sum(map(str.isdigit, text)) > MAX_DIGIT_SHARE * len(text):
        return False
    return not any(marker in text for marker in FORBIDDEN_MARKERS)


def read_documents(sources: Iterable[Source], cap: int = PACKAGE_CHAR_CAP) -> Iterator[Document]:
    """Documents of all sources without duplicates, at most ``cap`` characters a package, in hash order."""
    seen: set[str] = set()
    for source in sources:
        documents = []
        for path in source.files:
            inside = path.relative_to(source.root).parts if path.is_relative_to(source.root) else path.parts
            if _SKIPPED_DIRS.intersection(inside):
                continue
            try:
                text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
            except (OSError, UnicodeDecodeError):
                continue
            if not is_usable_text(text):
                continue
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest not in seen:
                seen.add(digest)
                documents.append(Document(text, digest, source.name))
        used = 0
        for document in sorted(documents, key=lambda item: item.sha256):
            used += len(document.text)
            if used > cap:
                break
            yield document


def corpus_hash(documents: Iterable[Document]) -> str:
    """Hash over the sorted hashes of the files."""
    return hashlib.sha256("\n".join(sorted(document.sha256 for document in documents)).encode()).hexdigest()


def corpus_record(sources: Iterable[Source], documents: list[Document]) -> dict[str, object]:
    """JSON-able record of what the corpus holds."""
    files: dict[str, int] = {}
    chars: dict[str, int] = {}
    for document in documents:
        files[document.package] = files.get(document.package, 0) + 1
        chars[document.package] = chars.get(document.package, 0) + len(document.text)
    packages = [
        {"name": s.name, "version": s.version, "licence": s.licence, "files": files[s.name],
         "chars": chars[s.name]}
        for s in sources if s.name in files
    ]  # fmt: skip
    return {
        "data_hash": corpus_hash(documents),
        "files": len(documents),
        "chars": sum(chars.values()),
        "held_out_files": sum(is_held_out(document.sha256) for document in documents),
        "packages": packages,
    }
