"""Gated checkpoints on Ray Serve: ``serve run examples/ray_serve.yaml``. Importing this imports neither Ray nor vLLM.

| module | process |
|---|---|
| ``config`` | wherever the application is built |
| ``application`` | the same: puts deployments together |
| ``ingress`` | ingress replicas: pass requests on, try again when a replica dies |
| ``replica``, ``exchange``, ``arguments``, ``free_kv`` | engine replicas: vLLM's engine and its own OpenAI application |
| ``scaling`` | Serve's controller: how many replicas |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def build_app(args: dict[str, Any]) -> Application:
    """The application of a Serve config file's ``import_path: vllm_prune.ray:build_app``.

    Runs where Serve builds applications: a task on the cluster (``serve run FILE``) or the caller's own process.

    Args:
        args: fields of ``vllm_prune.ray.config.RayServeConfig``.

    Raises:
        ImportError: Ray Serve is not installed.
        PruneError: a field is unknown or has a wrong value. What vLLM or a checkpoint refuses is known when a replica
            starts: the deployment then fails with the same message.
    """
    try:
        from ray import serve  # noqa: F401
    except ImportError as error:
        raise ImportError(f"vllm-prune: vllm_prune.ray needs Ray Serve ({error}). Install vllm-prune[ray].") from error
    from vllm_prune.ray.application import application
    from vllm_prune.ray.config import parse_config

    return application(parse_config(args))
