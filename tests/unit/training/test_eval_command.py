"""``vllm-prune eval`` before any engine runs: options, refusals, and a run that fails."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace as Entry

import pytest
from typer.testing import CliRunner
from vllm_prune_training.engine_eval import launch, main
from vllm_prune_training.engine_eval.jobs import Engine, Request
from vllm_prune_training.engine_eval.run import prompt_nll

from vllm_prune.cli import app
from vllm_prune.errors import PruneError
from vllm_prune.option_lists import names, whole_numbers

REFERENCE = Path(__file__).parents[3] / "examples" / "reference-dcp"


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_tasks_are_listed() -> None:
    result = CliRunner().invoke(app, ["eval", str(REFERENCE), "--tasks", "help"])
    assert result.exit_code == 0 and {"ppl", "delayed_need_neutral", "instructions"} <= set(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "ppl,nothing"], "unknown task 'nothing'"),
        (["--lengths", "512,4097"], "length 4097 exceeds the model's 4096 positions"),
        (["--lengths", "100"], "length 100 is too short"),
        (["--lengths", "512,-1"], "--lengths has '-1', which is no positive whole number"),
        (["--lengths", "5e2"], "--lengths has '5e2'"),
        (["--strength", "0.5", "--keep", "0.5"], "both strength and keep"),
        (["--strength", "-1"], "strength"),
        (["--strength", "nan"], "strength"),
        (["--dtype", "float16"], "dtype 'float16' is not served"),
        (["--data", "/nowhere/text.txt"], "the data /nowhere/text.txt does not exist"),
        (["--json", "/nowhere/result.json"], "the folder of /nowhere/result.json does not exist"),
        (["--tasks", "niah_multikey_3", "--lengths", "256"], "niah_multikey_3 does not fit into 256 tokens"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "launch", lambda *_: pytest.fail("an engine was started"))
    assert message in refused(str(REFERENCE), *arguments)


def test_a_folder_without_gates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    assert "no gated checkpoint" in refused(str(tmp_path))
    assert "no model folder" in refused(str(tmp_path / "none"))


def test_a_keep_without_a_table_is_refused(tmp_path: Path) -> None:
    shutil.copytree(REFERENCE, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["drop_gate"].pop("calibration", None)
    path.write_text(json.dumps(config))
    assert "no calibration table" in refused(str(tmp_path / "model"), "--keep", "0.2")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"\xff\xfe", "UTF-8 at line 1, byte 0"), (b"short", "one window needs")],
)
def test_bad_text_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert message in refused(str(REFERENCE), "--tasks", "ppl", "--data", str(tmp_path / "text.txt"))


def test_default_lengths_are_those_the_model_holds() -> None:
    assert main.choose_lengths(None, 2048) == (512, 1024)
    assert main.choose_lengths(None, 300) == (300,)
    assert main.choose_lengths((1024, 512, 512), 2048) == (512, 1024)


def test_lists() -> None:
    assert names(" a, b ,,c") == ("a", "b", "c") and names("") == ()
    assert whole_numbers("--n", "1, 2") == (1, 2) and whole_numbers("--n", " ") is None
    with pytest.raises(PruneError, match="--n has '0'"):
        whole_numbers("--n", "0")


def test_prompt_nll_takes_the_prompts_own_tokens() -> None:
    logprobs = [None, {7: Entry(logprob=-0.5), 1: Entry(logprob=-9.0)}, {5: Entry(logprob=-2.0)}]
    assert prompt_nll([3, 7, 5], logprobs) == 2.5


ENGINE = Engine("nowhere", {}, "float32", 64, 1 << 20, 32, 1)


def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a script in the place of the engine's process; its arguments are those that the engine would get."""
    script = tmp_path / "child.py"
    script.write_text(body)
    real = launch.subprocess.Popen
    monkeypatch.setattr(
        launch.subprocess, "Popen", lambda command, **more: real([sys.executable, str(script), *command[3:]], **more)
    )


def test_a_run_that_fails_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(
        tmp_path, monkeypatch, "raise SystemExit('Traceback ...\\nPruneError: vllm-prune: refused (dtype): no such.')"
    )
    with pytest.raises(PruneError, match=r"exit code 1 after 0 of 1 requests: refused \(dtype\): no such.*gated.log"):
        launch.launch(ENGINE, [Request([1], 2)], tmp_path, "gated")


def test_a_run_with_missing_answers_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = '{"index": 1, "token_ids": [], "nll": null, "memory": {}}'
    child(tmp_path, monkeypatch, f"import sys; open(sys.argv[2], 'w').write('{line}\\n'); print('killed')")
    with pytest.raises(PruneError, match="exit code 0 after 1 of 2 requests: killed"):
        launch.launch(ENGINE, [Request([1], 2)] * 2, tmp_path, "gated")


def test_answers_come_back_in_the_order_of_the_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = '{"index": %d, "token_ids": [%d], "nll": null, "memory": {}}'
    body = "import sys, time\nfile = open(sys.argv[2], 'w')\nfor i in (1, 0):\n"
    body += f"    file.write('{line}\\n' % (i, i + 5)); file.flush(); time.sleep(0.7)\n"
    child(tmp_path, monkeypatch, body)
    progress: list[int] = []
    answers = launch.launch(ENGINE, [Request([1], 2)] * 2, tmp_path, "gated", progress.append)
    assert [answer.token_ids for answer in answers] == [[5], [6]]
    assert progress == sorted(progress) and progress[-1] == 2 and 1 in progress
