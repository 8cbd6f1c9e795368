"""What serving whole prompts makes of vLLM's configuration, and what it refuses: options, checkpoints, bases."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import tiny_config
from test_bad_checkpoints import configure, refused, rewrite, tensors_of

from vllm_prune.checkpoint import GENERIC_ARCHITECTURE, add_gates
from vllm_prune.config import GATE_FILE, SECTION
from vllm_prune.gates import GATES, GateShape
from vllm_prune.models.request_check import is_check

LAYER = "drop_gate.layers.1"


def make(folder: Path, method: str, family: str = "qwen3", architecture: str | None = None) -> Path:
    """A checkpoint without base weights: refusals come before they are read."""
    config = tiny_config(family)
    config.architectures = ["LlamaForCausalLM" if family == "llama" else "Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    rewrite(folder, lambda data: data.update(dtype="float32"))
    shape = GateShape(config.hidden_size, config.num_key_value_heads, config.num_hidden_layers)
    gates = [GATES[method](shape).at_layer(layer) for layer in range(shape.num_layers)]
    add_gates(folder, gates, {"dtype": "float32", "protect": {"sinks": 1, "window": 4}}, architecture)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    return {method: make(tmp_path_factory.mktemp(method), method) for method in ("ltp_prompt", "acc_prompt")}


@pytest.fixture
def ltp(good, tmp_path) -> Path:
    return Path(shutil.copytree(good["ltp_prompt"], tmp_path / "copy"))


@pytest.fixture
def acc(good, tmp_path) -> Path:
    return Path(shutil.copytree(good["acc_prompt"], tmp_path / "copy"))


def test_prompts_come_whole_without_a_flag(ltp):
    config = configure(ltp, max_model_len=2048, enforce_eager=False)
    assert not config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens >= 2048
    assert config.model_config.enforce_eager
    assert [is_check(name) for name in config.model_config.logits_processors] == [True]


def test_a_default_that_is_too_small_is_raised(good, tmp_path):
    """A model of more positions than vLLM's default budget: nobody asked for the budget."""
    folder = Path(shutil.copytree(good["acc_prompt"], tmp_path / "long"))
    rewrite(folder, lambda data: data.update(max_position_embeddings=20_000))
    scheduler = configure(folder, max_model_len=None, max_num_seqs=8).scheduler_config
    assert scheduler.max_num_batched_tokens == 20_000 + 8 and not scheduler.enable_chunked_prefill


def test_other_methods_and_open_gates_are_left_alone(ltp):
    config = configure(ltp, additional_config={"vllm_prune": {"strength": 0.0}}, max_num_batched_tokens=300)
    assert config.scheduler_config.enable_chunked_prefill


def test_a_users_own_processors_stay(ltp):
    own = "vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor"
    first, second = configure(ltp, logits_processors=[own]).model_config.logits_processors
    assert first == own and is_check(second)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_model_len": 512, "max_num_batched_tokens": 300}, "max_num_batched_tokens 300 is less than max_model_len 512"),
        ({"max_model_len": 512, "long_prefill_token_threshold": 64}, "long_prefill_token_threshold 64 cuts prompts"),
    ],
)  # fmt: skip
def test_options_that_want_chunks_are_refused(ltp, options: dict[str, Any], said: str):
    refused(ltp, "refused (whole-prompts", said, "Leave --", **options)


def test_the_generic_class_cannot_skip(tmp_path):
    refused(
        make(tmp_path, "acc_prompt", "llama", GENERIC_ARCHITECTURE), "acc_prompt skips part of the computation", "Qwen3"
    )


TENSORS = {
    "threshold_missing": ("ltp", "theta", None, "theta' in drop_gate.safetensors is missing"),
    "threshold_nan": ("ltp", "theta", torch.tensor(float("nan")), "not finite"),
    "threshold_huge": ("ltp", "theta", torch.tensor(1e9), "theta of layer 1 is 1e+09"),
    "threshold_vector": ("ltp", "theta", torch.zeros(1), "has shape [1], expected []"),
    "profile_rises": ("acc", "profile", torch.tensor(0.5), "must not increase with depth, got 1, 0.5, 1"),
    "profile_zero": ("acc", "profile", torch.tensor(0.0), "must be shares above 0"),
    "coefficients_differ": ("acc", "coefficient", torch.tensor(0.5), "must be the same in all layers, got 0.5, 1"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_bad_tensors(case, request):
    method, name, value, said = TENSORS[case]
    folder = request.getfixturevalue(method)
    tensors = tensors_of(folder)
    tensors.pop(f"{LAYER}.{name}")
    if value is not None:
        tensors[f"{LAYER}.{name}"] = value
    save_file(tensors, folder / GATE_FILE)
    refused(folder, said)


@pytest.mark.parametrize(
    ("method", "params", "said"),
    [
        ("ltp", {"theta": -1.0}, "theta must be between 0 and"),
        ("ltp", {"theta": "high"}, "drop_gate.params.theta must be a finite number"),
        ("ltp", {"least": 0.1}, "drop_gate.params of method 'ltp_prompt'"),
        ("acc", {"least": 0.0}, "least must be a share above 0"),
        ("acc", {"theta": 0.1}, "drop_gate.params of method 'acc_prompt'"),
    ],
)
def test_bad_parameters(method, params, said, request):
    folder = request.getfixturevalue(method)
    rewrite(folder, lambda data: data[SECTION].update(params=params))
    refused(folder, said)
