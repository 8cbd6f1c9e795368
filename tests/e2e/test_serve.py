"""`vllm serve FOLDER` as a user runs it: stock vLLM, no flag that knows of the plugin, the plain openai client."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import BadRequestError, OpenAI
from serving import LONGEST, Server, serving, user_environment
from support import VOCAB, save_gated, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vllm_prune.metrics import GAUGES, LAYERS, SECONDS

pytestmark = pytest.mark.slow

REFERENCE = Path(__file__).parents[2] / "examples" / "reference-dcp"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "The quick brown fox jumps over the lazy dog. A key that nobody asks for again may be forgotten. "
MESSAGES: list[Any] = [{"role": "user", "content": "What may be forgotten? " + TEXT}]
NO_END = {"ignore_eos": True}


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE trained on a few sentences, with ChatML. Special ids as in ``tiny_config``."""
    special = ["<|endoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT, Path(__file__).read_text()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], eos_token=special[1], pad_token=special[2], chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The reference checkpoint of the repository where it is, a random one otherwise."""
    if (REFERENCE / "config.json").exists():
        return REFERENCE
    made = save_gated(tmp_path_factory.mktemp("served"), tiny_config("qwen3"), "dcp", section={"expected_keep": 0.5})
    save_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    with serving(folder, tmp_path_factory.mktemp("log") / "server.log") as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model(client, folder) -> str:
    (found,) = client.models.list().data
    assert found.id == str(folder)
    return found.id


def test_what_was_set_by_itself_is_in_the_log(server, model):
    log = server.log.read_text()
    assert re.search(r"vllm-prune: dcp gates at strength \S+, \d+ layers, planned kept fraction", log)
    assert "prefix caching is switched off" not in log


def test_completion(client, model, tokenizer):
    asked = {"model": model, "prompt": TEXT, "max_tokens": 20, "temperature": 0, "extra_body": NO_END}
    answer = client.completions.create(**asked)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text
    length = len(tokenizer(TEXT).input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, 20)
    assert answer.usage.total_tokens == length + 20
    assert client.completions.create(**asked).choices[0].text == answer.choices[0].text


def test_completion_stream(client, model, tokenizer):
    asked: dict[str, Any] = {"model": model, "prompt": TEXT, "max_tokens": 20, "temperature": 0, "extra_body": NO_END}
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.prompt_tokens == len(tokenizer(TEXT).input_ids)
    assert chunks[-1].usage.completion_tokens == 20
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert len(choices) > 10
    assert choices[-1].finish_reason == "length"
    assert "".join(choice.text for choice in choices) == client.completions.create(**asked).choices[0].text


def test_chat(client, model, tokenizer):
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**asked, extra_body=NO_END)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    templated = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert answer.usage.prompt_tokens == len(templated["input_ids"])
    assert answer.usage.completion_tokens == 12


def test_chat_stream(client, model):
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    asked["extra_body"] = NO_END
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 12
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[-1].finish_reason == "length"
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert "".join(choice.delta.content or "" for choice in choices) == whole


def test_keys_are_dropped_and_told_of(client, model, tokenizer):
    """A long prompt: what was kept of it rides on the response, in vLLM's field for its connector's words."""
    text = (TEXT * 20)[: LONGEST // 2]
    answer = client.completions.create(model=model, prompt=text, max_tokens=10, temperature=0, extra_body=NO_END)
    told = answer.model_extra["kv_transfer_params"]["vllm_prune"]
    # vLLM asks for these words before it hands over the last step's report: they are of the step before.
    assert told["tokens"] == answer.usage.total_tokens - 2
    assert told["keys_dropped"] > 0
    assert 0 < told["kept_fraction"] < 1
    assert told["kept_fraction"] == pytest.approx(told["keys_held"] / (told["keys_held"] + told["keys_dropped"]))


def test_too_long_a_prompt_is_the_clients_error(client, model):
    with pytest.raises(BadRequestError, match="maximum context length"):
        client.completions.create(model=model, prompt=TEXT * 100, max_tokens=5)


def test_many_at_once(client, model, server):
    """More requests than the pool may want to hold, of all lengths, streamed and not."""
    before = server.metric("vllm:generation_tokens_total")

    def ask(index: int) -> int:
        asked: dict[str, Any] = {
            "model": model, "prompt": TEXT * (index % 3) + "x" * index, "max_tokens": 5 + 3 * index, "extra_body": NO_END,
            "seed": index,
        }  # fmt: skip
        if index % 2 == 0:
            return client.completions.create(**asked).usage.completion_tokens
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        return chunks[-1].usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(1, 25))) == [5 + 3 * index for index in range(1, 25)]
    assert server.metric("vllm:generation_tokens_total") - before == sum(5 + 3 * index for index in range(1, 25))


def test_metrics(server, model):
    for name in ("vllm:prompt_tokens_total", "vllm:request_success_total", "vllm:e2e_request_latency_seconds_count"):
        assert server.metric(name) > 0
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def completion(client, model, asked: dict[str, Any] | None = None, **more: Any) -> Any:
    body = NO_END if asked is None else {**NO_END, "vllm_xargs": asked}
    asked_for = {"prompt": TEXT * 3, "max_tokens": 12, "temperature": 0, **more}
    return client.completions.create(model=model, extra_body=body, **asked_for)


def test_two_strengths_at_once_give_what_each_gives_alone(client, model):
    wishes: list[dict[str, Any] | None] = [None, {"prune.off": True}, {"prune.strength": 3.0}, {"prune.strength": 0.5}]
    alone = [completion(client, model, wish) for wish in wishes]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: completion(client, model, wishes[i % 4]), range(8)))
    for i, answer in enumerate(together):
        assert answer.choices[0].text == alone[i % 4].choices[0].text
    said = [answer.model_extra["kv_transfer_params"]["vllm_prune"] for answer in alone]
    assert [told["strength"] for told in said] == [said[0]["strength"], 0.0, 3.0, 0.5]
    assert said[1]["keys_dropped"] == 0 and said[1]["kept_fraction_least_layer"] == 1.0
    assert said[2]["keys_dropped"] > said[3]["keys_dropped"] > 0
    for told in said:
        assert told["kept_fraction_least_layer"] <= told["kept_fraction"]
        block = told["kv_bytes_held"] // told["blocks_held"]
        assert told["kv_bytes_saved"] == (told["blocks_dense"] - told["blocks_held"]) * block


def test_strength_of_a_chat(client, model):
    def ask(wish: dict[str, Any]) -> Any:
        return client.chat.completions.create(
            model=model, messages=MESSAGES, max_completion_tokens=4, extra_body={**NO_END, "vllm_xargs": wish}
        )

    assert ask({"prune.strength": 2}).model_extra["kv_transfer_params"]["vllm_prune"]["strength"] == 2.0


def test_a_chat_keeps_its_system_message(client, model):
    """Without being asked to; a request can protect something else, or nothing."""

    def protected(wish: dict[str, Any] | None) -> int:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "system", "content": TEXT}, *MESSAGES], max_completion_tokens=4,
            extra_body={**NO_END, **({} if wish is None else {"vllm_xargs": wish})},
        )  # fmt: skip
        return answer.model_extra["kv_transfer_params"]["vllm_prune"]["tokens_protected"]

    usual, second, nothing = (protected(w) for w in (None, {"prune.protect": "message:1"}, {"prune.protect": "none"}))
    assert usual > 20 and second > 20 and usual != second and nothing == 0
    assert protected({"prune.protect": "2:12"}) == 10


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prune.strength": -1}, "must lie in 0..16"),
        ({"prune.strength": "much"}, "must be a number"),
        ({"prune.off": 2}, "must be true or false"),
        ({"prune.keep": 1.5}, "must lie in 0..1"),
        ({"prune.power": 1}, "is unknown"),
        ({"prune.map": True}, "is switched off"),
        ({"prune.protect": "sytem"}, "has the word"),
    ],
)
def test_a_wrong_wish_is_the_clients_error(client, model, asked, said):
    (field,) = asked
    with pytest.raises(BadRequestError) as caught:
        completion(client, model, asked)
    assert said in str(caught.value) and field in str(caught.value)
    assert caught.value.body["param"] == field


def test_a_map_where_there_are_none(server, tmp_path):
    """Its endpoint comes only where it is named."""
    (tmp_path / "prompt.txt").write_text(TEXT)
    files = ["--prompt-file", str(tmp_path / "prompt.txt"), "--out", str(tmp_path / "map.html")]
    command = [sys.executable, "-m", "vllm_prune.cli", "map", "--url", server.url, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "VLLM_PLUGINS=vllm_prune" in done.stderr.replace("\n", " ")


def test_metrics_of_ours(client, model, server):
    dropped, kept = server.metric("vllm_prune:keys_dropped_total"), server.metric("vllm_prune:kept_fraction_count")
    told = completion(client, model, prompt="Never asked before. " + TEXT * 3).model_extra["kv_transfer_params"][
        "vllm_prune"
    ]
    assert server.metric("vllm_prune:keys_dropped_total") - dropped >= told["keys_dropped"]
    assert server.metric("vllm_prune:kept_fraction_count") - kept == len(LAYERS)
    assert server.metric("vllm_prune:keys_computed_total") > server.metric("vllm_prune:keys_dropped_total")
    for name in SECONDS:
        assert server.metric(f"vllm_prune:{name}_seconds_total") > 0
    for name in GAUGES:
        stays = name in ("strength_share", "snapshots", "snapshot_bytes")
        assert (server.metric(f"vllm_prune:{name}") > 0) == stays, "nothing runs"


def test_a_prefix_that_is_held(client, model, server):
    """The second time a prompt starts from a snapshot, says the same of itself, and vLLM's own figures show it."""
    names = ("vllm:prefix_cache_hits_total", "vllm:external_prefix_cache_hits_total", "vllm_prune:keys_dropped_total")
    first, *_ = completion(client, model, prompt="Held. " + TEXT * 4), completion(client, model)
    before = [server.metric(name) for name in names]
    again = completion(client, model, prompt="Held. " + TEXT * 4)
    hits, external, dropped = (server.metric(name) - value for name, value in zip(names, before, strict=True))
    assert again.choices[0].text == first.choices[0].text
    said, told = (answer.model_extra["kv_transfer_params"]["vllm_prune"] for answer in (again, first))
    assert said["keys_dropped"] == told["keys_dropped"] > dropped and said["kept_pairs"] == told["kept_pairs"]
    assert hits == external == (again.usage.prompt_tokens - 1) // 32 * 32 > 0


def test_the_dashboard_asks_for_series_that_exist(server):
    board = json.loads((Path(__file__).parents[2] / "examples/grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    names = {name for query in queries for name in re.findall(r"vllm(?:_prune)?:\w+", query)}
    found = set(re.findall(r"^(vllm(?:_prune)?:\w+)", server.get("/metrics").text, re.M))
    assert len(queries) >= 8 and names <= found, names - found


def test_client_that_hangs_up(server, client, model):
    """In the middle of a stream. Its request ends, its blocks come back, and the server goes on."""
    ended = server.metric("vllm:request_success_total")
    body = {"model": model, "prompt": TEXT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        assert sum(1 for line in (next(lines) for _ in range(8)) if line.startswith("data: ")) >= 3
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") > 0 and time.monotonic() < end:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.get("/health").status_code == 200
    answer = client.completions.create(model=model, prompt=TEXT, max_tokens=10, extra_body=NO_END)
    assert answer.usage.completion_tokens == 10
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    # Told apart from one that was served to its end: 400 tokens were not counted.
    assert server.metric("vllm:request_success_total") - ended <= 2


def configure(folder: Path, plugins: str) -> subprocess.CompletedProcess[str]:
    """Only the configuration is made: unknown architectures are found there."""
    code = f"from vllm.engine.arg_utils import EngineArgs; EngineArgs(model={str(folder)!r}).create_engine_config()"
    env = user_environment(VLLM_PLUGINS=plugins)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


def test_without_the_plugin_the_folder_is_not_served(folder):
    """Never silently without its gates: stock vLLM does not know the architecture."""
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    done = configure(folder, plugins="")
    assert done.returncode != 0
    assert f"Model architectures ['{architecture}'] are not supported" in done.stderr


def test_with_the_plugin_alone_it_is(folder):
    done = configure(folder, plugins="vllm_prune")
    assert done.returncode == 0, done.stderr[-3000:]


def test_sigterm_ends_it(server):
    """Comes last: the engine and the worker go with it."""
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert len(family) >= 3
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    with pytest.raises(httpx.HTTPError):
        server.get("/health")
