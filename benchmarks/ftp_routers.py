"""FTP's router and, for research alone, one that reads hidden states in its place: trained by the same trainer.

The published ablation compares the four factors with hidden states and does not say whether losses, steps and schedule were
the same. Here all is but what the router reads. For ``claims_ftp.py``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from vllm_prune_training.build import gate_section, make_teacher
from vllm_prune_training.ftp import RouterPass, set_schedule
from vllm_prune_training.masked import GatedModel
from vllm_prune_training.objectives import TrainedModel
from vllm_prune_training.recipe import Recipe
from vllm_prune_training.routed import Decide, Routes, decoder_layers
from vllm_prune_training.text_data import Batches
from vllm_prune_training.train import training_arguments
from vllm_prune_training.trainer import GateTrainer

from vllm_prune.gates import FTPGate, GateShape
from vllm_prune.gates.ftp import HIDDEN, share_router

Reads = Callable[[Routes], torch.Tensor]


class HiddenGate(FTPGate):
    """A router of the stream as it enters the block, normed, and the requirement: (D_model + 1) -> 64 -> 2, one for all blocks.
    What ``FTPGate`` calls facts is the stream [..., D_model] here. It is not served."""

    def __init__(self, shape: GateShape, kv: str = "skip", form: str = "causal") -> None:
        super().__init__(shape, kv, form)
        self.router = nn.Sequential(nn.Linear(shape.hidden_size + 1, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))

    def logits(self, facts: torch.Tensor, requirement: torch.Tensor) -> torch.Tensor:
        x = F.rms_norm(facts.float(), facts.shape[-1:])
        wanted = 4.0 * requirement.to(x.dtype).expand(x.shape[:-1])
        return self.router(torch.cat([x, wanted[..., None]], dim=-1))  # type: ignore[no-any-return]


class Stream:
    """The stream that is about to enter a layer, ``x`` [B, T, D_model], without a gradient: as facts are read."""

    def __init__(self, model: Any) -> None:
        self.x = torch.empty(0)
        for layer in decoder_layers(model):
            layer.register_forward_pre_hook(self._take, with_kwargs=True, prepend=True)  # before the decision

    def _take(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach()


class ReadingModel(TrainedModel):
    """A trained model whose routers read something else than facts."""

    reads: Reads

    def _routed(self, ids: torch.Tensor, now: torch.Tensor, keys: torch.Tensor | None) -> RouterPass:
        made = super()._routed(ids, now, keys)
        made.reads = self.reads  # type: ignore[method-assign]
        return made


@dataclass(frozen=True)
class Router:
    """A trained one: its model, and what its gates read."""

    gated: GatedModel
    reads: Reads

    def decide(self, shift: float = 0.0) -> Decide:
        """Decisions as they are served, the block run where run - skip + shift >= 0."""

        def decide(layer: int, routes: Routes) -> torch.Tensor | None:
            gate: Any = self.gated.gates[layer]
            if gate.always_runs:
                return None
            run, skip = gate.logits(self.reads(routes), gate.requirement(1.0)).unbind(-1)
            return (run - skip + shift >= 0.0).float()

        return decide


def train_router(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, plan: list[float], kind: type[FTPGate] = FTPGate
) -> Router:
    """A router trained at a schedule by the project's trainer, on a copy of the recipe's base.

    Args:
        recipe: of method ftp; its search is not done. Nothing of it is kept on disk.
        plan: the schedule.
        kind: what the router reads follows from it.
    """
    torch.manual_seed(recipe.training.seed + 1)
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32).requires_grad_(False)
    section = gate_section(recipe, model.config)
    gates = [kind(section.shape, **section.params) for _ in range(section.num_layers)]
    share_router(gates)
    set_schedule(gates, plan)
    stream = Stream(model) if kind is HiddenGate else None
    reads: Reads = RouterPass.reads if stream is None else lambda routes: stream.x
    gated = GatedModel(model, gates, section)
    trained = ReadingModel(recipe, model, gated, make_teacher(recipe))
    trained.reads = reads
    prompts = recipe.told_prompts if recipe.whole_prompts else None
    batches = Batches(recipe.data, recipe.training, tokenizer, 1.0, prompts)
    with tempfile.TemporaryDirectory(prefix="vllm-prune-ftp-") as folder, redirect_stdout(sys.stderr):
        trainer = GateTrainer(trained, recipe, batches, [], Path(folder), torch.empty(0, 1),
                              args=training_arguments(recipe, Path(folder), {}))  # fmt: skip
        trainer.train()
    return Router(gated.eval(), reads)
