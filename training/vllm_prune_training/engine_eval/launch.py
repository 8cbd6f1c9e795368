"""Starts an engine run in a child process (one gated engine fits in a process) and reads its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from vllm_prune.demo.launch import environment
from vllm_prune.errors import PruneError

from .jobs import Answer, Engine, Request

POLL_SECONDS = 0.5
TRAINING_ROOT = Path(__file__).resolve().parents[2]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def launch(
    engine: Engine,
    requests: Sequence[Request],
    folder: Path,
    name: str,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Answer]:
    """Run all requests in a child process.

    Args:
        engine: its settings.
        requests: to run.
        folder: for NAME.job.json, NAME.jsonl (answers) and NAME.log (what the engine wrote).
        name: of the run.
        progress: called with the number of answers so far.

    Returns:
        One answer a request, in the order of the requests.

    Raises:
        PruneError: the run failed; with the reason it gave, or the end of its log.
    """
    job, result, log_path = (folder / f"{name}{end}" for end in (".job.json", ".jsonl", ".log"))
    job.write_text(json.dumps({"engine": asdict(engine), "requests": [asdict(r) for r in requests]}), encoding="utf-8")
    result.unlink(missing_ok=True)
    env = environment(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TRAINING_ROOT), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"{__package__}.run", str(job), str(result)]
    with log_path.open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
        try:
            while child.poll() is None:
                time.sleep(POLL_SECONDS)
                progress(_lines(result))
        finally:
            if child.poll() is None:  # interrupted: nothing stays behind
                child.terminate()
                child.wait()
    found = (
        [Answer(**json.loads(line)) for line in result.read_text(encoding="utf-8").splitlines()]
        if result.is_file()
        else []
    )
    if child.returncode or sorted(answer.index for answer in found) != list(range(len(requests))):
        lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        refused = [line.partition("vllm-prune: ")[2] for line in lines if "vllm-prune: " in line]
        reason = "\n".join(refused[-1:] or lines[-5:])
        raise PruneError(
            f"the run '{name}' ended with exit code {child.returncode} after {len(found)} of {len(requests)} requests: "
            f"{reason}", f"See {log_path}.",
        )  # fmt: skip
    progress(len(found))
    return sorted(found, key=lambda answer: answer.index)
