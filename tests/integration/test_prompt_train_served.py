"""`vllm-prune train` on the tiny recipes of the prompt forms, and their folders served by vLLM as the trainer masks them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import engine, generate, recorded
from vllm_prune_training.calibrate import CalibrateOptions, calibrate
from vllm_prune_training.masked import load_gated

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["training.steps=20", "training.eval_tokens=1024", "training.precision=fp32", "training.eval_steps=20"]


@pytest.mark.parametrize("method", ["ltp_prompt", "acc_prompt"])
def test_from_text_to_a_served_folder(method: str, tmp_path: Path) -> None:
    recipe, made = ROOT / f"examples/recipes/{method.replace('_', '-')}-tiny.yaml", tmp_path / "gated"
    command = [sys.executable, "-m", "vllm_prune.cli", "train", str(recipe), f"--set=output={made}"]
    ran = subprocess.run([*command, *(f"--set={item}" for item in SHORT)], cwd=ROOT, text=True, capture_output=True,
                         timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    record = json.loads((made / "record.json").read_text())
    held_out = record["held_out"]
    assert 0.2 < held_out["kept_hard"] < 0.95
    assert held_out["ppl_hard"] == pytest.approx(held_out["ppl_open"], rel=0.2)
    section = json.loads((made / "config.json").read_text())["drop_gate"]
    assert section["dtype"] == "float32" and section["expected_keep"] == round(held_out["kept_hard"], 4)
    if method == "ltp_prompt":
        assert 0.9 < record["hard_over_soft"] < 1.1
    else:
        assert '"profile"' in ran.stdout and held_out["kept_hard"] == pytest.approx(0.6, abs=0.03)
    table = calibrate(CalibrateOptions(made, ROOT / "README.md", 128, (0.5, 1.0, 4.0), 256))
    assert [row.kept for row in table.rows] == sorted((row.kept for row in table.rows), reverse=True)

    twin = load_gated(made)
    ids = [i % 500 + 3 for i in range(7, 7 * 180, 7)]
    with engine(made, max_model_len=256, additional_config={"vllm_prune": {"record": True}}) as llm:
        (output,) = generate(llm, [{"prompt_token_ids": ids}], tokens=12)
        read, found = recorded(llm, output)
        with torch.no_grad():
            out = twin(torch.tensor(read), "hard", prompt=len(ids))
        assert out.expiry is not None
        np.testing.assert_array_equal(found, out.expiry.numpy())
