"""What other programs hand us: a server's map, a Ray Serve file, server options. Read right, or refused by name."""

from __future__ import annotations

import base64
import json
import resource
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fuzz import TEXTS, damaged, deep, examples, json_values, refused_or_fine
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER
from vllm_prune.lifetimes import pack, unpack
from vllm_prune.live_map import draw, page_of
from vllm_prune.ray.arguments import serve_arguments
from vllm_prune.ray.config import RayServeConfig, parse_config

# A server's map -----------------------------------------------------------------------------------------------------

EXPIRY = np.asarray([[[1, NEVER, NEVER]], [[2, 2, NEVER]]])
GOOD = {
    "model": "m", "text": ["a", "</script>", "c"], "strength": 1.0, "blocks_peak": 2, "blocks_dense": 3,
    "map": pack(EXPIRY, 2, "by_query"),
}  # fmt: skip
BOMB = base64.b64encode(zlib.compress(bytes(2**28), 9)).decode()
NAMES = st.one_of(st.sampled_from([*GOOD, *GOOD["map"], "refused"]), TEXTS)
SIZES = st.sampled_from([0, 1, 2, 3, -1, 2**16, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400, 1.5, True, "3", None])


def with_map(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "map": {**GOOD["map"], **changes}}


ANSWERS = st.one_of(
    damaged(GOOD, NAMES),
    st.builds(lambda a, b, c, p: with_map(layers=a, units=b, tokens=c, prompt_tokens=p), SIZES, SIZES, SIZES, SIZES),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6).map(
        lambda x: with_map(expiry=base64.b64encode(zlib.compress(np.asarray(x, "<i4").tobytes())).decode())
    ),
    st.binary(max_size=40).map(lambda raw: with_map(expiry=base64.b64encode(raw).decode())),
)


@examples(400)
@given(ANSWERS)
@example(with_map(layers=2**32, units=2**32, expiry=BOMB))
@example(with_map(expiry=BOMB))
@example({**GOOD, "strength": 10**400})
@example({**GOOD, "text": ["\ud800", "b", "c"]})
def test_any_answer_is_a_page_or_refused(answer: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused_or_fine("map", "server", "figures"):
        if not (isinstance(answer, dict) and isinstance(answer.get("map"), dict)):
            return  # what ``ask`` returns has a map
        page = page_of(answer)
        page.encode("utf-8")
        data = page.partition('id="data">')[2].partition("</script>")[0]
        found = json.loads(data)
        life = np.asarray(found["life"])
        assert life.shape == (len(found["units"]), len(found["tokens"]))
        assert ((life >= -1) & (life <= len(found["tokens"]))).all(), "no key lives less than not at all"
        assert 0 <= found["prompt"] <= len(found["tokens"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


def test_the_good_answer_is_read_right() -> None:
    np.testing.assert_array_equal(unpack(GOOD["map"]), EXPIRY)
    assert "forgot of one request" in page_of(GOOD)


RAW: dict[str, bytes] = {
    "no json": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    "nothing": b"",
    "no http": b"\x00\x01\x02\r\n\r\n",
    "half": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{",
    "half of an error": b"HTTP/1.1 500 Oops\r\nContent-Length: 999\r\n\r\n{",
    "status": b"HTTP/1.1 abc\r\n\r\n",
    "long line": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n{}",
    "deep": b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000,
    "deep error": b"HTTP/1.1 400 Bad\r\n\r\n" + b"[" * 200_000,
    "not utf-8": b"HTTP/1.1 200 OK\r\n\r\n\xff\xfe{",
    "elsewhere": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
    "round": b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "a list": b"HTTP/1.1 200 OK\r\n\r\n[]",
}  # fmt: skip


@contextmanager
def saying(raw: bytes, heard: list[str] | None = None) -> Iterator[str]:
    """A server whose every answer is these bytes. ``heard``: gets a line for each request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(raw)
            self.close_connection = True

        do_GET = lambda self: self.wfile.write(raw)  # noqa: E731

        def log_message(self, *args: Any) -> None:
            return

        def parse_request(self) -> bool:
            if heard is not None:
                heard.append(str(self.raw_requestline))
            return super().parse_request()

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("case", RAW)
def test_whatever_a_server_sends(case: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("x")
    with saying(RAW[case]) as url, pytest.raises(PruneError, match=r"server|answer"):
        draw(url, tmp_path / "prompt.txt", tmp_path / "map.html", {})
    assert not (tmp_path / "map.html").exists()


URLS = [
    "http://",
    "http://a b",
    "http://[::1",
    "http://127.0.0.1:99999",
    "file:///etc/passwd",
    "http://a\0b",
    "http://ñ.\ud800",
]


@pytest.mark.parametrize("url", URLS, ids=range(len(URLS)))
def test_urls_that_are_none(url: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("x")
    with pytest.raises(PruneError, match=r"URL|answer"):
        draw(url, tmp_path / "prompt.txt", tmp_path / "map.html", {})


def test_prompt_and_key_stay_with_the_server_that_was_asked(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("x")
    heard: list[str] = []
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(GOOD).encode()
    with saying(answer, heard) as elsewhere:
        for status in (301, 302, 303, 307, 308):
            raw = f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere}/v1/prune/map\r\n\r\n".encode()
            with saying(raw) as url, pytest.raises(PruneError, match=f"HTTP {status}"):
                draw(url, tmp_path / "prompt.txt", tmp_path / "map.html", {}, "key")
        assert heard == []
        draw(elsewhere, tmp_path / "prompt.txt", tmp_path / "map.html", {}, "key")
        assert len(heard) == 1, "the control"


def test_a_server_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than an answer can have is read."""
    from vllm_prune import live_map

    monkeypatch.setattr(live_map, "MOST_BYTES", 10_000)
    (tmp_path / "prompt.txt").write_text("x")
    raw = b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps({**GOOD, "more": "a" * 20_000}).encode()
    with saying(raw) as url, pytest.raises(PruneError, match=r"more than 10,000 bytes"):
        draw(url, tmp_path / "prompt.txt", tmp_path / "map.html", {})


# A Ray Serve file ---------------------------------------------------------------------------------------------------

ARGS = {
    "model": "m", "engine": {"max_model_len": 64, "additional_config": {"vllm_prune": {"strength": 1}}}, "min_replicas": 1,
    "max_replicas": 2, "target_free_kv": 0.1, "upscale_delay_s": 1.0, "env": {"A": "b"}, "gpus_per_rank": 0,
}  # fmt: skip
FIELDS = st.one_of(st.sampled_from([*RayServeConfig.model_fields, "port", "max-model-len", "--model"]), TEXTS)


@examples(300)
@given(st.one_of(damaged(ARGS, FIELDS), st.dictionaries(FIELDS, json_values(FIELDS), max_size=4), json_values()))
@example({"model": "m" * 5000})
@example({**ARGS, "upscale_delay_s": float("inf")})
@example({**ARGS, "engine": {"a": deep(5000)}})
def test_any_ray_serve_args(args: Any) -> None:
    with refused_or_fine("args"):
        config = parse_config(args)
        assert config.max_replicas >= config.min_replicas >= 1
        for name, value in config:
            if isinstance(value, float):
                assert np.isfinite(value), name
        assert config.place and config.served_model_name


ENGINE = {
    "max_model_len": 64,
    "enforce_eager": True,
    "served_model_name": ["a"],
    "additional_config": {"vllm_prune": {}},
}


@examples(40)
@given(damaged(ENGINE, st.one_of(st.sampled_from([*ENGINE, "dtype", "seed", "config", "help", "version"]), TEXTS)))
@example({"help": True})
@example({"help": ["all"]})
@example({"help": "dtype"})
@example({"version": True})
@example({"hel": True})
@example({"additional_config": {"a": deep(5000)}})
@example({"additional_config": "[" * 200_000})
@example({"max_model_len": 10**5000})
@example({"por": 7})
@example({"max model len": "--config=/etc/passwd"})
@example({"served_model_name": ["--config", "/etc/passwd"]})
def test_any_engine_options(engine: Any) -> None:
    """Read by vLLM's own parser, which must not end the replica's process instead of refusing."""
    import vllm.entrypoints.launchers.cli_args  # noqa: F401 (takes longer than any input may)

    with refused_or_fine("engine options", "args"):
        config = parse_config({"model": "m", "engine": engine})
        found = serve_arguments(config.engine)
        assert (found.port, found.host, found.config, found.tensor_parallel_size) == (8000, None, None, 1), (
            "given elsewhere"
        )


# Server options -----------------------------------------------------------------------------------------------------

OPTIONS = {
    "strength": 1.0, "record": False, "floor": 0.2, "pressure": {"start": 0.5, "full": 0.9, "slack": 0.05}, "protect": "system",
    "maps": True,
}  # fmt: skip


@examples(300)
@given(st.one_of(damaged(OPTIONS, st.one_of(st.sampled_from([*OPTIONS, "keep"]), TEXTS)), json_values()))
@example({"strength": 10**400})
@example({"strength": 10**5000})
@example({"floor": 10**400})
def test_any_server_options(options: Any) -> None:
    from vllm_prune.models.hook import options_of

    with refused_or_fine("additional_config.vllm_prune"):
        found = options_of(SimpleNamespace(additional_config={"vllm_prune": options}))
        assert 0 <= found.get("strength", 1) <= 16 and 0 < found.get("floor", 1) <= 1
