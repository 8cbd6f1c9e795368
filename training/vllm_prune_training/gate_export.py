"""README.md of a trained checkpoint, out of its own ``record.json`` and config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_prune.config import SECTION, DropGateConfig

NAMES = {
    "dcp": "DCP (Dynamic Context Pruning, arXiv 2305.15805)",
    "dms": "DMS (Dynamic Memory Sparsification, arXiv 2506.05345)",
    "ltp": "LTP by age (after Learned Token Pruning, arXiv 2107.00910)",
    "acc": "ACC-style eviction (after arXiv 2201.03327)",
    "none": "no gates (dense, for comparison)",
}
COLUMNS = {
    "ppl_open": "perplexity, gates open", "ppl_soft": "perplexity, soft gates as trained",
    "ppl_hard": "perplexity, gated as served", "kept_soft": "past pairs kept, soft", "kept_hard": "past pairs kept, as served",
}  # fmt: skip


def readme(folder: Path) -> str:
    """Text of the README.

    Args:
        folder: as ``train.export`` writes it, with ``record.json``.

    Raises:
        OSError, ValueError, KeyError: the record or the config is missing or damaged.
    """
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    section = DropGateConfig.model_validate(config[SECTION]) if SECTION in config else None
    recipe, held_out = record["recipe"], record["held_out"]
    gate = recipe["gate"]
    method = gate["method"]
    rows = [f"| {name} | {_number(key, held_out[key])} |" for key, name in COLUMNS.items() if key in held_out]
    lines = [
        f"# Trained by vllm-prune: {NAMES.get(method, method)}",
        "",
        "An ordinary Hugging Face folder"
        + (", served by `vllm serve` where vllm-prune is installed." if section else ": it holds no gates."),
        "",
        f"- Gates: {method}, parameters {json.dumps(gate['params'])}; "
        + ("all weights trained" if gate["train_base"] else "the base's weights frozen"),
        f"- {record['steps']:,} steps, {record['tokens_seen']:,} tokens seen, finished {record['finished']}",
        f"- Recipe, data hashes, versions: `record.json`; commit {str(record['git_commit'])[:12]}",
        "",
        f"Held-out text, {held_out['windows']} windows of {held_out['length']} tokens:",
        "",
        "| | |",
        "|---|---|",
        *rows,
    ]
    if section is not None:
        lines += ["", *_strength(section)]
    return "\n".join(lines) + "\n"


def _number(key: str, value: Any) -> str:
    return f"{value:.4f}" if key.startswith("kept") else f"{value:.3f}"


def _strength(section: DropGateConfig) -> list[str]:
    """What is known of other strengths."""
    table = section.calibration
    if table is None:
        return ["Not calibrated: `vllm-prune calibrate` measures other strengths, `vllm-prune report` draws a card."]
    return [
        f"Calibrated at {table.length} tokens; safe up to strength {table.safe_strength:.3g}.", "",
        "| strength | past pairs kept | perplexity | KL to open gates, nats |", "|---|---|---|---|",
        *(f"| {row.strength:.3g} | {row.kept:.3f} | {row.ppl:.3f} | {row.kl:.4f} |" for row in table.rows),
    ]  # fmt: skip
