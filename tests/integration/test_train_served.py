"""`vllm-prune train` on the tiny recipe, stopped and gone on with, and its folder served by vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import engine, generate, pool_is_whole, prompts, recorded
from vllm_prune_training.masked import load_gated

from vllm_prune.gates import NEVER

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, *settings: str, recipe: str = "dcp-tiny") -> subprocess.Popen[str]:
    sets = [f"--set={item}" for item in (f"output={folder / 'gated'}", "training.steps=24", "training.eval_tokens=1024",
                                         "training.log_steps=1", *settings)]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_prune.cli", "train", str(ROOT / f"examples/recipes/{recipe}.yaml"), *sets],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def steps_in(text: str) -> list[int]:
    return [json.loads(line)["step"] for line in text.splitlines() if line.startswith('{"step"') and '"loss"' in line]


def test_from_text_to_a_served_folder(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert first.stdout is not None
    seen = ""
    while '"step": 5' not in seen:
        line = first.stdout.readline()
        assert line, first.communicate()[1]
        seen += line
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=240)
    seen += out
    last = steps_in(seen)[-1]
    assert first.returncode == 128 + signal.SIGTERM, err
    assert 5 <= last < 24 and f"step {last} is saved" in seen and not (tmp_path / "gated").exists()

    second = start(tmp_path)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert steps_in(out) == list(range(last + 1, 25)) and "made " in out
    record = json.loads((tmp_path / "gated/record.json").read_text())
    assert record["steps"] == 24 and record["tokens_seen"] == 24 * 2048
    assert 0.99 < record["hard_over_soft"] < 1.01

    from vllm import SamplingParams

    with engine(tmp_path / "gated", skip_tokenizer_init=False, max_model_len=256) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        output: Any = llm.generate("def read(path):\n    return ", params, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 12 and output.outputs[0].text
        assert pool_is_whole(llm)


@pytest.mark.parametrize("method", ["ltp", "acc"])
def test_gates_at_boundaries_from_text_to_a_served_folder(tmp_path: Path, method: str) -> None:
    """What the trained folder drops when served is what its masked twin says."""
    out, err = start(tmp_path, "training.precision=fp32", recipe=f"{method}-tiny").communicate(timeout=300)
    assert "made " in out, err
    record = json.loads((tmp_path / "gated/record.json").read_text())
    assert record["held_out"]["kept_hard"] < 0.97
    if method == "acc":
        assert abs(record["profile"]["kept"] - 0.6) < 0.02
        assert abs(record["held_out"]["kept_hard"] - record["profile"]["kept"]) < 1e-6, (
            "a budget is counted, not learnt"
        )
    twin = load_gated(tmp_path / "gated")
    with engine(tmp_path / "gated", max_model_len=256, additional_config={"vllm_prune": {"record": True}}) as llm:
        for output in generate(llm, prompts([120, 40], seed=2), tokens=24):
            ids, found = recorded(llm, output)
            with torch.no_grad():
                want = twin(torch.tensor(ids), "hard").expiry
            assert np.array_equal(found, np.where(want.numpy() < len(ids), want.numpy(), NEVER))
        assert pool_is_whole(llm)
