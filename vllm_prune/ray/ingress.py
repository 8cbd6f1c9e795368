"""The ingress: passes each request to an engine replica, whole, and its answer back, piece by piece."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from vllm_prune.ray.exchange import Call, Opening

DIED = (RayActorError, ObjectLostError)
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
NO_METRICS = (
    "Each replica counts for itself, so its series are among those of its Ray node (ray_vllm_..., by ReplicaId), at the "
    "node's metrics port."
)
api = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)


def error_body(message: str, status: int) -> dict[str, Any]:
    """An error as the OpenAI API has it."""
    return {
        "error": {"message": f"vllm-prune: {message}", "type": "ServiceUnavailableError", "param": None, "code": status}
    }


class Ingress:
    """Serve deployment; its own actor process, without an engine.

    Args:
        engine: of the engine replicas.
        retries: see ``RayServeConfig``.
        by_prefix: whether Ray's router for prefixes chooses the replica.
    """

    def __init__(self, engine: DeploymentHandle, retries: int, by_prefix: bool = False) -> None:
        self._engine = engine.options(method_name="answer", stream=True)
        self._retries, self._by_prefix = retries, by_prefix

    @api.get("/metrics")
    async def metrics(self) -> Response:
        return JSONResponse(error_body(NO_METRICS, 404), 404)

    @api.api_route("/{path:path}", methods=METHODS)
    async def forward(self, path: str, request: Request) -> Response:
        """Every other route. Answers 503 itself when no replica took the request to its end."""
        call = Call(
            request.method, "/" + path, request.scope["query_string"],
            [(bytes(name), bytes(value)) for name, value in request.headers.raw], await request.body(),
        )  # fmt: skip
        # That router divides by the length of a positional argument's prompt: where there is none it must not look.
        unlooked = self._by_prefix and not call.prompt
        lost = ""
        for _ in range(1 + self._retries):
            pieces: Any = self._engine.remote(call=call) if unlooked else self._engine.remote(call)
            try:
                opening = await anext(aiter(pieces))
            except DIED:
                lost = f"{1 + self._retries} replicas died, one after another, with this request"
                continue
            except BackPressureError:
                lost = "too many requests wait (max_queued_requests)"
                break
            except DeploymentUnavailableError:
                lost = "no engine replica can be started"
                break
            response = StreamingResponse(_body(opening, pieces), opening.status)
            response.raw_headers = list(opening.headers)
            return response
        return JSONResponse(error_body(f"{lost}.", 503), 503)


async def _body(opening: Opening, pieces: Any) -> AsyncIterator[bytes]:
    """The answer's body. A stream of events whose replica dies ends with an error event, anything else breaks off."""
    ended = False
    try:
        yield opening.body
        async for piece in pieces:
            yield piece
        ended = True
    except DIED:
        ended = True
        kind = dict(opening.headers).get(b"content-type", b"")
        if not kind.startswith(b"text/event-stream"):
            raise
        error = error_body("the replica died while it sent this answer.", 503)
        yield f"data: {json.dumps(error)}\n\n".encode()
    finally:
        if not ended:
            pieces.cancel()
