"""`vllm-prune train` on ShadowLLM's tiny recipe, and its folder served: what the server closes is what the twin closes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import engine, generate, recorded
from vllm_prune_training.command import train_command
from vllm_prune_training.masked import load_gated

from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples/recipes/shadow-tiny.yaml"


def settings(folder: Path, *more: str) -> list[str]:
    return [f"output={folder / 'gated'}", "shadow.samples=24", "shadow.epochs=10", "shadow.windows=4", *more]


def test_from_a_base_to_a_served_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    assert train_command(RECIPE, settings(tmp_path), resume=True) == 0
    folder = tmp_path / "gated"
    record = json.loads((folder / "record.json").read_text())
    assert -1 <= record["predictors"]["heads"]["spearman"] <= 1 and record["held_out"]["ppl_open"] > 1
    assert "closed as served" in (folder / "README.md").read_text()
    with pytest.raises(PruneError, match="is there already"):
        train_command(RECIPE, settings(tmp_path), resume=True)

    # The traces are used again, whatever is learnt from them; of another run they are refused.
    other = settings(tmp_path / "other", f"work={tmp_path / 'gated-work'}", "shadow.epochs=12", "shadow.criterion=l2")
    assert train_command(RECIPE, other, resume=True) == 0
    assert "are taken from" in capsys.readouterr().out
    with pytest.raises(PruneError, match=r"of another run: prompt: 96 before, 64 now"):
        train_command(RECIPE, [*other, f"output={tmp_path / 'third'}", "shadow.prompt=64"], resume=True)

    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # decisions in bfloat16 may differ where scores lie within rounding
    (folder / "config.json").write_text(json.dumps(config))
    ids = load_ids(folder)
    with engine(folder, max_model_len=256, additional_config={"vllm_prune": {"record": True}}) as llm:
        outputs = generate(llm, [{"prompt_token_ids": x} for x in (ids[:40], ids[40:140])], tokens=12)
        for output in outputs:
            tokens, found = recorded(llm, output)
            with torch.no_grad():
                twin = load_gated(folder, torch.float32)(
                    torch.tensor(tokens), "hard", prompt=len(output.prompt_token_ids)
                )
            assert twin.expiry.tolist() == found.tolist() and (found != NEVER).any()


def load_ids(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)((ROOT / "vllm_prune/gates/base.py").read_text())["input_ids"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("gate.params.neurons=64", r"params\.neurons follows from the base"),
        ("gate.params.width=64", r"params\.width follows from the base"),
        ("gate.params.closed=2", r"closed must be a share"),
        ("gate.method=dms", r"Input should be"),
        ("shadow.samples=10000000", r"field 'shadow\.samples'"),
        ("shadow.criterion=snip", r"field 'shadow\.criterion'.*'plainact' or 'l2'"),
        (
            "shadow.neuron_criterion=weight",
            r"shadow\.neuron_criterion belongs to shadow_token: shadow closes no neurons",
        ),
        ("shadow.steps=3", r"field 'shadow\.steps' is unknown; allowed here: batch, "),
        ("shadow.held_out=0.001", r"both sides need 2"),
        ("shadow.prompt=5000", r"the model has 4096 positions"),
        ("training.steps=3", r"field 'training' is unknown"),
        ("model=examples", r"no config\.json"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path: Path, monkeypatch, change: str, said: str) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(PruneError, match=said):
        train_command(RECIPE, [*settings(tmp_path), change], resume=True)
    assert not (tmp_path / "gated").exists()


def test_an_ordinary_recipe_with_shadow_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(PruneError, match="give a section shadow"):
        train_command(ROOT / "examples/recipes/dms-tiny.yaml", ["gate.method=shadow", "gate.params={}"], resume=True)


def test_the_token_form_is_served_as_trained(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = ROOT / "examples/recipes/shadow-token-tiny.yaml"
    by_weight = "shadow.neuron_criterion=weight"
    with pytest.raises(PruneError, match="neuron_criterion weight goes with criterion plainact, not with l2"):
        train_command(recipe, settings(tmp_path, by_weight, "shadow.criterion=l2"), resume=True)
    assert train_command(recipe, settings(tmp_path, "shadow.epochs=5"), resume=True) == 0
    plain, folder = tmp_path / "gated", tmp_path / "weight/gated"  # of the same traces
    other = settings(tmp_path / "weight", f"work={tmp_path / 'gated-work'}", "shadow.epochs=5", by_weight)
    assert train_command(recipe, other, resume=True) == 0
    was, now = (json.loads((x / "record.json").read_text())["predictors"] for x in (plain, folder))
    assert {"heads", "neurons"} == set(now) and was["heads"] == now["heads"] and was["neurons"] != now["neurons"]
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    with engine(folder, max_model_len=256) as llm:
        (output,) = generate(llm, [{"prompt_token_ids": load_ids(folder)[:100]}], tokens=12)
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    with torch.no_grad():
        logits = load_gated(folder, torch.float32)(torch.tensor(ids), "hard", prompt=100).logits
    assert logits[99:-1].argmax(-1).tolist() == list(output.outputs[0].token_ids)
