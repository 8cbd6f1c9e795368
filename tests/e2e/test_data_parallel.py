"""`vllm serve FOLDER --data-parallel-size 2`: two engines behind one address, nothing of the plugin shared between them."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI
from support import save_gated, tiny_config
from test_serve import NO_END, TEXT, Server, save_tokenizer, serving

pytestmark = pytest.mark.slow


def by_engine(server: Server, name: str) -> dict[str, float]:
    """A series of ours, by the engine it is of."""
    lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    return {re.search(r'engine="(\d+)"', line)[1]: float(line.rpartition(" ")[2]) for line in lines}  # type: ignore[index]


def test_two_engines(tmp_path: Path):
    """Both serve, drop and count; the same question has the same answer and the same drops, whoever is asked. A server option
    (here: strength by pressure, of a pool that is never roomy) reaches both."""
    folder = save_gated(tmp_path / "gated", tiny_config("qwen3"), "dcp", beta=3.6)
    save_tokenizer(folder)
    config = json.dumps({"vllm_prune": {"pressure": {"start": 0.0, "full": 1e-6}}})
    options = ("--data-parallel-size", "2", "--dtype", "float32", "--additional-config", config)
    with serving(folder, tmp_path / "server.log", *options) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)

        def ask(prompt: str) -> tuple[str, dict]:
            said = client.completions.create(
                model=str(folder), prompt=prompt, max_tokens=24, temperature=0, extra_body=NO_END
            )
            told = said.model_extra["kv_transfer_params"]["vllm_prune"]  # type: ignore[index]
            assert told["strength_applied"] == {"least": 1.0, "mean": 1.0, "most": 1.0}
            return said.choices[0].text, {key: told[key] for key in ("keys_dropped", "keys_held", "kept_pairs")}

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, [TEXT * 3] * 8))
        assert all(answer == answers[0] for answer in answers), "the engines hold the same model and the same gates"
        dropped = by_engine(server, "vllm_prune:keys_dropped_total")
        assert set(dropped) == {"0", "1"} and min(dropped.values()) > 0, dropped
        ask("one more step, which tells what ended")
        assert sum(by_engine(server, "vllm:kv_cache_usage_perc").values()) == 0.0
