"""Commands on a full disk: a refusal that names the place, and nothing half written in place of what was whole. ``/dev/full``
has no room for a byte, and a process may be forbidden to write to any file."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner
from vllm_prune_training.engine_eval import main as engine_eval

from vllm_prune.checkpoint import write_json
from vllm_prune.cli import app
from vllm_prune.errors import PruneError, writing

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@contextmanager
def no_room() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_demo(tmp_path):
    """Before an engine starts."""
    (tmp_path / "run-evicting.job.json").symlink_to(FULL)
    asked = ["demo", "--out", str(tmp_path), "--prompt-tokens", "40", "--new-tokens", "4"]
    found = CliRunner().invoke(app, asked)
    said = " ".join(found.output.split())
    assert found.exit_code == 2 and "cannot be written" in said and "No space left" in said and "--out" in said, said


def test_the_demo_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    found = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file" / "x"), "--prompt-tokens", "40"])
    assert found.exit_code == 2 and "cannot be written" in found.output


def test_an_evaluation_is_printed_before_it_is_written(monkeypatch, capsys):
    monkeypatch.setattr(engine_eval, "show", lambda console, result: console.print(result["perplexity"]))
    with pytest.raises(PruneError, match=r"/dev/full cannot be written: .*No space left on device"):
        engine_eval.publish(FULL, {"perplexity": 7.25}, Console())
    assert "7.25" in capsys.readouterr().out


def test_a_checkpoints_config_is_replaced_or_left(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"old": 1})
    with no_room(), pytest.raises(PruneError, match=r"config.json cannot be written: .*File too large.* Make room."), \
            writing(path, "Make room."):  # fmt: skip
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]
