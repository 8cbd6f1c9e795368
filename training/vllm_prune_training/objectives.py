"""The trained module: a base model with its gates, whose forward returns the loss of the recipe.

DCP (arXiv 2305.15805, section 3): losses + gamma * mean visibility over past pairs, j < n. The paper's mean runs over
the square with its constant half, so its term has a floor near gamma/2 and ours has none. DMS (arXiv 2506.05345): losses
+ budget_weight * mean over sequences of max(target - closed fraction, 0), the closed fraction straight-through and
averaged over heads, layers and positions, the logits with logistic noise. LTP (arXiv 2107.00910): losses + gamma * mean
visibility of past pairs (what of it exceeds the target, if there is one), then the losses alone under the hard mask.
ACC-style: the losses alone, always under the hard mask.

KL directions: ``kl_forward`` is KL(teacher || student), ``kl_reverse`` KL(student || teacher).

Dimension letters: B batch, T tokens, V vocabulary, H KV heads, L layers, F features a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .ftp import RouterPass, row_scales
from .masked import GatedModel, GatedOutput, Mode, Perturb
from .prompt_recipe import PROMPT_METHODS
from .recipe import Recipe

ROWS = 4096
"""Logits [., V] in float32 are held for this many tokens at a time."""


def logistic_noise(logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """A logistic variable, the difference of two Gumbel variables, float32 of the shape of ``logits``."""
    u = torch.rand(logits.shape, generator=generator, dtype=torch.float32, device=logits.device)
    u = u.clamp(1e-6, 1.0 - 1e-6)
    return torch.log(u) - torch.log1p(-u)


def row_noise(keys: torch.Tensor, seed: int, layers: int, tokens: int, features: int) -> Iterator[torch.Tensor]:
    """Noise [B, T, F] a layer that follows from (seed, row) alone: the same on any number of processes, and after a resume.

    Args:
        keys: int64 [B], the rows' numbers in the run.
    """
    device = keys.device
    makers = [torch.Generator(device).manual_seed((seed * 2_654_435_761 + key) % 2**62) for key in keys.tolist()]
    shape = torch.empty(tokens, features, device=device)
    whole = [torch.stack([logistic_noise(shape, maker) for maker in makers]) for _ in range(layers)]
    return iter(whole)


def token_losses(
    logits: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor | None, weights: dict[str, float]
) -> dict[str, torch.Tensor]:
    """Losses of predicting each token but the first.

    Args:
        logits: [B, T, V]; ids: int64 [B, T]; teacher: [B, T, V] where a KL weight is above 0.
        weights: ``next_token``, ``kl_forward``, ``kl_reverse``. The cross-entropy is always there, without a gradient
            when its weight is 0.

    Returns:
        float32 [B, T - 1] for each name with a weight, and ``next_token``.
    """
    wanted = [name for name, weight in weights.items() if weight > 0.0]

    def part(student: torch.Tensor, target: torch.Tensor, taught: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        log_q = F.log_softmax(student.float(), dim=-1)
        out = {"next_token": F.nll_loss(log_q, target, reduction="none")}
        if taught is not None:
            log_p = F.log_softmax(taught.float(), dim=-1)
            if "kl_forward" in wanted:
                out["kl_forward"] = (log_p.exp() * (log_p - log_q)).sum(-1)
            if "kl_reverse" in wanted:
                out["kl_reverse"] = (log_q.exp() * (log_q - log_p)).sum(-1)
        return tuple(out[name] for name in names)

    names = ["next_token", *(name for name in wanted if name != "next_token")]
    b, t = ids.shape
    student, target = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    taught = None if teacher is None else teacher[:, :-1].flatten(0, 1)
    pieces = []
    for at in range(0, len(target), ROWS):
        args = (student[at : at + ROWS], target[at : at + ROWS], None if taught is None else taught[at : at + ROWS])
        # Several copies of [., V] in float32: for large vocabularies they are made again in the backward pass.
        again = len(target) > ROWS and student.requires_grad
        pieces.append(torch.utils.checkpoint.checkpoint(part, *args, use_reentrant=False) if again else part(*args))
    return {name: torch.cat([piece[i] for piece in pieces]).view(b, t - 1) for i, name in enumerate(names)}


def square_mean(kept: torch.Tensor, tokens: int) -> torch.Tensor:
    """The paper's mean of visibility over the T x T square, from the mean over past pairs: its ones are constant."""
    past = tokens * (tokens - 1) / 2
    return (kept * past + tokens * (tokens + 1) / 2) / tokens**2


class TrainedModel(nn.Module):
    """What the Trainer sees: one module with the base and the gates in it.

    Args:
        recipe: of the run.
        model: the base.
        gated: the same base in a ``GatedModel``; None for dense training.
        teacher: the dense teacher, frozen; it is no submodule, so that it is neither trained nor saved.
        body: replaces the decoder's forward (a compiled one).
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        gated: GatedModel | None,
        teacher: PreTrainedModel | None = None,
        body: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.method = recipe, recipe.gate.method
        self.weights = recipe.objective.weights(self.method)
        if gated is None:
            self.base = model
        else:
            self.gated = gated
        object.__setattr__(self, "teacher", teacher)
        object.__setattr__(self, "body", body)
        self._router: RouterPass | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The base model."""
        return self.gated.model if self.method != "none" else self.base

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.model.config

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of the recipe."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.training.precision == "bf16")

    def soft(
        self,
        ids: torch.Tensor,
        now: torch.Tensor,
        keys: torch.Tensor | None,
        prompt: int | torch.Tensor | None = None,
    ) -> GatedOutput:
        """A gated forward pass over ids [B, T] as it is trained, with the knobs of the moment: soft, with noise for rows
        ``keys`` (DMS), or in the stage that the first knob says (LTP, ACC-style; see ``forward``)."""
        knobs: dict[str, Any] = {}
        perturb: Perturb | None = None
        if self.method == "acc_prompt":
            return self.gated(ids, "hard", strength=float(now[0]), collect=False, prompt=prompt)  # type: ignore[no-any-return]
        if self.method == "ltp_prompt":
            mode: Mode = "soft" if float(now[0]) == 0.0 else "hard"
            return self.gated(ids, mode, collect=False, prompt=prompt, tau=self.recipe.objective.tau)  # type: ignore[no-any-return]
        if self.method == "acc" or (self.method == "ltp" and float(now[0]) > 0.0):
            return self.gated(ids, "hard", strength=float(now[0]), collect=False)  # type: ignore[no-any-return]
        if self.method == "dcp":
            knobs.update(alpha=now[0], leak=now[3])
        elif self.method in ("dms", "ltp"):
            knobs["tau"] = self.recipe.objective.tau
            if keys is not None and self.method == "dms":
                gates = self.gated.gates
                noise = row_noise(keys, self.recipe.training.seed, len(gates), ids.shape[1], gates[0].num_features)
                perturb = lambda logits: logits.float() + next(noise)  # noqa: E731
        elif self.method == "ftp":
            decide = self._routed(ids, now, keys)
            return self.gated(ids, "soft", collect=False, body=self.body, decide=decide, prompt=prompt)  # type: ignore[no-any-return]
        else:
            protect = self.recipe.gate.protect
            knobs.update(sinks=protect.sinks, window=protect.window)
        return self.gated(ids, "soft", perturb=perturb, collect=False, body=self.body, **knobs)

    def _routed(self, ids: torch.Tensor, now: torch.Tensor, keys: torch.Tensor | None) -> RouterPass:
        """FTP's decisions for ids [B, T]: with rows ``keys`` at random scales and with noise, else as they will be served."""
        options, gates = self.recipe.objective.ftp, list(self.gated.gates)
        assert options is not None
        scale = torch.ones(len(ids), device=ids.device)
        noise: Iterator[torch.Tensor] | None = None
        if keys is not None:
            seed = self.recipe.training.seed
            scale = row_scales(keys, seed, options.scale_low, options.scale_high)
            loud = float(now[2])
            if loud > 0.0:
                noise = (loud * x for x in row_noise(keys, seed, len(gates), ids.shape[1], 1))
        self._router = RouterPass(gates, scale, float(now[0]), noise)
        return self._router

    def forward(
        self,
        input_ids: torch.Tensor,
        loss_weight: torch.Tensor | None = None,
        weight_total: torch.Tensor | None = None,
        row_key: torch.Tensor | None = None,
        knobs: torch.Tensor | None = None,
        measure: Mode | None = None,
        prompt: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss of some rows of a step, or with ``measure`` the sum of the held-out losses (``measured``).

        Args:
            input_ids: int64 [B, T].
            loss_weight: float32 [B, T], of predicting that token.
            weight_total: float32 [B], the sum of weights of the whole step, over all its rows.
            row_key: int64 [B], numbers of the rows in the run.
            knobs: float32 [4]: alpha, gamma, target of the closed fraction, leak; what a method has not is not read. LTP and
                ACC-style, at boundaries and of prompts, have for alpha: LTP 1 in the hard stage and 0 before, ACC-style
                the strength of the step; FTP tau, weight of L_g, factor of the noise. LTP at boundaries has for the
                target the kept fraction below which nothing pushes.
            measure: mode of an evaluation; the weights and keys are not read then.
            prompt: int64 [B], where prompts end (gates that decide about whole prompts).

        Returns:
            ``text_loss``: the losses' share of the step's weighted mean (sums over rows add up to the mean);
            ``budget``: what is added to it, a mean over these rows; and without a gradient the sums ``next_token`` and
            KLs like ``text_loss``, and the means ``kept`` (over past pairs) and ``closed``.
        """
        if measure is not None:
            return self.measured(input_ids, measure, knobs)
        assert loss_weight is not None and weight_total is not None and knobs is not None
        with self.autocast(input_ids.device):
            out: Any
            if self.method == "none":
                logits = self.dense(input_ids)
            else:
                out = self.soft(input_ids, knobs, row_key, prompt)
                logits = out.logits
        taught = None
        if self.teacher is not None:
            with torch.no_grad(), self.autocast(input_ids.device):
                taught = self.teacher(input_ids=input_ids, use_cache=False).logits
        share = loss_weight[:, 1:] / weight_total[:, None]
        parts = token_losses(logits, input_ids, taught, self.weights)
        sums = {name: (value * share).sum() for name, value in parts.items()}
        loss = torch.stack([self.weights[name] * value for name, value in sums.items()]).sum()
        budget = torch.zeros_like(loss)
        result = {name: value.detach() for name, value in sums.items()}
        if self.method != "none":
            kept = torch.stack(out.kept).float().mean()
            result["kept"] = kept.detach()
            if self.method == "dcp":
                budget = knobs[1] * kept
                result["square_mean"] = square_mean(kept.detach(), input_ids.shape[1])
            elif self.method == "ltp_prompt":
                if kept.requires_grad:  # thresholds stay in the hard stage
                    budget = knobs[1] * kept
            elif self.method == "ltp":
                if kept.requires_grad:  # thresholds stay in the hard stage
                    budget = knobs[1] * (kept - knobs[2]).clamp_min(0.0)
            elif self.method == "dms":
                closed = self.closed_fraction(out.features)
                budget = self.recipe.objective.budget_weight * (knobs[2] - closed).clamp_min(0.0).mean()
                result["closed"] = closed.detach().mean()
            elif self.method == "ftp":
                assert self._router is not None and self.recipe.objective.ftp is not None
                short, guide = self._router.sparsity_loss(), self._router.guide_loss()
                budget = self.recipe.objective.ftp.sparsity_weight * short + knobs[1] * guide
                skipped = self._router.skipped_everywhere()
                result.update(short=short.detach(), guide=guide.detach(), skipped=skipped)
        return {"text_loss": loss, "budget": budget, **result}

    def dense(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of a base without gates."""
        run = self.model.get_decoder() if self.body is None else self.body
        hidden = run(input_ids=ids, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    @torch.no_grad()
    def measured(self, ids: torch.Tensor, mode: Mode, knobs: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Sum of the next-token losses of ids [B, T] (``nll``) over ``tokens`` tokens and, gated, the mean share of past
        pairs kept (``kept``).

        Soft mode is at the temperature of the moment and without noise. With gates that decide about whole prompts the first
        half of the tokens is the prompt: losses are those of the second half in every mode, and kept is the share of (prompt
        token, layer) pairs.
        """
        prompt = max(1, ids.shape[1] // 2) if self.recipe.whole_prompts else 1
        told: dict[str, Any] = {"prompt": prompt} if self.recipe.whole_prompts else {}
        with self.autocast(ids.device):
            out: Any = None
            if self.method == "none":
                logits = self.dense(ids)
            else:
                out = (
                    self.soft(ids, knobs, None, **told)
                    if mode == "soft" and knobs is not None and self.method not in ("ltp", *PROMPT_METHODS)
                    else self.gated(ids, mode, **told, **self.at(mode))
                )
                logits = out.logits
        losses = token_losses(logits, ids, None, {})["next_token"][:, prompt - 1 :]
        result = {"nll": losses.sum(), "tokens": torch.tensor(float(losses.numel()), device=ids.device)}
        if (told and mode != "open") or (mode == "soft" and out is not None):
            result["kept"] = torch.stack(out.kept).float().mean()
        elif mode == "hard" and out is not None:
            t = ids.shape[1]
            past = out.expiry.clamp(max=t) - torch.arange(t, device=ids.device) - 1
            result["kept"] = past.clamp_min(0).sum(-1).double().mean().float() / (t * (t - 1) / 2)
        return result

    def at(self, mode: Mode) -> dict[str, float]:
        """LTP's temperature in soft mode."""
        return {"tau": self.recipe.objective.tau} if mode == "soft" and self.method in ("ltp", "ltp_prompt") else {}

    def closed_fraction(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Closed fraction of each sequence [B] of noisy logits [B, T, H] a layer: hard forward, sigmoid backward."""
        logits = torch.stack(features)[:, :, 1:].float()  # [L, B, T - 1, H]: the first token decides about nothing
        soft = torch.sigmoid(logits / self.recipe.objective.tau)
        return ((logits > 0).float() + soft - soft.detach()).mean(dim=(0, 2, 3))
