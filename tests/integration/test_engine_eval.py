"""Evaluation through the live engine against the masked twin: perplexity, what was kept, query-agnostic contexts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import engine, pool_is_whole, state_of
from transformers import AutoTokenizer
from vllm_prune_training import tasks
from vllm_prune_training.engine_eval import samples
from vllm_prune_training.engine_eval.jobs import Answer
from vllm_prune_training.engine_eval.run import answers
from vllm_prune_training.engine_eval.stats import perplexity
from vllm_prune_training.masked import GatedModel, load_gated

REFERENCE = Path(__file__).parents[2] / "examples" / "reference-dcp"
LENGTH = 768


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REFERENCE)


@pytest.fixture(scope="module")
def made(tokenizer: Any) -> list[samples.Sample]:
    text = samples.held_out(None)
    windows = samples.window_samples(text, LENGTH, 3, tokenizer, 4096)
    rules = samples.task_samples("instructions", LENGTH, 2, tokenizer, tasks.counter(tokenizer), text.lines)
    return windows + rules[:3]


@pytest.fixture(scope="module")
def twin() -> GatedModel:
    return load_gated(REFERENCE, torch.float32)  # before the first engine: vLLM rewrites Hugging Face's classes


@pytest.fixture(scope="module")
def run(twin: GatedModel, made: list[samples.Sample], tokenizer: Any) -> Iterator[tuple[list[Answer], Any, list[Any]]]:
    """Answers of all samples, in order, and the recorded expiries [L, E, LENGTH + 32] of each, from one float32 engine that reads
    prompts in chunks of 200 tokens and three requests at once."""
    options = {"vllm_prune": {"record": True}}
    with engine(REFERENCE, dtype="float32", max_num_batched_tokens=200, max_num_seqs=3, max_model_len=LENGTH + 32,
                additional_config=options) as llm:  # fmt: skip
        found = sorted(answers(llm, [s.request for s in made], [tokenizer.eos_token_id]), key=lambda a: a.index)
        store = state_of(llm).store
        names = {int(key.split("-")[0]): key for key, _ in store.events}
        expiries = [store.expiries(names[i], LENGTH + 32) for i in range(len(made))]
        llm.generate(
            {"prompt_token_ids": [5, 6]}, use_tqdm=False
        )  # a step after the last request ends it on the worker
        yield found, llm, expiries


@torch.no_grad()
def test_perplexity_is_the_masked_twins(run: Any, twin: GatedModel, made: list[samples.Sample]) -> None:
    windows = [(s, a) for s, a in zip(made, run[0], strict=True) if s.request.scored]
    assert len(windows) == 3
    hard, opened = [], []
    for sample, _ in windows:
        ids = torch.tensor(sample.request.prompt)
        for mode, sums in (("hard", hard), ("open", opened)):
            logits = twin(ids, mode, collect=False).logits  # type: ignore[arg-type]
            sums.append(torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum").item())
    tokens = [LENGTH - 1] * len(windows)
    served = [answer.nll for _, answer in windows]
    assert perplexity(served, tokens) == pytest.approx(perplexity(hard, tokens), rel=1e-4)
    assert served == pytest.approx(hard, rel=1e-4)
    # The gates matter here, so that the comparison could fail.
    assert max(abs(a / b - 1.0) for a, b in zip(opened, hard, strict=True)) > 20e-4


@torch.no_grad()
def test_kept_fraction_and_bytes_are_the_masked_twins(run: Any, twin: GatedModel, made: list[samples.Sample]) -> None:
    for sample, answer in zip(made, run[0], strict=True):
        if not sample.request.scored:
            continue
        covered = int(answer.memory["tokens"])
        assert covered == len(sample.request.prompt)  # the report is of the whole prompt
        expiry = twin(torch.tensor(sample.request.prompt), "hard").expiry
        assert expiry is not None
        live = (expiry >= covered).double().mean().item()
        assert answer.memory["kept_fraction"] == pytest.approx(live, abs=2e-3)
        assert 0.0 < live < 0.9
        assert answer.memory["blocks_dense"] == LENGTH // 32 > answer.memory["blocks_held"] > 0


def test_what_becomes_of_a_context_does_not_depend_on_the_question(run: Any, made: list[samples.Sample]) -> None:
    pairs = [(s.request.prompt, e) for s, e in zip(made, run[2], strict=True) if s.task == "instructions"]
    assert len(pairs) == 3
    shared = next(i for i, ids in enumerate(zip(*(p for p, _ in pairs), strict=False)) if len(set(ids)) > 1)
    assert shared > 500
    before = [torch.as_tensor(e)[..., :shared].clamp(max=shared) for _, e in pairs]
    for other in before[1:]:
        assert (other == before[0]).float().mean() > 0.999  # a score within rounding of its threshold may flip
    after = [torch.as_tensor(e)[..., :shared] for _, e in pairs]
    assert any(not torch.equal(after[0], other) for other in after[1:])  # while the questions themselves do drop keys


def test_texts_end_where_they_ask_to_and_nothing_stays(run: Any, made: list[samples.Sample], tokenizer: Any) -> None:
    for sample, answer in zip(made, run[0], strict=True):
        assert tokenizer.eos_token_id not in answer.token_ids
        assert len(answer.token_ids) <= sample.request.new_tokens
        assert answer.memory["tokens"] >= len(sample.request.prompt)
    assert pool_is_whole(run[1])


@pytest.mark.slow
def test_the_command_runs_gated_and_open(tmp_path: Path) -> None:
    """As a user runs it: two engine processes one after the other, tables and JSON."""
    out = tmp_path / "result.json"
    command = [
        sys.executable, "-m", "vllm_prune.cli", "eval", str(REFERENCE), "--tasks", "ppl,niah_single_2_neutral",
        "--lengths", "512", "--samples", "2", "--dense", "--json", str(out),
    ]  # fmt: skip
    env = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2] / "training")
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    ppl, needle = result["rows"]
    assert (ppl["task"], needle["task"]) == ("ppl", "niah_single_2_neutral") and ppl["samples"] == needle[
        "samples"
    ] == 2
    for row in (ppl, needle):
        gated, opened = row["memory"], row["open"]["memory"]
        assert 0 < gated["kept_fraction"] < 1 == opened["kept_fraction"]
        assert gated["kv_bytes"] == pytest.approx(gated["dense_kv_bytes"] * gated["kept_fraction"], rel=1e-2)
        assert opened["kv_bytes"] == opened["dense_kv_bytes"] and opened["blocks_peak"] >= opened["dense_blocks"]
        assert (
            gated["blocks_held"] < opened["blocks_held"] and gated["blocks_returned"] > 0 == opened["blocks_returned"]
        )
        assert f"{gated['kept_fraction']:.1%}" in done.stdout
    assert ppl["perplexity"] / ppl["open"]["perplexity"] == pytest.approx(ppl["ratio"]) != 1
    assert result["engine"]["token_bytes"] == 8 * 2 * 2 * 64 * 2 and result["gate"]["strength"] == 1.0
    assert len(result["requests"]) == 4 and all("open" in each and "gated" in each for each in result["requests"])
    assert result["averages"]["checked_open"] and result["versions"]["vllm"] and result["model"]["sha256"]
