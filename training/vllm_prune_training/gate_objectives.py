"""What the gates are trained for: the losses of DCP and DMS, with their temperatures and budgets over time.

``progress`` in [0, 1] is the used share of the time budget. Dimension letters: B batch, T tokens, V vocabulary,
H KV heads, L layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel

from vllm_prune.gates import GATES, Gate, GateShape

from .base import weighted_loss
from .masked import GatedModel

Stats = dict[str, float]
Body = Callable[..., Any] | None


@dataclass(frozen=True)
class GateSettings:
    """Settings of a gate run. Learning rates are those at the top of the schedule; all weights are trained.

    Attributes:
        params: of the gate class.
        target: DCP: past-pair fraction to keep; DMS: closed fraction.
        target_at: progress at which the linear ramp of the target ends.
        band_start: DCP: initial half-width 1/(alpha - 1) of the soft band of scores, in units of the initial beta.
        alpha_end, alpha_from, alpha_at: DCP: between these, the band shrinks geometrically until alpha is this.
        tau: DMS: temperature.
        budget_weight: DMS: weight of the budget loss.
    """

    method: str
    minutes: float
    params: dict[str, int | float] = field(default_factory=dict)
    batch_tokens: int = 4096
    muon_lr: float = 0.004
    adam_lr: float = 8e-4
    gate_lr: float = 2e-3
    bias_lr: float = 0.03
    recall_share: float = 0.25
    answer_weight: float = 4.0
    target: float = 0.25
    target_at: float = 0.5
    band_start: float = 1.3
    alpha_end: float = 8.0
    alpha_from: float = 0.06
    alpha_at: float = 0.85
    tau: float = 0.1
    budget_weight: float = 2.0
    save_seconds: float = 300.0
    compile: bool = True
    seed: int = 2
    phases: tuple[tuple[float, int], ...] = ((0.70, 1024), (1.0, 2048))


def reference_settings(method: str, minutes: float) -> GateSettings:
    """The settings of the reference checkpoints."""
    if method == "dcp":
        return GateSettings("dcp", minutes, {"rank": 32, "beta": 4.0})
    return GateSettings(
        "dms",
        minutes,
        {"delay": 64},
        muon_lr=0.002,
        adam_lr=4e-4,
        gate_lr=4e-5,
        target=0.78,
        target_at=0.65,
        phases=((1.0, 1024),),  # a decision sees one token only: longer sequences teach nothing new
    )


def make_gates(config: PretrainedConfig, settings: GateSettings) -> list[Gate]:
    """New gates for every layer of a base model."""
    torch.manual_seed(settings.seed)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = GateShape(config.hidden_size, heads, config.num_hidden_layers)
    return [GATES[settings.method](shape, **settings.params) for _ in range(shape.num_layers)]  # type: ignore[arg-type]


class Objective(ABC):
    """A loss over soft-gated forward passes, with state that a checkpoint keeps."""

    def __init__(self, settings: GateSettings) -> None:
        self.settings = settings
        self.state: dict[str, float] = {}

    def target(self, progress: float, start: float) -> float:
        """The target of the budget: linear from ``start``, then constant."""
        share = min(1.0, progress / self.settings.target_at)
        return start + (self.settings.target - start) * share

    @abstractmethod
    def loss(
        self, gated: GatedModel, inputs: dict[str, torch.Tensor], progress: float, body: Body
    ) -> tuple[torch.Tensor, Stats]:
        """Loss of ``input_ids`` int64 [B, T] and ``answer_mask`` bool [B, T], and numbers for the log."""


class DCPObjective(Objective):
    """Next-token cross-entropy + gamma * mean visibility over past pairs (arXiv 2305.15805, section 3).

    The paper's mean runs over the whole square with its constant half, so our gamma counts about twice theirs. Gamma
    follows a controller: it grows while more is kept than the target of the moment and shrinks while less is.
    """

    GAMMA = (1e-3, 3.0)

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        self.state = {"gamma": 0.1, "kept": 1.0}

    def alpha(self, progress: float) -> float:
        """alpha whose band |s| < 1/(alpha - 1), outside which no gradient flows, shrinks geometrically.

        The paper's cosine in alpha leaves the initial scores outside the band after a few per cent of a short run;
        here the gates have equal time at each scale of the scores.
        """
        first = self.settings.band_start * float(self.settings.params["beta"])
        last = 1.0 / (self.settings.alpha_end - 1.0)
        start, end = self.settings.alpha_from, self.settings.alpha_at
        return 1.0 + 1.0 / (first * (last / first) ** min(1.0, max(0.0, (progress - start) / (end - start))))

    def loss(
        self, gated: GatedModel, inputs: dict[str, torch.Tensor], progress: float, body: Body
    ) -> tuple[torch.Tensor, Stats]:
        ids = inputs["input_ids"]
        alpha, target = self.alpha(progress), self.target(progress, 1.0)
        with torch.autocast(ids.device.type, torch.bfloat16):
            out = gated(ids, "soft", alpha=torch.tensor(alpha, device=ids.device), collect=False, body=body)
        loss = weighted_loss(out.logits, ids, inputs["answer_mask"], self.settings.answer_weight)
        kept = torch.stack(out.kept).mean()
        state = self.state
        state["kept"] += 0.2 * (kept.item() - state["kept"])
        low, high = self.GAMMA
        state["gamma"] = min(high, max(low, state["gamma"] * math.exp(0.1 * (state["kept"] - target))))
        stats = {"ce": loss.item(), "soft_kept": kept.item(), "target_keep": target, "alpha": alpha, **state}
        return loss + state["gamma"] * kept, stats


def logistic_noise(logits: torch.Tensor) -> torch.Tensor:
    """Adds the difference of two Gumbel variables."""
    u = torch.rand_like(logits, dtype=torch.float32).clamp(1e-6, 1.0 - 1e-6)
    return logits.float() + torch.log(u) - torch.log1p(-u)


class DMSObjective(Objective):
    """KL from the dense teacher + max(target - closed fraction, 0) (arXiv 2506.05345).

    The closed fraction is straight-through: hard decisions forward, sigmoid(logit / tau) backward; averaged over heads,
    layers and positions, so that heads and layers are free to differ. The teacher is the base model; KL(teacher ||
    student) in the usual direction.
    """

    def __init__(self, settings: GateSettings, teacher: PreTrainedModel) -> None:
        super().__init__(settings)
        self.teacher = teacher.eval().requires_grad_(False)

    def loss(
        self, gated: GatedModel, inputs: dict[str, torch.Tensor], progress: float, body: Body
    ) -> tuple[torch.Tensor, Stats]:
        ids, tau = inputs["input_ids"], self.settings.tau
        target = self.target(progress, 0.0)
        with torch.no_grad():
            wanted = self.teacher(input_ids=ids, use_cache=False).logits
        with torch.autocast(ids.device.type, torch.bfloat16):
            out = gated(ids, "soft", tau=tau, perturb=logistic_noise, collect=False, body=body)
        logits = torch.stack(out.features)[:, :, 1:]  # [L, B, T - 1, H]: the first token decides about nothing
        soft = torch.sigmoid(logits / tau)
        closed = ((logits > 0).float() + soft - soft.detach()).mean(dim=(0, 2, 3))  # [B]
        log_q = F.log_softmax(out.logits.float(), dim=-1)
        kl = F.kl_div(log_q, F.log_softmax(wanted.float(), dim=-1), log_target=True, reduction="none").sum(-1)
        weights = torch.ones_like(kl)
        weights[:, :-1] += (self.settings.answer_weight - 1.0) * inputs["answer_mask"][:, 1:].float()
        kl = (kl * weights).sum() / weights.sum()
        budget = (target - closed).clamp_min(0.0).mean()
        ce = F.nll_loss(log_q[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        kept = torch.stack(out.kept).mean()
        stats = {"ce": ce.item(), "kl": kl.item(), "closed": closed.mean().item(), "target_closed": target,
                 "soft_kept": kept.item()}  # fmt: skip
        return kl + self.settings.budget_weight * budget, stats
