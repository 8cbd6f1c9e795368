"""``vllm-prune map``: asks a running server for a request's eviction map and writes it as a page. Runs in the user's process."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from vllm_prune.demo.maps import EvictionMap, render_page
from vllm_prune.errors import PruneError, writing
from vllm_prune.json_text import parse
from vllm_prune.lifetimes import unpack

PATH = "/v1/prune/map"
MOST_BYTES = 2**28
"""Of an answer: a map of ``lifetimes.CELLS`` keys and the text of as many tokens have room."""
SAME_VERSION = "Use the same version of vllm-prune at both ends."
SWITCH_ON = """Start it with VLLM_PLUGINS=vllm_prune and --additional-config '{"vllm_prune": {"maps": true}}'."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the prompt and the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask(url: str, body: dict[str, Any], api_key: str | None = None, timeout: float = 600.0) -> dict[str, Any]:
    """The server's answer to a map request.

    Args:
        url: of the server, with or without /v1.
        body: fields of ``endpoint.MapRequest``.
        api_key: of the server.
        timeout: in seconds.

    Raises:
        PruneError: nobody answers there, the endpoint is not switched on, or the server refuses, with its reason.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise PruneError(f"the URL {url} is none of a server.", "Give one like http://127.0.0.1:8000.")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        request = urllib.request.Request(base + PATH, json.dumps(body).encode(), headers)
        with urllib.request.build_opener(_Stay).open(request, timeout=timeout) as response:
            raw = response.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        answer = parse(raw)
    except urllib.error.HTTPError as error:
        said = _message(error)
        if error.code == 404 and said == "Not Found":
            raise PruneError(f"the server at {base} has no {PATH}.", SWITCH_ON) from None
        raise PruneError(
            f"the server refused with HTTP {error.code}: {said}", "Correct the request or the server."
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise PruneError(f"no answer from {base}: {error}.", "Check the URL and the server.") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("map"), dict):
        raise PruneError(f"the server at {base} answered without a map.", SWITCH_ON)
    return answer


def _message(error: urllib.error.HTTPError) -> str:
    """Of an error in OpenAI's form or FastAPI's, or the start of whatever else came."""
    body = b""
    try:
        body = error.read(2**16)
        parsed = parse(body)
        found = parsed["error"]["message"] if "error" in parsed else parsed["detail"]
        return str(found)
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return body[:300].decode("utf-8", "replace")


def map_of(answer: dict[str, Any]) -> EvictionMap:
    """An answer as a map. Raises PruneError when it is damaged or the server refused to make one."""
    told = answer["map"]
    expiry = unpack(told)
    text, prompt = answer.get("text"), told.get("prompt_tokens")
    tokens = expiry.shape[-1]
    if not isinstance(text, list) or len(text) != tokens or not isinstance(prompt, int) or not 0 <= prompt <= tokens:
        raise PruneError("the server's text does not fit its map.", SAME_VERSION)
    if (expiry < np.arange(tokens)).any():
        raise PruneError("the server's map has keys that end before they begin.", SAME_VERSION)
    name = str(answer.get("model", "")).rstrip("/").rpartition("/")[2]
    pieces = [str(piece) for piece in text]
    return EvictionMap(pieces, expiry, prompt, str(told.get("reveal")), f"What {name} forgot of one request")


def page_of(answer: dict[str, Any]) -> str:
    """The HTML page of an answer: one file that loads nothing. Raises as ``map_of``."""
    data = map_of(answer)
    layers, units, tokens = data.expiry.shape
    try:
        facts = [
            ("strength", f"{answer['strength']:g}"), ("prompt", f"{data.prompt_tokens:,} tokens"),
            ("generated", f"{tokens - data.prompt_tokens:,}"), ("layers", str(layers)),
            *([("heads a layer", str(units))] if units > 1 else []), ("keys held at the end", f"{100 * data.kept.mean():.1f} %"),
            ("blocks at most", f"{answer['blocks_peak']:,}"), ("stock vLLM at the end", f"{answer['blocks_dense']:,}"),
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PruneError(f"the server's figures are not as expected: {error!r}.", SAME_VERSION) from None
    return render_page(data, facts)


def draw(url: str, prompt_file: Path, out: Path, wishes: dict[str, Any], api_key: str | None = None) -> EvictionMap:
    """All of the command.

    Args:
        url, api_key: of the server.
        prompt_file: UTF-8 text, sent as it is.
        out: page to write.
        wishes: further fields of ``endpoint.MapRequest``.

    Returns:
        The map.

    Raises:
        PruneError: the file cannot be read or written, and as ``ask`` and ``map_of``.
    """
    try:
        prompt = prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PruneError(f"the prompt {prompt_file} cannot be read: {error}.", "Name a UTF-8 text file.") from None
    answer = ask(url, {"prompt": prompt, **wishes}, api_key)
    page = page_of(answer)
    with writing(out, "Name another file with --out."):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    return map_of(answer)
