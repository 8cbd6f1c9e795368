"""FSDP2 under the Hugging Face Trainer: weights, gradients and optimizer state divided among W processes.

``accelerate`` does the work: it calls ``torch.distributed.fsdp.fully_shard`` on every decoder layer and on the root,
and moves the optimizer to the shards. Three things are ours:

* accelerate 1.15 turns FSDP on for accelerators only (``AcceleratorState``: MULTI_GPU and the like, not MULTI_CPU),
  although FSDP2 runs on gloo. On a CPU we set the two fields of its state that it sets itself on a GPU, so that the
  same code runs here, in tests, and there.
* ``fully_shard`` refuses parameters without dimensions (DCP's beta): they have one element, shape [1], while sharded.
* A checkpoint is written whole, in the files and shapes of a single process: rank 0 gathers, every rank reads. So a run
  may go on with another number of processes, or with none but its own. Rank 0 needs memory for all of it, once.

What it costs to evaluate: ``whole`` gathers the root's own weights for code that does not enter through the root's
``forward``; layers gather theirs by themselves, on all ranks together. A rank that stays away makes the others wait.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import Trainer

from . import ranks

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.pt"


def fsdp_arguments(layer_classes: set[str]) -> dict[str, Any]:
    """Fields of ``TrainingArguments`` that shard every module of these class names by itself, and the rest together."""
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": sorted(layer_classes),
            "state_dict_type": "FULL_STATE_DICT",
            "cpu_ram_efficient_loading": False,  # every rank has read the weights already
        },
    }


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds any part of the module."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Direct calls of what lies below a sharded root work inside this. Enter it on all ranks; nothing if not sharded."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def flatten_scalars(module: nn.Module) -> None:
    """Give parameters without dimensions the shape [1], in place, so that an optimizer's references stay valid."""
    for parameter in module.parameters():
        if parameter.ndim == 0:
            parameter.data = parameter.data.reshape(1)


def _gathered(tree: Any, scalars: Collection[int] = ()) -> Any:
    """A nested state with each sharded tensor whole, on the CPU; those whose id is in ``scalars`` without dimensions."""
    if isinstance(tree, DTensor):
        tensor = tree.full_tensor().cpu()
        return tensor.reshape(()) if id(tree) in scalars else tensor
    if isinstance(tree, dict):
        return {key: _gathered(value, scalars) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_gathered(value, scalars) for value in tree)
    return tree


def full_state(module: nn.Module, scalars: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The module's whole state dict, on the CPU. Collective: every rank calls it, and every rank gets it.

    Args:
        scalars: names of parameters that had no dimensions before ``flatten_scalars``.
    """
    with torch.no_grad():
        state = _gathered(module.state_dict())
    return {name: tensor.reshape(()) if name in scalars else tensor for name, tensor in state.items()}


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
    """The optimizer's state dict with whole tensors, on the CPU. Collective.

    Args:
        scalars: parameters that had no dimensions before ``flatten_scalars``.
    """
    wanted = {id(parameter) for parameter in scalars}
    owned = [values for part in _parts(optimizer) for p, values in part.state.items() if id(p) in wanted]
    with torch.no_grad():
        return _gathered(optimizer.state_dict(), {id(value) for values in owned for value in values.values()})


def load_full_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimizer over (sharded) parameters from a whole state that every rank has."""
    optimizer.load_state_dict(state)
    for part in _parts(optimizer):
        for parameter, values in part.state.items():
            for key, value in values.items():
                if key != "step" and isinstance(value, torch.Tensor) and value.numel() == parameter.numel():
                    values[key] = _placed(value, parameter)


class ShardedTrainer(Trainer):
    """A Trainer that can run FSDP2 on CPUs too, and whose checkpoints are those of a single process.

    Without FSDP it is ``Trainer``.
    """

    scalars: frozenset[str] = frozenset()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled and self.accelerator.device.type == "cpu":
            if self.accelerator.distributed_type is not DistributedType.MULTI_CPU:
                raise ValueError(f"FSDP needs several processes, this is {self.accelerator.distributed_type}")
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            for shared in (PartialState._shared_state, AcceleratorState._shared_state):
                shared["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # Called between the creation of the optimizer and accelerate's sharding.
        if self.is_fsdp_enabled and not is_sharded(model):
            self.scalars = frozenset(name for name, p in model.named_parameters() if p.ndim == 0)
            flatten_scalars(model)
        return super()._wrap_model(model, *args, **kwargs)

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The whole state dict of the trained module. Collective when sharded."""
        return full_state(self.model, self.scalars)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = self.full_weights()
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        scalars = [p for name, p in self.model.named_parameters() if name in self.scalars]
        state = full_optimizer_state(self.optimizer.optimizer, scalars)
        if self.args.should_save:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")

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
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        if dist.is_initialized():
            ranks.barrier()
