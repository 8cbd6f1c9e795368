"""``python -m tools.upgrade.on_cpu``: our tests on a release's Python sources where it has no CPU build.

The sources come from the release's wheel, whichever platform it is for; the compiled ops are those of the CPU build of vLLM that
is installed. So it shows what the release's Python does with our code, and nothing of its kernels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tools.upgrade.__main__ import download, installed
from tools.upgrade.manifest import OURS, ROOT


def lay_out(wheel: Path, release: str, folder: Path, ops: Path) -> None:
    """Make a folder from which Python imports a release with other compiled ops.

    Args:
        wheel: of the release.
        release: its version; the folder's metadata say "+cpu" after it, by which vLLM finds its platform.
        folder: made anew.
        ops: the folder that holds the package ``vllm`` whose compiled ops are taken.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder, [name for name in names if name.startswith("vllm/") and not name.endswith(".so")])
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(about).decode()
        points = archive.read(about.replace("METADATA", "entry_points.txt"))
    info = folder / f"vllm-{release}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(metadata.replace(f"Version: {release}", f"Version: {release}+cpu", 1))
    (info / "entry_points.txt").write_bytes(points)
    for op in (ops / "vllm").glob("*.so"):
        shutil.copy(op, folder / "vllm")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.upgrade.on_cpu", description=__doc__)
    parser.add_argument("release", help="x.y.z")
    parser.add_argument("--wheel", type=Path, help="its wheel; fetched by pip when left out")
    parser.add_argument("--with", dest="wanted", metavar="PACKAGE", action="append", default=[],
                        help="something that the release asks for and our environment lacks, installed beside it")  # fmt: skip
    args, more = parser.parse_known_args()  # the others are pytest's
    folder = ROOT / "build" / f"vllm-{args.release}"
    lay_out(args.wheel or download(args.release, ROOT / "build"), args.release, folder, installed())
    if args.wanted:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(folder),
            *args.wanted,
        ]
        subprocess.run(command, check=True)
    paths = [folder, *dict.fromkeys(OURS.values())]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    told = "import vllm, importlib.metadata as m; print(vllm.__file__, m.version('vllm'))"
    subprocess.run([sys.executable, "-c", told], env=env, cwd=ROOT, check=True)
    return subprocess.run([sys.executable, "-m", "pytest", *more], env=env, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
