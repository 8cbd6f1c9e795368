"""What is served and what is refused, read from the code that decides it: ``vllm-prune compat`` and docs/compatibility.md.

Runs in the user's process, without vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_prune.checkpoint import GATED_ARCHITECTURES, GENERIC_ARCHITECTURE
from vllm_prune.compat import BLOCK_SIZES, DTYPES, HEAD_SIZES, KV_DTYPES, REFUSALS, SUPPORTED
from vllm_prune.gates import GATES, Gate, Reads, Reveal, by_token, on_gpu
from vllm_prune.gates.dms import FORMS
from vllm_prune.public_dms import BASES
from vllm_prune.refusals import OF_REQUESTS, OF_SERVERS

if TYPE_CHECKING:
    from rich.console import Console

COMMAND = "vllm-prune compat --markdown"
DEVICES = {"cpu": "CPU", "cuda": "NVIDIA GPU"}


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: over it.
        intro: a sentence or two.
        columns: their heads.
        rows: of the same length each; plain text.
    """

    title: str
    intro: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _all(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _devices() -> Table:
    rows = tuple(
        (
            DEVICES[device],
            _all(DTYPES[device]),
            _all(("auto", *KV_DTYPES[device])),
            _all(HEAD_SIZES[device]),
            _all(BLOCK_SIZES[device]),
        )
        for device in HEAD_SIZES
    )
    versions = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    return Table(
        "Devices",
        f"vLLM releases let through: {versions}; tests run on the first.",
        ("device", "dtypes", "KV cache dtypes", "head sizes", "block sizes"),
        rows,
    )


def _bases() -> Table:
    public = {architecture: kind for kind, architecture in BASES.items()}
    rows = [
        (
            base,
            gated,
            f"as made, or public DMS checkpoints (model_type {public[base]})" if base in public else "as made",
        )
        for base, gated in GATED_ARCHITECTURES.items()
    ]
    rows.append(("any other decoder that nothing below refuses", GENERIC_ARCHITECTURE, "as made"))
    return Table(
        "Base models",
        "By the architecture in the base's config.json.",
        ("base", "served by", "checkpoints"),
        tuple(rows),
    )


def _method(gate: type[Gate]) -> tuple[str, ...]:
    skips = gate.routes or gate.reveal is Reveal.NONE
    gpu, ranks = ("yes" if served(gate.reveal, gate.routes) else "refused" for served in (on_gpu, by_token))
    return (gate.method, "yes", gpu, ranks, _all(GATED_ARCHITECTURES) if skips else "all")


def _methods() -> Table:
    rows = [_method(gate) for gate in GATES.values()]
    for form, reads in list(FORMS.items())[1:]:  # the first is the default
        bases = "all" if reads is Reads.INPUT else _all(GATED_ARCHITECTURES)
        rows.append((f"dms, form {form}", "yes", "yes", "yes", bases))
    return Table(
        "Methods", "A method's name is that of drop_gate.method. DMS gates about a token's own key are served as form query is.",
        ("method", "CPU", "NVIDIA GPU", "tensor parallel", "base models"), tuple(rows),
    )  # fmt: skip


def tables() -> tuple[Table, ...]:
    """All of them, in the order of the page."""
    columns = ("name", "why", "what to do")
    return (
        _devices(),
        _bases(),
        _methods(),
        Table(
            "Refused at start, whatever the gates",
            "Before an engine is begun, with the message `refused (NAME)`, the reason and the way out.",
            columns, tuple((one.name, one.reason, one.way_out) for one in REFUSALS),
        ),
        Table(
            "Refused at start, with some gates or options", "In the same way. Words in braces are filled in.",
            columns, tuple((one.name, one.reason, one.way_out) for one in OF_SERVERS),
        ),
        Table(
            "Refused for single requests", "With HTTP 400 and the field; the server goes on.",
            columns, tuple((one.name, one.reason, one.way_out) for one in OF_REQUESTS),
        ),
    )  # fmt: skip


def markdown() -> str:
    """The page docs/compatibility.md."""
    lines = [
        "# What is served, what is refused", "",
        f"Made by `{COMMAND}` from the code that decides; `tests/unit/test_compat_table.py` keeps the two equal, and",
        "`tests/integration/test_refusals.py` starts every refused combination. A wrong value of a field is refused too, by the",
        "field's name: [bad input](trust.md#bad-input). Nothing is served without its gates, or otherwise than asked.",
    ]  # fmt: skip
    for table in tables():
        lines += ["", f"## {table.title}", "", table.intro, ""]
        lines += [_line(table.columns), _line(["---"] * len(table.columns)), *map(_line, table.rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def show(console: Console) -> None:
    """The same tables for a terminal."""
    from rich.markup import escape
    from rich.table import Table as Grid

    for table in tables():
        grid = Grid(
            *table.columns, title=table.title, caption=table.intro, title_justify="left", caption_justify="left"
        )
        for row in table.rows:
            grid.add_row(*map(escape, row))
        console.print(grid, "")
