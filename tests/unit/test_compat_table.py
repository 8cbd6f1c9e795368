"""``vllm-prune compat`` and docs/compatibility.md say what the code decides."""

from __future__ import annotations

import string
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from vllm_prune import compat, refusals
from vllm_prune.cli import app
from vllm_prune.compat_table import COMMAND, tables
from vllm_prune.gates import GATES

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
ALL = [*compat.REFUSALS, *refusals.OF_SERVERS, *refusals.OF_REQUESTS]


def test_the_page_is_the_command_s() -> None:
    made = CliRunner().invoke(app, ["compat", "--markdown"])
    assert made.exit_code == 0
    assert PAGE.read_text(encoding="utf-8") == made.stdout, f"run: {COMMAND} > docs/compatibility.md"


def test_every_method_and_refusal_is_listed() -> None:
    cells = {row[0] for table in tables() for row in table.rows}
    assert set(GATES) <= cells and {refusal.name for refusal in ALL} <= cells
    assert all(len(row) == len(table.columns) for table in tables() for row in table.rows)


def test_the_terminal_shows_all_of_it() -> None:
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["compat"])
    assert shown.exit_code == 0 and all(refusal.name in shown.stdout for refusal in ALL)


def test_refusals_are_whole() -> None:
    assert len({refusal.name for refusal in ALL}) == len(ALL)
    for refusal in (*refusals.OF_SERVERS, *refusals.OF_REQUESTS):
        assert refusal.reason.endswith(".") and refusal.way_out.endswith(".")
        fields = {
            name
            for text in (refusal.reason, refusal.way_out)
            for _, name, _, _ in string.Formatter().parse(text)
            if name
        }
        error = refusals.refused(refusal.name, **dict.fromkeys(fields, "this"))
        assert str(error).startswith(f"vllm-prune: refused ({refusal.name}): ") and "{" not in str(error)


def test_it_does_not_need_vllm() -> None:
    code = "import sys; sys.modules['vllm'] = None; from vllm_prune.compat_table import markdown; assert 'refused' in markdown()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
