"""Where a run's processes come from: this one, several on this machine, or the workers of a Ray cluster.

* ``single``: here.
* ``accelerate``: PyTorch's elastic agent starts ``launch.workers`` processes on this machine. ``accelerate launch`` is
  the same agent for GPUs, but starts several CPU processes through MPI only. Inside, the Trainer and ``accelerate`` do
  the rest: DDP, or FSDP2 with ``launch.fsdp``. A command that is started by ``accelerate launch`` or ``torchrun``
  itself (several machines) joins the processes that these have made.
* ``ray``: Ray Train's ``TorchTrainer``, on the cluster of ``RAY_ADDRESS`` or a local one.

Backends: NCCL where there are GPUs, else gloo. Every process reads the data and draws the same batches (``ranks``). The
paths of the recipe must be the same files on every machine; this is checked. No process is started when there are too
few CPUs or GPUs: waiting for them would look like a hang.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import torch

from vllm_prune.errors import PruneError

from . import ranks
from .recipe import Recipe
from .train import Outcome, run

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and ``accelerate launch`` tell the processes that they start."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(recipe: Recipe, resume: bool = True) -> Outcome:
    """Run a recipe in the processes that it asks for, and wait for them.

    Raises:
        PruneError: refused, here or in any of the processes; too few CPUs or GPUs.
        RuntimeError: a process died otherwise.
    """
    kind, workers, outside = recipe.launch.kind, recipe.launch.workers, launched_processes()
    for _, length in recipe.training.phases:
        rows = recipe.training.batch_tokens // length
        if rows % workers:
            raise PruneError(
                f"training.batch_tokens {recipe.training.batch_tokens} makes {rows} sequences of {length} tokens, which "
                f"launch.workers {workers} cannot share equally.",
                f"Make training.batch_tokens a multiple of {workers} times each of training.lengths.",
            )
    if outside is not None and (outside > 1 or kind == "accelerate"):
        if kind != "accelerate" or workers != outside:
            raise PruneError(
                f"this is one of {outside} processes that a launcher started, but launch is kind {kind} with {workers} "
                "workers.",
                f"Set launch.kind accelerate and launch.workers {outside}, or start the command without the launcher.",
            )
        return run_here(recipe, resume)
    if recipe.launch.fsdp and workers < 2:
        raise PruneError("launch.fsdp divides weights among processes, there is 1.", "Set launch.workers to 2 or more.")
    if kind == "single" or (workers == 1 and kind == "accelerate"):
        return run(recipe, resume)
    return launch_local(recipe, resume) if kind == "accelerate" else launch_ray(recipe, resume)


def launched_processes() -> int | None:
    """How many processes the launcher of this one has started; None without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHED) else None


def run_here(recipe: Recipe, resume: bool) -> Outcome:
    """``run`` as one of several launched processes."""
    from accelerate import PartialState

    from .sharding import FSDP

    state = PartialState(cpu=not torch.cuda.is_available())  # makes the process group
    try:
        _check_shared(Path(recipe.work_folder))
        return run(recipe, resume, FSDP if recipe.launch.fsdp else None)
    finally:
        # Not after a failure: others may still wait in a collective, and the launcher ends them.
        if sys.exc_info()[0] is None:
            state.destroy_process_group()


def _check_shared(work: Path) -> None:
    """Refuse machines that do not see one work folder. All ranks find out together."""
    token = ranks.from_main(uuid.uuid4().hex)
    sign = work / f".seen-{token}"
    if ranks.is_main():
        work.mkdir(parents=True, exist_ok=True)
        sign.touch()
    ranks.barrier()
    blind = [number for number, seen in enumerate(ranks.everywhere(sign.exists())) if not seen]
    if ranks.is_main():
        sign.unlink()
    if blind:
        raise PruneError(
            f"processes {blind} do not see the work folder {work} of process 0.",
            "Put work, output, model and data on storage that every machine has under the same path.",
        )


# Several processes on this machine


def launch_local(recipe: Recipe, resume: bool) -> Outcome:
    """Start ``launch.workers`` processes here. SIGINT and SIGTERM reach each of them once, as a wish to save and stop;
    those that need more than 30 s for it are killed, and a later run goes on from the last checkpoint."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    workers, gpus, cpus = recipe.launch.workers, torch.cuda.device_count(), len(os.sched_getaffinity(0))
    have, what = (gpus, "GPUs") if torch.cuda.is_available() else (cpus, "CPU cores")
    if workers > have:
        raise PruneError(
            f"launch.workers asks for {workers} processes, this machine has {have} {what}.",
            f"Set launch.workers to at most {have}, or use kind ray or an outer launcher for several machines.",
        )
    with tempfile.TemporaryDirectory(prefix="vllm-prune-") as folder:
        task = Path(folder) / "task.json"
        task.write_text(json.dumps({"recipe": _plain(recipe), "resume": resume}), encoding="utf-8")
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=workers, run_id=uuid.uuid4().hex, max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.2,
        )  # fmt: skip
        stopped, failed = 0, ""
        # The agent replaces handlers for good, and reports refusals at length. Its processes get our environment, and
        # import what we imported.
        before = dict(os.environ)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus // workers)))
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        try:
            elastic_launch(config, sys.executable)("-m", "vllm_prune_training.launch", str(task))
        except SignalException as error:
            stopped = int(error.sigval)
        except ChildFailedError as error:
            failed = str(error)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.environ.clear()
            os.environ.update(before)
        return _collect(Path(folder), recipe, stopped, failed)


def _collect(folder: Path, recipe: Recipe, stopped: int, failed: str) -> Outcome:
    """The end of a run out of what its processes left in ``folder``."""
    for path in sorted(folder.glob("refused-*.json")):
        raise _revived(json.loads(path.read_text(encoding="utf-8")))
    path = folder / "outcome.json"
    if path.exists():
        end = json.loads(path.read_text(encoding="utf-8"))
        return Outcome(Path(end["output"]), Path(end["work"]), end["steps"], end["signal"])
    if stopped:
        from .checkpoints import checkpoints

        found = checkpoints(Path(recipe.work_folder))
        step = int(found[-1].name.rpartition("-")[2]) if found else 0
        return Outcome(Path(recipe.output), Path(recipe.work_folder), step, stopped)
    raise RuntimeError(f"a training process died. {failed}")


class Refused(PruneError):
    """A refusal of another process, with its exit code."""

    exit_code = 2


def _revived(said: dict[str, Any]) -> PruneError:
    error = Refused(said["problem"], said["way_out"])
    error.exit_code = said["exit_code"]
    return error


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)


def child(task: Path) -> int:
    """What ``launch_local`` starts: one process of a run. Returns the exit status."""
    told = json.loads(task.read_text(encoding="utf-8"))
    number = int(os.environ["RANK"])
    try:
        end = run_here(Recipe.model_validate(told["recipe"]), told["resume"])
    except PruneError as error:
        code = getattr(error, "exit_code", 2)
        said = {"problem": error.problem, "way_out": error.way_out, "exit_code": code}
        made = task.with_name(f"refused-{number}.tmp")
        made.write_text(json.dumps(said), encoding="utf-8")
        made.rename(task.with_name(f"refused-{number:05}.json"))
        return int(code)
    if number == 0:
        said = {"output": str(end.output), "work": str(end.work), "steps": end.steps, "signal": end.signal}
        task.with_name("outcome.json").write_text(json.dumps(said), encoding="utf-8")
    return 0


# Ray


def launch_ray(recipe: Recipe, resume: bool) -> Outcome:
    """Run on ``launch.workers`` workers of a Ray cluster: that of ``RAY_ADDRESS``, or one of this machine's own.

    A worker gets a GPU where the cluster has GPUs, else a CPU. Checkpoints and logs are the Trainer's, in ``work``; Ray
    keeps what it needs for itself in ``WORK-ray``. Stopping the driver ends the workers at once: the next start goes on
    from the last checkpoint.
    """
    try:
        import ray
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise PruneError(f"launch.kind ray needs Ray Train ({error}).", "Install vllm-prune[ray].") from None

    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line twice
    ours = not ray.is_initialized()
    if ours:
        if os.environ.get("RAY_ADDRESS"):
            ray.init()
        else:
            # Without a dashboard Ray Train warns every second that it cannot ask it.
            quiet = ray.LoggingConfig(encoding="TEXT", log_level="ERROR")
            ray.init(address="local", include_dashboard=False, object_store_memory=150_000_000, logging_config=quiet)
    try:
        gpu = _check_cluster(recipe.launch.workers, ray.cluster_resources(), _free(recipe.launch.workers))
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"recipe": _plain(recipe), "resume": resume, "folder": os.getcwd()},
            scaling_config=ray.train.ScalingConfig(num_workers=recipe.launch.workers, use_gpu=gpu),
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            run_config=ray.train.RunConfig(
                name=f"train-{uuid.uuid4().hex[:8]}", storage_path=str(Path(recipe.work_folder).absolute()) + "-ray"
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            for cause in _causes(error):
                if isinstance(cause, PruneError):
                    raise cause from None
            raise
        steps, number = result.return_value
        return Outcome(Path(recipe.output), Path(recipe.work_folder), steps, number)
    finally:
        if ours:
            ray.shutdown()


def _free(workers: int, patience_s: float = 10.0) -> dict[str, float]:
    """What is free in the cluster. Ray counts with some delay: what another run has just given back is waited for."""
    import ray

    until = time.monotonic() + patience_s
    while True:
        free: dict[str, float] = ray.available_resources()
        kind = "GPU" if ray.cluster_resources().get("GPU", 0.0) > 0 else "CPU"
        if free.get(kind, 0.0) >= workers or ray.cluster_resources().get(kind, 0.0) < workers:
            return free
        if time.monotonic() > until:
            return free
        time.sleep(0.2)


def _check_cluster(workers: int, total: dict[str, float], free: dict[str, float]) -> bool:
    """Whether workers get a GPU each. Raises PruneError when the cluster cannot start them now.

    Args:
        total, free: resources of the cluster as Ray counts them.
    """
    kind = "GPU" if total.get("GPU", 0.0) > 0 else "CPU"
    for found, said in ((total.get(kind, 0.0), "has"), (free.get(kind, 0.0), "has free")):
        if found < workers:
            raise PruneError(
                f"launch.workers asks for {workers} workers with a {kind} each, the Ray cluster {said} {found:g}.",
                f"Set launch.workers to at most {int(found)}, add nodes, or wait for them to be free."
                if found >= 1
                else "Add nodes, or wait for them to be free.",
            )
    return kind == "GPU"


def _causes(error: BaseException) -> list[BaseException]:
    """An error of Ray Train's and all that it was made of."""
    found: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop(0)
        if one is None or one in found:
            continue
        found.append(one)
        failures = getattr(one, "worker_failures", None) or {}
        todo += [failures[key] for key in sorted(failures)]
        todo += [getattr(one, name, None) for name in ("cause", "__cause__", "_base_exc", "controller_failure")]
    return found


def _ray_worker(told: dict[str, Any]) -> tuple[int, int]:
    """One worker of ``launch_ray``: steps done, and the signal that stopped it or 0."""
    if not Path(told["folder"]).is_dir():
        raise PruneError(
            f"the folder {told['folder']}, where the command was started, is not on every machine.",
            "Start it in a folder that all machines share.",
        )
    os.chdir(told["folder"])
    end = run_here(Recipe.model_validate(told["recipe"]), told["resume"])
    return end.steps, end.signal


if __name__ == "__main__":
    sys.exit(child(Path(sys.argv[1])))
