"""An engine replica: vLLM's asynchronous engine with vLLM's own OpenAI server application, without vLLM's HTTP server."""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from vllm_prune.errors import PruneError
from vllm_prune.ray.arguments import serve_arguments
from vllm_prune.ray.config import RayServeConfig
from vllm_prune.ray.exchange import Call, EngineGone, Opening, exchange
from vllm_prune.ray.scaling import KV_USED

logger = logging.getLogger("ray.serve")
WATCH_SECONDS = 0.2
LAST_ANSWERS_SECONDS = 0.5
"""What requests of a dead engine have to answer with their errors before the replica ends."""


def _refusal(error: ValidationError) -> PruneError | None:
    """The plugin's own refusal in what vLLM's configuration class raises, which prints all of the configuration with it."""
    cause = error.errors()[0].get("ctx", {}).get("error")
    return cause if isinstance(cause, PruneError) else None


class EngineReplica:
    """Serve deployment; its own actor process, with the engine core (and its workers) as child processes.

    Args:
        config: of the application.

    Raises:
        PruneError: vLLM or the plugin refuses an option, the checkpoint, or their combination.
    """

    async def __init__(self, config: RayServeConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        from vllm_prune.ray.free_kv import KvUse

        args = serve_arguments(config.engine)
        args.model, args.tensor_parallel_size = config.place, config.tensor_parallel_size
        names = config.served_model_name
        args.served_model_name = [names] if isinstance(names, str) else names
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        options = AsyncEngineArgs.from_cli_args(args)
        kv_use = KvUse()
        self._kv_use = kv_use
        usage = UsageContext.OPENAI_API_SERVER
        try:
            vllm_config = options.create_engine_config(usage_context=usage)
        except ValidationError as error:
            raise _refusal(error) or error from None
        self._engine = AsyncLLM.from_vllm_config(
            vllm_config=vllm_config,
            usage_context=usage,
            stat_loggers=[lambda vllm_config, index: kv_use, RayPrometheusStatLogger],
            enable_log_requests=options.enable_log_requests,
            disable_log_stats=options.disable_log_stats,
        )
        await self._engine.reset_mm_cache()
        self._app = await self._application(args)
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        self._watch = asyncio.create_task(self._end_with_the_engine())

    async def _application(self, args: Namespace) -> Any:
        """vLLM's own: every route, error and field is what ``vllm serve`` has."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, args, tasks)
        # Its error handler tells the HTTP server of a dead engine to stop: here nobody asks, _end_with_the_engine does it.
        app.state.server = SimpleNamespace(should_exit=False)
        return app

    async def answer(self, call: Call) -> AsyncIterator[Opening | bytes]:
        """The application's answer to one request. Called by the ingress as a stream.

        When the engine has died and nothing was sent yet, this waits for the end of the process, which is near: only then
        does Serve stop giving requests to this replica, so that the ingress's next try gets another one.
        """
        try:
            async for piece in exchange(self._app, call, gone=lambda: self._engine.errored):
                yield piece
        except EngineGone:
            await asyncio.Event().wait()

    async def check_health(self) -> None:
        """Called by Serve. Raises what the engine died of."""
        await self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: what ``RequestsAndFreeKv`` reads in the controller."""
        return {KV_USED: self._kv_use.used}

    async def _end_with_the_engine(self) -> None:
        """A replica without an engine answers fastest, and would draw all requests until Serve's third failed health check. So
        it ends at once, and Serve starts another."""
        while not self._engine.errored:
            await asyncio.sleep(WATCH_SECONDS)
        logger.error("vllm-prune: the engine of this replica has died. The replica ends; Serve starts another.")
        await asyncio.sleep(LAST_ANSWERS_SECONDS)
        os._exit(1)

    def __del__(self) -> None:
        """Called by Serve when the replica is stopped. The engine's processes end here."""
        if watch := getattr(self, "_watch", None):
            watch.cancel()
        if engine := getattr(self, "_engine", None):
            engine.shutdown()
