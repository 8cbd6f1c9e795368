"""Loading gates beside base weights. Runs in the worker."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_prune.attention.gated import GatedAttention, section_of
from vllm_prune.config import TENSOR_PREFIX, find_gate_file, load_gates
from vllm_prune.errors import PruneError
from vllm_prune.public_dms import is_public_tensor, public_gates


def without_gates(
    weights: Iterable[tuple[str, torch.Tensor]], public: dict[str, torch.Tensor] | None = None
) -> Iterable[tuple[str, torch.Tensor]]:
    """The base's weights: vLLM's loader globs the folder and so meets the gate file too. Where ``public`` is given, tensors of
    public DMS checkpoints are put there instead, by name."""
    for name, tensor in weights:
        if public is not None and is_public_tensor(name):
            public[name] = tensor.clone()
        elif not name.startswith(TENSOR_PREFIX):
            yield name, tensor


def load_gate_weights(
    model: nn.Module, vllm_config: VllmConfig, public: dict[str, torch.Tensor] | None = None
) -> set[str]:
    """Fill every layer's gate from the gate file, or from tensors that lay among the base's weights; where there are several
    ranks, with the part of this one.

    Returns:
        Names of the parameters loaded, as in ``model.named_parameters()``.
    """
    section = section_of(vllm_config)
    config = vllm_config.model_config
    if public and section.tensors == "file":
        raise PruneError(
            f"tensor '{min(public)}' belongs to DMS gates, but drop_gate.tensors is 'file'.", "Export again."
        )
    if section.tensors == "base":
        tensors = public_gates(public or {}, section)
    else:
        tensors = load_gates(find_gate_file(config.model, config.revision), section)
    gated = [(name, module) for name, module in model.named_modules() if isinstance(module, GatedAttention)]
    if len(gated) != section.num_layers:
        raise RuntimeError(f"vllm-prune: {len(gated)} gated layers were built, the checkpoint has {section.num_layers}")
    rank, ranks = get_tensor_model_parallel_rank(), vllm_config.parallel_config.tensor_parallel_size
    loaded: set[str] = set()
    for layer, ((name, module), state) in enumerate(zip(gated, tensors, strict=True)):
        if module.drop_gate is not None:
            if ranks > 1:
                whole = section.build_gate().at_layer(layer)
                whole.load_state_dict(state)
                state = whole.at_rank(rank, ranks).state_dict()
            module.drop_gate.load_state_dict(state)
            loaded.update(f"{name}.drop_gate.{key}" for key in state)
    return loaded
