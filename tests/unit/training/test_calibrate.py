"""Calibration of a tiny checkpoint: the numbers against a naive computation, the file, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny_language as tiny
import torch
from vllm_prune_training.calibrate import (
    CalibrateOptions,
    build_table,
    calibrate,
    check_length,
    describe,
    measure_table,
    parse_strengths,
)
from vllm_prune_training.held_text import make_windows, read_texts
from vllm_prune_training.masked import load_gated
from vllm_prune_training.sweep import Point, sweep

from vllm_prune.calibration import Calibration
from vllm_prune.checkpoint import add_gates
from vllm_prune.config import GATE_FILE, SECTION, check_calibration, find_gate_file, parse_drop_gate
from vllm_prune.errors import PruneError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "text.py").write_text(tiny.text())
    tiny.save_gated(folder / "model")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def run(folder: Path, **more: Any) -> Calibration:
    options = {"length": 64, "tokens": 256, **more}
    return calibrate(CalibrateOptions(folder / "model", options.pop("data", folder / "text.py"), **options))


def section_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model" / "config.json").read_text())[SECTION]


@torch.no_grad()
@pytest.mark.parametrize("method", ["dcp", "dms"])
def test_sweep_is_what_pair_by_pair_counting_finds(method: str, tmp_path: Path) -> None:
    model = load_gated(tiny.save_gated(tmp_path, method), dtype=torch.float32)
    ids = torch.randint(3, tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    for point in sweep(model, ids, [0.0, 0.6, 3.0]):
        seen = live = pairs = early = 0
        early_pairs = 16 * 15 // 2 * model.section.num_layers * len(ids)
        loss, kl = 0.0, 0.0
        for row in ids:
            expiry = model(row, "hard", strength=point.strength).expiry  # [L, E, T]
            for n in range(24):
                for j in range(n):
                    seen, pairs = seen + (n < expiry[..., j]).double(), pairs + 1
                    early += (n < expiry[..., j]).double().mean(-1).sum().item() if n < 16 else 0
            live = live + (expiry > 23).double().mean(-1)
            p = model(row, "open").logits.double().log_softmax(-1)
            q = model(row, "hard", strength=point.strength).logits.double().log_softmax(-1)
            loss -= sum(q[n, row[n + 1]].item() for n in range(23))
            kl += (p.exp() * (p - q)).sum(-1).mean().item() / 2
        torch.testing.assert_close(point.kept, seen / pairs)
        torch.testing.assert_close(point.live, live / 2)
        assert point.shorter == {16: pytest.approx(early / early_pairs)}
        assert point.ppl == pytest.approx(math.exp(loss / 46), rel=1e-4)
        assert point.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert (point.kept.mean() < 0.95) == (point.strength > 0) == (point.kl > 1e-3)


def test_calibrate_stores_a_table_that_the_server_reads(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "model").iterdir()}
    table = run(folder)
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "model").iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"config.json"}
    section = section_of(folder)
    assert Calibration.model_validate(section["calibration"]) == table
    assert section["expected_keep"] == pytest.approx(table.keep_at(1.0), abs=1e-5)
    kept = [row.kept for row in table.rows]
    assert table.rows[0].kl == 0 and kept[-1] < 0.3 and table.length == 64 and table.tokens == 256
    assert all(a - b < 0.101 for a, b in pairwise(kept)) or len(kept) == 16
    model = load_gated(folder / "model", strength=table.strength_at(0.5))
    windows = make_windows(read_texts(folder / "text.py"), tiny.save_tokenizer(folder / "other"), 64, 256)
    (point,) = sweep(model, windows.ids, [model.section.strength])
    assert point.kept.mean().item() == pytest.approx(0.5, abs=0.05)  # between rows it is linear, so not exact
    assert model.section.expected_keep == pytest.approx(0.5)
    (short,) = sweep(model, windows.ids[:, :32], [table.strength_at(0.5, 32)])
    assert (
        short.kept.mean().item()
        == pytest.approx(0.5, abs=0.05)
        != pytest.approx(table.keep_at(table.strength_at(0.5), 32), abs=0.05)
    )
    check_calibration(find_gate_file(str(folder / "model")), model.section)
    assert f"{table.rows[-1].ppl:.3f}" in describe(table)


def test_given_strengths_only(folder: Path) -> None:
    table = run(folder, strengths=(4.0, 1.0, 1.0), max_rise=1e9)
    assert [row.strength for row in table.rows] == [0.0, 1.0, 4.0]
    assert table.safe_strength == 4.0
    assert run(folder, strengths=(1.0,), max_rise=0.0).safe_strength in (0.0, 1.0)


def test_again_gives_the_same_table_and_other_gates_make_it_stale(folder: Path) -> None:
    assert run(folder, strengths=(1.0,)) == run(folder, strengths=(1.0,))
    gate_file = folder / "model" / GATE_FILE
    other = Path(shutil.copytree(folder / "model", folder / "other"))
    add_gates(other, tiny.gates(seed=5), {"params": tiny.PARAMS["dcp"]})
    shutil.copy(other / GATE_FILE, gate_file)
    section = parse_drop_gate(load_gated(folder / "model").config)
    with pytest.raises(PruneError, match="other gates"):
        check_calibration(str(gate_file), section)
    run(folder, strengths=(1.0,))  # measured again: accepted again
    check_calibration(str(gate_file), parse_drop_gate(load_gated(folder / "model").config))


def test_a_failed_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (folder / "model" / "config.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PruneError, match="No space left on device"):
        run(folder, strengths=(1.0,))
    assert (folder / "model" / "config.json").read_bytes() == old
    assert not [path for path in (folder / "model").iterdir() if "tmp" in path.name]


def test_hard_linked_config_of_another_folder_is_not_written_through(folder: Path) -> None:
    config = folder / "model" / "config.json"
    os.link(config, folder / "linked.json")
    old = config.read_bytes()
    run(folder, strengths=(1.0,))
    assert (folder / "linked.json").read_bytes() == old != config.read_bytes()


def test_noise_is_cleaned_and_stated(good: Path) -> None:
    windows = make_windows(read_texts(good / "text.py"), tiny.save_tokenizer(good / "tokenizer"), 64, 64)
    kept = [1.0, 0.5, 0.52, 0.2]
    points = [
        Point(s, torch.full((2, 1), k), torch.full((2, 1), k), 10.0, 0.1)
        for s, k in zip([0.0, 1.0, 2.0, 4.0], kept, strict=True)
    ]
    table = build_table(points, windows, "g", "float32", 0.01)
    assert [row.kept for row in table.rows] == [1.0, 0.51, 0.51, 0.2]
    assert table.noise == pytest.approx(0.01, abs=1e-6)


def test_gaps_are_filled(good: Path) -> None:
    model = load_gated(good / "model")
    ids = torch.randint(3, tiny.VOCAB, (1, 64), generator=torch.Generator().manual_seed(1))
    points = measure_table(model, ids, None)
    strengths = [point.strength for point in points]
    assert strengths == sorted(set(strengths)) and 7 < len(points) <= 16


BAD_DATA = {
    "empty.txt": (b"", "holds no text"),
    "latin.txt": ("caf\u00e9".encode("latin-1"), "no valid UTF-8 at line 1, byte 3"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
    "field.jsonl": (b'{"content": "a"}\n', "line 1 has no text in field 'text'"),
    "number.jsonl": (b'{"text": 3}\n', "line 1 has no text in field 'text'"),
    "short.txt": (b"a few words", "one window needs 64"),
    "no.parquet": (b"not parquet", "no Parquet file"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_changes_nothing(folder: Path, name: str) -> None:
    content, said = BAD_DATA[name]
    (folder / name).write_bytes(content)
    old = (folder / "model" / "config.json").read_bytes()
    with pytest.raises(PruneError, match=said):
        run(folder, data=folder / name)
    assert (folder / "model" / "config.json").read_bytes() == old


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"length": 513}, "positions for 512 tokens"),
    "short": ({"length": 1}, "does not fit"),
    "strength": ({"strengths": (1.0, 17.0)}, r"must lie in 0\.\.16"),
    "negative": ({"strengths": (-1.0,)}, r"must lie in 0\.\.16"),
    "nan": ({"strengths": (float("nan"),)}, r"must lie in 0\.\.16"),
    "open only": ({"strengths": (0.0,)}, "none but 0"),
    "tokens": ({"tokens": 0}, "--tokens"),
    "rise": ({"max_rise": -0.1}, "--max-rise"),
    "no data": ({"data": Path("/nowhere")}, "does not exist"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(folder: Path, case: str) -> None:
    options, said = BAD_OPTIONS[case]
    with pytest.raises(PruneError, match=said):
        run(folder, **options)


def test_folders_that_are_no_checkpoint(folder: Path) -> None:
    with pytest.raises(PruneError, match="no model folder"):
        calibrate(CalibrateOptions(folder, folder / "text.py"))
    (folder / "model" / "tokenizer.json").unlink()
    (folder / "model" / "tokenizer_config.json").unlink()
    with pytest.raises(PruneError, match="no tokenizer that loads"):
        run(folder)


def test_all_kinds_of_data_give_the_same_windows(tmp_path: Path) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path / "tokenizer")
    parts = [tiny.text()[:900], tiny.text()[900:2500]]
    data = tmp_path / "data"
    data.mkdir()
    for number, part in enumerate(parts):
        (data / f"{number}.txt").write_text(part)
    (data / "ignored.bin").write_bytes(b"\xff\xfe")
    lines = [json.dumps({"text": part}) for part in parts]
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[0], "", lines[1]]))
    pyarrow.parquet.write_table(pyarrow.table({"text": parts, "id": [1, 2]}), tmp_path / "rows.parquet")
    made = [
        make_windows(read_texts(path), tokenizer, 48, 480)
        for path in (data, tmp_path / "rows.jsonl", tmp_path / "rows.parquet")
    ]
    assert len({windows.sha256 for windows in made}) == 1
    assert made[0].ids.shape == (10, 48) and (made[0].ids[:, 0] == tokenizer.bos_token_id).all()
    pieces = 0
    for row, documents, spans in zip(made[0].ids, made[0].document, made[0].span, strict=True):  # type: ignore[arg-type]
        for token, document, (start, end) in zip(row.tolist(), documents, spans, strict=True):
            if document >= 0:
                assert tokenizer.decode([token]).strip("\ufffd") in parts[document][start:end]
                pieces += 1
    assert pieces > 400


def test_lists_and_lengths() -> None:
    class Config:
        max_position_embeddings = 8192

    assert parse_strengths("0.5, 1,2") == (0.5, 1.0, 2.0) and parse_strengths("") is None
    with pytest.raises(PruneError, match="no list of numbers"):
        parse_strengths("1;2")
    assert check_length(Config(), None) == 4096 and check_length(Config(), 8192) == 8192
    Config.max_position_embeddings = None  # type: ignore[assignment]
    with pytest.raises(PruneError, match="max_position_embeddings"):
        check_length(Config(), None)
