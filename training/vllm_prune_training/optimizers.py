"""The optimizer of a run: groups for the base, the gates' matrices and the gates' scalars."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vllm_prune.errors import PruneError

from .optim import MuonAdamW
from .recipe import Training
from .schedules import rate_at

GATE_BETAS = (0.9, 0.98)


def gate_groups(gates: nn.Module, training: Training) -> list[dict[str, Any]]:
    """Groups of the gates' trainable parameters: matrices and vectors, then scalars (DCP's beta, one or per head, and LTP's
    thresholds)."""
    named = [(name, p) for name, p in gates.named_parameters() if p.requires_grad]
    scalars = [p for name, p in named if name.endswith(("beta", "theta"))]
    known = {id(p) for p in scalars}
    rest = [p for p in gates.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": rest, "lr": training.gate_lr}, {"params": scalars, "lr": training.bias_lr}]
    return [{**group, "weight_decay": 0.0, "betas": GATE_BETAS} for group in groups if group["params"]]


def base_groups(model: nn.Module, training: Training) -> list[dict[str, Any]]:
    """Groups of the base's trainable parameters: matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [{**group, "lr": training.lr, "betas": (0.9, 0.95)} for group in groups if group["params"]]


class MuonWithGates(MuonAdamW):
    """Muon and AdamW for the base, AdamW for the gates, as one optimizer."""

    def __init__(self, model: nn.Module, gates: nn.Module | None, training: Training) -> None:
        assert training.adam_lr is not None
        if not any(p.ndim == 2 and ".layers." in name for name, p in model.named_parameters()):
            raise PruneError("training.optimizer muon found no matrices under '.layers.' in this model.", "Use adamw.")
        super().__init__(model, training.lr, training.adam_lr, training.weight_decay)
        groups = [] if gates is None else gate_groups(gates, training)
        self.gate = torch.optim.AdamW(groups) if groups else None
        if self.gate is not None:
            self.param_groups += self.gate.param_groups

    def step(self, closure: Any = None) -> None:
        """One step of all."""
        super().step(closure)
        if self.gate is not None:
            self.gate.step()

    def state_dict(self) -> dict[str, Any]:
        """State of all."""
        state = super().state_dict()
        return state if self.gate is None else {**state, "gate": self.gate.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores all, and keeps ``param_groups`` joined."""
        super().load_state_dict(state_dict)
        if self.gate is not None:
            self.gate.load_state_dict(state_dict["gate"])
            self.param_groups += self.gate.param_groups


def make_optimizer(model: nn.Module, gates: nn.Module | None, training: Training) -> torch.optim.Optimizer:
    """The optimizer over what requires a gradient.

    Args:
        model: the base.
        gates: its gates, None for dense training.
    """
    if training.optimizer == "muon":
        return MuonWithGates(model, gates, training)
    groups = base_groups(model, training) + ([] if gates is None else gate_groups(gates, training))
    return torch.optim.AdamW(groups)


def make_scheduler(optimizer: torch.optim.Optimizer, training: Training) -> LambdaLR:
    """Learning rates by step."""
    return LambdaLR(optimizer, lambda step: rate_at(training, step))
