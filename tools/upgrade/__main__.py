"""``python -m tools.upgrade``: what a vLLM release changes of what we stand on. Reads sources, imports nothing of them.

Exit code: 0 nothing changed, 1 something to read, 2 something that our code cannot stay as it is with, 3 no sources to be had.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tools.upgrade.compare import BROKEN, compare
from tools.upgrade.manifest import MANIFEST, make_manifest, our_tree, read, to_json
from tools.upgrade.report import report


def installed() -> Path:
    """The folder that holds the installed vLLM, which is not imported."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        sys.exit("no vLLM is installed here: give --tree or --wheel")
    return Path(spec.origin).parents[1]


def download(release: str, folder: Path) -> Path:
    """The wheel of a release, by pip: whichever platform it is for, its Python sources are the same."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
    ]
    done = subprocess.run([*command, f"vllm=={release}"])
    wheels = sorted(folder.glob(f"vllm-{release}*.whl"))
    if done.returncode or not wheels:
        print(f"pip found no wheel of vLLM {release}; give --wheel or --tree (a checkout)", file=sys.stderr)
        raise SystemExit(3)
    return wheels[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.upgrade", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--release", metavar="X.Y.Z", help="fetch this release's wheel by pip")
    which.add_argument("--wheel", type=Path, help="a wheel of vLLM")
    which.add_argument("--tree", type=Path, help="a folder that holds the package `vllm`: site-packages, a checkout")
    parser.add_argument("--name", help="what to call it in the report")
    parser.add_argument("--report", type=Path, help="write the report there (Markdown) instead of to standard output")
    parser.add_argument("--write", action="store_true", help="make the manifest anew, of the vLLM given or installed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = args.wheel or args.tree or (download(args.release, Path(folder)) if args.release else installed())
        name = args.name or args.release or (version("vllm").partition("+")[0] if place == installed() else place.name)
        begin = time.perf_counter()
        tree = our_tree(place)
        if args.write:
            MANIFEST.write_text(to_json(name, make_manifest(tree)))
            return 0
        base, manifest = read()
        changes = compare(tree, manifest)
    text = report(base, name, manifest, changes)
    if args.report:
        args.report.write_text(text)
    else:
        print(text)
    broken = sum(change.kind in BROKEN for change in changes)
    seconds = time.perf_counter() - begin
    print(f"{len(manifest)} interfaces, {len(changes)} changes, {broken} that break, {seconds:.0f} s", file=sys.stderr)
    return 2 if broken else 1 if changes else 0


if __name__ == "__main__":
    sys.exit(main())
