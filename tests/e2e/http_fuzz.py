"""Random bodies for our own route, and for vLLM's with our fields in them: an answer, or an error of the client's that says what
is wrong; and afterwards the server is as it was."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
from fuzz import NUMBERS, SCALARS, TEXTS, damaged, json_values
from hypothesis import strategies as st
from test_serve import MESSAGES, TEXT, Server

from vllm_prune.live_map import PATH
from vllm_prune.requests import FIELDS

SECONDS = 60.0
"""That an answer may take on a loaded machine."""
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
GOOD_MAP: dict[str, Any] = {"prompt": TEXT, "max_tokens": 4, "model": "mapped", "strength": 0.7}
GOOD_CHAT: dict[str, Any] = {
    "model": "mapped", "messages": MESSAGES, "max_completion_tokens": 3, "temperature": 0, "ignore_eos": True,
    "vllm_xargs": {"prune.strength": 1.3, "prune.map": True, "prune.protect": "system,0:4"},
}  # fmt: skip
IDS = st.lists(
    st.one_of(st.integers(-2, 520), st.sampled_from([2**31, 2**63, 2**64, -(2**63), True, 1.0, "7", None])), max_size=4
)
MAPS = st.one_of(
    damaged(GOOD_MAP, st.one_of(st.sampled_from([*GOOD_MAP, "map", "n"]), TEXTS)),
    json_values(),
    st.builds(lambda prompt: {**GOOD_MAP, "prompt": prompt}, IDS | TEXTS),
    st.builds(lambda name, value: {**GOOD_MAP, name: value}, st.sampled_from(["max_tokens", "strength"]), NUMBERS),
)
WORDS = st.sampled_from(
    ["none", "system", "0:2", "message:0", "9:1", "system,none", "0:1," * 999 + "0:1", "0:1," * 1000 + "0:1"]
)
VALUES = st.one_of(SCALARS, WORDS, st.lists(SCALARS, max_size=2), st.dictionaries(TEXTS, SCALARS, max_size=1))
WISHES = st.dictionaries(
    st.one_of(st.sampled_from(FIELDS), st.builds("prune.{}".format, TEXTS)), VALUES, min_size=1, max_size=2
)
NINES, DEEP = b"9" * 5000, b"[" * 5000 + b"]" * 5000
RAW = {
    "digits of a strength": b'{"prompt": "x", "strength": ' + NINES + b"}",
    "digits of max_tokens": b'{"prompt": "x", "max_tokens": ' + NINES + b"}",
    "tokens beyond 64 bits": b'{"prompt": "x", "max_tokens": 18446744073709551616}',
    "nan": b'{"prompt": "x", "strength": NaN}',
    "infinity": b'{"prompt": "x", "strength": -Infinity}',
    "nothing": b"",
    "no json": b"{",
    "deep": b'{"prompt": ' + b"[" * 100_000,
    "deep and whole": b'{"prompt": ' + DEEP + b"}",
    "not utf-8": b'{"prompt": "\xff"}',
    "twice": b'{"prompt": "x", "prompt": [], "max_tokens": 2}',
    "surrogate": b'{"prompt": "\\ud800", "max_tokens": 2}',
    "null byte": b'{"prompt": "\\u0000", "max_tokens": 2}',
    "a list": b"[]",
    "a number": b"7",
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "long": b'{"prompt": "' + b"a " * 200_000 + b'"}',
}
RAW_WISHES = {
    "digits of a strength": b'{"prune.strength": ' + NINES + b"}",
    "number beyond floats": b'{"prune.strength": ' + NINES[:400] + b"}",
    "minus": b'{"prune.keep": -' + NINES[:400] + b"}",
    "nan": b'{"prune.strength": NaN}',
    "infinity": b'{"prune.keep": Infinity}',
    "flag": b'{"prune.off": ' + NINES[:400] + b"}",
    "text": b'{"prune.strength": "1"}',
    "deep": b'{"prune.protect": ' + DEEP + b"}",
    "surrogate": b'{"prune.protect": "\\ud800"}',
    "surrogate name": b'{"prune.\\ud800": 1}',
    "many words": b'{"prune.protect": "' + b"0:1," * 100_000 + b'0:1"}',
}


def content(body: Any) -> bytes:
    """As Python's JSON writes it: NaN, infinities and lone surrogates too."""
    return json.dumps(body).encode()


def post(server: Server, path: str, body: bytes, key: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return httpx.post(server.url + path, content=body, headers=headers, timeout=SECONDS)


def check(response: httpx.Response, *names: str) -> bool:
    """Whether it was answered. Else it is an error of the client's, of a readable length, with one of ``names`` in it."""
    if response.status_code == 200:
        return True
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:500])
    said = response.json()
    message = said["error"]["message"] if "error" in said else said["detail"]
    assert message and len(message) < 10_000
    assert not names or any(name in message for name in names), (names, message[:500])
    return False


def facts(server: Server, key: str) -> tuple[Any, ...]:
    """What good requests are answered, and that nothing runs or holds a block after them."""
    told = post(server, PATH, content(GOOD_MAP), key).raise_for_status().json()
    said = post(server, CHAT, content(GOOD_CHAT), key).raise_for_status().json()
    end = time.monotonic() + SECONDS
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") > 0:
        assert time.monotonic() < end, "a request is still running"
        time.sleep(0.1)
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.metric("vllm_prune:held_blocks") == 0
    return told["text"], told["map"], said["choices"][0]["message"]["content"], said["kv_transfer_params"]
