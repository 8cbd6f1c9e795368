"""What changes over a run, as functions of its progress in [0, 1], and the controller of DCP's gamma."""

from __future__ import annotations

import math

from .recipe import Alpha, Objective, Training

LEAST_ALPHA = 1.02
"""The published cosine starts at 1 + 1e-8; compiled code takes alpha as a tensor, which must be at least this."""


def alpha_at(alpha: Alpha, progress: float, beta: float) -> float:
    """DCP's alpha. ``beta`` is the gates' initial bias, the unit of a band's half-width 1/(alpha - 1)."""
    low, high = alpha.span
    share = min(1.0, max(0.0, (progress - low) / (high - low)))
    if alpha.schedule == "band":
        first = alpha.first * beta
        last = 1.0 / (alpha.end - 1.0)
        value = 1.0 + 1.0 / (first * (last / first) ** share)
    else:
        if alpha.schedule == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        value = alpha.first + (alpha.end - alpha.first) * share
    return max(LEAST_ALPHA, value)


def leak_at(objective: Objective, progress: float) -> float:
    """DCP's leak: falls to 0 while alpha rises, so that scores leave the band again before the mask is hard."""
    low, high = objective.alpha.span
    return objective.leak * (1.0 - min(1.0, max(0.0, (progress - low) / (high - low))))


def keep_at(objective: Objective, progress: float) -> float:
    """DCP's target of the kept fraction: linear from 1 to ``keep``."""
    assert objective.keep is not None
    return 1.0 + (objective.keep - 1.0) * min(1.0, progress / objective.ramp)


def closed_at(objective: Objective, progress: float) -> float:
    """DMS's target of the closed fraction: 1 - 1/CR with CR linear from 1, or linear itself (arXiv 2506.05345)."""
    share = min(1.0, progress / objective.ramp)
    if objective.compression is not None:
        return 1.0 - 1.0 / (1.0 + (objective.compression - 1.0) * share)
    assert objective.closed is not None
    return objective.closed * share


def rate_at(training: Training, step: int) -> float:
    """Factor of the learning rates at an optimizer step, 0 to ``training.steps``."""
    progress = step / training.steps
    if training.warmup > 0.0 and progress < training.warmup:
        return max(0.02, progress / training.warmup)
    if training.schedule == "constant":
        return 1.0
    if training.schedule == "trapezoid":
        return min(1.0, max(0.0, (1.0 - progress) / training.decay))
    share = (progress - training.warmup) / max(1e-9, 1.0 - training.warmup)
    return 1.0 - share if training.schedule == "linear" else (1.0 + math.cos(math.pi * min(1.0, share))) / 2.0


class GammaController:
    """Gamma that follows a target: it grows while more is kept than wanted and shrinks while less is.

    Its state is part of a checkpoint. With ``objective.gamma`` it is constant, as published. The gain is per run, not
    per step: an error as large as the target, held over the whole run, changes gamma by exp(GAIN).
    """

    LOW, HIGH, GAIN = 1e-3, 3.0, 8.0

    def __init__(self, objective: Objective, steps: int) -> None:
        self.objective, self.steps = objective, steps
        self.gamma = 0.1 if objective.gamma is None else objective.gamma
        self.kept = 1.0

    def update(self, kept: float, progress: float) -> None:
        """Take in the kept fraction of a step, a mean over the global batch."""
        self.kept += 0.2 * (kept - self.kept)
        if self.objective.keep is not None:
            error = (self.kept - keep_at(self.objective, progress)) / self.objective.keep
            self.gamma = min(self.HIGH, max(self.LOW, self.gamma * math.exp(self.GAIN / self.steps * error)))

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"gamma": self.gamma, "kept": self.kept}

    def load(self, state: dict[str, float]) -> None:
        """From a checkpoint."""
        self.gamma, self.kept = state["gamma"], state["kept"]
