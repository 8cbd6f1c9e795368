"""``vllm-prune eval``: a gated checkpoint's quality through the live engine, and what it cost in memory.

This process has the tokenizer, makes the prompts and judges; the engines run in child processes, one after the other.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from vllm_prune.config import DropGateConfig, parse_drop_gate, read_config_json
from vllm_prune.demo.launch import pool_bytes
from vllm_prune.demo.main import find_model, load_tokenizer
from vllm_prune.demo.report import model_facts, origin
from vllm_prune.errors import PruneError, writing

from .. import tasks
from .jobs import BLOCK_TOKENS, LEAST_NEW_TOKENS, Answer, Engine
from .launch import launch
from .samples import (
    LEAST_LENGTH,
    NAMES,
    NEUTRAL,
    PERPLEXITY,
    Sample,
    check_names,
    held_out,
    task_samples,
    window_samples,
)
from .show import show
from .summary import Judged, KVSize, averages, judge, rows

DEFAULT_LENGTHS = (512, 1024, 4096)
DEFAULT_TASKS = tuple(name for name in NAMES if not name.endswith(NEUTRAL))
DTYPES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class EvalOptions:
    """Options of the command.

    Attributes:
        model: folder of a gated checkpoint.
        tasks: of ``samples.NAMES``.
        lengths: in tokens; None takes those of ``DEFAULT_LENGTHS`` that the model holds.
        samples: of each task and length.
        strength, keep: at most one; the checkpoint's own strength without either.
        data: held-out text; None takes modules of the standard library.
        json: file for the result.
        dense: run everything with gates open too.
        dtype: None takes the checkpoint's where the engine serves it, else bfloat16.
        chunk_tokens: most prompt tokens in one step.
        concurrency: most requests at once.
    """

    model: Path
    tasks: tuple[str, ...] = DEFAULT_TASKS
    lengths: tuple[int, ...] | None = None
    samples: int = 16
    strength: float | None = None
    keep: float | None = None
    data: Path | None = None
    json: Path | None = None
    dense: bool = False
    dtype: str | None = None
    chunk_tokens: int = 512
    concurrency: int = 4


def choose_lengths(wanted: Sequence[int] | None, positions: int) -> tuple[int, ...]:
    """Lengths to run, ascending. Raises PruneError for one that the model cannot hold, or too short for any task."""
    if wanted is None:
        wanted = [length for length in DEFAULT_LENGTHS if length <= positions] or [positions]
    for length in wanted:
        if length > positions:
            raise PruneError(f"length {length} exceeds the model's {positions} positions.", "Lower --lengths.")
        if length < LEAST_LENGTH:
            raise PruneError(f"length {length} is too short: no task fits.", f"At least {LEAST_LENGTH} tokens.")
    if not wanted:
        raise PruneError("no length is named.", "Name some with --lengths.")
    return tuple(sorted(set(wanted)))


def choose_dtype(wanted: str | None, config: Any) -> str:
    """Name of the dtype. Raises PruneError for one that gated models are not served in."""
    if wanted is None:
        own = str(getattr(config, "dtype", None)).removeprefix("torch.")
        return own if own in DTYPES else "bfloat16"
    if wanted not in DTYPES:
        raise PruneError(f"dtype {wanted!r} is not served.", f"Known: {', '.join(DTYPES)}.")
    return wanted


def make_samples(
    options: EvalOptions, lengths: Sequence[int], tokenizer: Any, positions: int
) -> tuple[list[Sample], str]:
    """All samples, and where the held-out text comes from. Raises PruneError: a task does not fit, or no text."""
    text = held_out(options.data)
    filler, count = text.lines, tasks.counter(tokenizer)
    found: list[Sample] = []
    for name in dict.fromkeys(options.tasks):
        for length in lengths:
            if name == PERPLEXITY:
                found += window_samples(text, length, options.samples, tokenizer, positions)
            else:
                found += task_samples(name, length, options.samples, tokenizer, count, filler)
    return found, text.source


def make_engine(options: EvalOptions, folder: Path, config: Any, samples: Sequence[Sample], tokenizer: Any) -> Engine:
    """Settings of the gated run; the pool holds ``concurrency`` of the longest requests densely."""
    longest = max(len(s.request.prompt) + max(s.request.new_tokens, LEAST_NEW_TOKENS) for s in samples)
    length = min(-(-longest // BLOCK_TOKENS) * BLOCK_TOKENS, config.max_position_embeddings)
    chosen = {"strength": options.strength, "keep": options.keep}
    ends = {tokenizer.eos_token_id} - {None}
    return Engine(
        str(folder), {name: value for name, value in chosen.items() if value is not None},
        choose_dtype(options.dtype, config), length,
        options.concurrency * pool_bytes(config, length, options.chunk_tokens), options.chunk_tokens,
        options.concurrency, sorted(ends),
    )  # fmt: skip


def run_eval(options: EvalOptions, console: Console) -> dict[str, Any]:
    """Do all of it.

    Returns:
        The result as written to JSON.

    Raises:
        PruneError: model, tasks, lengths or data are refused, or a run failed.
    """
    from transformers import AutoConfig

    check_names(options.tasks)
    folder = find_model(options.model)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    section = parse_drop_gate(config, options.strength, options.keep)
    positions = config.max_position_embeddings
    lengths = choose_lengths(options.lengths, positions)
    if options.json is not None and not options.json.parent.is_dir():
        raise PruneError(f"the folder of {options.json} does not exist.", "Make it, or name another file.")
    choose_dtype(options.dtype, config)
    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise PruneError(f"{folder} has no fast tokenizer.", "Save it with one (tokenizer.json).")
    load = os.getloadavg()[0]
    samples, source = make_samples(options, lengths, tokenizer, positions)
    engine = make_engine(options, folder, config, samples, tokenizer)
    work = Path(tempfile.mkdtemp(prefix="vllm-prune-eval-"))  # stays when a run fails: its log is there
    gated = judge(samples, _run(engine, samples, work, "gated", console), tokenizer)
    opened = None
    if options.dense:
        dense = Engine(**{**vars(engine), "options": {"strength": 0}})
        opened = judge(samples, _run(dense, samples, work, "open", console), tokenizer)
    shutil.rmtree(work)
    result = build_result(options, folder, config, section, engine, source, gated, opened, load)
    publish(options.json, result, console)
    return result


def publish(path: Path | None, result: dict[str, Any], console: Console) -> None:
    """Print the result, and write it where that is wanted.

    Raises:
        PruneError: it cannot be written; it was printed before.
    """
    show(console, result)
    if path is None:
        return
    with writing(path, "All but the single answers is printed above."):
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"Written to [bold]{escape(str(path))}[/].")


def _run(engine: Engine, samples: Sequence[Sample], work: Path, name: str, console: Console) -> list[Answer]:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{name} run", total=len(samples))
        return launch(
            engine, [s.request for s in samples], work, name, lambda n: progress.update(task, completed=n)
        )  # fmt: skip


def build_result(options: EvalOptions, folder: Path, config: Any, section: DropGateConfig, engine: Engine, source: str,
                 gated: list[Judged], opened: list[Judged] | None, load: float) -> dict[str, Any]:  # fmt: skip
    """The JSON result: rows, averages, every request's output, and where it comes from."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = KVSize(section.num_layers, section.num_kv_heads, head_size, DTYPES[engine.dtype])
    table = rows(gated, opened, size)
    return {
        **origin(load),
        "model": model_facts(folder, read_config_json(str(folder))),
        "gate": {"method": section.method, "strength": section.strength, "keep_asked": options.keep},
        "held_out": source,
        "query_agnostic": True,
        "rows": table,
        "averages": averages(table),
        "engine": {
            "dtype": engine.dtype,
            "max_model_len": engine.max_model_len,
            "block_tokens": BLOCK_TOKENS,
            "block_bytes": size.block,
            "token_bytes": size.token,
            "pool_bytes": engine.pool_bytes,
            "chunk_tokens": engine.chunk_tokens,
            "concurrency": engine.concurrency,
        },
        "requests": [_request(each, opened[i] if opened else None) for i, each in enumerate(gated)],
    }


def _request(gated: Judged, opened: Judged | None) -> dict[str, Any]:
    sample = gated.sample
    record: dict[str, Any] = {
        "task": sample.task, "length": sample.length, "context": sample.context,
        "prompt_tokens": len(sample.request.prompt), "depths": sample.depths, "references": sample.references,
        "kept_fraction": gated.answer.memory["kept_fraction"], "blocks_peak": gated.answer.memory["blocks_peak"],
    }  # fmt: skip
    for name, judged in (("gated", gated), ("open", opened)):
        if judged is not None:
            record[name] = {"nll": judged.answer.nll} if judged.score is None else {
                "score": judged.score, "output": judged.output}  # fmt: skip
    return record
