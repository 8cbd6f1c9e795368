"""What the commands share: a refusal's exit code, and a training package that is not installed."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner
from vllm_prune_training import command
from vllm_prune_training.checkpoints import SaveFailed

from vllm_prune.cli import app

COMMANDS = {
    "eval": ["DIR"], "calibrate": ["DIR", "--data", "text.jsonl"], "report": ["DIR"], "train": ["recipe.yaml"],
    "export": ["--base", "DIR", "--out", "OUT"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_training_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [known for known in sys.modules if known.partition(".")[0] == "vllm_prune_training"]:
        monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(app, [name, *COMMANDS[name]])
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert f"vllm-prune: {name} needs the training package" in said and said.endswith("Install vllm-prune[train].")


def test_a_refusal_keeps_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise SaveFailed("no space is left.", "Make some.")

    monkeypatch.setattr(command, "train_command", full)
    result = CliRunner().invoke(app, ["train", "recipe.yaml"])
    assert result.exit_code == SaveFailed.exit_code == 4
    assert " ".join(result.output.split()) == "vllm-prune: no space is left. Make some."
