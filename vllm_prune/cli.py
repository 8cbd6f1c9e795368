"""The ``vllm-prune`` command. Commands import what they need when they run: help and version start at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_prune import __version__
from vllm_prune.errors import PruneError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False,
                  help="Learned context eviction for vLLM.")  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-prune {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Learned context eviction for vLLM."""


@app.command()
def demo(
    model: Annotated[Path | None, typer.Option(help="Gated checkpoint. Default: examples/reference-dcp")] = None,
    source: Annotated[Path | None, typer.Option(help="Text to read. Default: a held-out library module")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of it that are read.")] = 3000,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    out: Annotated[Path, typer.Option(help="Folder for report.json, map.png and map.html.")] = Path("build/demo"),
    chunk_tokens: Annotated[int, typer.Option(min=32, help="Most prompt tokens in one step.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Times each run is timed; the fastest counts.")] = 5,
) -> None:
    """Continue a source file with and without eviction, measure both, and draw what was forgotten."""
    from rich.console import Console

    from vllm_prune.demo.main import DemoOptions, run_demo

    options = DemoOptions(model, source, prompt_tokens, new_tokens, out, chunk_tokens, repeats=repeats)
    try:
        run_demo(options, Console())
    except PruneError as error:
        Console(stderr=True, style="red").print(str(error), markup=False, highlight=False)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
