"""Every refused combination is started for real and must say why and what to do, with nothing half started.

Parametrised over the table itself: a new refusal without a case fails. One exception, since no second platform is here:
the platform is refused on a real configuration whose device type alone is changed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from support import VOCAB, random_gates, tiny_config
from transformers import AutoConfig

from vllm_prune import compat
from vllm_prune.checkpoint import GENERIC_ARCHITECTURE, add_gates
from vllm_prune.gates import GATES, DCPGate, GateShape

Build = Callable[[Path], Path]


@contextmanager
def nothing_started() -> Iterator[None]:
    """No process and no process group outlives the block."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}, torch.distributed.is_initialized()
    yield
    assert (
        {child.pid for child in psutil.Process().children(recursive=True)},
        torch.distributed.is_initialized(),
    ) == before


def engine_args(folder: Path, **options: Any) -> dict[str, Any]:
    defaults = {"model": str(folder), "skip_tokenizer_init": True, "max_model_len": 256, "enforce_eager": True,
                "kv_cache_memory_bytes": 16 << 20, "dtype": "float32"}  # fmt: skip
    return {**defaults, **options}


def configure(folder: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**engine_args(folder, **options)).create_engine_config()


def gated(config: Any, architecture: str = GENERIC_ARCHITECTURE, **extra: Any) -> Build:
    """A maker of a gated checkpoint of any family, without base weights: refusals come before they are read."""

    def build(folder: Path) -> Path:
        config.save_pretrained(folder)
        path = folder / "config.json"
        data = json.loads(path.read_text())
        path.write_text(json.dumps({**data, "architectures": [architecture], "dtype": "float32", **extra}))
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        shape = GateShape(text.hidden_size, heads, text.num_hidden_layers)
        add_gates(
            folder, [DCPGate(shape, rank=16) for _ in range(shape.num_layers)], {"params": {"rank": 16}}, architecture
        )
        return folder

    return build


SIZES = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 4,
}  # fmt: skip
T5 = {"d_model": 128, "d_kv": 64, "num_heads": 4, "num_layers": 2, "vocab_size": VOCAB}
BART = {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": VOCAB}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def family(name: str, **more: Any) -> Build:
    return gated(AutoConfig.for_model(name, **{**SIZES, **more}))


def around_text(name: str, text: str) -> Build:
    return gated(AutoConfig.for_model(name, text_config={"model_type": text, **SIZES}))


QWEN3 = gated(tiny_config("qwen3"), "PrunedQwen3ForCausalLM")
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}

# Refusal name to cases: what to build, and the options to start it with. "platform" is tested apart.
CASES: dict[str, dict[str, tuple[Build, dict[str, Any]]]] = {
    "encoder-decoder": {
        "t5": (gated(AutoConfig.for_model("t5", **T5)), {}),
        "bart": (gated(AutoConfig.for_model("bart", **BART)), {}),
        "whisper": (gated(AutoConfig.for_model("whisper", **BART, pad_token_id=0)), {}),
    },
    "multimodal": {
        "qwen2_vl": (around_text("qwen2_vl", "qwen2_vl_text"), {}),
        "llava": (around_text("llava", "llama"), {}),
        "gemma3": (around_text("gemma3", "gemma3_text"), {}),
    },
    "task": {
        "runner": (QWEN3, {"runner": "pooling"}),
        "embed": (QWEN3, {"convert": "embed"}),
        "classify": (QWEN3, {"convert": "classify"}),
    },
    "mla": {"deepseek_v2": (family("deepseek_v2", **MLA), {})},
    "hybrid": {
        "jamba": (family("jamba"), {}),
        "falcon_h1": (family("falcon_h1"), {}),
        "lfm2": (family("lfm2", layer_types=["conv", "full_attention"]), {}),
        "qwen3_next": (family("qwen3_next", layer_types=["linear_attention", "full_attention"]), {}),
        "mamba2": (family("mamba2", num_heads=4), {}),
        "llama4_chunked": (family("llama4_text"), {}),
    },
    "sliding-window": {
        "mistral": (family("mistral", sliding_window=64), {}),
        "gemma2": (family("gemma2", sliding_window=64), {}),
        "qwen2_layers": (family("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1), {}),
        "starcoder2": (family("starcoder2", sliding_window=64), {}),
    },
    "head-size": {
        "80": (gated(tiny_config("qwen3", head_dim=80), "PrunedQwen3ForCausalLM"), {}),
        "generic_16": (family("mistral", sliding_window=None, head_dim=16), {}),
    },
    "dtype": {"float16": (QWEN3, {"dtype": "float16"})},
    "kv-cache-dtype": {
        "fp8": (QWEN3, {"kv_cache_dtype": "fp8"}),
        "fp8_e5m2": (QWEN3, {"kv_cache_dtype": "fp8_e5m2"}),
        "bfloat16_of_float32": (QWEN3, {"kv_cache_dtype": "bfloat16"}),
    },
    "quantization": {
        "fp8": (QWEN3, {"quantization": "fp8"}),
        "awq": (gated(tiny_config("qwen3"), "PrunedQwen3ForCausalLM", quantization_config=AWQ), {}),
    },
    "speculative-decoding": {"ngram": (QWEN3, {"speculative_config": NGRAM})},
    "lora": {"lora": (QWEN3, {"enable_lora": True})},
    "kv-connector": {
        "configured": (QWEN3, {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}),
        "offloading": (QWEN3, {"kv_offloading_size": 1.0}),
    },
    "context-parallel": {
        "decode": (QWEN3, {"decode_context_parallel_size": 2, "tensor_parallel_size": 2}),
        "prefill": (QWEN3, {"prefill_context_parallel_size": 2}),
    },
    "pipeline-parallel": {"2": (QWEN3, {"pipeline_parallel_size": 2})},
    "tensor-parallel": {
        "more_ranks_than_heads": (QWEN3, {"tensor_parallel_size": 4}),
        "heads_do_not_divide": (
            gated(tiny_config("qwen3", kv_heads=3), "PrunedQwen3ForCausalLM"),
            {"tensor_parallel_size": 2},
        ),
    },
    "external-launcher": {
        "2": (QWEN3, {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}),
    },
    "block-size": {"16": (QWEN3, {"block_size": 16}), "48": (QWEN3, {"block_size": 48})},
}

STARTED = [refusal for refusal in compat.REFUSALS if refusal.name != "platform"]
TABLE = [
    pytest.param(refusal, case, id=f"{refusal.name}-{case}")
    for refusal in STARTED
    for case in CASES.get(refusal.name, {"": None})
]


@pytest.fixture
def start(monkeypatch) -> Callable[..., Any]:
    """``LLM`` as a user calls it, its worker in a process of its own; fails if it gets as far as starting its engine."""
    from vllm import LLM
    from vllm.v1.engine.core_client import EngineCoreClient

    def begun(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the engine was about to be started")

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(EngineCoreClient, "make_client", begun)
    return lambda folder, **options: LLM(**engine_args(folder, **options))


def test_start_goes_as_far_as_the_engine(start, tmp_path):
    """The control: what is not refused would be started."""
    with pytest.raises(RuntimeError, match="about to be started"):
        start(QWEN3(tmp_path))


@pytest.mark.parametrize(("refusal", "case"), TABLE)
def test_refused(refusal, case, tmp_path, start):
    """With reason and way out, before there is an engine."""
    assert case, f"the refusal '{refusal.name}' has no case in this file"
    build, options = CASES[refusal.name][case]
    folder = build(tmp_path)
    with nothing_started(), pytest.raises(ValueError) as caught:
        start(folder, **options)
    message = str(caught.value)
    assert f"refused ({refusal.name})" in message
    assert refusal.reason in message
    assert refusal.way_out in message


def test_table_and_cases_agree():
    assert {refusal.name for refusal in STARTED} == set(CASES)
    assert len({refusal.name for refusal in compat.REFUSALS}) == len(compat.REFUSALS)
    assert all(refusal.reason.endswith(".") and refusal.way_out.endswith(".") for refusal in compat.REFUSALS)


SERVED: dict[str, tuple[Build, dict[str, Any]]] = {
    "no_flags": (QWEN3, {}),
    "bfloat16": (QWEN3, {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}),
    "blocks_of_64": (QWEN3, {"block_size": 64}),
    "llama": (gated(tiny_config("llama"), "PrunedLlamaForCausalLM"), {}),
    "mistral_without_window": (family("mistral", sliding_window=None), {}),
    "qwen2_window_off": (family("qwen2", use_sliding_window=False, sliding_window=64), {}),
}


@pytest.mark.parametrize("case", SERVED)
def test_not_refused(case, tmp_path):
    """The table refuses no more than it must, and the hook leaves the configuration as serving needs it."""
    build, options = SERVED[case]
    config = configure(build(tmp_path), **options)
    assert config.kv_transfer_config.kv_connector == compat.CONNECTOR
    assert config.cache_config.enable_prefix_caching, "as vLLM's default is"
    assert config.cache_config.block_size % 32 == 0


@pytest.mark.parametrize("pressure", [True, {}, {"start": 0.2}, False])
def test_no_prefixes_under_pressure(pressure, tmp_path):
    """Whatever switches pressure on switches prefix caching off: what is left then hangs on how full the pool was."""
    config = configure(QWEN3(tmp_path), additional_config={"vllm_prune": {"pressure": pressure}})
    assert config.cache_config.enable_prefix_caching == (pressure is False)


def of_method(method: str, params: dict[str, Any]) -> Build:
    """A maker of a gated checkpoint of a method."""

    def build(folder: Path) -> Path:
        config = tiny_config("qwen3")
        config.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["Qwen3ForCausalLM"]}))
        add_gates(folder, random_gates(config, method, **params), {"params": params})
        return folder

    return build


ON_ONE_RANK = {
    "ltp": {},
    "acc": {},
    "ltp_prompt": {},
    "acc_prompt": {},
    "ftp": {},
    "shadow": {"query_heads": 4, "width": 256, "hidden": 32},
    "shadow_token": {"query_heads": 4, "width": 256, "hidden": 32, "neurons": 192},
}
ON_RANKS = {
    "dcp": {"rank": 16},
    "dcp_kv_head": {"rank": 16, "scope": "kv_head"},
    "dms": {},
    "window": {},
    "random": {},
}


@pytest.mark.parametrize("method", ON_ONE_RANK)
def test_methods_that_ranks_cannot_serve(tmp_path, method):
    folder = of_method(method, ON_ONE_RANK[method])(tmp_path)
    with nothing_started(), pytest.raises(ValueError, match=rf"refused \(method-on-ranks\): {method} "):
        configure(folder, tensor_parallel_size=2)
    assert configure(folder, tensor_parallel_size=1).kv_transfer_config.kv_connector == compat.CONNECTOR


@pytest.mark.parametrize("method", ON_RANKS)
def test_methods_that_ranks_serve(tmp_path, method):
    folder = of_method(method.removesuffix("_kv_head"), ON_RANKS[method])(tmp_path)
    assert configure(folder, tensor_parallel_size=2).kv_transfer_config.kv_connector == compat.CONNECTOR


def test_every_method_is_served_by_ranks_or_refused():
    assert {name.removesuffix("_kv_head") for name in ON_RANKS} | set(ON_ONE_RANK) == set(GATES)


def test_platform(tmp_path):
    """On this machine only by handing the table a configuration that says it is of another device."""
    real = configure(QWEN3(tmp_path))
    real.kv_transfer_config = None
    compat.check(real)
    elsewhere = SimpleNamespace(**{**vars(real), "device_config": SimpleNamespace(device_type="xpu")})
    (refusal,) = [refusal for refusal in compat.REFUSALS if refusal.name == "platform"]
    with pytest.raises(compat.PruneError) as caught:
        compat.check(elsewhere)
    assert refusal.reason in str(caught.value)
    assert refusal.way_out in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("head-size", {"head_dim": 32}), ("dtype", {"dtype": torch.float64}), ("block-size", {"block_size": 96})],
)
def test_what_a_gpu_does_not_take(tmp_path, name, changes):
    """Each device has a table of its own: what is fine on one is refused on another."""
    build = gated(tiny_config("qwen3", head_dim=changes.get("head_dim", 64)), "PrunedQwen3ForCausalLM")
    real = configure(build(tmp_path))
    real.kv_transfer_config = None
    real.model_config.dtype = changes.get("dtype", torch.bfloat16)
    real.cache_config.block_size = changes.get("block_size", 64)
    gpu = SimpleNamespace(**{**vars(real), "device_config": SimpleNamespace(device_type="cuda")})
    with pytest.raises(compat.PruneError, match=name):
        compat.check(gpu)


@pytest.mark.parametrize(("cache", "skips", "knows", "refused"), [
    ("fp8", [], True, False), ("fp8_e4m3", [], True, False), ("auto", [], False, False), ("bfloat16", [], False, False),
    ("fp8", [], False, True), ("fp8", ["0"], True, True), ("fp8_e5m2", [], True, True), ("nvfp4", [], True, True),
])  # fmt: skip
def test_caches_on_a_gpu(monkeypatch, cache, skips, knows, refused):
    (refusal,) = [refusal for refusal in compat.REFUSALS if refusal.name == "kv-cache-dtype"]
    monkeypatch.setattr(compat, "has_fp8", lambda: knows)
    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type="cuda"), model_config=SimpleNamespace(dtype=torch.bfloat16),
        cache_config=SimpleNamespace(cache_dtype=cache, kv_cache_dtype_skip_layers=skips),
    )  # fmt: skip
    assert bool(refusal.holds(config)) == refused


# vLLM's version ------------------------------------------------------------------------------------------------------


def test_started_on_another_version(tmp_path, monkeypatch, start):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.2")
    with (
        nothing_started(),
        pytest.raises(ValueError, match=r"vLLM 0\.31\.2 is not supported; 0\.32 or 0\.33 is needed\. Inst"),
    ):
        start(QWEN3(tmp_path))


def test_other_models_on_another_version(tmp_path, monkeypatch, caplog):
    """Registering only warns, and a model without gates is configured as ever."""
    from vllm_prune.plugin import register

    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.2")
    vllm_logger = logging.getLogger("vllm")
    caplog.set_level(logging.WARNING, logger="vllm")  # whatever VLLM_LOGGING_LEVEL says
    vllm_logger.addHandler(caplog.handler)  # vLLM's logger does not propagate to the root
    try:
        register()
    finally:
        vllm_logger.removeHandler(caplog.handler)
    assert "vLLM 0.31.2 is not supported" in caplog.text
    config = tiny_config("qwen3")
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(tmp_path)
    assert configure(tmp_path).kv_transfer_config is None
