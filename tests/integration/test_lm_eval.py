"""lm-eval on a gated checkpoint through its vLLM backend: what it scores is what the masked twin says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VOCAB, save_gated, tiny_config
from transformers import PreTrainedTokenizerFast
from vllm_prune_training.masked import GatedModel, load_gated
from vllm_prune_training.tokenizer import train_tokenizer

QUESTION = "The road is long and the hills are green. A cart goes by and the day goes on. Rain falls on the roof "
CHOICES = [" and runs down", " of the river", " again"]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE_TASK = """
task: tiny_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT_TASK = """
task: tiny_text
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["NEVER"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder: Path) -> None:
    rows = [{"question": QUESTION * (2 + i), "choices": CHOICES, "answer": i % 3} for i in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, body in (("choice", CHOICE_TASK), ("text", TEXT_TASK)):
        (folder / f"{name}.yaml").write_text(body + COMMON.format(data=folder / "rows.jsonl"))


def run_lm_eval(model: Path, folder: Path, strength: float) -> dict[str, list[dict[str, Any]]]:
    """The logged samples of both tasks."""
    arguments = {
        "pretrained": str(model), "dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True,
        "max_num_batched_tokens": 64, "additional_config": {"vllm_prune": {"strength": strength}},
    }  # fmt: skip
    out = folder / "out"
    command = [
        sys.executable, "-m", "lm_eval", "--model", "vllm", "--model_args", json.dumps(arguments), "--batch_size", "auto",
        "--include_path", str(folder), "--tasks", "tiny_choice,tiny_text", "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    env = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny_choice" in done.stdout and "exact_match" in done.stdout
    return {
        name: [
            json.loads(line) for file in out.rglob(f"samples_{name}_*.jsonl") for line in file.read_text().splitlines()
        ]
        for name in ("tiny_choice", "tiny_text")
    }


@torch.no_grad()
def score(twin: GatedModel, tokenizer: PreTrainedTokenizerFast, context: str, text: str, strength: float) -> float:
    """log p(text | context) under the hard mask; a context's blanks at its end belong to the text, as lm-eval has it."""
    start = tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"]
    ids = tokenizer(context + text, add_special_tokens=False)["input_ids"]
    logp = twin(torch.tensor(ids), "hard", strength=strength).logits.float().log_softmax(-1)
    return sum(logp[at - 1, ids[at]].item() for at in range(len(start), len(ids)))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: requirements/lm-eval.txt"
)
def test_lm_eval_scores_what_the_gates_left(tmp_path: Path) -> None:
    model = tmp_path / "model"
    strength = 1.5
    save_gated(model, tiny_config("qwen3", layers=2), "dcp", torch.float32)
    tokenizer = train_tokenizer([QUESTION * 3 + "".join(CHOICES)], VOCAB)
    tokenizer.save_pretrained(model)
    twin = load_gated(model, torch.float32)
    write_tasks(tmp_path)
    logged = run_lm_eval(model, tmp_path, strength)

    assert len(logged["tiny_choice"]) == 4 == len(logged["tiny_text"])
    changed = 0.0
    for sample in logged["tiny_choice"]:
        for at, ((found, _),) in enumerate(sample["resps"]):
            pair = sample["arguments"][f"gen_args_{at}"]
            context, text = pair["arg_0"], pair["arg_1"]
            expected = score(twin, tokenizer, context, text, strength)
            assert float(found) == pytest.approx(expected, abs=2e-3)
            changed = max(changed, abs(expected - score(twin, tokenizer, context, text, 0.0)))
    assert changed > 0.1  # open gates would have scored otherwise
    for sample in logged["tiny_text"]:
        context = sample["arguments"]["gen_args_0"]["arg_0"]
        ids = tokenizer(context, add_special_tokens=False)["input_ids"]
        prompt = len(ids)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(twin(torch.tensor(ids), "hard", strength=strength).logits[-1].argmax()))
        expected = tokenizer.decode(ids[prompt:], skip_special_tokens=True)
        # vLLM holds a character back that has not all its bytes yet.
        assert sample["resps"][0][0].rstrip("\ufffd") == expected.rstrip("\ufffd") != ""
