"""Writing a gated checkpoint: gates beside base weights, and the ``drop_gate`` section in config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_prune.config import GATE_FILE, SECTION, TENSOR_PREFIX, DropGateConfig
from vllm_prune.gates import Gate

GATED_ARCHITECTURES = {
    "Qwen3ForCausalLM": "PrunedQwen3ForCausalLM",
    "LlamaForCausalLM": "PrunedLlamaForCausalLM",
}
"""Base architecture to its gated class; every other decoder is served by ``GENERIC_ARCHITECTURE``."""

GENERIC_ARCHITECTURE = "PrunedTransformersForCausalLM"


def write_json(path: Path, data: Any) -> None:
    """Write a file so that a reader, or a crash, finds the old one or the new one and nothing between.

    A hard-linked or symbolically linked file is replaced, never written through.

    Raises:
        OSError: the file could not be written; the old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def gated_architecture(base: str) -> str:
    return GATED_ARCHITECTURES.get(base, GENERIC_ARCHITECTURE)


def save_gates(path: Path, gates: Sequence[Gate], section: DropGateConfig) -> None:
    """Write a gate file: float32 tensors of every layer, and in its metadata what the gates are, so that it can travel.

    Args:
        path: of the file.
        gates: one a layer.
        section: of the checkpoint; provenance and calibration are left out.
    """
    tensors = {
        f"{TENSOR_PREFIX}.{layer}.{name}": tensor.detach()
        .to(torch.float32)
        .contiguous()
        .cpu()
        .clone()  # layers may share
        for layer, gate in enumerate(gates)
        for name, tensor in gate.state_dict().items()
    }
    described = json.dumps(section.model_dump(mode="json", exclude={"provenance", "calibration"}))
    save_file(tensors, path, metadata={"format": "pt", "method": section.method, SECTION: described})


def add_gates(folder: Path, gates: list[Gate], section: dict[str, Any], architecture: str | None = None) -> None:
    """Turn an ordinary Hugging Face model folder into a gated checkpoint, in place.

    Args:
        folder: with config.json and base weights.
        gates: one a layer, L of them, all of one method.
        section: fields of ``DropGateConfig``; method and base sizes are filled in from the gates.
        architecture: overrides the gated architecture that follows from the base's.

    Raises:
        pydantic.ValidationError: the section is invalid.
        ValueError: the gates do not fit together.
    """
    shape = gates[0].shape
    if len(gates) != shape.num_layers or any(gate.method != gates[0].method for gate in gates):
        raise ValueError(f"need {shape.num_layers} gates of one method, got {[gate.method for gate in gates]}")
    full = {
        "method": gates[0].method,
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "hidden_size": shape.hidden_size,
        **section,
    }
    checked = DropGateConfig.model_validate(full)
    save_gates(folder / GATE_FILE, gates, checked)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    base = config["architectures"][0]
    config["architectures"] = [architecture or gated_architecture(base)]
    config[SECTION] = checked.model_dump(mode="json", exclude_none=True)
    write_json(path, config)
