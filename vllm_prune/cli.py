"""The ``vllm-prune`` command. Commands import what they need when they run: help and version start at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def _refuse(error: PruneError) -> typer.Exit:
    """Print a refusal in red; the exit to raise, with the error's own code or 2."""
    from rich.console import Console

    Console(stderr=True, style="red").print(str(error), markup=False, highlight=False)
    return typer.Exit(getattr(error, "exit_code", 2))


@contextmanager
def _training_package(command: str) -> Iterator[None]:
    """Around a command's imports of the training package: without it, exit with 2 and say what to install."""
    try:
        yield
    except ImportError as error:
        typer.echo(f"vllm-prune: {command} needs the training package ({error}). Install vllm-prune[train].", err=True)
        raise typer.Exit(2) from None


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
        raise _refuse(error) from None


@app.command("map")
def live_map(
    url: Annotated[str, typer.Option(help="Of a running server, like http://127.0.0.1:8000.")],
    prompt_file: Annotated[Path, typer.Option(help="UTF-8 text, sent as it is.")],
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("map.html"),
    model: Annotated[str | None, typer.Option(help="As served. Default: whatever the server serves")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    strength: Annotated[float | None, typer.Option(help="Of the gates. Default: the server's")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="Of the server.")] = None,
) -> None:
    """Ask a running server what its gates forget of a prompt, and draw it: one HTML file with layers, tokens and time."""
    from vllm_prune.live_map import draw

    asked = {"model": model, "max_tokens": max_tokens, "strength": strength}
    wishes = {name: value for name, value in asked.items() if value is not None}
    try:
        made = draw(url, prompt_file, out, wishes, api_key)
    except PruneError as error:
        raise _refuse(error) from None
    held, layers = 100 * made.kept.mean(), len(made.expiry)
    typer.echo(
        f"{made.tokens:,} tokens, {layers} layers, {held:.1f} % of the keys held at the end: {out}, to open in a browser"
    )


@app.command()
def compat(
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/compatibility.md has it.")] = False,
) -> None:
    """List what is served and what is refused, with reasons and ways out: devices, bases, methods, combinations."""
    from vllm_prune import compat_table

    if markdown:
        typer.echo(compat_table.markdown(), nl=False)
        return
    from rich.console import Console

    compat_table.show(Console())


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a gated checkpoint.")],
    tasks: Annotated[str, typer.Option(help="Names with commas between; all by default. 'help' lists them.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer. Default: 512,1024,4096.")] = "",
    samples: Annotated[int, typer.Option(min=1, help="Of each task and length.")] = 16,
    strength: Annotated[float | None, typer.Option(help="Of the gates; 1 is as trained.")] = None,
    keep: Annotated[float | None, typer.Option(help="Fraction to keep, by the calibration table.")] = None,
    data: Annotated[Path | None, typer.Option(help="Held-out text. Default: standard library modules.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the result, with every output.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Run everything with gates open too, and compare.")] = False,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32. Default: the checkpoint's.")] = None,
    chunk_tokens: Annotated[int, typer.Option(min=32, help="Most prompt tokens in one step.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests at once.")] = 4,
) -> None:
    """Measure quality through the live engine: perplexity and long-context tasks, with what the gates kept."""
    from rich.console import Console

    from vllm_prune.option_lists import names, whole_numbers

    with _training_package("eval"):
        from vllm_prune_training.engine_eval import main as engine_eval
        from vllm_prune_training.engine_eval.samples import NAMES
    if tasks == "help":
        typer.echo("\n".join(NAMES))
        return
    try:
        options = engine_eval.EvalOptions(
            model, names(tasks) or engine_eval.DEFAULT_TASKS, whole_numbers("--lengths", lengths), samples, strength,
            keep, data, json, dense, dtype, chunk_tokens, concurrency,
        )  # fmt: skip
        engine_eval.run_eval(options, Console())
    except PruneError as error:
        raise _refuse(error) from None


@app.command()
def calibrate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Gated checkpoint; its config.json gets the table.")],
    data: Annotated[Path, typer.Option(help="Held-out text, JSONL or Parquet with 'text', or a folder of them.")],
    length: Annotated[int | None, typer.Option(help="Tokens a window. Default: the model's, at most 4096")] = None,
    strengths: Annotated[str, typer.Option(help="With commas between. Default: chosen to fill the range.")] = "",
    tokens: Annotated[int, typer.Option(help="Held-out tokens to measure each strength on.")] = 16384,
    max_rise: Annotated[float, typer.Option(help="Perplexity rise that is called safe, a fraction.")] = 0.01,
) -> None:
    """Measure kept fraction, perplexity and KL against strength; store the table, so that "keep" can be asked for."""
    with _training_package("calibrate"):
        from vllm_prune_training import calibrate as command
    try:
        wanted = command.parse_strengths(strengths)
        options = command.CalibrateOptions(folder, data, length, wanted, tokens, max_rise)
        table = command.calibrate(options, typer.echo)
    except PruneError as error:
        raise _refuse(error) from None
    typer.echo(command.describe(table))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Gated checkpoint.")],
    data: Annotated[Path | None, typer.Option(help="Held-out text. Default: standard library modules")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the card. Default: DIR/report")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a window. Default: as calibrated")] = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 16384,
    texts: Annotated[int, typer.Option(help="Recall texts of each task and length.")] = 4,
    quick: Annotated[bool, typer.Option("--quick", help="Less text, at most 1024 tokens a window.")] = False,
) -> None:
    """Write a card: what the gates keep by layer, head, depth and kind of token, what it costs, and what is safe."""
    with _training_package("report"):
        from vllm_prune_training import report_card as card
    try:
        path = card.report(card.ReportOptions(folder, data, out, length, tokens, texts, quick), typer.echo)
    except PruneError as error:
        raise _refuse(error) from None
    typer.echo(f"written to {path}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="See examples/recipes and docs/training.md.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="training.steps=10; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint; otherwise an earlier run is put aside.")
    ] = True,
) -> None:
    """Train gates by a recipe, from text to a folder that `vllm serve` takes. Exit codes: docs/training.md."""
    with _training_package("train"):
        from vllm_prune_training.command import train_command
    try:
        code = train_command(recipe, overrides or [], resume)
    except PruneError as error:
        raise _refuse(error) from None
    raise typer.Exit(code)


@app.command()
def export(
    base: Annotated[Path, typer.Option(help="Base model's folder, with safetensors weights.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    gates: Annotated[Path | None, typer.Option(help="Gated folder, or its drop_gate.safetensors.")] = None,
    method: Annotated[str | None, typer.Option(help="Gates without training: window or random.")] = None,
    params: Annotated[str, typer.Option(help="""Of the method, JSON: '{"window": 512}'.""")] = "{}",
    protect: Annotated[str, typer.Option(help="""With --method, JSON: '{"sinks": 4}'.""")] = "{}",
    strength: Annotated[float | None, typer.Option(help="Default: the gates' own.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out when it holds something.")] = False,
    other_weights: Annotated[
        bool, typer.Option("--other-weights", help="Allow a base that the gates were not trained on.")
    ] = False,
) -> None:
    """Put base weights and gates into one folder that `vllm serve` takes: weights linked, not copied."""
    import shlex
    import sys

    with _training_package("export"):
        from vllm_prune_training import export as command
        from vllm_prune_training.baseline_gates import read_params
    try:
        made = command.export(
            command.ExportOptions(
                base, out, gates, method, read_params(params), read_params(protect), strength, overwrite, other_weights,
                shlex.join(["vllm-prune", *sys.argv[1:]]),
            )
        )  # fmt: skip
    except PruneError as error:
        raise _refuse(error) from None
    if made.placed.copied:
        typer.echo(f"copied, for want of hard links: {', '.join(made.placed.copied)}")
    typer.echo(f"written to {made.folder}: {len(made.placed.linked)} weight files linked, {made.section.method} gates")


if __name__ == "__main__":
    app()
