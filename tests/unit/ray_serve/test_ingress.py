"""What the ingress does when a replica dies, with replicas made for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is an extra")

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from vllm_prune.ray.exchange import Call, Opening
from vllm_prune.ray.ingress import Ingress

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json"), (b"content-length", b"2")]


class Pieces:
    """What a call of Serve's handle returns: an iterator that can be cancelled. An exception among the pieces is raised."""

    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = iter(pieces)
        self.cancelled = False

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> Any:
        try:
            piece = next(self._pieces)
        except StopIteration:
            raise StopAsyncIteration from None
        if isinstance(piece, Exception):
            raise piece
        return piece

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Gives each call to the next of its replicas."""

    def __init__(self, *replicas: list[Any]) -> None:
        self.given = [Pieces(pieces) for pieces in replicas]
        self.calls: list[Call] = []

    def options(self, **options: Any) -> Handle:
        assert options == {"method_name": "answer", "stream": True}
        return self

    def remote(self, call: Call) -> Pieces:
        self.calls.append(call)
        return self.given[len(self.calls) - 1]


async def ask(handle: Any, retries: int = 2) -> Response:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/p/v1/completions", "query_string": b"a=1",
             "headers": [(b"authorization", b"Bearer key")]}  # fmt: skip
    return await Ingress(handle, retries).forward("v1/completions", Request(scope, receive))


def answer(handle: Any, retries: int = 2) -> tuple[Response, bytes]:
    async def run() -> tuple[Response, bytes]:
        response = await ask(handle, retries)
        if not isinstance(response, StreamingResponse):
            return response, bytes(response.body)
        return response, b"".join([bytes(piece) async for piece in response.body_iterator])  # type: ignore[arg-type]

    return asyncio.run(run())


def test_an_answer_is_passed_on() -> None:
    handle = Handle([Opening(400, JSON, b"{}")])
    response, body = answer(handle)
    assert (response.status_code, response.raw_headers, body) == (400, JSON, b"{}")
    assert handle.calls == [Call("POST", "/v1/completions", b"a=1", [(b"authorization", b"Bearer key")], b"{}")]


def test_a_request_that_was_not_begun_goes_to_another_replica() -> None:
    handle = Handle([RayActorError()], [RayActorError()], [Opening(200, EVENTS, b"a"), b"b"])
    assert answer(handle)[1] == b"ab"


def test_but_not_for_ever() -> None:
    response, body = answer(Handle([RayActorError()], [RayActorError()]), retries=1)
    assert response.status_code == 503
    assert json.loads(body)["error"]["message"] == "vllm-prune: 2 replicas died, one after another, with this request."


def test_too_many_requests() -> None:
    response, body = answer(Handle([BackPressureError(num_queued_requests=1, max_queued_requests=1)]))
    assert response.status_code == 503 and b"too many requests wait" in body


def test_a_stream_that_was_begun_ends_with_an_error_event() -> None:
    _, body = answer(Handle([Opening(200, EVENTS, b"data: 1\n\n"), RayActorError()]))
    first, last = body.decode().strip().split("\n\n")
    assert first == "data: 1"
    assert "the replica died" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_anything_else_that_was_begun_breaks_off() -> None:
    with pytest.raises(RayActorError):
        answer(Handle([Opening(200, JSON, b"{"), RayActorError()]))


def test_a_client_that_leaves() -> None:
    handle = Handle([Opening(200, EVENTS, b"a"), b"b", b"c"])

    async def run() -> None:
        response = await ask(handle)
        assert isinstance(response, StreamingResponse)
        body: AsyncIterator[Any] = response.body_iterator  # type: ignore[assignment]
        await anext(body)
        await body.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())
    assert handle.given[0].cancelled


@pytest.mark.parametrize(
    ("body", "by_prefix", "shown"), [(b'{"prompt": "a"}', True, True), (b"{}", True, False), (b"{}", False, True)]
)
def test_rays_router_for_prefixes_is_shown_prompts_alone(body: bytes, by_prefix: bool, shown: bool) -> None:
    """It looks at positional arguments, and divides by the length of what they have."""

    class Looking(Handle):
        positional = 0

        def remote(self, *looked_at: Call, **others: Call) -> Pieces:
            self.positional += len(looked_at)
            return super().remote(*looked_at, **others)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    handle = Looking([Opening(200, JSON, b"{}")])
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    asyncio.run(Ingress(handle, 0, by_prefix).forward("v1/completions", Request(scope, receive)))  # type: ignore[arg-type]
    assert handle.positional == shown and handle.calls[0].body == body
