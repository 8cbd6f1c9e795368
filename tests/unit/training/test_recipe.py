"""Recipes: what is refused, in words that name the file, the field and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_runs import plain_recipe, recipe_of
from vllm_prune_training.recipe import Recipe
from vllm_prune_training.recipe_file import differences, read_recipe
from vllm_prune_training.shadow.recipe import ShadowRecipe

from vllm_prune.errors import PruneError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    return plain_recipe(tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "examples/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_valid(path: Path) -> None:
    assert isinstance(read_recipe(path), Recipe | ShadowRecipe)


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("training", {"steps": "ten"}, r"field 'training\.steps': Input should be a valid integer, got 'ten'"),
        ("training", {"steps": 1.5}, r"field 'training\.steps'"),
        ("training", {"steps": True}, r"field 'training\.steps': Input should be a valid integer"),
        ("training", {"lr": "fast"}, r"field 'training\.lr': Input should be a valid number"),
        ("training", {"lr": float("nan")}, r"field 'training\.lr'"),
        ("training", {"stpes": 3}, r"field 'training\.stpes' is unknown; allowed here: accumulation, .*steps"),
        ("training", {"precision": "fp8"}, r"field 'training\.precision': Input should be 'bf16' or 'fp32'"),
        ("training", {"lengths": [[0.5, 32]]}, r"field 'training': lengths must be a T"),
        ("training", {"lengths": [[1.0, 4096]]}, r"batch_tokens must be at least the longest of lengths, 4096"),
        ("training", {"lengths": 32.5}, r"field 'training\.lengths"),
        ("training", {"optimizer": "muon"}, r"adam_lr goes with optimizer muon"),
        ("gate", {"method": "dpc"}, r"method 'dpc' is unknown; known: none, .*dcp, dms"),
        ("gate", {"protect": {"sinks": 4}}, r"protect cannot be trained with dcp"),
        ("gate", {"init": "x"}, r"field 'gate\.init' is unknown; allowed here: init_from"),
        ("objective", {"gamma": 0.3}, r"exactly one of gamma and keep"),
        ("objective", {"tau": 0.1}, r"objective\.tau belongs to dms, not to dcp"),
        ("objective", {"keep": 1.5}, r"field 'objective\.keep': Input should be less than 1, got 1\.5"),
        ("objective", {"next_token": 0.0}, r"objective has no loss"),
        ("objective", {"alpha": {"schedule": "cosine", "from": 0.9, "until": 0.1}}, r"from must lie before until"),
        ("objective", {"alpha": {"schedule": "cosine", "since": 0.9}}, r"alpha\.since' is unknown; .*from"),
        ("data", {"train": []}, r"field 'data\.train': List should have at least 1 item"),
        ("data", {"train": [{"path": "x", "glob": "y", "format": "text"}]}, r"data\.train\.0': give exactly one of"),
        ("data", {"train": [{"path": "x", "format": "csv"}]}, r"data\.train\.0\.format'.*'text', 'jsonl' or 'parquet'"),
        ("launch", {"kind": "single", "workers": 2}, r"kind single has one worker"),
        ("model", {"new": {"config": {}, "tokenizer_vocab": 320}}, r"config needs model_type"),
        ("model", 3, r"field 'model'"),
    ],
)
def test_what_is_wrong_is_named(plain: dict[str, Any], section: str, change: Any, said: str) -> None:
    if section == "launch":
        plain["launch"] = {}
    with pytest.raises(PruneError, match=said):
        recipe_of(plain, **{section: change})


def test_all_faults_are_told_at_once_and_missing_fields_too(plain: dict[str, Any]) -> None:
    del plain["output"]
    plain["training"]["steps"] = -1
    with pytest.raises(PruneError) as caught:
        recipe_of(plain)
    assert "field 'output' is missing" in str(caught.value) and "field 'training.steps'" in str(caught.value)


def _file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_traps(tmp_path: Path) -> None:
    recipe = (ROOT / "examples/recipes/dcp-tiny.yaml").read_text()
    assert read_recipe(_file(tmp_path, recipe), ["training.lr=1e-3"]).training.lr == 1e-3  # YAML 1.1 has a text here
    with pytest.raises(PruneError, match="the key 'gate' stands twice"):
        read_recipe(_file(tmp_path, recipe + "\ngate: {method: dms}\n"))
    with pytest.raises(PruneError, match="is no valid YAML"):
        read_recipe(_file(tmp_path, "model: [1,"))
    with pytest.raises(PruneError, match="must hold fields with values, got NoneType"):
        read_recipe(_file(tmp_path, ""))
    with pytest.raises(PruneError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "recipe.yaml").write_bytes(b"model: \xff")
    with pytest.raises(PruneError, match="is no UTF-8 text"):
        read_recipe(tmp_path / "recipe.yaml")


def test_overrides(tmp_path: Path) -> None:
    path = ROOT / "examples/recipes/dcp-tiny.yaml"
    recipe = read_recipe(path, ["training.steps=7", "training.lengths=[[0.5, 64], [1.0, 128]]", "work=elsewhere"])
    assert recipe.training.steps == 7 and recipe.training.length_at(0.5) == 128 and recipe.work_folder == "elsewhere"
    for wrong, said in (("training.steps", "not understood"), ("output.x=1", "no section"),
                        ("training.step=1", "unknown")):  # fmt: skip
        with pytest.raises(PruneError, match=said):
            read_recipe(path, [wrong])


def test_what_may_change_between_parts_of_a_run(plain: dict[str, Any]) -> None:
    one = recipe_of(plain)
    other = recipe_of(plain, work="elsewhere", training={"save_steps": 1, "log_steps": 2, "eval_steps": 5})
    assert differences(one.same_run(), other.same_run()) == []
    changed = recipe_of(plain, training={"steps": 9, "seed": 5}, data={"max_line_chars": 7})
    assert differences(one.same_run(), changed.same_run()) == [
        "data.max_line_chars: 100000 before, 7 now", "training.steps: 8 before, 9 now", "training.seed: 1 before, 5 now",
    ]  # fmt: skip
