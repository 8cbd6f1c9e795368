"""What happens to a live server when something around it breaks: it goes on as if nothing were, or it ends with a clear error,
and the next one serves. Whatever it sent until then was right.

The tests come in an order: each server stands for the restart after the fault that ended the one before.
"""

from __future__ import annotations

import re
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest
import torch
from openai import OpenAI
from public_checkpoints import WINDOW, published, save_nvidia
from serving import Events, Server, serving
from support import VOCAB, prompts, save_gated, tiny_config
from vllm_prune_training.tokenizer import train_tokenizer

pytestmark = pytest.mark.slow

LONG = 380
"""Tokens of an answer that is still under way when something happens."""
ASKED = [prompt["prompt_token_ids"] for prompt in prompts([3, 120, 40, 100])]
OPTIONS = ("--dtype", "float32", "--served-model-name", "faults", "--kv-cache-memory-bytes", "8M")
LONGER = ("--max-model-len", "2048")
DAY = 86400


def make(folder: Path, seed: int) -> Path:
    save_gated(folder, tiny_config("qwen3", layers=2), "dcp", seed=seed, beta=3.6)
    train_tokenizer(["one two"], VOCAB).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("faults") / "model", seed=0)


@pytest.fixture(scope="module")
def clock(tmp_path_factory) -> Iterator[Callable[[int], None]]:
    """Sets how many seconds the first server's wall clock is off; ``clock.env`` is of that server."""
    place = tmp_path_factory.mktemp("clock")
    source = Path(__file__).with_name("clock_jump.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", place / "jump.so", "-ldl"], check=True)
    (place / "seconds").write_bytes(bytes(8))

    def jump(seconds: int) -> None:
        with (place / "seconds").open("r+b") as file:
            file.write(struct.pack("<q", seconds))

    jump.env = {"LD_PRELOAD": str(place / "jump.so"), "CLOCK_JUMP": str(place / "seconds")}  # type: ignore[attr-defined]
    return jump


EXTRA = {"ignore_eos": True, "return_token_ids": True}


def asked(prompt: list[int], tokens: int) -> dict[str, Any]:
    return {"model": "faults", "prompt": prompt, "max_tokens": tokens, "temperature": 0}


def body(prompt: list[int], tokens: int = LONG, **more: Any) -> dict[str, Any]:
    return {**asked(prompt, tokens), **EXTRA, **more}


def answer(server: Server, prompt: list[int]) -> tuple[list[int], int]:
    """Tokens, and how many keys were dropped."""
    found = httpx.post(server.url + "/v1/completions", json=body(prompt), timeout=120)
    assert found.status_code == 200, found.text
    data = found.json()
    return data["choices"][0]["token_ids"], data["kv_transfer_params"]["vllm_prune"]["keys_dropped"]


def answers(server: Server) -> list[tuple[list[int], int]]:
    with ThreadPoolExecutor(len(ASKED)) as pool:
        return list(pool.map(lambda prompt: answer(server, prompt), ASKED))


class Stream:
    """A client that reads an answer as it comes. ``tokens`` so far; ``ended``: "whole", "cut", or what it was told."""

    def __init__(self, server: Server, prompt: list[int], wanted: int, go_on: Event) -> None:
        self.go_on = go_on
        self.url, self.prompt, self.wanted, self.tokens, self.ended = server.url, prompt, wanted, list[int](), ""

    def read(self) -> None:
        try:
            wish = body(self.prompt, self.wanted, stream=True)
            with httpx.stream("POST", self.url + "/v1/completions", json=wish, timeout=120) as found:
                if found.status_code != 200:
                    self.ended = found.read().decode()
                    return
                self.ended = "cut"
                events = Events()
                for chunk in found.iter_bytes():
                    for data in events.take(chunk):
                        self.take(data)
                        if self.tokens:
                            self.go_on.wait(60)
        except httpx.HTTPError as error:
            self.ended = self.ended or repr(error)

    def take(self, data: dict[str, Any]) -> None:
        if "error" in data:
            self.ended = data["error"]["message"]
        for choice in data.get("choices", ()):
            self.tokens += choice["token_ids"]
            if choice["finish_reason"]:
                self.ended = "whole" if choice["finish_reason"] == "length" else choice["finish_reason"]


@contextmanager
def under_load(server: Server, wanted: int = LONG, begun: int = 2 * len(ASKED)) -> Iterator[list[Stream]]:
    """Streams of which ``begun`` or more have begun; after the block all must end, within two minutes."""
    go_on = Event()  # who has begun reads no further until all have: busy readers would keep the others from beginning
    streams = [Stream(server, prompt, wanted, go_on) for prompt in ASKED * 2]
    with ThreadPoolExecutor(len(streams)) as pool:
        running: list[Future[None]] = [pool.submit(stream.read) for stream in streams]
        wait_for(lambda: sum(bool(stream.tokens) for stream in streams) >= begun, 60)
        go_on.set()
        yield streams
        for one in running:
            one.result(110)


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def family(server: Server) -> list[psutil.Process]:
    first = psutil.Process(server.process.pid)
    return [first, *first.children(recursive=True)]


def named(server: Server, name: str) -> psutil.Process:
    (found,) = [process for process in family(server) if name in " ".join(process.cmdline()[:1])]
    return found


def rightly_begun(streams: list[Stream], usual: list[tuple[list[int], int]]) -> None:
    for stream, (tokens, _) in zip(streams, usual * 2, strict=True):
        assert stream.tokens[:LONG] == tokens[: len(stream.tokens)], "what was sent must be right"
        assert (stream.ended == "whole") == (len(stream.tokens) == stream.wanted)


@pytest.fixture(scope="module")
def first(folder, clock, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "first.log"
    with serving(folder, log, *OPTIONS, "--shutdown-timeout", "120", **clock.env) as found:
        yield found


@pytest.fixture(scope="module")
def usual(first) -> list[tuple[list[int], int]]:
    found = answers(first)
    assert all(len(tokens) == LONG and dropped > 0 for tokens, dropped in found)
    return found


def test_the_clock_jumps(first, usual, clock):
    """A day ahead and two days back while requests run: nothing of ours looks at the wall clock."""

    def time_there() -> float:
        return httpx.post(first.url + "/v1/completions", json=body([5], 2), timeout=60).json()["created"] - time.time()

    assert all("jump.so" in Path(f"/proc/{process.pid}/maps").read_text() for process in family(first)[:1])
    with under_load(first) as streams:
        clock(DAY)
        assert abs(time_there() - DAY) < 60
        wait_for(lambda: all(len(stream.tokens) > 20 for stream in streams), 60)
        clock(-DAY)
        assert abs(time_there() + DAY) < 60
    rightly_begun(streams, usual)
    assert all(stream.ended == "whole" for stream in streams)
    counted = first.metric("vllm_prune:kept_fraction_count")
    assert answers(first) == usual
    assert first.metric("vllm_prune:kept_fraction_count") - counted == 5 * len(ASKED)
    answer(first, [5])
    assert first.metric("vllm_prune:held_blocks") == 0 == first.metric("vllm:kv_cache_usage_perc")
    clock(0)


def test_the_disk_is_full(first, usual):
    """No process of a server can write to a file any more. None wants to, but for the log, whose lines are lost."""
    files = {file.path for process in family(first) for file in process.open_files() if file.mode in ("w", "a", "r+")}
    assert {path for path in files if not path.startswith("/dev/shm")} <= {str(first.log)}
    for process in family(first):
        process.rlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    size = first.log.stat().st_size
    assert answers(first) == usual
    bad = httpx.post(first.url + "/v1/completions", json=body([5], vllm_xargs={"prune.power": 1}), timeout=60)
    assert bad.status_code == 400 and "prune.power" in bad.text
    assert first.log.stat().st_size == size
    for process in family(first):
        process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert answers(first) == usual


def test_the_checkpoint_is_overwritten(first, usual, folder):
    """Emptied in place, so that whoever had mapped a file would fall over it: what is served was read at the start."""
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    for path in kept:
        path.write_bytes(b"")
    assert answers(first) == usual
    for path, data in kept.items():
        path.write_bytes(data)


def test_clients_leave(first, usual):
    """All at once, in the middle of their streams."""
    with ThreadPoolExecutor(8) as pool:

        def leave(prompt: list[int]) -> None:
            with httpx.stream(
                "POST", first.url + "/v1/completions", json=body(prompt, stream=True), timeout=60
            ) as found:
                next(found.iter_bytes())

        list(pool.map(leave, ASKED * 2))
    wait_for(lambda: first.metric("vllm:num_requests_running") == 0, 60)
    assert answers(first) == usual
    answer(first, [5])
    assert first.metric("vllm:kv_cache_usage_perc") == 0


def test_sigterm_under_load(first, usual):
    """With vLLM's --shutdown-timeout those who are being served get all of their answers; nobody else is let in."""
    processes = family(first)
    with under_load(first) as streams:
        first.process.send_signal(signal.SIGTERM)
    rightly_begun(streams, usual)
    assert [(stream.ended, len(stream.tokens)) for stream in streams] == [("whole", LONG)] * len(streams)
    first.process.wait(60)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def kill_under_load(server: Server, name: str, usual: list[tuple[list[int], int]]) -> None:
    """One process of a server dies as the kernel's OOM killer would have it: clients are told, and the server ends."""
    assert answers(server) == usual, "the restart after the fault before"
    processes, victim = family(server), named(server, name)  # a look at all processes takes long under load
    # On a busy machine clients hear late that they have begun: who waits for all of them may come when the first have ended.
    with under_load(server, 4 * LONG, begun=2) as streams:
        victim.kill()
    rightly_begun(streams, usual)
    assert all(stream.ended for stream in streams)
    assert any(stream.ended != "whole" for stream in streams), "it came too late to be a fault"
    server.process.wait(60)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []
    assert re.search(r"ERROR .*(died|dead|Dead)", server.log.read_text()), server.log.read_text()[-3000:]


def test_the_worker_is_killed(folder, usual, tmp_path):
    with serving(folder, tmp_path / "server.log", *OPTIONS, *LONGER) as server:
        kill_under_load(server, "Worker", usual)


def test_the_engine_core_is_killed(folder, usual, tmp_path):
    with serving(folder, tmp_path / "server.log", *OPTIONS, *LONGER) as server:
        kill_under_load(server, "EngineCore", usual)


def test_a_restart_serves_what_is_on_the_disk(folder, usual, tmp_path):
    """Another checkpoint by now: a public one, in NVIDIA's format, asked with the openai client."""
    new = save_nvidia(tmp_path / "new")
    train_tokenizer(["one two"], VOCAB).save_pretrained(new)
    shutil.rmtree(folder)
    shutil.move(new, folder)
    with serving(folder, tmp_path / "server.log", *OPTIONS) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
        found = [client.completions.create(**asked(prompt, 40), extra_body=EXTRA) for prompt in ASKED]
    for prompt, answer in zip(ASKED, (one.model_dump() for one in found), strict=True):
        ids = torch.tensor([*prompt, *answer["choices"][0]["token_ids"]])
        logits, mark = published(folder, ids)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ids[len(prompt) :].tolist()
        told = answer["kv_transfer_params"]["vllm_prune"]
        ended = torch.arange(len(ids)) + WINDOW + 1 < told["tokens"]
        assert told["tokens"] >= len(ids) - 2 and told["keys_dropped"] == int((mark & ended).sum()) > 0
