"""`vllm serve FOLDER` on several workers, asked with the openai client: two engines behind one address, two
ranks of one engine."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI
from support import save_gated, tiny_config
from test_serve import NO_END, TEXT, Server, save_tokenizer, serving

pytestmark = pytest.mark.slow

PROMPTS = [TEXT * 3, TEXT * 2, "Forgotten: " + TEXT * 4]
SAME = ("keys_dropped", "keys_held", "kept_pairs")
"""Of what rides on an answer, what does not hang on who computed it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = save_gated(tmp_path_factory.mktemp("gated"), tiny_config("qwen3"), "dcp", beta=3.6)
    save_tokenizer(made)
    return made


def ask(server: Server, folder: Path, prompt: str) -> tuple[str, dict]:
    """Text, and what is told of the request."""
    client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
    said = client.completions.create(model=str(folder), prompt=prompt, max_tokens=24, temperature=0, extra_body=NO_END)
    return said.choices[0].text, said.model_extra["kv_transfer_params"]["vllm_prune"]  # type: ignore[index]


def by_engine(server: Server, name: str) -> dict[str, float]:
    """A series of ours, by the engine it is of."""
    lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    return {re.search(r'engine="(\d+)"', line)[1]: float(line.rpartition(" ")[2]) for line in lines}  # type: ignore[index]


def all_free(server: Server, folder: Path) -> bool:
    ask(server, folder, "one more step, which tells what ended")
    return sum(by_engine(server, "vllm:kv_cache_usage_perc").values()) == 0.0


@pytest.fixture(scope="module")
def of_two_engines(folder, tmp_path_factory) -> list[tuple[str, dict]]:
    """Answers to ``PROMPTS`` of two engines. Both serve, drop and count; the same question has the same answer and the same
    drops, whoever is asked. A server option (here: strength by pressure, of a pool that is never roomy) reaches both."""
    config = json.dumps({"vllm_prune": {"pressure": {"start": 0.0, "full": 1e-6}}})
    options = ("--data-parallel-size", "2", "--dtype", "float32", "--additional-config", config)
    with serving(folder, tmp_path_factory.mktemp("log") / "server.log", *options) as server:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda prompt: ask(server, folder, prompt), PROMPTS * 4))
        dropped = by_engine(server, "vllm_prune:keys_dropped_total")
        assert set(dropped) == {"0", "1"} and min(dropped.values()) > 0, dropped
        assert all_free(server, folder)
    for at, (text, told) in enumerate(found):
        first = found[at % len(PROMPTS)]
        assert text == first[0] and {key: told[key] for key in SAME} == {key: first[1][key] for key in SAME}
        assert told["strength_applied"] == {"least": 1.0, "mean": 1.0, "most": 1.0}
    return found[: len(PROMPTS)]


def test_two_engines(of_two_engines):
    assert all(told["keys_dropped"] > 0 for _, told in of_two_engines)


def test_two_ranks(folder, of_two_engines, tmp_path):
    """`--tensor-parallel-size 2`: the answers and the drops of one rank, and blocks of both counted."""
    options = ("--tensor-parallel-size", "2", "--dtype", "float32")
    with serving(folder, tmp_path / "server.log", *options) as server:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda prompt: ask(server, folder, prompt), PROMPTS))
        assert all_free(server, folder)
    for (text, told), (other, before) in zip(found, of_two_engines, strict=True):
        assert text == other and told["strength"] == before["strength"]
        assert {key: told[key] for key in SAME} == {key: pytest.approx(before[key]) for key in SAME}
        assert told["kv_bytes_held"] / told["blocks_held"] == before["kv_bytes_held"] / before["blocks_held"]
