"""The ``args`` of an application in a Ray Serve config file. Read where the application is built and in every replica."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_prune.errors import PruneError

TAKEN = {
    "model": "model",
    "model_tag": "model",
    "tensor_parallel_size": "tensor_parallel_size",
    "config": "args itself",
    "host": "http_options of the Serve config file",
    "port": "http_options of the Serve config file",
    "uds": "http_options of the Serve config file",
    "ssl_keyfile": "http_options of the Serve config file",
    "ssl_certfile": "http_options of the Serve config file",
    "root_path": "route_prefix of the Serve config file",
    "data_parallel_size": "min_replicas and max_replicas",
    "api_server_count": "min_replicas and max_replicas",
    "headless": "nothing: replicas have no other nodes' ranks to wait for",
    "grpc": "nothing: Serve speaks HTTP here",
}
"""Options of ``vllm serve`` that mean nothing in ``engine``, and what is there instead."""


class RayServeConfig(BaseModel):
    """Fields of ``args``.

    Attributes:
        model: gated folder (or any that vLLM serves), at the same path on every node, or a hub id.
        engine: options as of ``vllm serve``, with underscores: ``max_model_len: 4096``, ``enforce_eager: true``.
        tensor_parallel_size: ranks of a replica.
        min_replicas, max_replicas: of the engine. Equal by default: no autoscaling.
        target_ongoing_requests: of a replica, running and queued; more of them ask for more replicas.
        target_free_kv: share of a replica's KV blocks that should be free; less asks for more replicas.
        upscale_delay_s, downscale_delay_s: how long a wish has to last.
        look_back_period_s: both figures are means over so long; replicas report theirs every 10 seconds.
        max_ongoing_requests: a replica is given at once; more wait at the ingress.
        max_queued_requests: that may wait at an ingress replica; others get HTTP 503. -1: any number.
        retries: further replicas that a request is given to when its replica dies before it has sent anything.
        prefix_routing: prefer the replica that has served the longest common beginning, unless its queue is so many requests
            longer than another's; 0 leaves the choice to Serve.
        cpus_per_replica, gpus_per_rank: what Ray sets aside. 0 GPUs: an engine on CPU.
        ingress_replicas, cpus_per_ingress: of the ingress, which has no engine.
        env: environment of the engine replicas.
        health_period_s: between health checks.
        drain_s: what a replica that is scaled away may take to end its requests.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(min_length=1)
    engine: dict[str, Any] = Field(default_factory=dict)
    tensor_parallel_size: int = Field(1, ge=1)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(0, ge=0)
    target_ongoing_requests: float = Field(32.0, gt=0.0)
    target_free_kv: float = Field(0.1, ge=0.0, lt=1.0)
    upscale_delay_s: float = Field(10.0, ge=0.0)
    downscale_delay_s: float = Field(300.0, ge=0.0)
    look_back_period_s: float = Field(20.0, gt=10.0)
    max_ongoing_requests: int = Field(256, ge=1)
    max_queued_requests: int = Field(-1, ge=-1)
    retries: int = Field(2, ge=0)
    prefix_routing: int = Field(0, ge=0)
    cpus_per_replica: float = Field(1.0, ge=0.0)
    gpus_per_rank: Literal[0, 1] = 1
    ingress_replicas: int = Field(1, ge=1)
    cpus_per_ingress: float = Field(0.1, ge=0.0)
    env: dict[str, str] = Field(default_factory=dict)
    health_period_s: float = Field(5.0, gt=0.0)
    drain_s: float = Field(120.0, ge=0.0)

    @field_validator("engine")
    @classmethod
    def _own_options(cls, engine: dict[str, Any]) -> dict[str, Any]:
        for name in engine:
            plain = name.lstrip("-").replace("-", "_")
            if plain in TAKEN:
                raise ValueError(f"'{name}' is not given here, but by {TAKEN[plain]}")
            if plain != name:
                raise ValueError(f"'{name}' is written '{plain}'")
        return engine

    @model_validator(mode="before")
    @classmethod
    def _as_many(cls, data: Any) -> Any:
        """``max_replicas`` is ``min_replicas`` unless it is given."""
        if isinstance(data, dict) and "max_replicas" not in data:
            return {**data, "max_replicas": data.get("min_replicas", 1)}
        return data

    @model_validator(mode="after")
    def _in_order(self) -> RayServeConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}")
        return self

    @property
    def autoscales(self) -> bool:
        return self.max_replicas > self.min_replicas

    @property
    def served_model_name(self) -> str | list[str]:
        """Names for ``model`` in requests: ``engine.served_model_name``, else the model as it was written."""
        return self.engine.get("served_model_name") or self.model

    @property
    def place(self) -> str:
        """The model for vLLM: an absolute path where there is such a folder, since replicas run elsewhere."""
        return str(Path(self.model).resolve()) if os.path.isdir(self.model) else self.model


def parse_config(args: dict[str, Any]) -> RayServeConfig:
    """Raises PruneError with the first field that is unknown or wrong."""
    try:
        return RayServeConfig.model_validate(args)
    except ValidationError as error:
        first = min(
            error.errors(), key=lambda one: one["type"] != "extra_forbidden"
        )  # a typing error before what it leaves out
        where = ".".join(["args", *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            raise PruneError(f"Ray Serve field '{where}' is unknown.",
                             f"Known: {', '.join(RayServeConfig.model_fields)}.") from None  # fmt: skip
        problem = first["msg"].removeprefix("Value error, ")
        raise PruneError(f"Ray Serve field '{where}' is invalid: {problem}.", "Correct it.") from None
