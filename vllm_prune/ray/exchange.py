"""One HTTP request, carried from the ingress to an ASGI application in another process and back. Knows neither Ray nor vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_prune.json_text import parse_object

Headers = list[tuple[bytes, bytes]]
LEAVE_SECONDS = 5.0
"""What an application has to end a request whose client has left, before its task is cancelled."""


class EngineGone(RuntimeError):
    """The engine behind the application has died and nothing of the answer was sent: another replica may give it."""


@dataclass(frozen=True)
class Call:
    """A request. ``path`` is below the application's route prefix."""

    method: str
    path: str
    query: bytes = b""
    headers: Headers = field(default_factory=list)
    body: bytes = b""

    @property
    def prompt(self) -> str:
        """What replicas that hold prefixes are chosen by: fields that decide what is left of a prompt, then messages or prompt.
        Empty for a request without any. The name is what Ray's prefix-aware router looks for."""
        try:
            data = parse_object(self.body)
        except ValueError:
            return ""
        text = data.get("messages", data.get("prompt"))
        first = {name: data[name] for name in ("cache_salt", "vllm_xargs", "tools") if data.get(name)}
        return "" if text is None else json.dumps([first, text] if first else text)

    def scope(self) -> dict[str, Any]:
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": self.method, "scheme": "http", "path": self.path, "raw_path": self.path.encode(),
            "query_string": self.query, "root_path": "", "headers": self.headers, "client": None, "server": None,
        }  # fmt: skip


@dataclass(frozen=True)
class Opening:
    """The begin of an answer, sent with its first piece of body: before that another replica can take the request over."""

    status: int
    headers: Headers
    body: bytes


_tasks: set[asyncio.Task[None]] = set()


async def exchange(app: Any, call: Call, gone: Callable[[], bool]) -> AsyncIterator[Opening | bytes]:
    """The application's answer: an opening, then pieces of the body. Pieces that came meanwhile are sent as one.

    When the iterator is closed, the application is told that its client has left. Runs in an engine replica.

    Args:
        app: an ASGI application.
        gone: whether the engine behind it has died.

    Raises:
        EngineGone: before anything was sent.
    """
    messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    left = asyncio.Event()
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": call.body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        messages.put_nowait(message)

    task = asyncio.create_task(app(call.scope(), receive, send))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        start: dict[str, Any] | None = None
        ended = opened = False
        while not ended:
            ready = [await messages.get()]
            while not messages.empty():
                ready.append(messages.get_nowait())
            body = b""
            for message in ready:
                if message is None:
                    ended = True
                elif message["type"] == "http.response.start":
                    start = message
                elif message["type"] == "http.response.body":
                    body += message.get("body", b"")
                    ended = ended or not message.get("more_body", False)
            if opened:
                if body:
                    yield body
            elif body or ended:
                if gone():
                    raise EngineGone("the engine of this replica has died")
                if start is None:
                    task.result()  # its exception
                    raise RuntimeError("the application ended without an answer")
                opened = True
                yield Opening(start["status"], [(bytes(k), bytes(v)) for k, v in start.get("headers", ())], body)
        if task.done():
            task.result()
    finally:
        left.set()
        if not task.done():
            asyncio.get_running_loop().call_later(LEAVE_SECONDS, task.cancel)
