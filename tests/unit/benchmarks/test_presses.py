"""kvpress in its own environment (`make baselines`): one prefill for all presses against a prefill each, the measured kept
fraction, greedy decoding against teacher forcing, and the refusal of a folder that reads as another model there."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from baselines.case_file import Case, Question, load_cases, save_cases
from transformers import AutoModelForCausalLM, Qwen3Config

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-baselines" / "bin" / "python"
needs_env = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-baselines: run `make baselines`")

TWINS = """
import sys, torch
sys.path.insert(0, sys.argv[1] + "/benchmarks")
from pathlib import Path
from baselines import press as p
from baselines.case_file import load_cases
model = p.load_model(Path(sys.argv[2]))
(case, *_), _ = load_cases(Path(sys.argv[3]))
for budget in (0.5, 0.1):
    presses = [make(1 - budget) for make in p.PRESSES.values()]
    fast = p.press_all(model, case.context, presses)
    for (name, make), found in zip(p.PRESSES.items(), fast, strict=True):
        want = p.press_cache(model, case.context, make(1 - budget))
        assert all(torch.equal(a, b) for one, other in zip(found, want) for a, b in zip(one, other)), name
        assert abs(p.kept_fraction(found, len(case.context)) - budget) < 0.01, (name, budget)
    assert any(not torch.equal(fast[0][0][0], other[0][0]) for other in fast[1:]), "the presses choose differently"
print("twins agree")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("presses")
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
                         rope_parameters={"rope_type": "default", "rope_theta": 4321.0})  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.2 / weight.shape[1] ** 0.5)
        model.save_pretrained(folder / "model")
        ids = torch.randint(64, (400,)).tolist()
        logits = model(torch.tensor([ids[:100]])).logits[0, -1].tolist()
    questions = [Question(ids[300:310], ids[310:312]), Question(ids[320:325], ids[325:326])]
    cases = [Case("asked", "lookup", "test", ids[:300], questions),
             Case("text", "text", "test", ids[:300], continuation=ids[300:]),
             Case("fit", "text", "calibration", ids[:300], continuation=ids[300:])]  # fmt: skip
    save_cases(folder / "cases.json", cases, {"ids": ids[:100], "logits": logits}, {})
    return folder / "model", folder / "cases.json"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([str(PYTHON), *map(str, arguments)], capture_output=True, text=True, env=env, check=False)


@needs_env
def test_one_prefill_serves_all_presses(files: tuple[Path, Path]) -> None:
    done = run("-c", TWINS, ROOT, *files)
    assert "twins agree" in done.stdout, done.stderr[-2000:]


@needs_env
def test_rows(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = run(ROOT / "benchmarks/baselines/press.py", "--model", files[0], "--cases", files[1], "--out", out,
               "--presses", "SnapKV", "Random", "--budgets", "0.5", "1.0", "--threads", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(out.read_text())
    assert data["record"]["greedy_checked"] == data["record"]["greedy_agreed"] == 4
    assert data["record"]["logit_difference"] < 1e-4
    rows = {(row["method"], row["budget"], row["case"]): row for row in data["rows"]}
    assert len(rows) == 8 and not any(case == "fit" for _, _, case in rows), "calibration cases are not the test"
    model = AutoModelForCausalLM.from_pretrained(files[0])
    cases, _ = load_cases(files[1])
    text = cases[1]
    with torch.no_grad():
        logits = model(torch.tensor([text.context + text.continuation])).logits[0, 300:-1]
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(text.continuation[1:]), reduction="sum")
    for method in ("SnapKV", "Random"):
        row = rows[method, 1.0, "text"]
        assert row["kept"] == 1.0 and row["nll"] == pytest.approx(float(want), rel=1e-4), "a whole cache is dense"
        assert rows[method, 0.5, "text"]["kept"] == 0.5
        assert abs(rows[method, 0.5, "text"]["nll"] - float(want)) > 0.01


@needs_env
def test_another_model_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    cases, check = load_cases(files[1])
    save_cases(tmp_path / "cases.json", cases, {**check, "logits": [x * 1.01 for x in check["logits"]]}, {})
    done = run(ROOT / "benchmarks/baselines/press.py", "--model", files[0], "--cases", tmp_path / "cases.json",
               "--out", tmp_path / "rows.json")  # fmt: skip
    assert done.returncode == 1 and "other logits than ours" in done.stderr
    assert not (tmp_path / "rows.json").exists()


def test_files_with_unusable_cases_are_refused(tmp_path: Path) -> None:
    good = Case("a", "lookup", "test", [0, 1, 2], [Question([3], [4])])
    path = tmp_path / "cases.json"
    for bad in (replace(good, questions=[]), replace(good, continuation=[1, 2]), replace(good, context=[0]),
                replace(good, questions=[Question([], [4])]), replace(good, questions=[], continuation=[5])):  # fmt: skip
        save_cases(path, [bad], {}, {})
        with pytest.raises(ValueError, match="case a"):
            load_cases(path)
    save_cases(path, [good], {"ids": [1]}, {})
    assert load_cases(path) == ([good], {"ids": [1]})
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(ValueError, match="version"):
        load_cases(path)
