"""Whole training runs on tiny models: exact resume, fixed masks, and what goes wrong in the middle."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import QWEN, AtStep, losses, plain_recipe, recipe_of, terminate
from vllm_prune_training.checkpoints import SaveFailed, checkpoints
from vllm_prune_training.masked import load_gated
from vllm_prune_training.train import run
from vllm_prune_training.trainer import LossNotFinite

from vllm_prune.errors import PruneError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """A dense model, made by the trainer itself."""
    plain = plain_recipe(folder, "base", steps=3, lengths=48)
    plain.update(gate={"method": "none"}, objective={})
    recipe = recipe_of(plain)
    assert run(recipe).signal == 0
    return Path(recipe.output)


def _same_files(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "drop_gate.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


def test_dcp_interrupted_and_resumed_is_the_same_run(folder: Path) -> None:
    whole = recipe_of(plain_recipe(folder, "dcp-whole"))
    parts = recipe_of(plain_recipe(folder, "dcp-parts"))
    assert run(whole).steps == 8
    stopped = run(parts, callbacks=[AtStep(4, terminate)])
    assert stopped.signal == signal.SIGTERM and stopped.steps == 4
    assert not Path(parts.output).exists() and checkpoints(Path(parts.work_folder))[-1].name == "checkpoint-4"
    assert run(parts).signal == 0
    assert losses(Path(parts.work_folder)) == losses(Path(whole.work_folder))
    assert list(losses(Path(whole.work_folder))) == list(range(1, 9))
    _same_files(Path(whole.output), Path(parts.output))
    record = json.loads((Path(whole.output) / "record.json").read_text())
    assert record["tokens_seen"] == 8 * 96 and record["held_out"]["ppl_hard"] > 1.0
    assert record["versions"]["torch"] and len(record["data"]) == 2 and len(record["data"][0]["sha256"]) == 64
    assert (Path(whole.work_folder) / "tensorboard").is_dir()

    gated = load_gated(whole.output)
    assert gated.section.method == "dcp" and gated.section.params == {"rank": 4, "beta": 2.0}
    config = json.loads((Path(whole.output) / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == ["PrunedQwen3ForCausalLM"]
    with pytest.raises(PruneError, match="is there already"):
        run(whole)
    before = Path(whole.output).rename(folder / "moved")  # as if it could not be written: nothing is trained again
    log = (Path(whole.work_folder) / "log.jsonl").read_text().splitlines()
    assert run(whole).steps == 8
    _same_files(Path(whole.output), before)
    assert (Path(whole.work_folder) / "log.jsonl").read_text().splitlines() == [*log, log[-1]]


def test_dms_with_accumulation_and_a_teacher_resumes_exactly(folder: Path, base: Path) -> None:
    plain = plain_recipe(folder, "dms", steps=5, lengths=48, accumulation=2, gate_lr=1e-4)
    plain["model"] = str(base)
    plain["gate"] = {"method": "dms", "params": {"delay": 4}}
    plain["objective"] = {"kl_forward": 1.0, "compression": 4.0, "ramp": 0.6}
    whole, parts = recipe_of(plain), recipe_of({**plain, "output": str(folder / "dms-parts")})
    run(whole)
    assert run(parts, callbacks=[AtStep(2, terminate)]).steps == 2
    run(parts)
    assert losses(Path(parts.work_folder)) == losses(Path(whole.work_folder))
    _same_files(Path(whole.output), Path(parts.output))
    first = json.loads((Path(whole.work_folder) / "log.jsonl").read_text().splitlines()[0])
    assert first["kl_forward"] < 0.05 and 0.0 <= first["closed"] < 0.1  # starts at the teacher, all open but for noise


def test_a_changed_recipe_or_changed_data_is_not_gone_on_with(folder: Path) -> None:
    plain = plain_recipe(folder / "changed", "run", steps=4, lengths=32)
    recipe = recipe_of(plain)
    run(recipe, callbacks=[AtStep(2, terminate)])
    with pytest.raises(PruneError, match=r"training\.lr: 0\.001 before, 0\.002 now"):
        run(recipe_of(plain, training={"lr": 2e-3}))
    with pytest.raises(PruneError, match=r"gate\.params\.rank: 4 before, 8 now"):
        run(recipe_of(plain, gate={"params": {"rank": 8, "beta": 2.0}}))
    (folder / "changed/texts/0.txt").write_text("something else\n" * 30)
    with pytest.raises(PruneError, match=r"files changed since in .*\*\.txt\."):
        run(recipe)
    fresh = run(recipe_of(plain, training={"lr": 2e-3, "save_steps": 4}), resume=False)
    assert fresh.steps == 4 and Path(f"{recipe.work_folder}.old-1").is_dir()


def test_a_loss_that_is_no_number_stops_the_run_at_once(folder: Path) -> None:
    recipe = recipe_of(plain_recipe(folder, "nan", steps=8, save_steps=3))

    def poison(model: Any, **_: Any) -> None:
        with torch.no_grad():
            next(model.model.parameters()).fill_(float("nan"))

    with pytest.raises(LossNotFinite, match="the loss of step 5 is nan") as caught:
        run(recipe, callbacks=[AtStep(4, poison)])
    assert caught.value.exit_code == 3
    good = checkpoints(Path(recipe.work_folder))
    assert [path.name for path in good] == ["checkpoint-3"]
    assert all(bool(value.isfinite().all()) for value in load_file(good[0] / "model.safetensors").values())
    assert run(recipe).steps == 8  # and goes on from there


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Limits how large a file this process can write; the error of a full disk comes from the system itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> Any:
        return lambda **_: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_full_disk_leaves_the_earlier_checkpoint(folder: Path, small_files: Any, part: str) -> None:
    recipe = recipe_of(plain_recipe(folder, f"full-{part}", steps=6, save_steps=2, lengths=32))
    work = Path(recipe.work_folder)
    limit = {"model": 30_000, "optimizer": 200_000}[part]
    with pytest.raises(SaveFailed, match="step 4 could not be written") as caught:
        run(recipe, callbacks=[AtStep(3, small_files(limit))])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert caught.value.exit_code == 4
    sizes = {path.name: path.stat().st_size for path in (work / "checkpoint-2").iterdir()}
    assert sizes["optimizer.pt"] > limit and (sizes["model.safetensors"] > limit) == (part == "model")
    assert [path.name for path in checkpoints(work)] == ["checkpoint-2"] and not (work / ".unfinished").exists()
    assert run(recipe).steps == 6


def test_the_base_is_trained_under_a_fixed_mask(folder: Path, base: Path) -> None:
    plain = plain_recipe(folder, "window", steps=3, lengths=48)
    plain.update(model=str(base), objective={}, gate={"method": "window", "params": {"window": 5},
                                                      "protect": {"sinks": 2, "window": 0}})  # fmt: skip
    recipe = recipe_of(plain)
    run(recipe)
    held = json.loads((Path(recipe.output) / "record.json").read_text())["held_out"]
    assert held["ppl_soft"] == pytest.approx(held["ppl_hard"], rel=1e-4)
    assert held["kept_soft"] == pytest.approx(held["kept_hard"], rel=1e-4)
    assert held["ppl_open"] != held["ppl_hard"]
    before, after = load_file(base / "model.safetensors"), load_file(Path(recipe.output) / "model.safetensors")
    assert not all(torch.equal(before[key], after[key]) for key in before)


def test_a_frozen_base_stays_as_it_is_and_gates_go_on_from_a_folder(folder: Path, base: Path) -> None:
    plain = plain_recipe(folder, "frozen", steps=2, lengths=48)
    plain.update(model=str(base), gate={**plain["gate"], "train_base": False})
    recipe = recipe_of(plain)
    run(recipe)
    before, after = load_file(base / "model.safetensors"), load_file(Path(recipe.output) / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    gates = load_file(Path(recipe.output) / "drop_gate.safetensors")

    further = recipe_of({**plain, "model": recipe.output, "output": str(folder / "further"),
                         "gate": {**plain["gate"], "init_from": recipe.output}}, training={"gate_lr": 1e-12,
                                                                                         "bias_lr": 1e-12})  # fmt: skip
    run(further)
    later = load_file(Path(further.output) / "drop_gate.safetensors")
    assert all(torch.allclose(gates[key], later[key], atol=1e-6) for key in gates)
    wrong = recipe_of({**plain, "gate": {**plain["gate"], "params": {"rank": 8}, "init_from": recipe.output},
                       "output": str(folder / "wrong")})  # fmt: skip
    with pytest.raises(PruneError, match="Make them equal"):
        run(wrong)


def test_a_borrowed_neuron_is_moved_into_the_gate(folder: Path) -> None:
    plain = plain_recipe(folder, "borrowed", steps=2, lengths=48)
    plain["model"]["new"]["config"] = {**plain["model"]["new"]["config"], "model_type": "llama"}
    plain.update(gate={"method": "dms", "params": {"delay": 4, "form": "borrowed"}},
                 objective={"next_token": 1.0, "closed": 0.3})  # fmt: skip
    recipe = recipe_of(plain)
    run(recipe)
    gated = load_gated(recipe.output)
    assert gated.gates[0].borrows and float(gated.gates[0].gate.weight.abs().max()) > 0.0
    ids = torch.arange(30)
    held = json.loads((Path(recipe.output) / "record.json").read_text())["held_out"]
    assert held["ppl_hard"] == pytest.approx(held["ppl_soft"], rel=0.05)
    assert bool(gated(ids, "hard").logits.isfinite().all())
    other = recipe_of({**plain, "gate": {**plain["gate"], "init_from": recipe.output}, "output": str(folder / "no")})
    with pytest.raises(PruneError, match="belong to the base that they were taken from"):
        run(other)


def test_new_models_of_other_families_are_trained(folder: Path) -> None:
    plain = plain_recipe(folder, "gpt2", steps=2, lengths=48)
    plain["model"]["new"]["config"] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    recipe = recipe_of(plain)
    run(recipe)
    assert load_gated(recipe.output).section.num_kv_heads == 2
    for change, said in (
        ({"n_positions": 16}, "has 48 tokens, but the model has 16 positions"),
        ({"heads": 3}, r"'model\.new\.config\.heads' is unknown to gpt2"),
    ):
        plain["model"]["new"]["config"].update(change)
        with pytest.raises(PruneError, match=said):
            run(recipe_of({**plain, "output": str(folder / "gpt2-wrong")}))
        for name in change:
            plain["model"]["new"]["config"][name] = 64


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    tied = {"new": {"tokenizer_vocab": 320, "config": {**QWEN, "tie_word_embeddings": True}}}
    recipe = recipe_of(plain_recipe(tmp_path), model=tied, training={"steps": 1})
    run(recipe)
    found = load_file(Path(recipe.output) / "model.safetensors")
    assert "model.embed_tokens.weight" in found and "lm_head.weight" not in found
