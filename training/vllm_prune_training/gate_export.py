"""Writing a trained gated model as a servable folder, measuring it as served, and describing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from vllm_prune.checkpoint import add_gates
from vllm_prune.config import SECTION
from vllm_prune.gates import Gate

from .gate_evaluation import gate_report, recall_report
from .masked import load_gated
from .packing import Corpus

MAX_FILE_BYTES = 16 * 2**20
NAMES = {"dcp": "DCP (Dynamic Context Pruning, arXiv 2305.15805)", "dms": "DMS (arXiv 2506.05345)"}


def write_gated(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    gates: list[Gate],
    section: dict[str, Any],
) -> None:
    """Writes base weights in bfloat16, tokenizer, gates and the ``drop_gate`` section.

    Raises:
        ValueError: a file is larger than ``MAX_FILE_BYTES``.
    """
    model.to(torch.bfloat16)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_gates(folder, gates, section)
    for path in folder.iterdir():
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {MAX_FILE_BYTES}")


def measure(folder: Path, corpus: Corpus, lengths: tuple[int, ...], tokens: int, tasks: int) -> dict[str, Any]:
    """Numbers of the folder as it would be served: loaded again, in bfloat16, with hard masks at strength 1."""
    gated = load_gated(folder)
    result: dict[str, Any] = {"held_out": {}}
    for length in lengths:
        result["held_out"].update(gate_report(gated, corpus, length, max(2, tokens // length)))
    result["recall_accuracy"] = recall_report(gated, corpus, [n for n in (256, *lengths)], tasks)
    return result


def set_expected_keep(folder: Path, keep: float, provenance: dict[str, Any]) -> None:
    """Puts the measured fraction and the provenance into the folder's ``drop_gate`` section."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[SECTION].update(expected_keep=min(1.0, max(1e-3, round(keep, 4))), provenance=provenance)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def readme(record: dict[str, Any]) -> str:
    """README.md of an exported folder."""
    held_out, recall = record["held_out"], record["recall_accuracy"]
    lengths = sorted(int(key.rsplit("_", 1)[1]) for key in held_out if key.startswith("ppl_open"))
    columns = ("ppl_open", "ppl_hard", "hard_kept", "final_live")
    rows = [f"| {n} | " + " | ".join(f"{held_out[f'{key}_{n}']:.3f}" for key in columns) + " |" for n in lengths]
    kinds = [
        f"| {kind}, {n} tokens | {value:.2f} | {recall['hard'][kind][n]:.2f} |"
        for kind, row in recall["open"].items()
        for n, value in row.items()
    ]
    training, millions = record["training"], record["parameters"] / 1e6
    return f"""# Reference checkpoint: {NAMES[record["method"]]}

A {millions:.1f} M parameter Qwen3-shaped model with drop gates, small enough for tests and demonstrations.
It was trained on a CPU, on Python source code and synthetic recall tasks; it is no useful language model.

- Gates: {record["method"]}, parameters {json.dumps(training["settings"]["params"])}; all weights trained.
- Tokens seen: {record["base_tokens_seen"]:,} by the base, {training["tokens_seen"]:,} with gates.
- Made by: `{record["command"]}`

Held-out code, hard masks at strength 1, bfloat16. Kept: share of past pairs (key before query) still visible, mean over
layers. Live: share of keys that the last query still sees.

| Length | Perplexity, gates open | Perplexity, gated | Kept | Live at the end |
|---|---|---|---|---|
{chr(10).join(rows)}

| Recall (share of exact answers) | Open | Gated |
|---|---|---|
{chr(10).join(kinds)}

Details, per layer too: `record.json`.
"""
