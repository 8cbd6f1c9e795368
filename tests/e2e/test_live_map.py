"""The eviction map of a running server: in its answers, by ``POST /v1/prune/map``, by ``vllm-prune map``, in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import http_fuzz
import httpx
import numpy as np
import pytest
import schemathesis
import torch
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from openai import BadRequestError, OpenAI
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from support import VOCAB, save_gated, tiny_config
from test_serve import TEXT, Server, serving
from transformers import AutoTokenizer
from vllm_prune_training.masked import load_gated
from vllm_prune_training.tokenizer import train_tokenizer

from vllm_prune.gates import NEVER
from vllm_prune.lifetimes import unpack
from vllm_prune.live_map import PATH
from vllm_prune.requests import FIELDS

pytestmark = pytest.mark.slow

KEY = "some-key"
PROMPT = TEXT * 3 + "</script><b>\nä\n"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """float32, so that server and twin decide alike; two decisions a layer."""
    config = tiny_config("qwen3", layers=3)
    made = save_gated(tmp_path_factory.mktemp("mapped"), config, "dcp", torch.float32, beta=3.6, scope="kv_head")
    train_tokenizer([TEXT], VOCAB).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    assert entry_points(group="vllm.endpoint_plugins", name="vllm_prune"), (
        "installed without its endpoint: pip install -e ."
    )
    options = ["--dtype", "float32", "--api-key", KEY, "--served-model-name", "mapped",
               "--additional-config", '{"vllm_prune": {"maps": true}}']  # fmt: skip
    with serving(folder, tmp_path_factory.mktemp("log") / "server.log", *options, VLLM_PLUGINS="vllm_prune") as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=120)


def twin(folder: Path, ids: list[int], prompt: int, strength: float | None = None) -> np.ndarray:
    """Hard expiries [L, E, T] of the masked Hugging Face twin, NEVER where the last query sees the key."""
    with torch.no_grad():
        found = load_gated(folder)(torch.tensor(ids), mode="hard", prompt=prompt, strength=strength).expiry.numpy()
    return np.where(found < len(ids), found, NEVER)


def test_the_answer_of_a_completion(client, folder):
    asked = {"vllm_xargs": {"prune.map": True, "prune.strength": 0.7}, "ignore_eos": True, "return_token_ids": True}
    for tokens in (2, 25):
        answer = client.completions.create(
            model="mapped", prompt=PROMPT, max_tokens=tokens, temperature=0, extra_body=asked
        )
        told = answer.model_extra["kv_transfer_params"]["vllm_prune"]
        prompt = answer.choices[0].model_extra["prompt_token_ids"]
        ids = [*prompt, *answer.choices[0].model_extra["token_ids"]][: told["tokens"]]
        assert len(ids) == told["tokens"] == len(prompt) + tokens - 2
        want = twin(folder, ids, len(prompt), 0.7)
        np.testing.assert_array_equal(unpack(told["map"]), want)
        assert want.shape == (3, 2, len(ids)) and 0.05 < (want != NEVER).mean() < 0.95


def test_who_does_not_ask_is_not_told(client):
    answer = client.completions.create(model="mapped", prompt=PROMPT, max_tokens=4, temperature=0)
    assert "map" not in answer.model_extra["kv_transfer_params"]["vllm_prune"]


def test_several_sequences_are_the_clients_error(client):
    with pytest.raises(BadRequestError, match="maps one sequence"):
        client.completions.create(
            model="mapped", prompt=PROMPT, max_tokens=4, n=2, extra_body={"vllm_xargs": {"prune.map": 1}}
        )


def post(server: Server, body: Any, key: str = KEY) -> httpx.Response:
    return httpx.post(server.url + "/v1/prune/map", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120)


def test_the_endpoint(server, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT).input_ids
    for one in (PROMPT, prompt):
        answer = post(server, {"prompt": one, "max_tokens": 20, "model": "mapped"}).raise_for_status().json()
        assert answer["map"]["prompt_tokens"] == len(prompt) and answer["model"] == "mapped"
        text = answer["text"]
        assert "".join(text[: len(prompt)]) == "<|bos|>" + PROMPT
        assert len(prompt) <= len(text) == answer["tokens"] <= len(prompt) + 18  # it may end its text before
        expiry = unpack(answer["map"])
        np.testing.assert_array_equal(expiry[..., : len(prompt)] <= len(prompt) - 1, twin(folder, prompt, 0) != NEVER)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"prompt": "x", "max_tokens": 1}, 400, "max_tokens"),
        ({"prompt": "x", "strength": 17}, 400, "prune.strength must lie in 0..16"),
        ({"prompt": "x", "power": 1}, 400, "power"),
        ({"prompt": [10**7]}, 400, "out of vocabulary"),
        ({"prompt": TEXT * 100}, 400, "maximum context length"),
        ({"prompt": list(range(5, 505)) + [7] * 11}, 400, "ended with its first token"),
        ({"prompt": "x", "model": "another"}, 404, "does not exist"),
        ({}, 400, "prompt"),
    ],
)
def test_a_wrong_wish_is_the_clients_error(server, body, status, said):
    answer = post(server, body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]


def test_nobody_without_the_key(server):
    assert post(server, {"prompt": "x"}, key="other").status_code == 401


# Random bodies -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(server) -> Iterator[Any]:
    """What good requests are answered: the same before all bad ones and after them, with nothing left behind."""
    before = http_fuzz.facts(server, KEY)
    yield before
    assert http_fuzz.facts(server, KEY) == before


@examples(40, 1000)
@given(body=http_fuzz.MAPS)
def test_any_body_of_our_route(server, answers, body):
    response = http_fuzz.post(server, PATH, http_fuzz.content(body), KEY)
    if http_fuzz.check(response):
        assert unpack(response.json()["map"]).shape[:2] == (3, 2)


@examples(40, 1000)
@given(wishes=http_fuzz.WISHES, chat=st.booleans())
def test_any_wish(server, answers, wishes, chat):
    """An error names a field that was sent, or the place of a value that no field may have."""
    good = http_fuzz.GOOD_CHAT if chat else {"model": "mapped", "prompt": TEXT, "max_tokens": 2}
    path = http_fuzz.CHAT if chat else http_fuzz.COMPLETION
    response = http_fuzz.post(server, path, http_fuzz.content({**good, "vllm_xargs": wishes}), KEY)
    if not http_fuzz.check(response, *wishes, "vllm_xargs", "extra_args", "surrogates"):
        return
    assert set(wishes) <= set(FIELDS)


@pytest.mark.parametrize("case", http_fuzz.RAW)
def test_bodies_that_are_none(server, answers, case):
    http_fuzz.check(http_fuzz.post(server, PATH, http_fuzz.RAW[case], KEY))


@pytest.mark.parametrize("case", http_fuzz.RAW_WISHES)
def test_wishes_that_are_none(server, answers, case):
    body = http_fuzz.content({**http_fuzz.GOOD_CHAT, "vllm_xargs": "HERE"})
    assert not http_fuzz.check(
        http_fuzz.post(server, http_fuzz.CHAT, body.replace(b'"HERE"', http_fuzz.RAW_WISHES[case]), KEY)
    )


@pytest.fixture(scope="module")
def route(server) -> Any:
    """Our route as the server's own OpenAPI schema has it."""
    schema = server.get("/openapi.json").raise_for_status().json()
    return schemathesis.openapi.from_dict(schema)[PATH]["POST"]


@pytest.mark.parametrize("mode", [*GenerationMode])
def test_what_the_schema_allows_and_forbids(server, answers, route, mode):
    """Bodies and headers that Schemathesis makes of the schema, right and wrong ones: no answer is the server's error."""

    @examples(15, 1000)
    @given(case=route.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=http_fuzz.SECONDS)
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=[not_a_server_error])

    run()


def command(server: Server, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    given = ["map", "--url", server.url, "--prompt-file", str(folder / "prompt.txt"), "--out", str(folder / "map.html")]
    env = {**os.environ, "VLLM_API_KEY": KEY}
    return subprocess.run([sys.executable, "-m", "vllm_prune.cli", *given, *more], env=env, capture_output=True, text=True,
                          check=False, timeout=120)  # fmt: skip


@pytest.fixture(scope="module")
def page(server, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page")
    done = command(server, out, "--max-tokens", "30")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ tokens, 3 layers, \d+\.\d % of the keys held at the end", done.stdout.replace("\n", " "))
    return out / "map.html"


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_the_page(page, server):
    data = data_of(page)
    answer = post(server, {"prompt": PROMPT, "max_tokens": 30}).json()
    expiry = unpack(answer["map"])
    life = np.where(expiry == NEVER, -1, expiry - np.arange(expiry.shape[-1])).reshape(6, -1)
    assert data["tokens"] == answer["text"] and data["life"] == life.tolist()
    assert data["units"][3] == "layer 1, head 1" and "src=" not in page.read_text().partition("<script")[0]


def test_a_wrong_key_is_told(server, tmp_path):
    done = command(server, tmp_path, "--api-key", "other")
    assert done.returncode == 2 and "HTTP 401" in done.stderr


def test_a_page_that_finds_no_room_is_told(server, tmp_path):
    done = command(server, tmp_path, "--out", "/dev/full")
    assert done.returncode == 2 and "/dev/full cannot be written: [Errno 28] No space left on device" in done.stderr


# In a browser -----------------------------------------------------------------------------------------------------------

MOVE = """<script>
const slide = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); };
slide("unit", UNIT); slide("time", TIME);
spans[TOKEN].dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
</script></body>"""


def browse(page: Path, *options: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1440,1000",
               f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=10000", *options, page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Uncaught" not in done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("unit", "share"), [(0, 0.4), (3, 0.6), (6, 0.9)])
def test_the_sliders(page, unit, share):
    """A layer and a time are chosen as by hand; every token says whether it is still held there, and then."""
    data = data_of(page)
    life = np.asarray(data["life"])
    tokens = life.shape[-1]
    time, token = int(share * tokens), int(share * tokens / 2)
    script = MOVE.replace("UNIT", str(unit)).replace("TIME", str(time)).replace("TOKEN", str(token))
    moved = page.with_name(f"moved-{unit}.html")
    moved.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    dom = browse(moved, "--dump-dom", "--enable-logging=stderr")
    classes = {int(j): name.split() for name, j in re.findall(r'<span class="([^"]*)" data-j="(\d+)"', dom)}
    classes |= {int(j): name.split() for j, name in re.findall(r'<span data-j="(\d+)"[^>]* class="([^"]*)"', dom)}
    units = data["dropping"] if unit == 0 else [unit - 1]
    seen = (life[units] < 0) | (time < np.arange(tokens) + life[units])
    past = np.arange(tokens) <= time
    gone = set(np.flatnonzero(past & ~seen.any(axis=0)).tolist())
    assert {j for j, names in classes.items() if "gone" in names} == gone
    assert gone or unit == 0, "something must be gone"
    assert {j for j, names in classes.items() if "later" in names} == set(range(time + 1, tokens))
    held = f"{100 * seen[:, past].mean():.1f} %"
    assert f'<b id="timename">{time} of {tokens - 1}: {held} of its keys are held</b>' in dom
    assert "here" in classes[token] and f"position {token}, prompt" in dom
    if unit:
        assert f'<b id="unitname">{data["units"][unit - 1]}</b>' in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_screenshot_is_a_picture(page):
    path = page.with_name("map.png")
    browse(page, f"--screenshot={path}")
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    colours = np.unique((pixels * 255).astype(np.uint8).reshape(-1, 3), axis=0)
    assert pixels.shape[:2] == (1000, 1440) and len(colours) > 200
