"""``vllm-prune demo`` as a user runs it: a process, two engines, the files it writes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import VOCAB, save_gated, tiny_config
from vllm_prune_training.tokenizer import train_tokenizer

TEXT = Path(hashlib.__file__).read_text(encoding="utf-8").replace("https://", "").replace("http://", "")


@pytest.mark.slow
def test_demo(tmp_path: Path):
    pytest.importorskip("matplotlib")
    model, out, text = tmp_path / "model", tmp_path / "out", tmp_path / "text.py"
    save_gated(model, tiny_config("qwen3", layers=3), "dcp", torch.float32)
    train_tokenizer([TEXT], VOCAB).save_pretrained(model)
    text.write_text(TEXT.replace("http", "h t t p"), encoding="utf-8")
    command = [
        sys.executable, "-m", "vllm_prune.cli", "demo", "--model", str(model), "--source", str(text), "--out", str(out),
        "--prompt-tokens", "400", "--new-tokens", "16", "--chunk-tokens", "128", "--repeats", "2",
    ]  # fmt: skip
    env = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "peak blocks" in done.stdout and "kept at the end" in done.stdout

    report = json.loads((out / "report.json").read_text())
    assert report["prompt_tokens"] == 400 and report["new_tokens"] == 16
    assert 0 < report["kept_fraction"] < 1 and len(report["kept_by_layer"]) == 3
    assert report["kept_fraction"] == pytest.approx(sum(report["kept_by_layer"]) / 3)
    assert report["blocks_returned"] > 0 == report["blocks_returned_dense"]
    assert report["peak_blocks"] < report["peak_blocks_dense"] == 13  # 415 tokens computed, 32 a block
    assert report["tokens_per_second"]["with_eviction"]["decode"] > 0
    assert report["versions"]["vllm"] and report["machine"]["cores"] and report["model"]["method"] == "dcp"
    assert report["source"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    # The plugin's own count, of the step before the last, and the recorded drops speak of the same keys.
    assert report["plugin_summary"]["kept_fraction"] == pytest.approx(report["kept_fraction"], abs=0.02)

    page = (out / "map.html").read_text(encoding="utf-8")
    assert "http" not in page and '"layer 2"' in page
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert len(data["tokens"]) == 415 and len(data["life"]) == 3
    assert "".join(data["tokens"][:400]) in "<|bos|>" + text.read_text()
    assert (out / "map.png").read_bytes().startswith(b"\x89PNG")
