"""Training FTP's router (arXiv 2412.11494): straight-through decisions, and the losses beside distillation.

Loss = L_d + lambda_s L_s + lambda_g(t) L_g. L_d is KL to the dense model at the last block (``kl_forward``). L_s = sum over
blocks of max(s_i - skipped_i, 0), one-sided. L_g: cross-entropy with the static router's decisions, linear to 0. In prompt mode
L_s and L_g are about the prompt's tokens, L_d about what follows them. Ours,
where the paper says nothing: Gumbel-softmax over the two outputs (of two, a sigmoid with logistic noise), its
temperature falling geometrically; no noise in the second half, or the router would hide behind it and skip nothing by
argmax; and schedules scaled at random, so that strength is an input that means something.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vllm_prune.gates.ftp import MOST, FTPGate, static_keep

from .recipe_ftp import FTPObjective
from .routed import Decide, Routes


def tau_at(objective: FTPObjective, progress: float) -> float:
    """Temperature: geometric from ``tau_start`` to ``tau_end`` over the run."""
    return objective.tau_start * float(objective.tau_end / objective.tau_start) ** progress


def noise_at(objective: FTPObjective, progress: float) -> float:
    """Factor of the logistic noise: linear from ``tau_start`` to 0 at ``guide_until``; the rest is decided by argmax."""
    return objective.tau_start * max(0.0, 1.0 - progress / objective.guide_until)


def guide_at(objective: FTPObjective, progress: float) -> float:
    """Weight of L_g: linear to 0 at ``guide_until``."""
    return objective.guide_weight * max(0.0, 1.0 - progress / objective.guide_until)


def row_scales(keys: torch.Tensor, seed: int, low: float, high: float) -> torch.Tensor:
    """A factor of the schedule for each row of the run, uniform in [low, high], from (seed, row) alone: float32 [B]."""
    draws = [
        torch.rand(1, generator=torch.Generator().manual_seed((seed * 1_000_003 + 17 * key + 5) % 2**62))
        for key in keys.tolist()
    ]
    return (low + (high - low) * torch.cat(draws)).to(keys.device)


class RouterPass:
    """The decisions of one forward pass, to give to ``GatedModel.forward(decide=...)``, and the losses after it.

    Args:
        gates: one a block, with one router between them.
        scale: float32 [B], strength of each row.
        tau: temperature of the backward pass.
        noise: added to run - skip, [B, T, 1] a block; None decides by argmax.
    """

    def __init__(
        self, gates: Sequence[Any], scale: torch.Tensor, tau: float, noise: Iterator[torch.Tensor] | None
    ) -> None:
        self.gates: Sequence[FTPGate] = gates
        self.scale, self.tau, self.noise = scale, tau, noise
        self._routes: Routes | None = None
        self._layers: list[int] = []
        self._wanted: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []

    @staticmethod
    def reads(routes: Routes) -> torch.Tensor:
        """What routers decide from: [B, T, 3]."""
        return routes.facts

    def __call__(self, layer: int, routes: Routes) -> torch.Tensor | None:
        gate = self.gates[layer]
        if gate.always_runs:
            return None
        wanted = gate.requirement(self.scale)
        run, skip = gate.logits(self.reads(routes), wanted[:, None]).unbind(-1)
        logit = run - skip
        noisy = logit if self.noise is None else logit + next(self.noise)[..., 0]
        soft = torch.sigmoid(noisy / self.tau)
        self._routes = routes
        self._layers.append(layer)
        self._wanted.append(wanted)
        self._logits.append(logit)
        return (noisy >= 0).float() + soft - soft.detach()

    @property
    def runs(self) -> list[torch.Tensor]:
        """[B, T] a routed block: 1 where it ran, exempt tokens included."""
        return [] if self._routes is None else [self._routes.kept[layer] for layer in self._layers]

    def skipped(self) -> torch.Tensor:
        """Share of tokens that each routed block skipped: [blocks, B]."""
        assert self._routes is not None
        return 1.0 - self._routes.share(torch.stack(self.runs))

    def skipped_everywhere(self) -> torch.Tensor:
        """Share of tokens that were skipped, mean over rows and all blocks, those that always run too. No gradient."""
        if self._routes is None:
            return torch.zeros(())
        return 1.0 - self._routes.share(torch.stack(self._routes.kept)).detach().mean()

    def sparsity_loss(self) -> torch.Tensor:
        """L_s: sum over blocks, mean over rows."""
        if self._routes is None:
            return torch.zeros(())
        return (torch.stack(self._wanted) - self.skipped()).clamp_min(0.0).sum(0).mean()

    def guide_loss(self) -> torch.Tensor:
        """L_g: binary cross-entropy with the static router, mean over blocks, rows and the tokens of each."""
        if self._routes is None:
            return torch.zeros(())
        t, prompt = self._logits[0].shape[1], self._routes.prompt
        static = torch.stack([static_keep(t, wanted, prompt=prompt) for wanted in self._wanted]).float()
        each = F.binary_cross_entropy_with_logits(torch.stack(self._logits), static, reduction="none")
        return self._routes.share(each).mean()


def static_decisions(schedule: Sequence[float]) -> Decide:
    """The static router at a schedule, as decisions for ``GatedModel.forward``."""

    def decide(layer: int, routes: Routes) -> torch.Tensor | None:
        if schedule[layer] <= 0.0:
            return None
        b, t, _ = routes.facts.shape
        return static_keep(t, min(schedule[layer], MOST), routes.facts.device, routes.prompt).float().expand(b, t)

    return decide


def random_decisions(schedule: Sequence[float], seed: int) -> Decide:
    """As many tokens as the static router keeps, chosen at random: the baseline."""
    generator = torch.Generator().manual_seed(seed)

    def decide(layer: int, routes: Routes) -> torch.Tensor | None:
        if schedule[layer] <= 0.0:
            return None
        b, t, _ = routes.facts.shape
        counted = routes.counted.cpu()
        budget = ((1.0 - min(schedule[layer], MOST)) * counted.sum(-1, keepdim=True)).round().clamp_min(1.0)
        draw = torch.rand(b, t, generator=generator)
        if routes.exempt is not None:
            draw = draw.masked_fill(routes.exempt.cpu(), -1.0)  # part of the budget, not on top of it
        order = draw.masked_fill(~counted, 2.0).argsort(-1).argsort(-1)
        return (order < budget).float().to(routes.facts.device)

    return decide


def set_schedule(gates: Sequence[Any], schedule: Sequence[float]) -> None:
    """Write a schedule into the gates; block 0's must be 0."""
    if schedule[0] != 0.0:
        raise ValueError("block 0 always runs")
    for gate, share in zip(gates, schedule, strict=True):
        gate.sparsity.fill_(share)


def schedule_of(gates: Sequence[Any]) -> list[float]:
    """The schedule in the gates."""
    return [float(gate.sparsity) for gate in gates]
