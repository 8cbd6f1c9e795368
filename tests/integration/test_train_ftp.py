"""`vllm-prune train` with FTP's tiny recipes, and their folders served by vLLM: the server bypasses what the twin bypasses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import engine, pool_is_whole, recorded
from vllm_prune_training.masked import load_gated
from vllm_prune_training.recipe_file import read_recipe

from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples/recipes/ftp-tiny.yaml"
PROMPT = ROOT / "examples/recipes/ftp-prompt-tiny.yaml"
SHORT = {"training.steps": 24, "training.eval_tokens": 256, "objective.ftp.search.generations": 1}


@pytest.mark.parametrize("recipe", [RECIPE, PROMPT], ids=["causal", "prompt"])
def test_from_a_recipe_to_a_served_folder(recipe: Path, tmp_path: Path) -> None:
    sets = [f"--set={name}={value}" for name, value in {**SHORT, "output": tmp_path / "ftp"}.items()]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_prune.cli", "train", str(recipe), *sets], cwd=ROOT, text=True, capture_output=True,
        timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "ftp/record.json").read_text())
    schedule = record["ftp"]["schedule"]
    assert schedule[0] == 0.0 and sum(schedule) / len(schedule) == pytest.approx(0.2, abs=1e-4)
    history = record["ftp"]["search"]["static_kl"]
    assert history == sorted(history, reverse=True)
    config = json.loads((tmp_path / "ftp/config.json").read_text())["drop_gate"]
    assert config["method"] == "ftp" and config["dtype"] == "float32"
    assert record["hard_over_soft"] == pytest.approx(1.0, abs=0.02)
    assert config["expected_keep"] == round(record["held_out"]["kept_hard"], 4)
    assert config["params"] == ({"form": "prompt"} if recipe == PROMPT else {})

    from vllm import SamplingParams

    twin = load_gated(tmp_path / "ftp", torch.float32)
    options = {"vllm_prune": {"record": True}}
    with engine(tmp_path / "ftp", skip_tokenizer_init=False, max_model_len=256, dtype="float32",
                additional_config=options) as llm:  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        output = llm.generate(recipe.read_text()[:400], params, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 12
        ids, found = recorded(llm, output)
        with torch.no_grad():
            want = twin(torch.tensor(ids), "hard", prompt=len(output.prompt_token_ids)).expiry
        assert want is not None
        np.testing.assert_array_equal(found != NEVER, want.numpy() != NEVER)
        assert pool_is_whole(llm)


@pytest.mark.parametrize(
    "sets,said",
    [
        ({"gate.train_base": True}, "train_base false"),
        ({"gate.protect.window": 4}, "protect.window"),
        ({"gate.params.kv": "drop"}, "'skip' or 'keep'"),
        ({"gate.params.form": "whole"}, "must be 'causal' or 'prompt'"),
        ({"objective.ftp.sparsity": 0.95}, "less than 0.9"),
        ({"objective.ftp.search.elite": 8}, "elite"),
        ({"objective.gamma": 0.3}, "belongs to dcp"),
        ({"training.compile": True}, "training.compile"),
        ({"launch.kind": "accelerate", "launch.fsdp": True}, "launch.fsdp"),
        (
            {"prompts.share": [0.2, 0.8]},
            "acc_prompt and ftp with params.form prompt, not to ftp with params.form causal",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_recipes(sets: dict, said: str, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from vllm_prune_training.build import gate_section

    with pytest.raises(PruneError, match=said):
        recipe = read_recipe(RECIPE, [f"{name}={json.dumps(value)}" for name, value in sets.items()])
        gate_section(recipe, AutoConfig.from_pretrained(ROOT / str(recipe.model)))


@pytest.mark.parametrize(
    "name,value,owner",
    [("hard_from", 0.5, "ltp_prompt"), ("strengths", [0.5, 2.0], "acc_prompt"), ("profile", "uniform", "acc_prompt")],
)
def test_fields_of_other_prompt_methods_are_refused_by_name(name: str, value: object, owner: str) -> None:
    with pytest.raises(PruneError, match=rf"prompts\.{name} belongs to {owner}, not to ftp with params\.form prompt"):
        read_recipe(PROMPT, [f"prompts.{name}={json.dumps(value)}"])
    assert read_recipe(PROMPT, ["gate.protect.window=4"]).whole_prompts and not read_recipe(RECIPE, []).whole_prompts


def test_a_base_too_shallow_for_its_sparsity() -> None:
    from vllm_prune_training.ftp_search import uniform_plan

    assert uniform_plan(5, 0.2) == [0.0, 0.25, 0.25, 0.25, 0.25]
    with pytest.raises(PruneError, match=r"objective\.ftp\.sparsity 0\.5 over 2 blocks"):
        uniform_plan(2, 0.5)
