"""The result as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MIB = 1 << 20


def _interval(pair: Any, digits: int = 2) -> str:
    return "" if pair is None else f" ({pair[0]:.{digits}f}-{pair[1]:.{digits}f})"


def _values(row: dict[str, Any]) -> tuple[str, str, str]:
    """Gated value, open value, remark."""
    opened = row.get("open")
    if "perplexity" in row:
        ratio = f"x {row['ratio']:.3f}{_interval(row['ratio_interval'], 3)}" if opened else ""
        return f"{row['perplexity']:.3f}", f"{opened['perplexity']:.3f}" if opened else "-", ratio
    remark = "excluded" if row.get("excluded") else ""
    if "obeyed" in row:
        rules = row["obeyed"]
        text = f"{rules['obeyed']:.1f} of {rules['rules']:.3g} rules, spread {rules['spread']:.2f}"
        remark = f"{text}; {remark}" if remark else text
    gated = f"{row['score']:.2f}{_interval(row['interval'])}"
    return gated, f"{opened['score']:.2f}{_interval(opened['interval'])}" if opened else "-", remark


def show(console: Console, result: dict[str, Any]) -> None:
    """Print scores and what they cost in memory. ``result``: as written to JSON (``main.run_eval``)."""
    gate = result["gate"]
    title = f"{gate['method']} gates at strength {gate['strength']:g}, with 95 % intervals; open: gates open"
    table = Table(title=title, title_justify="left")
    for name in ("task", "length", "n", "gated", "open"):
        table.add_column(name, justify="right" if name in ("length", "n") else "left", no_wrap=True)
    table.add_column("", overflow="fold")
    costs = Table(title="Measured for a request; after the slash: what stock vLLM holds", title_justify="left")
    costs.add_column("task", no_wrap=True)
    for name in ("length", "kept", "KV MiB", "peak blocks", "end blocks", "open peak"):
        costs.add_column(name, justify="right")
    for row in result["rows"]:
        style = "dim" if row.get("excluded") else None
        table.add_row(escape(row["task"]), str(row["length"]), str(row["samples"]), *_values(row), style=style)
        used = row["memory"]
        opened = row.get("open", {}).get("memory")
        dense = f" / {used['dense_blocks']:.1f}"
        costs.add_row(
            escape(row["task"]), str(row["length"]), f"{used['kept_fraction']:.1%}",
            f"{used['kv_bytes'] / MIB:.2f} / {used['dense_kv_bytes'] / MIB:.2f}", f"{used['blocks_peak']:.1f}{dense}",
            f"{used['blocks_held']:.1f}{dense}", f"{opened['blocks_peak']:.1f}" if opened else "-",
        )  # fmt: skip
    console.print(table)
    console.print(costs)
    mean = result["averages"]
    if mean["score"] is not None:
        opened = f", gates open {mean['open_score']:.3f}" if "open_score" in mean else ""
        console.print(f"Mean score over {mean['rows']} rows: {mean['score']:.3f}{opened}.")
    elif mean["excluded"]:
        console.print("No row counts: the model can do none of these tasks with gates open.")
    if mean["excluded"]:
        names = ", ".join(mean["excluded"])
        console.print(
            f"The model cannot do these with gates open (score below {mean['excluded_below']:g}), excluded: {names}."
        )
    if not mean["checked_open"]:
        console.print(
            "Whether the model can do these tasks at all was not checked: --dense runs them with gates open too."
        )
