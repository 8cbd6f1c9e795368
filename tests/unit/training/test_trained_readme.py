"""The README of a trained folder says what its record says, before and after calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_language as tiny
from vllm_prune_training.calibrate import CalibrateOptions, calibrate
from vllm_prune_training.gate_export import readme


def record(method: str, **held_out: Any) -> dict[str, Any]:
    """The parts of a training record that matter, as ``train`` writes them."""
    return {
        "recipe": {"gate": {"method": method, "params": {"rank": 8}, "train_base": False}}, "steps": 1200,
        "tokens_seen": 4_915_200, "finished": "2026-01-02T03:04:05+00:00", "git_commit": "abcdef0123456789",
        "held_out": {"length": 64, "windows": 8, "ppl_open": 12.3456, **held_out},
    }  # fmt: skip


def test_gated(tmp_path: Path) -> None:
    tiny.save_gated(tmp_path / "model")
    (tmp_path / "text.py").write_text(tiny.text())
    made = record("dcp", ppl_soft=12.5, ppl_hard=12.501, kept_soft=0.2, kept_hard=0.2012)
    (tmp_path / "model" / "record.json").write_text(json.dumps(made))
    text = readme(tmp_path / "model")
    for part in ("DCP", '{"rank": 8}', "frozen", "4,915,200 tokens", "| perplexity, gates open | 12.346 |",
                 "| past pairs kept, as served | 0.2012 |", "commit abcdef012345", "Not calibrated"):  # fmt: skip
        assert part in text
    table = calibrate(CalibrateOptions(tmp_path / "model", tmp_path / "text.py", 64, (1.0,), 64))
    text = readme(tmp_path / "model")
    assert "Not calibrated" not in text and f"| {table.rows[1].kept:.3f} | {table.rows[1].ppl:.3f} |" in text


def test_dense_and_damaged(tmp_path: Path) -> None:
    tiny.save_base(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps(record("none")))
    text = readme(tmp_path)
    assert "it holds no gates" in text and "kept" not in text
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(KeyError):
        readme(tmp_path)
