"""Three minutes of mixed load on a live server (``benchmarks/soak.py``): nothing lost, nothing kept, nothing wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"
MINUTES = 3.0
ROOM = 400 << 20
"""Bytes that a process may grow by in so short a time: workers meet new shapes of matrix products, and what oneDNN made for each
is kept (stock vLLM's does as well)."""


@pytest.mark.timeout(900)
def test_three_minutes(tmp_path):
    command = [sys.executable, str(SOAK), "--minutes", str(MINUTES), "--json", str(tmp_path / "soak.json")]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-20000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["lost"] == found["wrong"] == found["faults_in_the_log"] == []
    requests, comparison = found["requests"], found["comparison"]
    assert comparison["compared"] == requests["finished"] > 60
    assert comparison["same"] + comparison.get("differ by rounding", 0) == comparison["compared"]
    assert comparison.get("differ by rounding", 0) <= 0.02 * comparison["compared"]
    assert comparison["keys compared"] > 10_000 and found["keys_dropped"] > 10_000
    assert (
        found["preemptions"] > 0
        and found["cached_tokens"] > 1_000
        and found["pool_found_whole"] == 2 * found["spells"] >= 4
    )
    assert requests["bad"] and requests["left midway"] and requests["left before the first token or soon after"]
    assert set(found["memory"]) == {"APIServer", "EngineCore", "Worker"}
    for name, memory in found["memory"].items():
        assert memory["last_bytes"] - memory["first_bytes"] < ROOM, (name, memory)
