"""``vllm-prune train``: from a recipe to a servable folder, in one process or inside each of several."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from vllm_prune.checkpoint import add_gates
from vllm_prune.errors import PruneError

from . import ranks
from .acc_profile import tune
from .boundary_profile import tune_boundaries
from .build import make_base, make_gates, make_tokenizer, make_trained
from .checkpoints import SaveFailed, check_same, checkpoints, publish, put_aside, read_run
from .ftp import schedule_of, set_schedule
from .ftp_search import Rows, plan_schedule, tune_schedule
from .gate_export import readme
from .objectives import TrainedModel
from .provenance import git_commit
from .recipe import NO_GATES, Recipe
from .shadow.recipe import ShadowRecipe
from .sharding import is_sharded
from .text_data import Batches, held_out_windows
from .text_files import find_files, inspect
from .trainer import GateTrainer

VERSIONS = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "vllm-prune")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the folder it made, or the signal that stopped it, which a later run goes on from."""

    output: Path
    work: Path
    steps: int
    signal: int = 0


def check_data(recipe: Recipe | ShadowRecipe) -> list[dict[str, Any]]:
    """Hashes and totals of all sources, train then held_out. Raises PruneError at the first fault."""
    found = []
    for kind in ("train", "held_out"):
        for source in getattr(recipe.data, kind):
            files = find_files(source, recipe.data.max_line_chars)
            totals = inspect(files, recipe.data.check == "full")
            found.append({"split": kind, "source": source.path or source.glob, **asdict(totals)})
    return found


def training_arguments(recipe: Recipe, work: Path, extra: dict[str, Any]) -> TrainingArguments:
    """Of the Hugging Face Trainer; ``extra`` has the last word."""
    t = recipe.training
    try:
        import tensorboard  # noqa: F401

        report = ["tensorboard"]
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(work / "tensorboard")  # not that of an earlier run here
    except ImportError:
        report = []
    return TrainingArguments(**{
        "output_dir": str(work), "max_steps": t.steps, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": t.accumulation, "learning_rate": t.lr, "max_grad_norm": t.max_grad_norm,
        "save_strategy": "no", "logging_steps": t.log_steps, "logging_nan_inf_filter": False, "report_to": report,
        "remove_unused_columns": False, "ignore_data_skip": True, "seed": t.seed, "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": False, **extra,
    })  # fmt: skip


def _start(recipe: Recipe, resume: bool, data: list[dict[str, Any]]) -> Path | None:
    """Check folders; the checkpoint to go on from, or None. The work folder exists afterwards."""
    output, work = Path(recipe.output), Path(recipe.work_folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PruneError(f"output {output} is there already.", "Remove it, or set another output.")
    last = None
    if ranks.is_main():
        if not resume and (aside := put_aside(work)) is not None:
            print(f"the earlier run's {work} is now {aside}", flush=True)
        work.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    if resume and (found := checkpoints(work)):
        last = found[-1]
        check_same(read_run(last), recipe.same_run(), data, work)
    return last


def _calibration_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, longest: int, device: torch.device) -> Rows:
    """Rows of the training data for FTP's schedule search, cut as the recipe cuts them in training."""
    assert recipe.objective.ftp is not None
    options = recipe.objective.ftp.search
    data = recipe.data.model_copy(update={"held_out": recipe.data.train})
    ids = held_out_windows(data, tokenizer, options.length or longest, options.tokens).to(device)
    if not recipe.whole_prompts:
        return Rows(ids)
    rng = np.random.default_rng([recipe.training.seed, 79])
    cuts = [recipe.told_prompts.length(rng, ids.shape[1], []) for _ in ids]
    return Rows(ids, torch.tensor(cuts, device=device))


def run(
    recipe: Recipe,
    resume: bool = True,
    extra_arguments: dict[str, Any] | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> Outcome:
    """Train, measure and export, inside a process that is already launched (one of several under torch.distributed).

    Args:
        recipe: of the run; ``launch`` is not read.
        resume: go on from the newest checkpoint in the work folder; otherwise an earlier work folder is put aside.
        extra_arguments: of ``TrainingArguments`` (FSDP).
        callbacks: further callbacks of the Trainer.

    Raises:
        PruneError: something is refused; ``LossNotFinite`` and ``SaveFailed`` during the run.
    """
    started = time.time()
    data = check_data(recipe)
    last = _start(recipe, resume, data)
    output, work = Path(recipe.output), Path(recipe.work_folder)
    longest = max(length for _, length in recipe.training.phases)
    arguments = training_arguments(recipe, work, extra_arguments or {})
    tokenizer = make_tokenizer(recipe, longest)
    prompts = recipe.told_prompts if recipe.whole_prompts else None
    batches = Batches(recipe.data, recipe.training, tokenizer, recipe.objective.answer_weight, prompts)
    windows = held_out_windows(recipe.data, tokenizer, longest, recipe.training.eval_tokens)
    trained = make_trained(recipe, make_base(recipe, tokenizer), arguments.device)
    gates = list(trained.gated.gates) if recipe.gate.method != NO_GATES else []
    beta = float(gates[0].beta.detach().max()) if recipe.gate.method == "dcp" else 1.0
    if recipe.gate.init_from is not None and recipe.gate.method == "dcp":
        beta = float(recipe.gate.params.get("beta", 2.0))
    profile: dict[str, Any] = {}
    if last is None and recipe.gate.init_from is None:
        if recipe.gate.method == "acc_prompt":
            _tune(recipe, trained, Batches(recipe.data, recipe.training, tokenizer, 1.0, prompts))
        elif recipe.gate.method == "acc":
            profile["profile"] = _tune_boundaries(recipe, trained, tokenizer, longest)
    planned: dict[str, Any] = {}
    ftp = recipe.objective.ftp
    if ftp is not None:
        calibration = _calibration_rows(recipe, tokenizer, longest, arguments.device)
        trained.to(arguments.device)
        if last is None and recipe.gate.init_from is None:
            planned["search"] = plan_schedule(
                trained.gated, calibration, ftp.search, ftp.sparsity, recipe.training.seed
            )
            set_schedule(gates, ranks.from_main(schedule_of(gates)))
            if ranks.is_main():
                print(json.dumps(planned), flush=True)
    trainer = GateTrainer(trained, recipe, batches, data, work, windows, beta, args=arguments, callbacks=callbacks)
    if last is not None:
        trainer.restore(last)
    if ranks.is_main():
        counts = {name: sum(p.numel() for p in part) for name, part in (
            ("parameters", trained.model.parameters()),
            ("gate_parameters", {id(p): p for g in gates for p in g.parameters()}.values()),
        )}  # fmt: skip
        print(json.dumps({"from": str(last or "the beginning"), "steps": recipe.training.steps, **counts}), flush=True)
    with trainer.signals, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    steps = trainer.state.global_step
    if trainer.interrupted and steps < recipe.training.steps:
        return Outcome(output, work, steps, trainer.interrupted)
    if ftp is not None and ftp.search.tune_generations:
        planned["tuning"] = tune_schedule(trained.gated, calibration, ftp.search, recipe.training.seed)
        set_schedule(gates, ranks.from_main(schedule_of(gates)))
    measured = trainer.measure()
    trainer.write(measured)
    record = {
        "recipe": recipe.model_dump(by_alias=True), "git_commit": git_commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in VERSIONS}, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "processes": ranks.world_size(), "sharded": is_sharded(trainer.model),
        "data": data, "steps": steps,
        "tokens_seen": trainer.tokens_seen, "seconds_this_process": round(time.time() - started, 1),
        "last_step": trainer.stats, **profile, "held_out": {"length": longest, "windows": len(windows), **measured},
    }  # fmt: skip
    if ftp is not None:
        record["ftp"] = {**planned, "schedule": schedule_of(gates)}
    if "ppl_soft" in measured:
        record["hard_over_soft"] = measured["ppl_hard"] / measured["ppl_soft"]
    state = trainer.full_weights()
    if ranks.is_main():
        export(recipe, trainer, tokenizer, state, record)
    ranks.barrier()
    return Outcome(output, work, steps)


def _tune(recipe: Recipe, trained: TrainedModel, batches: Batches) -> None:
    """The profile of ACC-style gates, measured on the sequences of the first step."""
    (first, *_) = batches.next_step()
    keep = recipe.objective.keep
    assert keep is not None
    found = tune(trained.gated, first["input_ids"], first["prompt"], recipe.told_prompts, keep)
    if ranks.is_main():
        print(json.dumps({"profile": {k: _rounded(v) for k, v in found.items()}}), flush=True)


def _rounded(value: Any) -> Any:
    return [round(x, 4) for x in value] if isinstance(value, list) else round(value, 4)


def _tune_boundaries(
    recipe: Recipe, trained: TrainedModel, tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, Any]:
    """The profile of ACC-style gates, measured on the beginning of the training text."""
    told, keep = recipe.told_boundaries, recipe.objective.keep
    assert keep is not None
    text = recipe.data.model_copy(update={"held_out": recipe.data.train})
    windows = held_out_windows(text, tokenizer, length, told.calibration_tokens)
    found = tune_boundaries(trained.gated, windows, told, keep)
    if ranks.is_main():
        print(json.dumps({"profile": {k: _rounded(v) for k, v in found.items()}}), flush=True)
    return found


def export(
    recipe: Recipe,
    trainer: GateTrainer,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, torch.Tensor],
    record: dict[str, Any],
) -> None:
    """Write the finished folder in one step: base weights, tokenizer, gates, ``record.json`` and the log.

    Args:
        state: full state of the ``TrainedModel``.

    Raises:
        SaveFailed: it could not be written; nothing is there then.
    """
    output = Path(recipe.output)
    made = output.with_name(output.name + ".unfinished")
    shutil.rmtree(made, ignore_errors=True)
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    model = trainer.accelerator.unwrap_model(trainer.model).model
    prefix = "base." if recipe.gate.method == NO_GATES else "gated.model."
    weights = {name.removeprefix(prefix): value.to(dtype) for name, value in state.items() if name.startswith(prefix)}
    for tied, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if source in weights:
            weights.pop(tied, None)  # a copy by now: nothing would tell that it is the same
    try:
        made.mkdir(parents=True)
        model.config._attn_implementation = "sdpa"
        model.save_pretrained(made, state_dict=weights)
        path = made / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(made)
        if recipe.gate.method != NO_GATES:
            section = trainer.model_section
            gates = make_gates(recipe, section)
            for i, gate in enumerate(gates):
                start = f"gated.gates.{i}."
                gate.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
            kept = record["held_out"]["kept_hard"]
            brief = {key: record[key] for key in ("git_commit", "versions", "tokens_seen", "steps", "held_out")}
            add_gates(made, gates, {
                "params": dict(section.params), "protect": section.protect.model_dump(),
                "dtype": section.dtype,
                "expected_keep": min(1.0, max(1e-3, round(kept, 4))),
                "provenance": {**brief, "data_sha256": [row["sha256"] for row in record["data"]]},
            })  # fmt: skip
        (made / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (made / "README.md").write_text(readme(made), encoding="utf-8")
        shutil.copy(Path(recipe.work_folder) / "log.jsonl", made / "log.jsonl")
        publish(made, output)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise SaveFailed(
            f"{output} could not be written: {error}.",
            "Make room, then run the same command: training is not repeated.",
        ) from None
