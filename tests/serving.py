"""`vllm serve FOLDER` as a user runs it, in processes of its own: for tests and for load."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

READY_SECONDS = 300
LONGEST = 512


def user_environment(**more: str) -> dict[str, str]:
    """The tests' own, without what makes an engine run in one process: a server has its worker in another."""
    kept = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {**kept, "VLLM_LOGGING_LEVEL": "INFO", **more}


@dataclass
class Server:
    """A running server: where it listens, where it logs, its process."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def metric(self, name: str) -> float:
        """Sum of a series over its labels."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith((name + "{", name + " "))]
        assert lines, f"no series {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def wait_until_ready(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"the server ended with {self.process.returncode}:\n{self.log.read_text()[-6000:]}"
                )
            try:
                if self.get("/health").status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.3)
        raise AssertionError(f"the server is not ready after {READY_SECONDS} s:\n{self.log.read_text()[-6000:]}")


class Events:
    """Server-sent events out of a stream's bytes. httpx's own lines also end at U+0085 and U+2028, which may be in a text."""

    def __init__(self) -> None:
        self.rest = b""

    def take(self, chunk: bytes) -> list[dict[str, Any]]:
        """The events that are whole with this chunk, as JSON."""
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


@contextmanager
def serving(folder: Path, log: Path, *options: str, **env: str) -> Iterator[Server]:
    """``vllm serve`` on a free port until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", str(LONGEST), "--kv-cache-memory-bytes", "64M", "--enforce-eager", *options,
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=user_environment(**env), stdout=out, stderr=out, start_new_session=True)
    family: list[psutil.Process] = []
    try:
        found = Server(f"http://127.0.0.1:{port}", log, process)
        found.wait_until_ready()
        family = psutil.Process(process.pid).children(recursive=True)
        yield found
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        for child in family:
            if child.is_running():
                child.kill()
