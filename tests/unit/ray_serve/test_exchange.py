"""A request's way to an application in another process, with applications made for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from vllm_prune.ray import exchange as module
from vllm_prune.ray.exchange import Call, EngineGone, Opening, exchange

CALL = Call("POST", "/v1/completions", b"a=1", [(b"content-type", b"application/json")], b"{}")
START = {"type": "http.response.start", "status": 201, "headers": [(b"x", b"y")]}


def pieces(app: Any, gone: Callable[[], bool] = lambda: False) -> list[Any]:
    async def run() -> list[Any]:
        return [piece async for piece in exchange(app, CALL, gone)]

    return asyncio.run(run())


def body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_the_application_sees_the_request() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/v1/completions", b"a=1")
        assert scope["headers"] == CALL.headers
        asked = await receive()
        await send(START)
        await send(body(asked["body"]))

    assert pieces(app) == [Opening(201, [(b"x", b"y")], b"{}")]


def test_the_opening_waits_for_the_first_piece_and_later_ones_are_joined() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await asyncio.sleep(0.01)
        await send(body(b"one", more=True))
        await asyncio.sleep(0.01)
        await send(body(b"two", more=True))
        await send(body(b"three", more=True))
        await send(body(b""))

    assert pieces(app) == [Opening(201, [(b"x", b"y")], b"one"), b"twothree"]


def test_an_answer_without_a_body() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(b""))

    assert pieces(app) == [Opening(201, [(b"x", b"y")], b"")]


def test_a_dead_engine_answers_nothing() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(b"an error"))

    with pytest.raises(EngineGone):
        pieces(app, lambda: True)


def test_what_was_begun_goes_on() -> None:
    """The application says itself what its stream ends with."""
    dead = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal dead
        await send(START)
        await send(body(b"one", more=True))
        await asyncio.sleep(0.01)
        dead = True
        await send(body(b"an error"))

    assert pieces(app, lambda: dead)[1:] == [b"an error"]


def test_an_exception_is_the_applications() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        pieces(app)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_client_that_leaves(deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The application is told; one that does not listen is cancelled a little later."""
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.05)
    said: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(START)
        await send(body(b"one", more=True))
        try:
            said.append("waits" if deaf else (await receive())["type"])
            if deaf:
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            said.append("cancelled")
            raise

    async def run() -> None:
        answer = exchange(app, CALL, lambda: False)
        assert isinstance(await anext(answer), Opening)
        await answer.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.2)

    asyncio.run(run())
    assert said == (["waits", "cancelled"] if deaf else ["http.disconnect"])


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (b'{"prompt": "a b", "n": 1}', '"a b"'),
        (b'{"prompt": [1, 2]}', "[1, 2]"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', '[{"role": "user", "content": "a"}]'),
        (b'{"prompt": "a", "vllm_xargs": {"prune.strength": 0.5}}', '[{"vllm_xargs": {"prune.strength": 0.5}}, "a"]'),
        (b'{"prompt": "a", "vllm_xargs": {}, "tools": null}', '"a"'),
        (b'{"input": "a"}', ""),
        (b"[1]", ""),
        (b"", ""),
        (b"\xff", ""),
        (b"[" * 100_000, ""),
    ],
)
def test_what_replicas_are_chosen_by(body: bytes, prompt: str) -> None:
    assert Call("POST", "/v1/completions", body=body).prompt == prompt
