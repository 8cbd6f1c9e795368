"""`vllm-prune train` on the tiny recipe, stopped and gone on with, and its folder served by vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import engine, pool_is_whole

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, *settings: str) -> subprocess.Popen[str]:
    sets = [f"--set={item}" for item in (f"output={folder / 'gated'}", "training.steps=24", "training.eval_tokens=1024",
                                         "training.log_steps=1", *settings)]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_prune.cli", "train", str(ROOT / "examples/recipes/dcp-tiny.yaml"), *sets],
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
