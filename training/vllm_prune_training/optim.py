"""Muon for hidden matrices with AdamW for the rest, as one optimizer, and a schedule by time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


class MuonAdamW(torch.optim.Optimizer):
    """Steps ``torch.optim.Muon`` on 2-D parameters of the layers and ``AdamW`` on all others."""

    def __init__(
        self, model: nn.Module, muon_lr: float = 0.02, adam_lr: float = 3e-3, muon_decay: float = 0.01
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        hidden = [p for name, p in named if p.ndim == 2 and ".layers." in name]
        other = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
        self.muon = torch.optim.Muon(hidden, lr=muon_lr, weight_decay=muon_decay, momentum=0.95)
        self.adam = torch.optim.AdamW(other, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
        super().__init__(hidden + other, {"lr": muon_lr})
        self.param_groups = self.muon.param_groups + self.adam.param_groups

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of both optimizers."""
        if closure is not None:
            raise ValueError("closures are not supported")
        self.muon.step()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """State of both optimizers."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both optimizers and keeps ``param_groups`` joined."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adam.load_state_dict(state_dict["adam"])
        self.param_groups = self.muon.param_groups + self.adam.param_groups


class Clock:
    """Time budget of a run; ``before`` seconds were used by earlier parts of the same run."""

    def __init__(self, seconds: float, before: float = 0.0) -> None:
        self.seconds, self.before = seconds, before
        self.start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds used so far, earlier parts included."""
        return self.before + time.monotonic() - self.start

    def progress(self) -> float:
        """Used share of the budget, at most 1."""
        return min(1.0, self.elapsed() / self.seconds)


def trapezoid(progress: float, warmup: float = 0.02, decay: float = 0.45) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear decay to zero at progress 1."""
    if progress < warmup:
        return max(0.02, progress / warmup)
    return min(1.0, max(0.0, (1.0 - progress) / decay))


def timed_schedule(optimizer: torch.optim.Optimizer, clock: Clock) -> LambdaLR:
    """A scheduler whose factor follows the clock and not the step."""
    return LambdaLR(optimizer, lambda _step: trapezoid(clock.progress()))
