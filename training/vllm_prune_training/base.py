"""Training of the reference base model with the Hugging Face Trainer under a time budget."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from .evaluate import held_out_perplexity, recall_accuracy, task_accuracy
from .optim import Clock, MuonAdamW, timed_schedule
from .packing import Corpus, MixedWindows, TimedBatches, first

PHASES = ((0.70, 512), (0.82, 1024), (0.90, 2048), (1.0, 4096))


@dataclass(frozen=True)
class BaseSettings:
    """Settings of the base run; the learning rates are those at the top of the schedule.

    ``names``: of the synthetic tasks (``tasks.TASKS`` and ``tasks.RECALL``); ``start``: folder of a model to go on from.
    """

    minutes: float = 50.0
    batch_tokens: int = 4096
    muon_lr: float = 0.015
    adam_lr: float = 3e-3
    recall_share: float = 0.15
    answer_weight: float = 4.0
    save_seconds: float = 300.0
    compile: bool = True
    seed: int = 1
    phases: tuple[tuple[float, int], ...] = PHASES
    names: tuple[str, ...] = ()
    start: str | None = None


def base_config(corpus: Corpus) -> Qwen3Config:
    """The architecture of the reference model: 7.3 M parameters, G = 2."""
    tokenizer = corpus.tokenizer
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def make_model(config: Qwen3Config, seed: int) -> Qwen3ForCausalLM:
    """A new model whose residual branches start at zero."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def weighted_loss(
    logits: torch.Tensor, ids: torch.Tensor, answer_mask: torch.Tensor, answer_weight: float
) -> torch.Tensor:
    """Next-token cross-entropy with a weight on recall answers; logits [B, T, V], ids and mask [B, T]."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = 1.0 + (answer_weight - 1.0) * answer_mask[:, 1:].flatten().float()
    return (losses * weights).sum() / weights.sum()


class BaseTrainer(Trainer):
    """Trainer whose loss runs the (compiled) body under bf16 autocast."""

    def __init__(self, *args: Any, settings: BaseSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.tokens_seen = 0
        body = self.model.model
        self._body = torch.compile(body, dynamic=False) if settings.compile else body

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        """Loss over inputs of [B, T]."""
        ids = inputs["input_ids"]
        self.tokens_seen += ids.numel()
        with torch.autocast(ids.device.type, torch.bfloat16):
            hidden = self._body(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return weighted_loss(logits, ids, inputs["answer_mask"], self.settings.answer_weight)


class TimedRun(TrainerCallback):
    """Stops at the end of the budget, checkpoints by time, and logs held-out numbers at checkpoints."""

    def __init__(self, corpus: Corpus, clock: Clock, settings: BaseSettings, log: Path) -> None:
        self.corpus, self.clock, self.settings, self.log = corpus, clock, settings, log
        self.trainer: BaseTrainer | None = None
        self.saved_at = clock.elapsed()
        self.first_step = 0

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row to the JSONL log."""
        row = {"seconds": round(self.clock.elapsed(), 1), **row}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decides whether to save or stop."""
        if self.clock.progress() >= 1.0:
            control.should_training_stop = control.should_save = True
        elif self.clock.elapsed() - self.saved_at >= self.settings.save_seconds:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Copies the training loss to the JSONL log."""
        if "loss" in logs:
            seen = self.trainer.tokens_seen
            self.write({"step": state.global_step, "tokens": seen, "loss": round(float(logs["loss"]), 4),
                        "lr": float(logs["learning_rate"])})  # fmt: skip

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stores the clock beside the checkpoint and evaluates."""
        self.saved_at = self.clock.elapsed()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        clock = {"elapsed": self.saved_at, "step": state.global_step, "tokens": self.trainer.tokens_seen}
        (folder / "clock.json").write_text(json.dumps(clock))
        if self.clock.progress() < 1.0:
            self.write({"step": state.global_step, "tokens": self.trainer.tokens_seen,
                        "held_out_ppl_1024": held_out_perplexity(self.trainer.model, self.corpus, 1024, 32),
                        "recall": recall_accuracy(self.trainer.model, self.corpus, (512,), 4),
                        "tasks": task_accuracy(self.trainer.model, self.corpus, self.settings.names, (1024, 4096), 6),
                        })  # fmt: skip


def train_base(corpus: Corpus, work: Path, settings: BaseSettings) -> tuple[Qwen3ForCausalLM, dict[str, Any]]:
    """Trains (or continues) the base model with checkpoints in ``work``; returns the model and a record."""
    last = get_last_checkpoint(str(work)) if work.exists() else None
    before = json.loads((Path(last) / "clock.json").read_text()) if last else {}
    if settings.start:
        model = Qwen3ForCausalLM.from_pretrained(settings.start, dtype=torch.float32)
    else:
        model = make_model(base_config(corpus), settings.seed)
    clock = Clock(settings.minutes * 60, before.get("elapsed", 0.0))
    optimizer = MuonAdamW(model, settings.muon_lr, settings.adam_lr)
    batches = TimedBatches(
        lambda length: MixedWindows(
            corpus, length, 2**62, seed=settings.seed, recall_share=settings.recall_share, names=settings.names
        ),
        settings.phases, clock.progress, settings.batch_tokens, before.get("step", 0),
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    run = TimedRun(corpus, clock, settings, work / "log.jsonl")
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=1_000_000, per_device_train_batch_size=1,
        learning_rate=settings.muon_lr,
        save_strategy="no", save_total_limit=2, logging_steps=10, disable_tqdm=True, report_to=[],
        remove_unused_columns=False, ignore_data_skip=True, max_grad_norm=1.0, seed=settings.seed,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = BaseTrainer(
        model=model, args=arguments, train_dataset=batches, data_collator=first, callbacks=[run],
        optimizers=(optimizer, timed_schedule(optimizer, clock)), settings=settings,
    )  # fmt: skip
    trainer.tokens_seen = before.get("tokens", 0)
    run.trainer = trainer
    started = time.time()
    output = trainer.train(resume_from_checkpoint=last)
    return model, {
        "settings": asdict(settings),
        "steps": output.global_step,
        "tokens_seen": trainer.tokens_seen,
        "seconds": round(clock.elapsed(), 1),
        "seconds_this_process": round(time.time() - started, 1),
        "mean_train_loss": output.training_loss,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
