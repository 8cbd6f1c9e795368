"""Builds sdist and wheel twice, from two copies of the sources in folders of other names, and compares them byte for byte.

The wheel is built from the unpacked sdist, so that one without a file that the build needs fails here. Then both are looked into:
every file of our packages is there. Runs on the tools of ``requirements/release.lock``; nothing is fetched.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vllm_prune/", "training/vllm_prune_training/", "kernels/vllm_prune_kernels/")
BESIDE = ("pyproject.toml", "README.md", "LICENSE")
C_SOURCES = (".c", ".h")


def git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def tracked() -> list[str]:
    """Files that git knows, as they are now."""
    return [name for name in git("ls-files", "-z").split("\0") if name and (ROOT / name).is_file()]


def normalise(sdist: Path, epoch: int) -> None:
    """Rewrite an sdist: members in order, their times and the archive's as given, no owner, plain permissions."""
    with tarfile.open(sdist) as archive:
        members = [
            (member, archive.extractfile(member)) for member in sorted(archive.getmembers(), key=lambda one: one.name)
        ]
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w", format=tarfile.PAX_FORMAT) as out:
            for member, content in members:
                plain = tarfile.TarInfo(member.name)
                plain.type, plain.size, plain.mtime = member.type, member.size, epoch
                plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
                out.addfile(plain, content)
    with sdist.open("wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=epoch) as packed:
        packed.write(inner.getvalue())


def build(place: Path, out: Path, epoch: int) -> list[Path]:
    """Copy the sources to ``place`` and build there; the distributions come to ``out``."""
    for name in tracked():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place / name)
        (place / name).chmod(0o755 if os.access(ROOT / name, os.X_OK) else 0o644)
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, "--sdist", str(place)], env=env, check=True, stdout=subprocess.DEVNULL)
    (sdist,) = out.glob("*.tar.gz")
    normalise(sdist, epoch)
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    subprocess.run([*command, "--wheel", str(unpacked)], env=env, check=True, stdout=subprocess.DEVNULL)
    return sorted(out.iterdir())


def lacking(sdist: Path, wheel: Path) -> list[str]:
    """What should be in them and is not, or should not and is."""
    ours = [name for name in tracked() if name.startswith(PACKAGES)]
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    found = [f"sdist lacks {name}" for name in (*ours, *BESIDE) if name not in packed]
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {name.removeprefix("training/").removeprefix("kernels/") for name in ours if not name.endswith(C_SOURCES)}
    found += [f"wheel lacks {name}" for name in sorted(wanted - installed)]
    extra = sorted(installed - wanted)
    found += [f"wheel has {name}" for name in extra if not name.endswith(".so")]
    libraries = sum(name.endswith(".so") for name in extra)
    return found if libraries == 2 else [*found, f"wheel has {libraries} compiled libraries, not 2"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(one: Path, other: Path) -> list[str]:
    """Members of two wheels that differ; of other archives, their name."""
    if one.suffix != ".whl":
        return [one.name]
    with zipfile.ZipFile(one) as a, zipfile.ZipFile(other) as b:
        names = sorted({*a.namelist(), *b.namelist()})
        return [
            name
            for name in names
            if name not in a.NameToInfo or name not in b.NameToInfo or a.read(name) != b.read(name)
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the distributions and SHA256SUMS, made anew"
    )
    args = parser.parse_args()
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        first = build(work / "a", work / "first", epoch)
        second = build(work / "another folder", work / "second", epoch)
        problems = [
            f"not reproducible: {', '.join(differences(one, other))}"
            for one, other in zip(first, second, strict=True)
            if one.name != other.name or digest(one) != digest(other)
        ]
        wheel, sdist = sorted(first, key=lambda path: path.suffix != ".whl")
        problems += lacking(sdist, wheel)
        shutil.rmtree(args.out, ignore_errors=True)
        args.out.mkdir(parents=True)
        for path in first:
            shutil.copy(path, args.out)
    sums = "".join(f"{digest(path)}  {path.name}\n" for path in sorted(args.out.iterdir()))
    (args.out / "SHA256SUMS").write_text(sums)
    print(sums + f"SOURCE_DATE_EPOCH {epoch}, commit {git('rev-parse', 'HEAD').strip()}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print("built twice, byte for byte the same; nothing is lacking")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
