"""The report card of a tiny checkpoint: numbers, pictures, words, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_language as tiny
import torch
from PIL import Image
from vllm_prune_training import depth_recall
from vllm_prune_training.calibrate import CalibrateOptions, calibrate
from vllm_prune_training.masked import load_gated
from vllm_prune_training.report_card import ReportOptions, lengths_up_to, report

from vllm_prune.checkpoint import add_gates
from vllm_prune.config import GATE_FILE
from vllm_prune.errors import PruneError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    (folder / "text.py").write_text(tiny.text())
    tiny.save_gated(folder / "model", "dms")
    return folder


def run(folder: Path, **more: Any) -> dict[str, Any]:
    options = {"length": 512, "tokens": 512, "texts": 1, "data": folder / "text.py", **more}
    path = report(ReportOptions(folder / "model", **options))
    return {**json.loads((path.parent / "report.json").read_text()), "card": path.read_text(), "at": path.parent}


def test_card(folder: Path) -> None:
    """Before and after calibration."""
    first = run(folder, out=folder / "first")
    assert not first["calibrated"] and "run `vllm-prune calibrate`" in first["card"]
    table = calibrate(CalibrateOptions(folder / "model", folder / "text.py", 512, (0.5, 1.0, 4.0), 512))
    second = run(folder, length=None)
    assert second["at"] == folder / "model" / "report" and second["calibrated"] and second["length"] == 512
    assert second["calibration"] == table.model_dump(mode="json")
    kept = torch.tensor(second["kept"])
    assert kept.shape == (tiny.LAYERS, tiny.KV_HEADS)
    (as_trained,) = [row for row in table.rows if row.strength == 1.0]
    assert kept.mean().item() == pytest.approx(as_trained.kept, abs=1e-5)  # the same windows
    assert second["ppl"] == pytest.approx(as_trained.ppl, rel=1e-5) and second["kl"] > 0
    assert {row["name"] for row in second["classes"]} >= {"identifier", "operator", "string", "special"}
    assert second["recency"]["verdict"] in second["card"]
    assert {(row["task"], row["length"]) for row in second["recall"]} >= {(n, 512) for n in depth_recall.TASKS}
    assert all(sum(row["asked"]) >= 1 for row in second["recall"])
    for name in ("kept", "tradeoff", "recency", "classes", "recall"):
        assert f"({name}.png)" in second["card"]
        with Image.open(second["at"] / f"{name}.png") as image:
            assert image.width > 500 and len(image.convert("L").getcolors() or range(999)) > 20


def test_refusals(folder: Path, tmp_path: Path) -> None:
    for bad in ({"tokens": 0}, {"texts": 0}, {"length": 9999}, {"data": tmp_path / "none"}):
        with pytest.raises(PruneError):
            run(folder, out=tmp_path / "out", **bad)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(PruneError, match="cannot be written"):
        run(folder, out=tmp_path / "file")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    calibrate(CalibrateOptions(copy / "model", copy / "text.py", 64, (1.0,), 64))
    other = tiny.save_gated(tmp_path / "other", "dms", strength=1.0)
    gates = load_gated(other)
    gates.gates[0].gate.weight.data.mul_(2)
    add_gates(other, list(gates.gates), {"params": tiny.PARAMS["dms"]})
    shutil.copy(other / GATE_FILE, copy / "model" / GATE_FILE)
    with pytest.raises(PruneError, match="measured with other gates"):
        run(copy)


def test_open_gates_have_no_card(tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text(tiny.text())
    tiny.save_gated(tmp_path / "model", strength=0.0)
    with pytest.raises(PruneError, match="gates are open"):
        run(tmp_path)


@pytest.mark.parametrize("name", depth_recall.TASKS)
@pytest.mark.parametrize("length", [400, 512])
def test_probes_hold_their_answers(name: str, length: int, tmp_path: Path) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path)
    filler = [line + "\n" for line in tiny.text().split("\n") if line.strip()]
    count = depth_recall.tasks.counter(tokenizer)
    made = [depth_recall.make_probe(name, tokenizer, length, seed, filler, count) for seed in range(4)]
    assert all(len(probe.ids) <= length for probe in made) and any(probe.answers for probe in made)
    for probe in made:
        assert len(probe.answers) == len(probe.depths) and all(0 <= depth <= 1 for depth in probe.depths)
        for answer in probe.answers:
            value = tokenizer.decode(probe.ids[answer.start : answer.stop]).strip().strip('"')
            before = tokenizer.decode(probe.ids[: answer.start])
            assert value.isdigit() and value in before  # it was defined earlier


def test_right_answers_are_counted(tmp_path: Path) -> None:
    """A stand-in that knows every next token finds all when open, and none when gated."""
    tokenizer = tiny.save_tokenizer(tmp_path)
    filler = [line + "\n" for line in tiny.text().split("\n") if line.strip()]

    def oracle(ids: torch.Tensor, mode: str, **_: Any) -> Any:
        logits = torch.nn.functional.one_hot(ids.roll(-1 if mode == "open" else -2), tiny.VOCAB).float()
        return type("Out", (), {"logits": logits})

    rows = depth_recall.measure_recall(oracle, tokenizer, [300], 3, filler)  # type: ignore[arg-type]
    for row in rows:
        assert sum(row.asked) > 0 and row.total("open") == 1.0 and row.total("hard") < 0.5
        assert [x for x in row.share("open") if x is not None] == [1.0] * sum(a > 0 for a in row.asked)


def test_lengths() -> None:
    assert lengths_up_to(100) == [] and lengths_up_to(192) == [192]
    assert lengths_up_to(1024) == [256, 512, 1024] and lengths_up_to(1000) == [256, 512, 1000]
