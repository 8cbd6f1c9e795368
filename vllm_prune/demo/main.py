"""``vllm-prune demo``: a gated checkpoint continues a source file with and without eviction; a map of what it forgot.

Runs in the command's own process, which has the tokenizer and draws; the engines run in child processes (``launch``).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

import vllm_prune
from vllm_prune.config import GATE_FILE, SECTION, read_config_json
from vllm_prune.demo import maps, plot, report
from vllm_prune.demo.launch import launch, pool_bytes
from vllm_prune.demo.run import BLOCK_TOKENS, Job, Result
from vllm_prune.demo.source import SourceText, load_source, pieces, require_file
from vllm_prune.errors import PruneError, writing
from vllm_prune.gates import GATES

REFERENCE = Path("examples/reference-dcp")


@dataclass(frozen=True)
class DemoOptions:
    """Options of the command.

    Attributes:
        model: folder of a gated checkpoint; None takes the reference checkpoint of the repository.
        source: text file; None takes a standard-library module that training held out.
        prompt_tokens, new_tokens: lengths; new_tokens >= 1.
        out: folder of what is written.
        chunk_tokens: most prompt tokens in one step.
        repetition_penalty: of the greedy sampling, the same in both runs.
        repeats: of each run; the fastest counts.
    """

    model: Path | None = None
    source: Path | None = None
    prompt_tokens: int = 3000
    new_tokens: int = 128
    out: Path = Path("build/demo")
    chunk_tokens: int = 512
    repetition_penalty: float = 1.2
    repeats: int = 5


def find_model(given: Path | None) -> Path:
    """The checkpoint's folder: as given, or the reference below the current folder or the repository's root.

    Raises:
        PruneError: there is none, or it is no gated checkpoint.
    """
    places = [given] if given else [REFERENCE, Path(vllm_prune.__file__).parents[1] / REFERENCE]
    folder = next((place for place in places if (place / "config.json").is_file()), None)
    if folder is None:
        looked = " and ".join(str(place) for place in places)
        raise PruneError(f"no model folder with a config.json at {looked}.", "Name a gated checkpoint: --model FOLDER.")
    if SECTION not in read_config_json(str(folder)) or not (folder / GATE_FILE).is_file():
        raise PruneError(
            f"{folder} is no gated checkpoint: it needs a '{SECTION}' section in config.json and {GATE_FILE}.",
            "Name the folder of an exported gated checkpoint.",
        )
    return folder


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PruneError(f"the tokenizer of {folder} cannot be loaded: {error}.", "Copy it into the folder.") from None


def jobs(options: DemoOptions, folder: Path, prompt: list[int]) -> tuple[Job, Job]:
    """The run with eviction and the one without; they differ in nothing else.

    Raises:
        PruneError: prompt and new tokens exceed the model's context, or the section is wrong.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    wanted, most = options.prompt_tokens + options.new_tokens, config.max_position_embeddings
    if wanted > most:
        raise PruneError(
            f"{options.prompt_tokens} prompt and {options.new_tokens} new tokens exceed the model's {most} positions.",
            "Lower --prompt-tokens or --new-tokens.",
        )
    length = min(-(-wanted // BLOCK_TOKENS) * BLOCK_TOKENS, most)

    def job(evict: bool) -> Job:
        return Job(
            str(folder), prompt, options.new_tokens, evict, length, pool_bytes(config, length, options.chunk_tokens),
            options.chunk_tokens, options.repetition_penalty, options.repeats,
        )  # fmt: skip

    return job(True), job(False)


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Do all of it.

    Returns:
        The report as written to report.json.

    Raises:
        PruneError: model, source or matplotlib is missing, the source is too short, a run failed, or nothing can be written.
    """
    plot.require_matplotlib()
    folder = find_model(options.model)
    if options.source is not None:
        require_file(options.source)
    config = read_config_json(str(folder))
    tokenizer = load_tokenizer(folder)
    source = load_source(tokenizer, options.source, options.prompt_tokens, options.new_tokens)
    evicting, dense = jobs(options, folder, source.prompt)
    load = os.getloadavg()[0]
    elsewhere = "Make room there, or name another folder with --out."
    with writing(options.out, elsewhere):
        options.out.mkdir(parents=True, exist_ok=True)
    names = [escape(str(path)) for path in (folder, source.path, options.out)]
    console.print(f"[bold]{names[0]}[/] continues [bold]{names[1]}[/] after {len(source.prompt):,} tokens")
    with console.status("running with eviction ..."), writing(options.out, elsewhere):
        pruned = launch(evicting, options.out, "run-evicting")
    with console.status("running with open gates ..."), writing(options.out, elsewhere):
        open_gates = launch(dense, options.out, "run-open")

    assert pruned.expiry is not None
    ids = [*source.prompt, *pruned.token_ids]
    expiry = np.asarray(pruned.expiry, np.int64)
    method = GATES[config[SECTION]["method"]]
    data = maps.EvictionMap(
        pieces(tokenizer, ids)[: expiry.shape[-1]], expiry, len(source.prompt), method.reveal.value,
        f"What {method.method.upper()} gates forget while reading {source.path.name}",
    )  # fmt: skip
    result = build_report(options, folder, config, source, data, pruned, open_gates, tokenizer, load)
    with writing(options.out, elsewhere):
        write(options.out, result, data, pruned, open_gates)
    report.show(console, result)
    console.print(f"\nWritten to [bold]{names[2]}[/]: report.json, map.png, and map.html to open in a browser.")
    return result


def build_report(options: DemoOptions, folder: Path, config: dict[str, Any], source: SourceText, data: maps.EvictionMap,
                 pruned: Result, dense: Result, tokenizer: Any, load: float) -> dict[str, Any]:  # fmt: skip
    """report.json. Kept fractions are of keys, over layers and eviction units; blocks as vLLM's pool counted them."""
    layers = data.by_layer()
    fast, slow = report.speeds(pruned, len(source.prompt)), report.speeds(dense, len(source.prompt))
    return {
        **report.origin(load),
        "model": report.model_facts(folder, config),
        "source": {"path": str(source.path), "sha256": source.sha256, "held_out": source.held_out},
        "prompt_tokens": len(source.prompt),
        "new_tokens": len(pruned.token_ids),
        "kept_fraction": float(data.kept.mean()),
        "kept_by_layer": [layer["kept"] for layer in layers],
        "visible_fraction": float(np.mean([layer["visible"] for layer in layers])),
        "lifetime": float(np.mean([layer["lifetime"] for layer in layers])),
        "layers": layers,
        "blocks_returned": pruned.summary["blocks_returned"],
        "blocks_returned_dense": dense.summary["blocks_returned"],
        "peak_blocks": pruned.peak_blocks,
        "peak_blocks_dense": dense.peak_blocks,
        "blocks_held": pruned.timeline[-1][1],
        "blocks_held_dense": dense.timeline[-1][1],
        "pool_blocks": dense.pool_blocks,
        "tokens_per_second": {
            "with_eviction": fast,
            "without_eviction": slow,
            "ratio": {phase: fast[phase] / slow[phase] if slow[phase] else None for phase in fast},
        },
        "seconds": {
            name: {"prefill": run.prefill_seconds, "decode": run.decode_seconds}
            for name, run in (("with_eviction", pruned), ("without_eviction", dense))
        },
        "same_leading_tokens": report.same_prefix(pruned.token_ids, dense.token_ids),
        "texts": {
            "with_eviction": tokenizer.decode(pruned.token_ids),
            "without_eviction": tokenizer.decode(dense.token_ids),
            "source": tokenizer.decode(source.continuation),
        },
        "engine": {
            "block_tokens": BLOCK_TOKENS,
            "chunk_tokens": options.chunk_tokens,
            "repetition_penalty": options.repetition_penalty,
            "repeats": options.repeats,
        },
        "plugin_summary": pruned.summary,
    }


def write(out: Path, result: dict[str, Any], data: maps.EvictionMap, pruned: Result, dense: Result) -> None:
    """report.json, map.png and map.html into ``out``."""
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    kept, peak, most = f"{result['kept_fraction']:.1%}", result["peak_blocks"], result["peak_blocks_dense"]
    subtitle = f"{kept} of the keys are left at the end; at its peak the request held {peak} blocks instead of {most}"
    timelines = {"with eviction": pruned.timeline, "gates open": dense.timeline}
    plot.draw(data, timelines, subtitle, out / "map.png")
    facts = [
        ("model", Path(result["model"]["path"]).name),
        ("tokens", f"{data.prompt_tokens:,} read, {result['new_tokens']:,} generated"),
        ("keys kept at the end", kept),
        ("visible over the run", f"{result['visible_fraction']:.1%}"),
        ("peak blocks", f"{peak} instead of {most}"),
    ]
    (out / "map.html").write_text(maps.render_page(data, facts), encoding="utf-8")
