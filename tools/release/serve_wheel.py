"""Installs the wheel into an environment of its own, as a user does, and serves the reference checkpoint with it.

Nothing of the sources is in reach of that environment: its working directory holds the checkpoint alone. The environment is
otherwise what ``make test`` has: the lock, torch, and vLLM's CPU build.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 600
PROMPT = "A key that nobody asks for again may be forgotten. " * 12
PACKAGES = ("vllm_prune", "vllm_prune_training", "vllm_prune_kernels")


def install(wheel: Path, folder: Path) -> None:
    """Make an environment with the wheel."""
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--require-hashes", "--no-deps", "-r", str(ROOT / "requirements/ci.lock")], check=True)
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    meta = folder / "vllm-meta"  # a copy, since building it writes there
    shutil.copytree(ROOT / "requirements/vllm-meta", meta, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    subprocess.run([*pip, "--no-build-isolation", "--no-deps", str(meta)], check=True)
    subprocess.run([*pip, str(wheel)], check=True)


def replace(wheel: Path, folder: Path) -> None:
    """Install the wheel into an environment that has all the rest, instead of what it has of ours."""
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "vllm-prune"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)


def environment() -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "VLLM_"))
    }
    return {
        **kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip


def where(python: Path, work: Path) -> dict[str, str]:
    """From where the environment imports our packages."""
    code = f"import json, importlib.util as u; print(json.dumps({{n: u.find_spec(n).origin for n in {PACKAGES}}}))"
    done = subprocess.run(
        [str(python), "-c", code], cwd=work, env=environment(), check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def get(url: str, body: dict[str, Any] | None = None, seconds: float = 120) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return answer.read().decode()  # type: ignore[no-any-return]


def serve(python: Path, checkpoint: Path, work: Path) -> dict[str, Any]:
    """Start ``vllm serve``, ask once, stop it. What it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = work / "server.log"
    command = [str(python.with_name("vllm")), "serve", checkpoint.name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "64M"]
    begin = time.monotonic()
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=work, env=environment(), stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if server.poll() is not None or time.monotonic() - begin > READY_SECONDS:
                sys.exit(f"the server did not come up:\n{log.read_text()[-4000:]}")
            try:
                get(f"{url}/health", seconds=5)
                break
            except OSError:
                time.sleep(1)
        ready = time.monotonic() - begin
        model = json.loads(get(f"{url}/v1/models"))["data"][0]["id"]
        body = {"model": model, "prompt": PROMPT, "max_tokens": 32, "temperature": 0.0, "ignore_eos": True}
        answer = json.loads(get(f"{url}/v1/completions", body))
        metrics = [line for line in get(f"{url}/metrics").splitlines() if line.startswith("vllm_prune:keys_dropped")]
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
    return {
        "ready_seconds": round(ready, 1),
        "text": answer["choices"][0]["text"],
        "summary": answer["kv_transfer_params"]["vllm_prune"],
        "metrics": metrics,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dist", type=Path, required=True, help="folder that holds the wheel")
    parser.add_argument("--work", type=Path, required=True, help="folder to work in, made anew")
    parser.add_argument("--into", type=Path, help="an environment made by `make test` elsewhere, in place of a new one")
    args = parser.parse_args()
    (wheel,) = args.dist.resolve().glob("vllm_prune-*.whl")
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    folder = args.into.absolute() if args.into else work / "venv"
    if args.into:
        replace(wheel, folder)
    else:
        install(wheel, folder)
    python = folder / "bin" / "python"
    checkpoint = Path(shutil.copytree(ROOT / "examples/reference-dcp", work / "served" / "reference-dcp"))
    origins = where(python, checkpoint.parent)
    result = {"wheel": wheel.name, "origins": origins, **serve(python, checkpoint, checkpoint.parent)}
    (work / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    held, dropped = (result["summary"][name] for name in ("keys_held", "keys_dropped"))
    strange = [path for path in origins.values() if not path.startswith(f"{folder}/")]
    if strange or not result["text"] or not result["metrics"] or not held or not dropped:
        print(f"not as it should be: {strange or 'no text, no keys dropped, or no metrics'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
