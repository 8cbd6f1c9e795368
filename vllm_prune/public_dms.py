"""Public DMS checkpoints, read as they are: config fields and tensor names of three formats. docs/public-dms.md has the sources.

| format | what tells it | token t's number g | about | set to 0 |
|---|---|---|---|---|
| ``nvidia``, borrowed | ``auto_map`` names NVIDIA's modules, or fields of ModelOpt's | last of the first query | key t - 1 | it |
| ``nvidia``, separate | and ``dms_separate_alpha`` | a linear map of the normed residual stream | key t - 1 | nothing |
| ``fastdms`` | ``dms_metadata.json`` in the folder, or the trainer's log above it | as the first | key t | nothing |

The first and the last look alike in config.json and in their tensors, and differ by one position: where nothing tells them apart,
or both claims are made, the folder is refused until ``dms_format`` says it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_prune.config import (
    GATE_FILE,
    MAX_TOKENS,
    SECTION,
    TENSOR_PREFIX,
    DropGateConfig,
    find_gate_file,
    gate_states,
    load_gates,
)
from vllm_prune.errors import PruneError, short
from vllm_prune.json_text import parse

BASES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
"""Bases that public DMS checkpoints are known of: ``model_type`` to architecture."""

METADATA, TRAINING_LOG = "dms_metadata.json", "training_log.json"
MOST_BYTES = 2**20
"""Of such a file; theirs have a few hundred."""
STATED = ("dms_format", "dms_expected_keep")
"""Fields of ours, which no checkpoint has: a user states them."""

_DECISIVE = ("dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset")
_MODELOPT = ("dms_separate_alpha", "dms_alpha_per", "dms_disable_eviction")
_MODELOPT_IDLE = (
    "dms_paged_attention_block_size", "dms_tau", "dms_compile_limit", "dms_manual_inference_mode", "dms_chunked_prefill",
    "dms_preallocate_for_tokens",
)  # fmt: skip
"""Of training, or of how NVIDIA's own cache computes the same attention."""
_KNOWN = {
    "nvidia": (*_DECISIVE, *_MODELOPT, *_MODELOPT_IDLE, "dms_cr"),
    "fastdms": (*_DECISIVE, "dms_alpha_offset", "dms_cr"),
}
_NVIDIA_MODULE = re.compile(r"(?:^|--)(?:configuration|modeling)_\w+_dms\.\w+$")
_TENSOR = re.compile(r"^(?:model\.)?layers\.(\d+)\.self_attn\.(dms_\w+)\.(\w+)$")
_NAMES = {"dms_proj_alpha": "gate", "dms_proj_alpha_norm": "norm"}


def _stated(format_: str) -> str:
    return f"""--hf-overrides '{{"dms_format": "{format_}"}}'"""


WAY_OUT = f"Say which it is: {_stated('nvidia')} or {_stated('fastdms')} (docs/public-dms.md)."


def _fields(config: Any) -> dict[str, Any]:
    """Every ``dms_*`` field of a config object that is set; null says that a field means nothing."""
    return {name: value for name, value in vars(config).items() if name.startswith("dms_") and value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        data = parse(raw)
    except (OSError, ValueError) as error:
        raise PruneError(f"{path.name} cannot be read: {error}.", "Copy the checkpoint again.") from None
    data = data.get("config", data) if isinstance(data, dict) else data
    if not isinstance(data, dict):
        raise PruneError(f"{path.name} must hold an object.", "Copy the checkpoint again.")
    return data


def _metadata(model: str, revision: str | None, named: bool) -> tuple[str, dict[str, Any]] | None:
    """FastDMS's own metadata, and where it lies; None when there is none. A hub is asked only about configs with DMS fields."""
    folder = Path(model)
    if folder.is_dir():
        path, log = folder / METADATA, folder.resolve().parent / TRAINING_LOG
        if path.is_file():
            return METADATA, _read_json(path)
        try:
            found = _read_json(log) if log.is_file() else {}
        except PruneError:  # somebody else's
            found = {}
        ours = {"window_size", "zeroing_steps", "alpha_scale", "alpha_offset"} <= found.keys()
        return (f"../{TRAINING_LOG}", found) if ours else None
    if not named:
        return None
    from transformers.utils.hub import cached_file

    cached = cached_file(model, METADATA, revision=revision, _raise_exceptions_for_missing_entries=False,
                         _raise_exceptions_for_connection_errors=False)  # fmt: skip
    return None if cached is None else (METADATA, _read_json(Path(cached)))


def _names_nvidia(config: Any) -> bool:
    auto_map = getattr(config, "auto_map", None)
    if not isinstance(auto_map, dict):
        return False
    named = [x for value in auto_map.values() for x in (value if isinstance(value, list | tuple) else [value])]
    return any(isinstance(x, str) and _NVIDIA_MODULE.search(x) for x in named)


def _format_of(config: Any, fields: dict[str, Any], has_metadata: bool) -> str:
    """``nvidia`` or ``fastdms``. Raises PruneError where nothing tells, or both are claimed."""
    stated = fields.get("dms_format")
    if stated is not None:
        if not isinstance(stated, str) or stated not in _KNOWN:
            raise PruneError(f"dms_format is {short(stated)}, not 'nvidia' or 'fastdms'.", WAY_OUT)
        return stated
    nvidia = _names_nvidia(config) or any(name in fields for name in (*_MODELOPT, *_MODELOPT_IDLE))
    if nvidia and has_metadata:
        raise PruneError(
            f"this DMS checkpoint has NVIDIA's remote code or fields and FastDMS's {METADATA}: their gates decide about "
            "different keys.", WAY_OUT,
        )  # fmt: skip
    if not nvidia and not has_metadata:
        raise PruneError(
            f"config.json has DMS fields ({', '.join(sorted(fields))}), but nothing says whose: NVIDIA's gates decide about the "
            "previous token's key, FastDMS's about their own.", WAY_OUT,
        )  # fmt: skip
    return "nvidia" if nvidia else "fastdms"


def _number(name: str, where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        raise PruneError(f"{name} in {where} must be a finite number, got {short(value)}.", "Correct it.")
    return float(value)


def _decisive(fields: dict[str, Any], metadata: tuple[str, dict[str, Any]] | None) -> dict[str, float]:
    """Window, scale and offset. What config.json and FastDMS's metadata both say they must say alike."""
    names = {
        "window": ("dms_window_size", "window_size"),
        "scale": ("dms_alpha_scale", "alpha_scale"),
        "offset": ("dms_initial_alpha_offset", "dms_alpha_offset", "alpha_offset"),
    }
    sources = [("config.json", fields), *([metadata] if metadata else [])]
    found: dict[str, float] = {}
    for kind, spellings in names.items():
        said = [(n, where, _number(n, where, x[n])) for where, x in sources for n in spellings if x.get(n) is not None]
        if len({value for _, _, value in said}) > 1:
            claims = " and ".join(f"{value:g} ({name} in {where})" for name, where, value in said)
            raise PruneError(f"this DMS checkpoint contradicts itself: its {kind} is {claims}.", "Correct one of them.")
        if said:
            found[kind] = said[0][2]
    window = found.get("window")
    if window is None:
        raise PruneError(
            "this DMS checkpoint does not say its window (dms_window_size): the formats' defaults differ, 512 and 256.",
            """Give it: --hf-overrides '{"dms_window_size": N}'.""",
        )
    if window != int(window) or not 0 <= window <= MAX_TOKENS:
        raise PruneError(f"dms_window_size must be a whole number of tokens, got {window:g}.", "Correct it.")
    return {"scale": 100.0, "offset": 5.0, **found}  # the defaults of both formats


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise PruneError(f"{name} in config.json must be true or false, got {short(value)}.", "Correct it.")
    return value


def public_section(config: Any, model: str, revision: str | None = None) -> dict[str, Any] | None:
    """The ``drop_gate`` section that a public DMS checkpoint stands for.

    Args:
        config: its Hugging Face config object, whichever class read it.
        model: its folder or hub id.
        revision: of the hub.

    Returns:
        None where the checkpoint has nothing of DMS.

    Raises:
        PruneError: it has, and what it means is unknown, missing or contradictory.
    """
    fields = _fields(config)
    metadata = _metadata(model, revision, bool(fields))
    if not fields and metadata is None:
        return None
    if not isinstance(config.model_type, str) or config.model_type not in BASES:
        raise PruneError(
            f"DMS checkpoints of model_type {short(config.model_type)} are not known.", f"Known: {', '.join(BASES)}."
        )
    kind = _format_of(config, fields, metadata is not None)
    for name in sorted(set(fields) - set(STATED) - set(_KNOWN[kind])):
        raise PruneError(
            f"field '{name}' in config.json is not known of {kind} DMS checkpoints, and may change what is dropped.",
            f"""If it means nothing to serving, say so: --hf-overrides '{{"{name}": null}}'.""",
        )
    numbers = _decisive(fields, metadata if kind == "fastdms" else None)
    separate, per = _flag(fields, "dms_separate_alpha"), fields.get("dms_alpha_per", "head")
    if separate and getattr(config, "attention_bias", False):
        raise PruneError(
            "separate DMS gates with attention_bias are not supported.", "Use a checkpoint without biases."
        )
    params = {
        "delay": int(numbers["window"]), "scale": numbers["scale"], "offset": numbers["offset"], "per": per,
        "form": "query_kept" if kind == "fastdms" else "stream" if separate else "query",
        "about": "own" if kind == "fastdms" else "previous",
    }  # fmt: skip
    if separate:
        params["eps"] = _number("rms_norm_eps", "config.json", config.rms_norm_eps)
    return {
        "method": "dms", "params": params, "tensors": "base",
        "strength": 0.0 if _flag(fields, "dms_disable_eviction") else 1.0,
        "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "expected_keep": fields.get("dms_expected_keep", 1.0),
        "provenance": {"format": kind, "metadata": metadata[0] if metadata else None},
    }  # fmt: skip


def recognise(config: Any, model: str, revision: str | None = None) -> bool:
    """Give the config of a public DMS checkpoint its ``drop_gate`` section. False, and nothing done, for any other."""
    if getattr(config, SECTION, None) is not None:
        return False
    section = public_section(config, model, revision)
    if section is not None:
        setattr(config, SECTION, section)
    return section is not None


# Tensors --------------------------------------------------------------------------------------------------------------


def is_public_tensor(name: str) -> bool:
    """Whether a tensor of base weights belongs to DMS gates."""
    return _TENSOR.match(name) is not None


def public_gates(tensors: dict[str, torch.Tensor], section: DropGateConfig) -> list[dict[str, torch.Tensor]]:
    """One state dict a layer, L of them, from all of a checkpoint's DMS tensors by their own names.

    ``self_attn.dms_proj_alpha.weight`` [H, D_model] and ``self_attn.dms_proj_alpha_norm.weight`` [D_model] of each layer in the
    separate form, none in the others. Raises PruneError as ``load_gates``.
    """
    names: dict[str, str] = {}
    for name in tensors:
        match = _TENSOR.match(name)
        assert match is not None
        layer, module, part = match.groups()
        ours = f"{TENSOR_PREFIX}.{layer}.{_NAMES.get(module, module)}.{part}"
        if ours in names:
            raise PruneError(f"'{name}' is in the weights twice, as '{names[ours]}' too.", "Copy the checkpoint again.")
        names[ours] = name

    def shown(ours: str) -> str:
        layer, _, rest = ours.removeprefix(TENSOR_PREFIX + ".").partition(".")
        module, _, part = rest.partition(".")
        theirs = {ours: theirs for theirs, ours in _NAMES.items()}.get(module, module)
        return names.get(ours, f"model.layers.{layer}.self_attn.{theirs}.{part}")

    return gate_states({ours: tensors[name] for ours, name in names.items()}, section, "the weights", shown)


def _folder_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == GATE_FILE:
            continue
        if not path.is_file():  # a pipe would be waited for
            raise PruneError(f"{path.name} is no file.", "Copy the checkpoint again.")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a file, no dict)
                    if is_public_tensor(name):
                        yield name, file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise PruneError(f"{path.name} cannot be read: {error}.", "Copy the checkpoint again.") from None


def read_gates(model: str, section: DropGateConfig, revision: str | None = None) -> list[dict[str, torch.Tensor]]:
    """The gate tensors of a checkpoint before its base weights are loaded, wherever they lie: one state dict a layer.

    Raises:
        PruneError: as ``load_gates``.
    """
    if section.tensors == "file":
        return load_gates(find_gate_file(model, revision), section)
    return public_gates(dict(_folder_tensors(Path(model))), section)
