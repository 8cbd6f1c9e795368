"""The Hugging Face Trainer on a ``TrainedModel``: knobs by step, whole checkpoints, a stop at the first bad loss.

Works in one process and in several: every rank draws the same global batches and takes its rows (``ranks``), losses are
divided by the weights of the global step, and the controller is fed with global means, so that the losses of a run do
not depend on how many processes made it.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError

from . import ranks
from .checkpoints import UNFINISHED, SaveFailed, forget_old, publish, read_run, write_run
from .ftp import guide_at, noise_at, tau_at
from .objectives import TrainedModel
from .optimizers import make_optimizer, make_scheduler
from .recipe import Recipe
from .schedules import GammaController, alpha_at, closed_at, keep_at, leak_at
from .sharding import ShardedTrainer
from .text_data import Batches

SUMS = ("text_loss", "next_token", "kl_forward", "kl_reverse")
"""Statistics that are shares of the step's mean; all others are means over rows."""


class LossNotFinite(PruneError):
    """The loss or its gradient is no number any more."""

    exit_code = 3


class _Shares(IterableDataset[dict[str, torch.Tensor]]):
    """This rank's rows of each batch."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (ranks.share(batch) for batch in self.batches)


class Signals:
    """SIGINT and SIGTERM as a wish to stop after the step; a second one is not held back."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def _take(self, number: int, _frame: Any) -> None:
        self.number = number
        self.restore()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *_: Any) -> None:
        self.restore()


class GateTrainer(ShardedTrainer):
    """See the module.

    Args:
        trained: the module.
        recipe: of the run.
        batches: at their beginning; ``resume`` moves them.
        data: hashes of the sources, for checkpoints.
        work: folder of checkpoints and logs.
        windows: held-out tokens, int64 [N, T].
        beta: initial bias of DCP's gates, the unit of the band schedule.
        kwargs: of ``Trainer``.
    """

    def __init__(
        self,
        trained: TrainedModel,
        recipe: Recipe,
        batches: Batches,
        data: list[dict[str, Any]],
        work: Path,
        windows: torch.Tensor,
        beta: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.batches, self.data, self.work = recipe, batches, data, work
        self.windows, self.beta = windows, beta
        self.controller = GammaController(recipe.objective, recipe.training.steps)
        self.signals = Signals()
        self.tokens_seen = 0
        self.stats: dict[str, float] = {}
        self.interrupted = 0
        self._parts: list[dict[str, torch.Tensor]] = []
        self._norm: Any = None
        self._saving = False
        super().__init__(model=trained, train_dataset=_Shares(batches), **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Steps(self))

    # Data, optimizer, losses

    def get_train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Whole batches, not prefetched and not sharded again: what was drawn is what was trained on."""
        return DataLoader(self.train_dataset, batch_size=None, num_workers=0)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW or Muon over the groups of the recipe."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            self.optimizer = make_optimizer(trained.model, getattr(trained, "gated", trained).gates
                                            if trained.method != "none" else None, self.recipe.training)  # fmt: skip
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Rates by step."""
        if self.lr_scheduler is None:
            inner = getattr(self.optimizer, "optimizer", self.optimizer)  # under accelerate's wrapper
            self.lr_scheduler = make_scheduler(inner if optimizer is None else optimizer, self.recipe.training)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @property
    def model_section(self) -> DropGateConfig:
        """The ``drop_gate`` section of the gates in training."""
        section: DropGateConfig = self.accelerator.unwrap_model(self.model).gated.section
        return section

    @property
    def progress(self) -> float:
        """Share of the run before the present step."""
        return float(self.state.global_step / self.recipe.training.steps)

    def knobs(self, progress: float) -> torch.Tensor:
        """alpha, gamma, the target of the closed fraction and the leak, or what a method has in their place: float32 [4]."""
        objective, method = self.recipe.objective, self.recipe.gate.method
        if objective.ftp is not None:
            return torch.tensor(
                [
                    tau_at(objective.ftp, progress),
                    guide_at(objective.ftp, progress),
                    noise_at(objective.ftp, progress),
                    0.0,
                ],
                device=self.args.device,
            )
        alpha = alpha_at(objective.alpha, progress, self.beta) if method == "dcp" else 0.0
        if method == "ltp_prompt":
            alpha = float(progress >= self.recipe.told_prompts.hard_from)
        elif method == "acc_prompt":
            alpha = self.recipe.told_prompts.strength_at(self.recipe.training.seed, self.state.global_step)
        closed = closed_at(objective, progress) if method == "dms" else 0.0
        leak = leak_at(objective, progress) if method == "dcp" else 0.0
        if method == "ltp":
            alpha = float(progress >= self.recipe.told_boundaries.hard_from)
            closed = 0.0 if objective.keep is None else keep_at(objective, progress)
        elif method == "acc":
            alpha = self.recipe.told_boundaries.strength_at(self.recipe.training.seed, self.state.global_step)
        return torch.tensor([alpha, self.controller.gamma, closed, leak], device=self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        """The loss of this rank's rows, such that the Trainer's division by the accumulation and the average of the
        gradients over ranks give the loss of the global step."""
        out = model(**inputs, knobs=self.knobs(self.progress))
        self._parts.append({name: value.detach() for name, value in out.items()})
        ids = inputs["input_ids"]
        self.tokens_seen += ids.numel() * ranks.world_size()
        parts = self.recipe.training.accumulation
        return parts * ranks.world_size() * out["text_loss"] + out["budget"]  # type: ignore[no-any-return]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return self._norm

    def finish_forward(self) -> None:
        """Global statistics of a step before the optimizer moves.

        Raises:
            LossNotFinite: on every rank at once.
        """
        parts, self._parts = self._parts, []
        names = list(parts[0])
        rows = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts]).sum(0)
        stop = torch.tensor([float(self.signals.number)], device=rows.device)
        total = ranks.global_sum(torch.cat([rows, stop])).tolist()
        self.interrupted = self.signals.number or (int(signal.SIGTERM) if total.pop() else 0)
        mean = ranks.world_size() * len(parts)
        stats = {name: value if name in SUMS else value / mean
                 for name, value in zip(names, total[: len(names)], strict=True)}  # fmt: skip
        stats["loss"] = stats.pop("text_loss") + stats.pop("budget")
        step = self.state.global_step + 1
        for name, value in (("loss", stats["loss"]), ("gradient", float(self._norm))):
            if not math.isfinite(value):
                raise LossNotFinite(
                    f"the {name} of step {step} is {value}; nothing was changed by it.",
                    f"The last good checkpoint in {self.work} is kept. Lower the learning rates, or use fp32.",
                )
        progress, objective = self.progress, self.recipe.objective
        method = self.recipe.gate.method
        hard_from = {"dcp": 2.0, "ltp": self.recipe.told_boundaries.hard_from,
                     "ltp_prompt": self.recipe.told_prompts.hard_from}.get(method, 0.0)  # fmt: skip
        if progress < hard_from:
            stats["gamma"] = self.controller.gamma
            if method == "dcp":
                stats["alpha"] = alpha_at(objective.alpha, progress, self.beta)
            if objective.keep is not None:
                stats["target_keep"] = keep_at(objective, progress)
            self.controller.update(stats["kept"], progress)
        elif method == "dms":
            stats["target_closed"] = closed_at(objective, progress)
        elif objective.ftp is not None:
            stats["tau"] = tau_at(objective.ftp, progress)
        self.stats = stats

    # Measuring and logging

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Held-out perplexity with gates open, soft and hard, and what the soft and hard masks keep. All ranks."""
        model = self.model_wrapped if self.model_wrapped is not None else self.model
        model.eval()
        result: dict[str, float] = {}
        size = max(1, self.recipe.training.batch_tokens // self.windows.shape[1])
        modes = {"none": ("open",), "acc": ("open", "hard"), "acc_prompt": ("open", "hard")}.get(
            self.recipe.gate.method, ("open", "soft", "hard")
        )
        for mode in modes:
            nll = kept = tokens = 0.0
            for ids in self.windows.split(size):
                out = model(input_ids=ids.to(self.args.device), knobs=self.knobs(self.progress), measure=mode)
                nll += out["nll"].item()
                tokens += out["tokens"].item()
                kept += out["kept"].item() * len(ids) if "kept" in out else 0.0
            mean = nll / tokens
            result[f"ppl_{mode}"] = math.exp(min(mean, 700.0))
            if mode != "open":
                result[f"kept_{mode}"] = kept / len(self.windows)
        model.train()
        return result

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to ``log.jsonl`` and print it, on the main process."""
        if ranks.is_main():
            row = {"step": self.state.global_step, "tokens": self.tokens_seen, **row}
            text = json.dumps({k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in row.items()})
            with (self.work / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(text + "\n")
            print(text, flush=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TensorBoard gets the step's statistics too."""
        if "learning_rate" in logs:
            self.write({**self.stats, "learning_rate": logs["learning_rate"], "grad_norm": float(self._norm)})
        super().log({**self.stats, **logs}, start_time)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.work / UNFINISHED) if self._saving else str(self.work)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint is written under another name and renamed when it is whole."""
        step = self.state.global_step
        made = self.work / UNFINISHED / f"checkpoint-{step}"
        if ranks.is_main():
            shutil.rmtree(made.parent, ignore_errors=True)
        ranks.barrier()
        self._saving = True
        problem = ""
        try:
            super()._save_checkpoint(model, trial)
            if ranks.is_main():
                write_run(made, {
                    "recipe": self.recipe.same_run(), "data": self.data, "batches": self.batches.state(),
                    "controller": self.controller.state(), "tokens": self.tokens_seen,
                })  # fmt: skip
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            self._saving = False
        problems = [text for text in ranks.everywhere(problem) if text]
        if ranks.is_main() and not problems:
            try:
                publish(made, self.work / made.name)
                forget_old(self.work, self.recipe.training.keep_checkpoints)
            except OSError as error:
                problems = [f"{type(error).__name__}: {error}"]
        problems = ranks.from_main(problems)
        if ranks.is_main():
            shutil.rmtree(made.parent, ignore_errors=True)
        if problems:
            raise SaveFailed(
                f"the checkpoint of step {step} could not be written to {self.work}: {problems[0]}.",
                "Earlier checkpoints are untouched: make room, then run the same command to go on.",
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """The state of base and gates in one file; a tied tensor once."""
        folder = Path(output_dir or self.work)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        seen: dict[tuple[int, tuple[int, ...]], str] = {}
        for name, value in state.items():
            seen.setdefault((value.data_ptr() or -len(seen) - 1, tuple(value.shape)), name)
        save_file({name: state[name].contiguous() for name in seen.values()}, folder / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        names = {name: value.data_ptr() for name, value in self.model.state_dict().items()}
        loaded = {pointer for name, pointer in names.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if names[name] not in loaded]
        if missing or load_result.unexpected_keys:
            raise PruneError(
                f"the checkpoint lacks {missing[:3]} and has unknown {load_result.unexpected_keys[:3]}.",
                "It is of another model; start over with --no-resume.",
            )

    def restore(self, checkpoint: Path) -> None:
        """What the Trainer does not know of: data, controller, tokens. Call it before ``train``."""
        run = read_run(checkpoint)
        self.batches.load(run["batches"])
        self.controller.load(run["controller"])
        self.tokens_seen = run["tokens"]


class _Steps(TrainerCallback):
    """When to measure, save and stop."""

    def __init__(self, trainer: GateTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.finish_forward()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, training = self.trainer, self.trainer.recipe.training
        step = state.global_step
        if ranks.world_size() == 1:  # several have to agree first: they stop after the next step
            trainer.interrupted = trainer.signals.number
        if trainer.interrupted:
            control.should_training_stop = control.should_save = True
        if step % training.save_steps == 0 or step >= training.steps:
            control.should_save = True
        if step % training.eval_steps == 0 and step < training.steps:
            row = trainer.measure()
            trainer.write(row)
            wanted = control.should_log  # logging numbers of our own ends the Trainer's wish to log its own
            trainer.log({f"eval_{name}": value for name, value in row.items()})
            control.should_log = wanted
