"""report.json and what the demo prints: measured numbers and where they come from."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import vllm_prune
from vllm_prune.compat import vllm_version
from vllm_prune.config import SECTION
from vllm_prune.demo.run import Result


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit(folder: Path) -> str | None:
    """The commit checked out where ``folder`` lies, with ``-dirty`` when tracked files differ; None without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def origin(load: float) -> dict[str, Any]:
    """Command, commit, versions, machine and time of this process.

    Args:
        load: average of the machine before the runs began.
    """
    versions = {"python": platform.python_version(), "vllm_prune": vllm_prune.__version__, "vllm": vllm_version()}
    for name in ("torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git_commit(Path(__file__).parent),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "1"),
            "load_before": round(load, 2),
        },
    }


def model_facts(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Which checkpoint this was: its gates, their provenance, and the hash of each weight file."""
    section = dict(config.get(SECTION) or {})
    return {
        "path": str(folder),
        "architecture": (config.get("architectures") or [None])[0],
        "method": section.get("method"),
        "strength": section.get("strength", 1.0),
        "expected_keep": section.get("expected_keep"),
        "provenance": section.get("provenance", {}),
        "sha256": {path.name: file_hash(path) for path in sorted(folder.glob("*.safetensors"))},
    }


def speeds(result: Result, prompt_tokens: int) -> dict[str, float]:
    """Tokens per second: of the fastest repeat, as other processes only ever slow one down."""
    return {
        "prefill": prompt_tokens / min(result.prefill_seconds),
        "decode": (len(result.token_ids) - 1) / min(result.decode_seconds) if len(result.token_ids) > 1 else 0.0,
    }


def same_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def show(console: Console, report: dict[str, Any]) -> None:
    """Print the texts and the table."""
    for key, title in (("with_eviction", "continued with eviction"), ("without_eviction", "continued with open gates")):
        console.print(Panel(Text(report["texts"][key]), title=title, title_align="left", border_style="dim"))
    share, new = report["same_leading_tokens"], report["new_tokens"]
    penalty = report["engine"]["repetition_penalty"]
    same = f"the first {share} of {new} tokens are the same"
    console.print(f"Greedy, repetition penalty {penalty}; {same}.\n", style="dim")

    layers = Table(title="What each layer keeps", title_justify="left", title_style="bold")
    for name in ("layer", "kept at the end", "visible over the run", "mean lifetime, tokens"):
        layers.add_column(name, justify="right")
    total = {"kept": report["kept_fraction"], "visible": report["visible_fraction"], "lifetime": report["lifetime"]}
    for number, layer in enumerate([*report["layers"], total]):
        name = str(number)
        if layer is total:
            layers.add_section()
            name = "all"
        layers.add_row(name, f"{layer['kept']:.1%}", f"{layer['visible']:.1%}", f"{layer['lifetime']:,.0f}")
    console.print(layers)

    table = Table(title="\nThe same prompt, twice", title_justify="left", title_style="bold")
    for name in ("", "with eviction", "gates open", "ratio"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, with_eviction: float, without: float) -> None:
        ratio = f"{with_eviction / without:.2f}" if without else "-"
        table.add_row(name, f"{with_eviction:,.0f}", f"{without:,.0f}", ratio)

    row("peak blocks of the pool", report["peak_blocks"], report["peak_blocks_dense"])
    row("blocks held at the end", report["blocks_held"], report["blocks_held_dense"])
    row("blocks returned while running", report["blocks_returned"], report["blocks_returned_dense"])
    speed = report["tokens_per_second"]
    for phase in ("prefill", "decode"):
        row(f"{phase}, tokens/s", speed["with_eviction"][phase], speed["without_eviction"][phase])
    console.print(table)
    machine = report["machine"]
    if machine["load_before"] > 0.5 * machine["cores"]:
        console.print(
            f"The machine was busy before (load {machine['load_before']} on {machine['cores']} cores): "
            "the speeds say little. Blocks and fractions do not depend on it.", style="yellow",
        )  # fmt: skip
