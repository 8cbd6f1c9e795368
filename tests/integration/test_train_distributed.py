"""Two processes train what one does: FSDP2 over gloo, DDP under torchrun, Ray Train. Checkpoints go from one to another.

The recipe makes it hard: answers weigh 4 times other tokens, so that ranks hold different shares of the weights; gradients
are accumulated; T changes within the run; gamma follows the kept fraction. All in float32: what is left is the order of
sums, 1e-4 of a loss at most (measured: 1e-6).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from support import FULL
from vllm_prune_training.launch import launch
from vllm_prune_training.recipe_file import parse_recipe

from vllm_prune.errors import PruneError

pytestmark = pytest.mark.slow
STEPS, TOLERANCE, RESUMED = 6, 1e-4, 1e-6
COMPARED = ("loss", "next_token", "kept", "gamma", "grad_norm", "ppl_open", "ppl_soft", "ppl_hard", "kept_hard")
FSDP = {"kind": "accelerate", "workers": 2, "fsdp": True}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    source = Path(__file__).parents[2] / "vllm_prune"
    (folder / "train.txt").write_text(
        "\n\n".join(path.read_text() for path in sorted((source / "gates").glob("d*.py")))
    )
    (folder / "held.txt").write_text((source / "connector.py").read_text())
    return folder


def fields(place: Path, name: str, **launching: Any) -> dict[str, Any]:
    return {
        "model": {"new": {
            "tokenizer_vocab": 384, "residual_zero": False,
            "config": {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
                       "max_position_embeddings": 256, "tie_word_embeddings": True},
        }},
        "output": str(place / name), "gate": {"method": "dcp", "params": {"rank": 8, "beta": 0.4}},
        "objective": {"keep": 0.3, "alpha": {"schedule": "linear", "start": 1.3, "end": 2.0}, "answer_weight": 4.0},
        "data": {
            "train": [{"path": str(place / "train.txt"), "format": "text"}],
            "held_out": [{"path": str(place / "held.txt"), "format": "text"}],
            "tasks": {"share": 0.5, "names": ["lookup"]},
        },
        "training": {
            "steps": STEPS, "lengths": [[0.5, 144], [1.0, 160]], "batch_tokens": 640, "accumulation": 2,
            "precision": "fp32", "lr": 3e-3, "gate_lr": 4e-3, "bias_lr": 0.05, "seed": 3, "log_steps": 1,
            "save_steps": 3, "eval_steps": 3, "eval_tokens": 640,
        },
        "launch": launching or {"kind": "single"},
    }  # fmt: skip


def train(place: Path, name: str, **launching: Any) -> None:
    outcome = launch(parse_recipe(fields(place, name, **launching), name))
    assert (outcome.steps, outcome.signal) == (STEPS, 0)


def rows(place: Path, name: str) -> dict[tuple[int, bool], dict[str, float]]:
    """The log's last row of each (step, is it a measurement)."""
    lines = (place / name / "log.jsonl").read_text().splitlines()
    return {(row["step"], "ppl_open" in row): row for row in map(json.loads, lines)}


def assert_same(place: Path, name: str, other: str, tolerance: float = TOLERANCE, since: int = 1) -> None:
    """Equal losses from a step on, and equal exported weights."""
    found, wanted = rows(place, name), rows(place, other)
    keys = [key for key in wanted if key[0] >= since]
    assert len(keys) == 6 - since + 1 + (2 if since <= 3 else 1)
    for key in keys:
        for field in set(COMPARED) & set(wanted[key]):
            assert found[key][field] == pytest.approx(wanted[key][field], rel=tolerance), (key, field)
    for file in ("model.safetensors", "drop_gate.safetensors"):
        one, two = load_file(place / name / file), load_file(place / other / file)
        assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in two.items()}
        for key, value in two.items():
            assert (one[key] - value).abs().max() <= tolerance * max(1.0, value.abs().max()), key


def go_on_from(place: Path, name: str, other: str) -> None:
    """A run ``name`` that was interrupted at the checkpoint that ``other`` made half-way."""
    work = place / f"{name}-work"
    shutil.copytree(place / f"{other}-work" / "checkpoint-3", work / "checkpoint-3")
    shutil.copy(place / f"{other}-work" / "log.jsonl", work / "log.jsonl")


@pytest.fixture(scope="module")
def single(place: Path) -> Path:
    """The run that all others must equal."""
    train(place, "single")
    table = rows(place, "single")
    kept = [table[step, False]["kept"] for step in range(1, STEPS + 1)]
    assert 0.02 < min(kept) < 0.98 and len(set(kept)) == STEPS  # the gates do something
    assert table[1, False]["loss"] > table[STEPS, False]["loss"] + 0.1
    return place


@pytest.fixture(scope="module")
def sharded(single: Path) -> Path:
    train(single, "fsdp", **FSDP)
    return single


def test_fsdp2_equals_one_process(sharded: Path) -> None:
    assert_same(sharded, "fsdp", "single")
    record = json.loads((sharded / "fsdp" / "record.json").read_text())
    assert (record["processes"], record["sharded"]) == (2, True)
    names = {path.name for path in (sharded / "fsdp-work" / "checkpoint-3").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "run.json", "rng_state_1.pth"} <= names


def test_one_process_goes_on_from_a_sharded_run(sharded: Path) -> None:
    """A checkpoint of two shards is that of one process."""
    go_on_from(sharded, "single-on", "fsdp")
    train(sharded, "single-on")
    assert_same(sharded, "single-on", "single", since=4)


def test_fsdp2_under_torchrun_goes_on_exactly(sharded: Path) -> None:
    """Processes that an outer launcher started; the losses are those of the uninterrupted run."""
    go_on_from(sharded, "fsdp-on", "fsdp")
    file = sharded / "fsdp-on.yaml"
    file.write_text(yaml.safe_dump(fields(sharded, "fsdp-on", **FSDP)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "vllm_prune.cli", "train", str(file)],
        env=ENV, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("made ") == 1  # said by one of the two
    assert_same(sharded, "fsdp-on", "fsdp", tolerance=RESUMED, since=4)


def test_two_processes_stop_at_a_signal_with_a_checkpoint(place: Path) -> None:
    data = fields(place, "stopped", kind="accelerate", workers=2)
    data["training"] |= {"steps": 100_000, "save_steps": 100_000, "eval_steps": 100_000}
    file = place / "stopped.yaml"
    file.write_text(yaml.safe_dump(data))
    log, work = place / "stopped.out", place / "stopped-work"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_prune.cli", "train", str(file)], env=ENV, stdout=out, stderr=out
        )
        try:
            until = time.monotonic() + 400
            while '"step": 2,' not in log.read_text() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
        finally:
            process.kill()
    text = log.read_text()
    assert code == 128 + signal.SIGTERM, text[-3000:]
    (checkpoint,) = work.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert step >= 2 and f"step {step} is saved in {work}" in text
    assert json.loads((checkpoint / "run.json").read_text())["batches"]["step"] == step
    assert not (place / "stopped").exists()


def test_a_refusal_in_the_processes_comes_out_as_one(sharded: Path) -> None:
    """Another recipe in the same work folder: every process refuses, the command says it once and does not hang."""
    data = fields(sharded, "other", **FSDP)
    data["work"] = str(sharded / "fsdp-work")
    data["training"]["lr"] = 1e-3
    with pytest.raises(PruneError, match=r"differs from that of the run .*training\.lr: 0\.003 before, 0\.001 now"):
        launch(parse_recipe(data, "other"))
    assert not (sharded / "other").exists()


RAY = """
import json, shutil, sys
from pathlib import Path
from vllm_prune_training.launch import launch
from vllm_prune_training.recipe_file import parse_recipe
from vllm_prune.errors import PruneError
import ray
place, data = Path(sys.argv[1]), json.loads(sys.stdin.read())
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, _temp_dir=sys.argv[2])
said = {}
def go(name, data):
    try:
        end = launch(parse_recipe(data, name))
        said[name] = [end.steps, end.signal]
    except PruneError as error:
        said[name] = str(error)
go("full", data)
go("too many", {**data, "launch": {"kind": "ray", "workers": 4}})
if sys.argv[3:]:
    shutil.copytree(place / "ray", place / "ray-full")
    shutil.rmtree(place / "ray")
    shutil.rmtree(place / "ray-work" / "checkpoint-6")
    go("resumed", data)
    go("refused", data)
print("SAID" + json.dumps(said))
"""


def test_ray_train_equals_one_process(single: Path) -> None:
    """Loss by loss, and refused for want of CPUs at once; in full also from its own checkpoint, and refused by a worker."""
    pytest.importorskip("ray.train", reason="Ray Train is an extra")
    token = single / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    # Ray puts sockets there, whose paths are short. Its workers are niced by 15: beside other tests they would hardly run at all.
    temp = Path("/tmp") / f"vp-{secrets.token_hex(3)}"
    env = {**ENV, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token",
           "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
           "RAY_worker_niceness": "0"}  # fmt: skip
    env.pop("RAY_ADDRESS", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", RAY, str(single), str(temp), *["full"] * FULL], env=env, capture_output=True, text=True,
            timeout=590, input=json.dumps(fields(single, "ray", kind="ray", workers=2)), cwd=single,
        )  # fmt: skip
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    said = json.loads(line.removeprefix("SAID"))
    assert said["full"] == [STEPS, 0]
    assert "4 workers with a CPU each, the Ray cluster has 2." in said["too many"]
    first = single / ("ray-full" if FULL else "ray")
    assert_same(single, first.name, "single")
    record = json.loads((first / "record.json").read_text())
    assert (record["processes"], record["sharded"]) == (2, False)
    if FULL:
        assert said["resumed"] == [STEPS, 0]
        assert f"output {single / 'ray'} is there already" in said["refused"]
        assert_same(single, "ray", "ray-full", tolerance=RESUMED, since=4)
