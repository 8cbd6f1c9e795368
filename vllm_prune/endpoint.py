"""``POST /v1/prune/map``: runs one request and answers with its eviction map and the text of its tokens.

vLLM's endpoint plugin: loaded in API servers only, and only when ``VLLM_PLUGINS`` names ``vllm_prune``. It reaches the engine as
vLLM's own routes do, by ``EngineClient.generate``, and keeps nothing: any number of API servers and engines may be behind it.
Below /v1 so that ``--api-key`` guards it.
"""

from __future__ import annotations

import asyncio
import uuid
from argparse import Namespace
from typing import Any, ClassVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_prune.config import MAX_TOKENS, SECTION
from vllm_prune.demo.source import pieces
from vllm_prune.live_map import PATH
from vllm_prune.requests import MAP, STRENGTH

LEAST_TOKENS = 2
"""Tokens to generate: vLLM asks for a request's last words before it hands over its last step's report."""

router = APIRouter()


class MapRequest(BaseModel):
    """Body of a request.

    Attributes:
        prompt: text, or token ids.
        model: as served; any when left out.
        max_tokens: to generate, greedily; as many as fit the model.
        strength: of the gates; the server's when left out.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str | list[int]
    model: str | None = None
    max_tokens: int = Field(32, ge=LEAST_TOKENS, le=MAX_TOKENS)
    strength: float | None = None


class MapMaker:
    """Makes maps. Lives in an API server.

    Args:
        engine: vLLM's client of the engine.
        models: names that the model is served under.
    """

    def __init__(self, engine: EngineClient, models: list[str]) -> None:
        self.engine, self.models = engine, models

    async def make(self, asked: MapRequest) -> dict[str, Any]:
        """Run a request.

        Returns:
            ``model``; ``text`` of each of the T tokens that became keys; and the plugin's words on the request, ``map`` among
            them (``lifetimes.pack``).

        Raises:
            VLLMValidationError: a bad value, no map to be had, or a request that ended before its first report (HTTP 400).
            VLLMNotFoundError: another model (HTTP 404).
        """
        if asked.model is not None and asked.model not in self.models:
            raise VLLMNotFoundError(f"The model `{asked.model}` does not exist.")
        if getattr(self.engine.model_config.hf_config, SECTION, None) is None:
            raise VLLMValidationError("vllm-prune: this server's model has no drop gates. Serve a gated checkpoint.")
        wishes: dict[str, Any] = {MAP: True}
        if asked.strength is not None:
            wishes[STRENGTH] = asked.strength
        params = SamplingParams(
            temperature=0.0, max_tokens=asked.max_tokens, min_tokens=LEAST_TOKENS, extra_args=wishes, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        renderer = self.engine.renderer
        given: Any = {"prompt": asked.prompt} if isinstance(asked.prompt, str) else {"prompt_token_ids": asked.prompt}
        (prompt,) = await renderer.render_cmpl_async([given])
        *_, last = [output async for output in self.engine.generate(prompt, params, f"map-{uuid.uuid4().hex}")]
        told = (last.kv_transfer_params or {}).get("vllm_prune")
        if told is None:
            raise VLLMValidationError("vllm-prune: the request ended with its first token, before anything was told of it. "
                                      "Ask with a prompt that leaves room for two tokens.", parameter="prompt")  # fmt: skip
        ids = [*(last.prompt_token_ids or ()), *last.outputs[0].token_ids][: told["tokens"]]
        text = await asyncio.to_thread(pieces, renderer.get_tokenizer(), ids)
        return {"model": asked.model or self.models[0], "text": text, **told}


@router.post(PATH)
@with_cancellation
async def make_map(asked: MapRequest, raw_request: Request) -> JSONResponse:
    """See the module. vLLM's own handlers turn what is raised into OpenAI's form of errors."""
    maker: MapMaker = raw_request.app.state.vllm_prune_maps
    return JSONResponse(await maker.make(asked))


class MapEndpoint:
    """Entry point ``vllm.endpoint_plugins``; see ``EndpointPlugin`` there."""

    name: ClassVar[str] = "vllm_prune"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        if engine_client is None:
            raise RuntimeError("vllm-prune: maps need an engine")
        state.vllm_prune_maps = MapMaker(engine_client, args.served_model_name or [args.model])
