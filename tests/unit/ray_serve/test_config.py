"""The config file's fields, and what Ray is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vllm_prune.errors import PruneError
from vllm_prune.ray.arguments import command_line, serve_arguments
from vllm_prune.ray.config import parse_config

ROOT = Path(__file__).parents[3]


def test_the_example_is_valid() -> None:
    (app,) = yaml.safe_load((ROOT / "examples" / "ray_serve.yaml").read_text())["applications"]
    assert app["import_path"] == "vllm_prune.ray:build_app"
    config = parse_config(app["args"])
    assert (config.min_replicas, config.max_replicas, config.autoscales) == (2, 2, False)
    assert serve_arguments(config.engine).kv_cache_memory_bytes == 64 << 20


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"model": "m", "replicas": 2}, r"'args\.replicas' is unknown\. Known: model, engine"),
        ({}, r"'args\.model' is invalid"),
        ({"model": "m", "target_free_kv": 1.0}, r"'args\.target_free_kv' is invalid: Input should be less than 1"),
        ({"model": "m", "min_replicas": 3, "max_replicas": 2}, r"max_replicas 2 is less than min_replicas 3"),
        (
            {"model": "m", "engine": {"port": 1}},
            r"'args\.engine' is invalid: 'port' is not given here, but by http_options",
        ),
        ({"model": "m", "engine": {"tensor-parallel-size": 2}}, r"but by tensor_parallel_size"),
        ({"model": "m", "engine": {"max-model-len": 2}}, r"'max-model-len' is written 'max_model_len'"),
        ({"model": "m", "gpus_per_rank": 2}, r"'args\.gpus_per_rank' is invalid"),
    ],
)
def test_what_is_wrong_is_named(args: dict, said: str) -> None:
    with pytest.raises(PruneError, match=said):
        parse_config(args)


def test_max_follows_min_unless_given() -> None:
    assert parse_config({"model": "m", "min_replicas": 4}).max_replicas == 4
    assert parse_config({"model": "m", "max_replicas": 4}).autoscales


def test_engine_options_are_those_of_vllm_serve() -> None:
    engine = {
        "max_model_len": 2048, "enforce_eager": True, "enable_chunked_prefill": False, "served_model_name": ["a", "b"],
        "additional_config": {"vllm_prune": {"strength": 0.5}}, "kv_cache_memory_bytes": "64M", "seed": None,
    }  # fmt: skip
    assert "--no-enable-chunked-prefill" in command_line(engine) and not any(
        "seed" in said for said in command_line(engine)
    )
    args = serve_arguments(engine)
    assert (args.max_model_len, args.enforce_eager, args.enable_chunked_prefill) == (2048, True, False)
    assert args.served_model_name == ["a", "b"]
    assert args.additional_config == {"vllm_prune": {"strength": 0.5}}


@pytest.mark.parametrize("engine", [{"max_modle_len": 1}, {"max_model_len": "many"}, {"enable_auto_tool_choice": True}])
def test_what_vllm_does_not_take_is_a_refusal(engine: dict) -> None:
    with pytest.raises(PruneError, match=r"vLLM does not take the engine options: .*Correct `engine`"):
        serve_arguments(engine)


def test_where_ranks_go() -> None:
    pytest.importorskip("ray.serve", reason="Ray Serve is an extra")
    from vllm_prune.ray.application import resources

    def asked(**fields: object) -> dict:
        found = resources(parse_config({"model": "m", **fields}))
        found["ray_actor_options"].pop("runtime_env")
        return found

    assert asked(gpus_per_rank=0, tensor_parallel_size=2) == {"ray_actor_options": {"num_cpus": 1.0, "num_gpus": 0}}
    assert asked(tensor_parallel_size=4) == {"ray_actor_options": {"num_cpus": 1.0, "num_gpus": 4}}
    assert asked(tensor_parallel_size=2, engine={"distributed_executor_backend": "ray"}) == {
        "ray_actor_options": {"num_cpus": 1.0},
        "placement_group_bundles": [{"CPU": 1.0, "GPU": 1.0}, {"GPU": 1.0}],
        "placement_group_strategy": "PACK",
    }


def test_an_application_is_built_from_args() -> None:
    serve = pytest.importorskip("ray.serve", reason="Ray Serve is an extra")
    from vllm_prune.ray import build_app

    assert isinstance(build_app({"model": "m", "max_replicas": 3}), serve.Application)
    with pytest.raises(PruneError, match=r"'args\.modle' is unknown"):
        build_app({"modle": "m"})


def test_without_ray() -> None:
    """Importing needs no Ray, and does not bring it in; building says what to install."""
    code = (
        "import sys, vllm_prune, vllm_prune.ray, vllm_prune.ray.config, vllm_prune.ray.scaling\n"
        "assert 'ray' not in sys.modules and 'vllm' not in sys.modules\n"
        "sys.modules['ray'] = None\n"
        "try: vllm_prune.ray.build_app({'model': 'm'})\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().endswith("Install vllm-prune[ray].")
