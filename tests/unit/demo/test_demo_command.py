"""The command around the runs: refusals, the children's environment, pool size, what is reported of speed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vllm_prune import __version__
from vllm_prune.cli import app
from vllm_prune.demo import launch, main, report
from vllm_prune.demo.run import Job, PoolWatch, Result
from vllm_prune.errors import PruneError

JOB = Job("nowhere", [1, 2, 3], 4, True, 64, 1 << 20, 32, 1.0, 1)


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output.strip() == f"vllm-prune {__version__}"


def test_a_missing_model_folder_is_refused(tmp_path: Path):
    result = CliRunner().invoke(app, ["demo", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "no model folder" in result.output and "--model FOLDER" in result.output
    assert not (tmp_path / "out").exists()


def test_a_model_without_gates_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(PruneError, match="no gated checkpoint"):
        main.find_model(tmp_path)


def test_the_reference_is_found_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / main.REFERENCE
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"drop_gate": {}}')
    (folder / "drop_gate.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert main.find_model(None).resolve() == folder


def test_the_environment_of_a_run():
    made = launch.environment({"PATH": "/bin", "VLLM_CPU_KVCACHE_SPACE": "4", "OMP_NUM_THREADS": "2",
                               "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})  # fmt: skip
    assert made["PATH"] == "/bin" and made["OMP_NUM_THREADS"] == "2" and made["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert made["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and made["HF_HUB_OFFLINE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in made


def test_the_pool_holds_the_dense_request():
    section = {"method": "dcp", "params": {"rank": 32}, "num_layers": 8, "num_kv_heads": 2, "hidden_size": 256}
    config = SimpleNamespace(drop_gate=section, num_hidden_layers=8, num_key_value_heads=2, hidden_size=256,
                             num_attention_heads=4, head_dim=64)  # fmt: skip
    block = 8 * 2 * 2 * 32 * 64 * 4
    assert launch.pool_bytes(config, 3200, 512) >= (100 + 16) * block * 1.125


def test_both_runs_differ_in_the_gates_only():
    evict = JOB.engine_args()
    dense = Job(**{**vars(JOB), "evict": False}).engine_args()
    assert evict.pop("additional_config") == {"vllm_prune": {"record": True}}
    assert dense.pop("additional_config") == {"vllm_prune": {"strength": 0}}
    assert evict == dense


def test_a_failed_run_is_reported_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ValueError: vllm-prune: refused (mla): no heads.'\necho more\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(python))
    with pytest.raises(PruneError, match=r"'x' ended with exit code 3: .*refused \(mla\): no heads\. See .*x\.log"):
        launch.launch(JOB, tmp_path, "x")
    assert json.loads((tmp_path / "x.job.json").read_text())["new_tokens"] == 4


def test_the_pool_is_sampled_between_scheduling_and_freeing():
    pool = SimpleNamespace(num_gpu_blocks=11, free=10)
    pool.get_num_free_blocks = lambda: pool.free

    def schedule() -> str:
        pool.free = 3
        return "output"

    scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=pool), schedule=schedule)
    watch = PoolWatch(scheduler)
    assert scheduler.schedule() == "output"
    pool.free = 8
    assert watch.sample() == 2 and watch.peak == 7


def test_the_fastest_repeat_counts():
    result = Result([1] * 5, [2.0, 1.0], [4.0, 8.0], 1, 1, [(0, 0)], {}, None)
    assert report.speeds(result, 300) == {"prefill": 300.0, "decode": 1.0}


def test_shared_leading_tokens():
    assert report.same_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert report.same_prefix([1, 2], [1, 2]) == 2
