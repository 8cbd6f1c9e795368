"""Training of drop gates, and of the base weights with them, under a time budget with the Hugging Face Trainer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_prune.config import DropGateConfig
from vllm_prune.gates import Gate

from .gate_evaluation import gate_report
from .gate_objectives import DCPObjective, DMSObjective, GateSettings, Objective, make_gates
from .masked import GatedModel
from .optim import Clock, MuonAdamW, timed_schedule
from .packing import Corpus, MixedWindows, TimedBatches, first


class GateOptimizer(MuonAdamW):
    """The base run's optimizer for the base weights; AdamW for the gates, their scalars at a rate of their own."""

    def __init__(self, model: nn.Module, gates: nn.Module, settings: GateSettings) -> None:
        super().__init__(model, settings.muon_lr, settings.adam_lr)
        groups = [
            {"params": [p for p in gates.parameters() if p.ndim > 0], "lr": settings.gate_lr},
            {"params": [p for p in gates.parameters() if p.ndim == 0], "lr": settings.bias_lr},
        ]
        groups = [group for group in groups if group["params"]]
        self.gate = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.param_groups += self.gate.param_groups

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.gate.step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "gate": self.gate.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.gate.load_state_dict(state_dict["gate"])
        self.param_groups += self.gate.param_groups


class GateTrainer(Trainer):
    """Trainer of the base model (``gated.model``, which carries the gates as a submodule) on an objective."""

    def __init__(self, *args: Any, gated: GatedModel, objective: Objective, clock: Clock, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gated, self.objective, self.clock = gated, objective, clock
        self.tokens_seen = 0
        self.stats: dict[str, float] = {}
        body = gated.model.get_decoder()
        self._body = torch.compile(body, dynamic=False) if objective.settings.compile else body

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        """Loss over inputs of [B, T]."""
        self.tokens_seen += inputs["input_ids"].numel()
        loss, self.stats = self.objective.loss(self.gated, inputs, self.clock.progress(), self._body)
        return loss


class TimedGateRun(TrainerCallback):
    """Stops at the end of the budget, checkpoints by time, and logs held-out numbers at checkpoints."""

    trainer: GateTrainer

    def __init__(self, corpus: Corpus, clock: Clock, settings: GateSettings, log: Path) -> None:
        self.corpus, self.clock, self.settings, self.log = corpus, clock, settings, log
        self.saved_at = clock.elapsed()

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row to the JSONL log."""
        row = {"seconds": round(self.clock.elapsed(), 1), **row}
        row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Logs, and decides whether to save or stop."""
        if state.global_step % 10 == 0:
            self.write({"step": state.global_step, "tokens": self.trainer.tokens_seen, **self.trainer.stats})
        if self.clock.progress() >= 1.0:
            control.should_training_stop = control.should_save = True
        elif self.clock.elapsed() - self.saved_at >= self.settings.save_seconds:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stores the clock and the objective's state beside the checkpoint and evaluates."""
        self.saved_at = self.clock.elapsed()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        kept = {"elapsed": self.saved_at, "step": state.global_step, "tokens": self.trainer.tokens_seen,
                "objective": self.trainer.objective.state}  # fmt: skip
        (folder / "clock.json").write_text(json.dumps(kept))
        if self.clock.progress() < 1.0:
            gated = self.trainer.gated
            report = gate_report(gated, self.corpus, 1024, 8)
            beta = {"beta": [round(g.beta.item(), 3) for g in gated.gates]} if self.settings.method == "dcp" else {}
            self.write({"step": state.global_step, "tokens": self.trainer.tokens_seen, **report, **beta})


def train_gates(
    base: Path, corpus: Corpus, work: Path, settings: GateSettings
) -> tuple[PreTrainedModel, list[Gate], dict[str, Any]]:
    """Trains (or continues) gates on the base model in ``base`` with checkpoints in ``work``.

    Returns:
        The trained base weights (float32, without gates), the gates, and a record.
    """
    last = get_last_checkpoint(str(work)) if work.exists() else None
    before = json.loads((Path(last) / "clock.json").read_text()) if last else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    gates = make_gates(model.config, settings)
    shape = gates[0].shape
    section = DropGateConfig(method=settings.method, params=settings.params, num_layers=shape.num_layers,
                             num_kv_heads=shape.num_kv_heads, hidden_size=shape.hidden_size)  # fmt: skip
    gated = GatedModel(model, gates, section, cache_dtype=torch.bfloat16)
    if settings.method == "dcp":
        objective: Objective = DCPObjective(settings)
    else:
        objective = DMSObjective(settings, AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    objective.state = before.get("objective", objective.state)
    clock = Clock(settings.minutes * 60, before.get("elapsed", 0.0))
    optimizer = GateOptimizer(model, gated.gates, settings)
    model.drop_gates = gated.gates  # so that the Trainer saves and restores them
    batches = TimedBatches(
        lambda length: MixedWindows(corpus, length, 2**62, seed=settings.seed, recall_share=settings.recall_share),
        settings.phases, clock.progress, settings.batch_tokens, before.get("step", 0),
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    run = TimedGateRun(corpus, clock, settings, work / "log.jsonl")
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=1_000_000, per_device_train_batch_size=1, learning_rate=settings.muon_lr,
        save_strategy="no", save_total_limit=2, logging_strategy="no", disable_tqdm=True, report_to=[],
        remove_unused_columns=False, ignore_data_skip=True, max_grad_norm=1.0, seed=settings.seed,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = GateTrainer(
        model=model, args=arguments, train_dataset=batches, data_collator=first, callbacks=[run],
        optimizers=(optimizer, timed_schedule(optimizer, clock)), gated=gated, objective=objective, clock=clock,
    )  # fmt: skip
    trainer.tokens_seen = before.get("tokens", 0)
    run.trainer = trainer
    output = trainer.train(resume_from_checkpoint=last)
    del model.drop_gates
    record = {
        "settings": asdict(settings), "steps": output.global_step, "tokens_seen": trainer.tokens_seen,
        "seconds": round(clock.elapsed(), 1), "last_step": trainer.stats,
        "gate_parameters": sum(p.numel() for p in gated.gates.parameters()),
    }  # fmt: skip
    return model, gates, record
