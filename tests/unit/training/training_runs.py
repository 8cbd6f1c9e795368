"""Tiny training runs for tests: data files, recipes, and a process that is stopped at a given step."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from vllm_prune_training.recipe import Recipe
from vllm_prune_training.recipe_file import parse_recipe

QWEN = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}  # fmt: skip
WORDS = ("def", "class", "return", "self", "value", "total", "index", "table", "open", "close", "first", "gate")


def write_texts(folder: Path, files: int = 6) -> None:
    """Some text files, and the same as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    rows = []
    for number in range(files):
        lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(20 + number)]
        rows.append("\n".join(lines) + "\n")
        (folder / f"{number}.txt").write_text(rows[-1], encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


def plain_recipe(folder: Path, name: str = "run", **training: Any) -> dict[str, Any]:
    """A DCP run of 8 steps in float32 on texts under ``folder``, as plain data."""
    if not (folder / "texts").exists():
        write_texts(folder / "texts")
    return {
        "model": {"new": {"tokenizer_vocab": 320, "config": dict(QWEN)}},
        "output": str(folder / name),
        "gate": {"method": "dcp", "params": {"rank": 4, "beta": 2.0}},
        "objective": {"keep": 0.5, "alpha": {"schedule": "band"}},
        "data": {
            "train": [{"glob": f"{folder}/texts/*.txt", "format": "text"}],
            "held_out": [{"path": f"{folder}/texts/rows.jsonl", "format": "jsonl"}],
            "shuffle_rows": 4,
        },
        "training": {
            "steps": 8, "lengths": [[0.5, 32], [1.0, 48]], "batch_tokens": 96, "precision": "fp32", "lr": 1e-3,
            "log_steps": 1, "save_steps": 3, "eval_steps": 100, "eval_tokens": 192, **training,
        },
    }  # fmt: skip


def recipe_of(plain: dict[str, Any], **changes: Any) -> Recipe:
    """A recipe with changes of sections by name."""
    plain = copy.deepcopy(plain)
    for section, value in changes.items():
        both = isinstance(plain.get(section), dict) and isinstance(value, dict)
        plain[section] = {**plain[section], **value} if both else value
    return parse_recipe(plain, "recipe")


def losses(work: Path) -> dict[int, float]:
    """Loss by step in a log; the last row of a step counts."""
    rows = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


class AtStep(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(**kwargs)


def terminate(**_: Any) -> None:
    """What a scheduler or the shell does to the process."""
    os.kill(os.getpid(), signal.SIGTERM)
