"""FSDP2 under the Hugging Face Trainer: weights, gradients and optimizer state divided among W processes.

``accelerate`` does the work: it calls ``torch.distributed.fsdp.fully_shard`` on every decoder layer and on the root,
and moves the optimizer to the shards. Three things are ours:

* accelerate 1.15 turns FSDP on for accelerators only (``AcceleratorState``: MULTI_GPU and the like, not MULTI_CPU),
  although FSDP2 runs on gloo. On a CPU we set the two fields of its state that it sets itself on a GPU, so that the
  same code runs here, in tests, and there.
* ``fully_shard`` refuses parameters without dimensions (DCP's beta): they have one element, shape [1], while sharded.
* A checkpoint is written whole, in the files and shapes of a single process: rank 0 gathers, every rank reads. So a run
  may go on with another number of processes, or with none but its own. Rank 0 needs memory for all of it, once.

Whatever runs the module must enter through its ``forward``, on all ranks together: weights are gathered there.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer

from . import ranks
from .families import attention_modules

WEIGHTS, OPTIMIZER, SCHEDULER = "model.safetensors", "optimizer.pt", "scheduler.pt"

FSDP: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,  # every rank has read the weights already
    },
}
"""Fields of ``TrainingArguments`` that turn FSDP2 on."""


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Names of the classes of decoder layers: each layer is gathered when it runs, and forgotten after."""
    attentions = {id(module) for module in attention_modules(model)}
    layers = [m for m in model.modules() if any(id(child) in attentions for child in m.children())]
    return sorted({type(layer).__name__ for layer in layers})


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds any part of the module."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def flatten_scalars(module: nn.Module) -> None:
    """Give parameters without dimensions the shape [1], in place, so that an optimizer's references stay valid."""
    for parameter in module.parameters():
        if parameter.ndim == 0:
            parameter.data = parameter.data.reshape(1)


def _gathered(tree: Any, scalars: Collection[int] = ()) -> Any:
    """A nested state with each sharded tensor whole, on the CPU of rank 0; the others help and forget it at once.

    Args:
        scalars: ids of tensors that had no dimensions.
    """
    if isinstance(tree, DTensor):
        tensor = tree.full_tensor()
        if not ranks.is_main():
            return None
        return (tensor.reshape(()) if id(tree) in scalars else tensor).cpu()
    if isinstance(tree, dict):
        return {key: _gathered(value, scalars) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_gathered(value, scalars) for value in tree)
    return tree


def full_state(module: nn.Module, scalars: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The module's whole state dict, on the CPU of rank 0; other ranks get {}. Collective: every rank calls it.

    Args:
        scalars: names of parameters that had no dimensions before ``flatten_scalars``.
    """
    if not is_sharded(module):
        return module.state_dict() if ranks.is_main() else {}
    state: dict[str, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in made:
                made[id(tensor)] = _gathered(tensor, {id(tensor)} if name in scalars else ())
            state[name] = made[id(tensor)]
    return {name: value.detach() for name, value in state.items()} if ranks.is_main() else {}


def _placed(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor in the shape, dtype and placement of a parameter."""
    tensor = tensor.to(dtype=like.dtype, device=like.device).reshape(like.shape)
    if isinstance(like, DTensor):
        # Every rank has read the same file: each takes its part, nothing travels.
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def load_full_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Fill a (sharded) module from a whole state dict that every rank has. Tied weights may be named once.

    Raises:
        KeyError: a tensor of the module is missing, or one is too many.
    """
    own = module.state_dict(keep_vars=True)
    places: dict[int, set[str]] = {}
    for name, tensor in own.items():
        places.setdefault(id(tensor), set()).add(name)
    missing = [sorted(names)[0] for names in places.values() if not names & set(state)]
    extra = sorted(set(state) - set(own))
    if missing or extra:
        raise KeyError(f"checkpoint lacks {missing or 'nothing'} and has in addition {extra or 'nothing'}")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(_placed(value, own[name]))


def _parts(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it is made of."""
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return [optimizer] + [part for child in inner for part in _parts(child)]


def full_optimizer_state(optimizer: Optimizer, scalars: Collection[nn.Parameter] = ()) -> dict[str, Any]:
    """The optimizer's state dict with whole tensors, on the CPU of rank 0; other ranks get {}. Collective.

    Args:
        scalars: parameters that had no dimensions before ``flatten_scalars``.
    """
    wanted = {id(parameter) for parameter in scalars}
    owned = [values for part in _parts(optimizer) for p, values in part.state.items() if id(p) in wanted]
    with torch.no_grad():
        state = _gathered(optimizer.state_dict(), {id(value) for values in owned for value in values.values()})
    return state if ranks.is_main() else {}


def _placed_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole state with each tensor as its parameter lies. A composed optimizer keeps its parts' states under their
    attributes' names."""
    if "param_groups" not in state:
        return {name: _placed_state(getattr(optimizer, name), part) for name, part in state.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {}
    for index, values in state["state"].items():
        like = parameters[index]
        placed[index] = {
            key: _placed(value, like)
            if isinstance(value, torch.Tensor) and key != "step" and value.numel() == like.numel()
            else value
            for key, value in values.items()
        }
    return {**state, "state": placed}


def load_full_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimizer over (sharded) parameters from a whole state that every rank has.

    It is divided before the optimizer sees it, which would put all of it on the parameters' device.
    """
    optimizer.load_state_dict(_placed_state(optimizer, state))


class ShardedTrainer(Trainer):
    """A Trainer that can run FSDP2 on CPUs too, and whose checkpoints are those of a single process.

    Without FSDP it is ``Trainer``. Its model has the base model as ``model.model``.
    """

    scalars: frozenset[str] = frozenset()
    _optimizer_state: dict[str, Any] = {}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if not self.args.fsdp:
            return
        if not self.is_fsdp_enabled and self.accelerator.distributed_type is DistributedType.MULTI_CPU:
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            for shared in (PartialState._shared_state, AcceleratorState._shared_state):
                shared["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if not self.accelerator.is_fsdp2:
            raise ValueError(f"FSDP2 is not on with {self.accelerator.distributed_type}")
        self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layer_classes(self.model.model)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # Called between the creation of the optimizer and accelerate's sharding.
        if self.is_fsdp_enabled and not is_sharded(model):
            self.scalars = frozenset(name for name, p in model.named_parameters() if p.ndim == 0)
            flatten_scalars(model)
        return super()._wrap_model(model, *args, **kwargs)  # type: ignore[no-any-return]

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The whole state dict of the trained module on rank 0. Collective when sharded."""
        return full_state(self.model, self.scalars)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # All that needs every rank comes before the first byte is written: when rank 0 fails to write, none waits.
        state = self.full_weights()
        scalars = [p for name, p in self.model.named_parameters() if name in self.scalars]
        self._optimizer_state = full_optimizer_state(self.optimizer.optimizer, scalars)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state, self._optimizer_state = self._optimizer_state, {}
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif is_sharded(self.model):  # the Trainer calls this before sharding as well
            load_full_state(self.model, load_file(Path(resume_from_checkpoint) / WEIGHTS))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        load_full_optimizer_state(self.optimizer.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
