"""Strength by kept fraction on the server: the option ``keep``, the warning beyond the safe range, and one exported,
calibrated folder served at a fraction and compared with its masked twin."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_language as tiny
import torch
from support import engine, generate, recorded, state_of
from vllm_prune_training.calibrate import CalibrateOptions, calibrate
from vllm_prune_training.export import ExportOptions, export
from vllm_prune_training.masked import load_gated

from vllm_prune.checkpoint import add_gates
from vllm_prune.config import SECTION
from vllm_prune.errors import PruneError
from vllm_prune.models.hook import warn_if_unsafe

OPTIONS: dict[str, Any] = {"max_model_len": 256, "max_num_batched_tokens": 256}
KEEP = 0.45


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported, then calibrated at 96 tokens."""
    made = tmp_path_factory.mktemp("keep")
    (made / "text.py").write_text(tiny.text())
    tiny.save_base(made / "base")
    shutil.copytree(made / "base", made / "gated")
    add_gates(made / "gated", tiny.gates(), {"params": tiny.PARAMS["dcp"]})
    export(ExportOptions(made / "base", made / "out", made / "gated"))
    weights = made / "base" / "model.safetensors"
    assert os.stat(weights).st_ino == os.stat(made / "out" / "model.safetensors").st_ino
    calibrate(CalibrateOptions(made / "out", made / "text.py", 96, tokens=960))
    return made / "out"


def section_for(folder: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_prune.config import served_section

    config = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, max_model_len=256, enforce_eager=True,
        additional_config={"vllm_prune": options},
    ).create_engine_config()  # fmt: skip
    return served_section(config)


@torch.no_grad()
def test_served_at_a_fraction_as_the_twin_says(folder: Path) -> None:
    """Same drops as the twin at the table's strength, about the fraction that was asked for, admission plans with it."""
    twin = load_gated(folder, dtype=torch.float32)
    table = twin.section.calibration
    assert table is not None
    strength = table.strength_at(KEEP)
    assert 0 < strength != 1.0
    text = torch.randint(3, tiny.VOCAB, (80,), generator=torch.Generator().manual_seed(2)).tolist()
    with engine(folder, additional_config={"vllm_prune": {"keep": KEEP, "record": True}}, **OPTIONS) as llm:
        (output,) = generate(llm, [{"prompt_token_ids": text}], tokens=16)
        ids, expiry = recorded(llm, output)
        served = state_of(llm).layers[0].section
    assert served.strength == pytest.approx(strength) and served.expected_keep == pytest.approx(KEEP, abs=1e-6)
    expected = twin(torch.tensor(ids), strength=strength).expiry
    assert torch.equal(torch.as_tensor(expiry).long().clamp(max=len(ids)), expected.clamp(max=len(ids)))
    as_trained = twin(torch.tensor(ids)).expiry
    assert not torch.equal(expected, as_trained)  # the option did something


def test_keep_is_resolved_or_refused_at_start(folder: Path, tmp_path: Path) -> None:
    served = section_for(folder, keep=1)
    assert served.strength == 0.0 and served.expected_keep == 1.0
    low = served.calibration.keep_range[0]
    assert section_for(folder, keep=low).strength == served.calibration.strongest
    weaker = section_for(folder, strength=0.5)
    assert weaker.expected_keep == pytest.approx(served.calibration.keep_at(0.5)) != 1.0
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    data = json.loads((bare / "config.json").read_text())
    del data[SECTION]["calibration"]
    (bare / "config.json").write_text(json.dumps(data))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (folder, {"keep": 0.5, "strength": 1.0}, "both strength and keep"),
        (folder, {"keep": 0.0}, "must lie in 0..1, above 0"),
        (folder, {"keep": 1.5}, "must lie in 0..1, above 0"),
        (folder, {"keep": True}, "keep must be a number"),
        (folder, {"keep": "0.5"}, "keep must be a number"),
        (folder, {"keep": low / 2}, "lies outside of what was measured"),
        (bare, {"keep": 0.5}, "vllm-prune calibrate"),
    ]
    for at, options, said in cases:
        with pytest.raises(ValueError) as caught:
            section_for(at, **options)
        assert "vllm-prune: " in str(caught.value) and said in str(caught.value), options


def test_a_table_of_other_gates_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / "copy" / "config.json", other)
    add_gates(other, tiny.gates(seed=3), {"params": tiny.PARAMS["dcp"]})
    shutil.copy(other / "drop_gate.safetensors", copy)
    with pytest.raises(ValueError, match="measured with other gates"):
        section_for(copy)


def test_beyond_the_safe_range_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    section = load_gated(folder).section
    table = section.calibration
    assert table is not None
    safe = section.model_copy(update={"calibration": table.model_copy(update={"safe_strength": 0.5})})
    logger = logging.getLogger("vllm.vllm_prune.models.hook")
    caplog.set_level(logging.WARNING, logger=logger.name)
    logger.addHandler(caplog.handler)
    try:
        warn_if_unsafe(safe.at_strength(0.5))
        warn_if_unsafe(section.model_copy(update={"calibration": None}))
        assert not caplog.records
        warn_if_unsafe(safe.at_strength(0.75))
        assert "strength 0.75 is beyond the safe range" in caplog.text and "96 tokens" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    with pytest.raises(PruneError):
        safe.at_strength(99.0)
