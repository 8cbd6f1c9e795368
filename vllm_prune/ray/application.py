"""Puts the two deployments together: engine replicas, and an ingress before them."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from vllm_prune.ray.config import RayServeConfig
from vllm_prune.ray.ingress import Ingress, api
from vllm_prune.ray.replica import EngineReplica

INGRESS_AT_ONCE = 100_000
"""Requests an ingress replica holds: how many run and wait is decided at the engine."""
START_TRIES = 3
"""Of a replica, before the deployment fails with what vLLM said. Serve's own 20 would load a refused checkpoint for minutes."""


def resources(config: RayServeConfig) -> dict[str, Any]:
    """Ray's resources of an engine replica, as deployment options.

    vLLM's ranks are the replica's child processes and see the GPUs that Ray gave to the replica, so they are all on its
    node. With ``engine.distributed_executor_backend: ray`` they are actors in a placement group of one GPU a bundle, which
    vLLM finds by itself, and the group may span nodes.
    """
    cpus, gpus = config.cpus_per_replica, config.gpus_per_rank * config.tensor_parallel_size
    actor: dict[str, Any] = {"num_cpus": cpus, "runtime_env": {"env_vars": dict(config.env)}}
    if gpus and config.engine.get("distributed_executor_backend") == "ray":
        bundles = [{"CPU": cpus, "GPU": 1.0}, *({"GPU": 1.0} for _ in range(gpus - 1))]
        return {"ray_actor_options": actor, "placement_group_bundles": bundles, "placement_group_strategy": "PACK"}
    return {"ray_actor_options": {**actor, "num_gpus": gpus}}


def replicas(config: RayServeConfig) -> dict[str, Any]:
    """How many engine replicas, as deployment options."""
    if not config.autoscales:
        return {"num_replicas": config.min_replicas}
    policy = AutoscalingPolicy(
        policy_function="vllm_prune.ray.scaling:RequestsAndFreeKv",
        policy_kwargs={"target_free_kv": config.target_free_kv},
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            look_back_period_s=config.look_back_period_s,
            policy=policy,
        )
    }


def routing(config: RayServeConfig) -> dict[str, Any]:
    """Which replica gets a request, as deployment options: Ray's own router for prefixes, where that is wanted."""
    if not config.prefix_routing:
        return {}
    chosen: dict[str, Any] = {
        "request_router_class": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
        "request_router_kwargs": {"imbalanced_threshold": config.prefix_routing, "do_eviction": True},
    }
    return {"request_router_config": RequestRouterConfig(**chosen)}


def application(config: RayServeConfig) -> Application:
    """The application. Nothing is started; runs where ``build_app`` does."""
    fixed = config.model_copy(update={"model": config.place, "engine": {
        **config.engine, "served_model_name": config.served_model_name,
    }})  # fmt: skip
    engine = serve.deployment(name="Engine")(EngineReplica).options(
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        health_check_period_s=config.health_period_s,
        health_check_timeout_s=max(30.0, config.health_period_s),
        graceful_shutdown_timeout_s=config.drain_s,
        max_constructor_retry_count=START_TRIES,
        **resources(config),
        **replicas(config),
        **routing(config),
    )
    ingress = serve.deployment(name="Ingress")(serve.ingress(api)(Ingress)).options(
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=INGRESS_AT_ONCE,
        ray_actor_options={"num_cpus": config.cpus_per_ingress},
        graceful_shutdown_timeout_s=config.drain_s,
    )
    return ingress.bind(engine.bind(fixed), config.retries, bool(config.prefix_routing))
