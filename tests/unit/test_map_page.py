"""``vllm-prune map`` against made-up servers: what it sends, what it writes, and how it says that something is wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_prune.cli import app
from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER
from vllm_prune.lifetimes import pack
from vllm_prune.live_map import PATH, ask, map_of, page_of

EXPIRY = np.asarray([[[1, 3, NEVER, NEVER], [NEVER] * 4]])
ANSWER: dict[str, Any] = {
    "model": "models/some-model", "text": ["</script><b>", "\n", "x", "y"], "strength": 0.5, "tokens": 4, "blocks_peak": 3,
    "blocks_dense": 4, "map": pack(EXPIRY, 3, "by_query"),
}  # fmt: skip


class Server(HTTPServer):
    """Answers every request alike and remembers them."""

    status: int = 200
    body: bytes = b""
    asked: list[tuple[str, dict[str, str], Any]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((self.path, dict(self.headers), sent))
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write(server.body)

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    made.body = json.dumps(ANSWER).encode()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def command(server_url: str, folder: Path, *more: str) -> Any:
    (folder / "prompt.txt").write_text("What? ü\n", encoding="utf-8")
    given = [
        "map",
        "--url",
        server_url,
        "--prompt-file",
        str(folder / "prompt.txt"),
        "--out",
        str(folder / "a" / "map.html"),
    ]
    return CliRunner(env={"VLLM_API_KEY": None}).invoke(app, [*given, *more])


def test_the_page_is_written_and_says_what_was_asked(server, tmp_path):
    done = command(
        server.url + "/v1/", tmp_path, "--max-tokens", "5", "--strength", "0.5", "--model", "m", "--api-key", "k"
    )
    assert done.exit_code == 0, done.output
    ((path, headers, sent),) = server.asked
    assert path == PATH and headers["Authorization"] == "Bearer k"
    assert sent == {"prompt": "What? ü\n", "model": "m", "max_tokens": 5, "strength": 0.5}
    assert "4 tokens, 1 layers, 75.0 % of the keys held at the end" in done.output
    page = (tmp_path / "a" / "map.html").read_text(encoding="utf-8")
    assert "http" not in page and page.count("</script>") == 2, "nothing is loaded, text is no markup"
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["tokens"] == ANSWER["text"] and data["prompt"] == 3
    assert data["life"] == [[1, 2, -1, -1], [-1] * 4] and data["units"] == ["layer 0, head 0", "layer 0, head 1"]
    assert data["title"] == "What some-model forgot of one request"


def test_what_is_left_out_is_not_sent(server, tmp_path):
    assert command(server.url, tmp_path).exit_code == 0
    assert server.asked[0][2] == {"prompt": "What? ü\n", "max_tokens": 32} and "Authorization" not in server.asked[0][1]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, {"detail": "Not Found"}, "has no /v1/prune/map. Start it with VLLM_PLUGINS=vllm_prune"),
        (404, {"error": {"message": "The model `m` does not exist."}}, "HTTP 404: The model `m` does not exist."),
        (400, {"error": {"message": "prune.map is switched off"}}, "HTTP 400: prune.map is switched off"),
        (401, {"error": "Unauthorized"}, "HTTP 401"),
        (500, "oops", "HTTP 500: \"oops\""),
        (200, {"some": "thing"}, "answered without a map"),
        (200, [1], "answered without a map"),
        (200, {**ANSWER, "map": {"refused": "a map of 9 keys is too large"}}, "made no map: a map of 9 keys is too large"),
        (200, {**ANSWER, "text": ["one"]}, "text does not fit"),
        (200, {**ANSWER, "strength": "1"}, "figures are not as expected"),
        (200, {name: value for name, value in ANSWER.items() if name != "blocks_peak"}, "KeyError('blocks_peak')"),
        (200, {**ANSWER, "map": {**ANSWER["map"], "layers": 7}}, "the map is damaged"),
    ],
)  # fmt: skip
def test_a_refusal_is_told_with_its_reason(server, tmp_path, status, body, said):
    server.status, server.body = status, json.dumps(body).encode()
    done = command(server.url, tmp_path)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "a").exists()


def test_nonsense_and_silence(server, tmp_path):
    server.body = b"<html>"
    with pytest.raises(PruneError, match="no answer from"):
        ask(server.url, {})
    with pytest.raises(PruneError, match=r"no answer from http://127\.0\.0\.1:9"):
        ask("http://127.0.0.1:9", {})
    with pytest.raises(PruneError, match="is none of a server"):
        ask("file:///etc/hostname", {})


def test_a_prompt_that_cannot_be_read_and_a_page_that_cannot_be_written(server, tmp_path):
    done = CliRunner().invoke(app, ["map", "--url", server.url, "--prompt-file", str(tmp_path / "none")])
    assert done.exit_code == 2 and "cannot be read" in " ".join(done.output.split()) and server.asked == []
    (tmp_path / "a").write_text("a file")
    done = command(server.url, tmp_path)
    assert done.exit_code == 2 and "cannot be written" in " ".join(done.output.split())


def test_an_answer_is_a_map():
    made = map_of(ANSWER)
    np.testing.assert_array_equal(made.expiry, EXPIRY)
    assert made.prompt_tokens == 3 and made.reveal == "by_query"
    assert "heads a layer" in page_of(ANSWER)
