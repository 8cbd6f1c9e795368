"""`serve run FILE` as a user runs it, on CPU, with the openai client: the example's file, small caches, 1, then 2 replicas."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import APIError, APIStatusError, BadRequestError, NotFoundError, OpenAI
from support import FULL

pytest.importorskip("ray.serve", reason="Ray Serve is an extra")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ray_serve.yaml"
READY_SECONDS = 240
TEXT = "def fibonacci(n):"
REPLICA, ENGINE = "ray::ServeReplica:gated:Engine", "VLLM::EngineCore"


@dataclass
class Serving:
    """A running `serve run`: where it listens, its log, its process, and those that it had."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    temp: Path
    seen: list[psutil.Process] = field(default_factory=list)

    def processes(self, name: str) -> list[psutil.Process]:
        """Of this Ray node, by the begin of the title."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.seen = family
        found = []
        for process in family:
            try:
                title = " ".join(process.cmdline()).strip()
            except psutil.Error:
                continue
            if title.startswith(name) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def answers(self) -> list[int]:
        """Process ids of the engine replicas that have answered, request by request."""
        return [int(pid) for pid in re.findall(r"gated:Engine pid=(\d+).* CALL answer OK", self.log.read_text())]

    def quiet(self) -> bool:
        """Whether nobody's answer has reached the log for two seconds."""
        before = len(self.answers())
        time.sleep(2)
        return len(self.answers()) == before

    def answered(self) -> set[int]:
        return set(self.answers())

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = READY_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not holds():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"not after {seconds} s: {what}\n{self.log.read_text()[-6000:]}")
            time.sleep(0.3)

    def healthy(self) -> bool:
        try:
            return httpx.get(self.url + "/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


def example(port: int) -> dict[str, Any]:
    """The example's file: other port, small KV caches, and scaling by free KV alone, fast."""
    file: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    file["http_options"]["port"] = port
    args = file["applications"][0]["args"]
    args["engine"] |= {"kv_cache_memory_bytes": "16M", "max_model_len": 2048, "enable_server_load_tracking": True,
                       "enable_prompt_tokens_details": True}  # fmt: skip
    args |= {
        "prefix_routing": 4, "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1000, "target_free_kv": 0.6,
        "look_back_period_s": 11, "upscale_delay_s": 1, "downscale_delay_s": 3600, "health_period_s": 2, "drain_s": 30,
    }  # fmt: skip
    return file


@pytest.fixture(scope="module")
def serving(tmp_path_factory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("ray")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "serve.yaml").write_text(yaml.safe_dump(example(port)))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    temp = Path("/tmp") / f"vp-{secrets.token_hex(3)}"  # Ray puts sockets there, whose paths are short
    temp.mkdir()
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env |= {
        "RAY_TMPDIR": str(temp), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # this one: all ports on 127.0.0.1
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "VLLM_LOGGING_LEVEL": "INFO", "RAY_worker_niceness": "0",  # 15 as a rule: beside other tests it would hardly run at all
    }  # fmt: skip
    log = folder / "serve.log"
    command = [str(Path(sys.executable).parent / "serve"), "run", str(folder / "serve.yaml")]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=ROOT, start_new_session=True)
    found = Serving(f"http://127.0.0.1:{port}", log, process, temp)
    try:
        found.wait("the server answers", found.healthy)
        yield found
    finally:
        if process.poll() is None:
            found.processes("")
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        _, alive = psutil.wait_procs(found.seen, timeout=10)
        for child in alive:
            child.kill()
        shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="module")
def client(serving) -> OpenAI:
    return OpenAI(base_url=serving.url + "/v1", api_key="none", max_retries=0, timeout=180)


@pytest.fixture(scope="module")
def model(client) -> str:
    (served,) = client.models.list().data
    return served.id


def complete(client: OpenAI, model: str, tokens: int, prompt: str = TEXT, stream: bool = False, **asked: Any) -> Any:
    return client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=stream,
        extra_body={"ignore_eos": True, "vllm_xargs": asked},
    )  # fmt: skip


def new() -> str:
    """A prompt that begins like no other, for whichever replica has served least."""
    return secrets.token_hex(100)


def test_completions_and_what_the_gates_did(client, model):
    assert model == "examples/reference-dcp"  # as the file has it
    answer = complete(client, model, 60, **{"prune.strength": 0.5})
    assert answer.usage.completion_tokens == 60
    told = answer.model_dump()["kv_transfer_params"]["vllm_prune"]
    assert told["strength"] == 0.5 and told["keys_dropped"] > 0 and 0 < told["kept_pairs"] < 1


def test_a_stream_comes_piece_by_piece(client, model):
    """Some seconds long: the first piece waits for a busy machine by tenths of a second, and must still come early."""
    whole = complete(client, model, 1500).choices[0].text
    begun, times, text = time.monotonic(), [], ""
    for chunk in complete(client, model, 1500, stream=True):
        times.append(time.monotonic() - begun)
        text += chunk.choices[0].text
    assert text == whole
    assert len(times) > 250 and times[0] < times[-1] / 2


def test_chat(client, model):
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": TEXT}], max_tokens=8)
    assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens > 0
    assert "vllm_prune" in answer.model_dump()["kv_transfer_params"]


def test_errors_are_vllms_own(client, model, serving):
    with pytest.raises(BadRequestError, match=r"prune\.strenght is unknown"):
        complete(client, model, 4, **{"prune.strenght": 0.5})
    with pytest.raises(APIError, match=r"prune\.strength must lie in 0\.\.16, got 99"):  # in the stream
        list(complete(client, model, 4, stream=True, **{"prune.strength": 99}))
    with pytest.raises(NotFoundError, match="does not exist"):
        complete(client, "another", 4)
    assert httpx.get(serving.url + "/nothing").status_code == 404


def test_a_client_that_leaves_ends_its_request(client, model, serving):
    def load() -> int:
        return httpx.get(serving.url + "/load", timeout=30).json()["server_load"]

    stream = complete(client, model, 1900, stream=True)  # some 12 seconds
    next(iter(stream))
    assert load() == 1
    stream.close()
    serving.wait("the stream's request ends", lambda: load() == 0, 8)
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": model, "prompt": TEXT, "max_tokens": 1900, "ignore_eos": True}
        httpx.post(serving.url + "/v1/completions", json=body, timeout=0.5)
    serving.wait("the other request ends", lambda: load() == 0, 8)


def test_metrics_are_rays(client, model, serving):
    complete(client, model, 60)
    asked = httpx.get(serving.url + "/metrics")
    assert asked.status_code == 404 and "ray_vllm" in asked.json()["error"]["message"]
    targets = serving.temp / "ray" / "prom_metrics_service_discovery.json"

    def shown() -> bool:
        try:  # Ray's agent writes the file, and listens, when it gets to it
            ports = json.loads(targets.read_text())[0]["targets"]
            text = "".join(httpx.get(f"http://{port}/metrics", timeout=30).text for port in ports)
        except (OSError, ValueError, IndexError, httpx.HTTPError):
            return False
        return all(name in text for name in ("ray_vllm_prune_keys_dropped_total{", "ray_vllm_kv_cache_usage_perc{"))

    serving.wait("the series are there", shown, 60)


@pytest.fixture(scope="module")
def both(serving, client, model) -> list[psutil.Process]:
    """Two replicas: the second comes when the first has little free KV left. No number of requests asks for it here."""
    assert len(serving.processes(REPLICA)) == 1
    enough = Event()

    def load(number: int) -> None:
        while not enough.is_set():
            complete(client, model, 400, f"{TEXT}  # {number}", **{"prune.off": True})

    with ThreadPoolExecutor(8) as pool:
        try:
            runs = [pool.submit(load, number) for number in range(8)]
            serving.wait("a second replica starts", lambda: len(serving.processes(REPLICA)) == 2, 90)
        finally:
            enough.set()
    for run in runs:
        run.result()
    serving.wait("it answers", lambda: complete(client, model, 8, new()) and len(serving.answered()) == 2)
    return serving.processes(REPLICA)


def test_little_free_kv_adds_a_replica(both):
    assert len(both) == 2


def test_the_same_beginning_goes_to_the_same_replica(both, serving, client, model):
    """Which then starts from what it holds of it: as many tokens cached as the first block border below the prompt's end says."""
    serving.wait("earlier answers are in the log", serving.quiet, 30)
    begun = len(serving.answers())
    prompts = [f"{word} " * 150 for word in ("alpha", "Beta", "(gamma)", "= delta")]
    cached: dict[str, list[int]] = {prompt: [] for prompt in prompts}
    for _ in range(3):
        for prompt in prompts:
            usage = complete(client, model, 2, prompt).usage
            cached[prompt].append(usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0)
            assert usage.prompt_tokens > 64
    serving.wait("the log says who answered", lambda: len(serving.answers()) >= begun + 12, 10)
    took = serving.answers()[begun:]
    assert len(took) == 12
    for number, prompt in enumerate(prompts):
        assert len(set(took[number::4])) == 1, took
        first, *later = cached[prompt]
        assert first < 64 <= later[0] == later[1], cached


@pytest.mark.parametrize(
    "victim", [REPLICA, *[ENGINE] * FULL], ids=["the replica's process", *["its engine's process"] * FULL]
)
def test_a_killed_replica_is_replaced_and_no_other_request_is_lost(victim, both, serving, client, model):
    """Requests not streamed are all answered, those of the dead replica by the other. Of streams those end that it had begun,
    with an error event, and no others; then a new replica answers too."""
    serving.wait("two replicas", lambda: len(serving.processes(REPLICA)) == len(serving.processes(ENGINE)) == 2, 60)

    def plain(_: int) -> int:
        return complete(client, model, 200, new()).usage.completion_tokens

    def streamed(number: int) -> str | None:
        reason = None
        try:
            for chunk in complete(client, model, 1750, new(), stream=True):
                begun.add(number)
                reason = chunk.choices[0].finish_reason or reason
        except APIStatusError:
            raise
        except APIError as error:
            return str(error)
        return reason

    begun: set[int] = set()
    before = {process.pid for process in serving.processes(REPLICA)}
    candidates = {process: [process, *process.children(recursive=True)] for process in serving.processes(victim)}

    def worked() -> dict[psutil.Process, float]:
        return {one: sum(part.cpu_times().user for part in parts) for one, parts in candidates.items()}

    with ThreadPoolExecutor(24) as pool:
        streams = []
        for number in range(12):
            streams.append(pool.submit(streamed, number))
            time.sleep(0.2)  # the router hears how much each replica has to do: at once, all could go to the same one
        serving.wait("all streams have begun", lambda: len(begun) == len(streams), 60)
        plains = [pool.submit(plain, number) for number in range(8)]
        since = worked()
        time.sleep(0.3)
        now = worked()
        dead = max(candidates, key=lambda one: now[one] - since[one])  # at work: the other may have ended its streams
        children = candidates[dead][1:]
        dead.kill()  # found before: a look at all processes takes seconds, and streams may end in them
        late = [pool.submit(plain, 100 + number) for number in range(4)]
        assert [run.result() for run in plains + late] == [200] * 12
        ends = [run.result() for run in streams]
    lost = [end for end in ends if end != "length"]
    assert 0 < len(lost) < len(ends)
    told = ("the replica died while it sent this answer", "EngineCore encountered an issue")
    assert all(end.endswith(told[0] + ".") or (victim == ENGINE and told[1] in end) for end in map(str, lost)), lost
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []

    def replaced() -> bool:
        complete(client, model, 8, new())
        return bool(serving.answered() & ({process.pid for process in serving.processes(REPLICA)} - before))

    serving.wait("a new replica answers", replaced)
    assert len(serving.processes(REPLICA)) == 2
