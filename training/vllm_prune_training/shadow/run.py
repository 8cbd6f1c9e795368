"""A ShadowLLM run: trace the frozen base, fit the predictor, measure, and make a servable folder."""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vllm_prune.checkpoint import save_gates
from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import Gate, ShadowGate, ShadowTokenGate
from vllm_prune.gates.shadow import close_lowest

from ..build import base_config
from ..checkpoints import SaveFailed, publish, put_aside
from ..export import ExportOptions, export
from ..export_files import load_model
from ..families import gate_shape
from ..masked import GatedModel
from ..provenance import git_commit
from ..recipe import Training
from ..recipe_file import differences
from ..text_data import Batches, held_out_windows
from ..train import VERSIONS, Outcome, check_data
from .criteria import Traces, places, trace
from .measure import attended_at, continuation_nll, nll_after
from .predictor import Fit, fit, scaled_targets, split
from .recipe import ShadowRecipe
from .weights import into_neurons

TRACES = "traces.safetensors"
PREDICTORS = {"heads": "predictor", "neurons": "neuron_predictor"}
"""Where layer 0's gate has the predictor of a kind of structures."""


def run(recipe: ShadowRecipe, resume: bool = True) -> Outcome:
    """Make the folder. Traces are kept in the work folder, and taken from there when the recipe and the data are the same.

    Raises:
        PruneError: something is refused; ``SaveFailed`` when a file cannot be written. Nothing is at ``output`` then.
    """
    started = time.time()
    output, work = Path(recipe.output), Path(recipe.work_folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PruneError(f"output {output} is there already.", "Remove it, or set another output.")
    data = check_data(recipe)
    config = base_config(recipe.model)
    section = section_of(recipe, config)
    longest = recipe.shadow.prompt + recipe.shadow.continuation
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise PruneError(f"shadow.prompt and continuation have {longest} tokens, the model has {limit} positions.",
                         "Lower them.")  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(recipe.model, trust_remote_code=False)
    model = load_model(recipe.model, config, torch.float32)
    model.eval().requires_grad_(False)
    places(model)
    if recipe.shadow.neuron_criterion == "weight" and not all(into_neurons(model)):
        raise PruneError(f"the MLPs of {type(model).__name__} have no gate_proj and up_proj whose rows are neurons.",
                         "Set shadow.neuron_criterion activation.")  # fmt: skip
    if not resume and (aside := put_aside(work)) is not None:
        print(f"the earlier run's {work} is now {aside}", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    traces = load_traces(recipe, data, work)
    if traces is None:
        traces = trace_all(recipe, model, tokenizer)
        save_traces(traces, recipe, data, work)
    found = fit_all(recipe, traces, section)
    gates = section.build_gates()
    for name, one in found.items():
        getattr(gates[0], PREDICTORS[name]).load_state_dict(one.predictor.state_dict())
    quality = {
        name: {"loss": one.loss, "spearman_train": one.rho_train, "spearman": one.rho, "spearman_static": one.static}
        for name, one in found.items()
    }
    measured = measure(recipe, model, tokenizer, gates, section, traces)
    say({**{f"{name}_spearman": row["spearman"] for name, row in quality.items()}, **measured})
    record = {
        "recipe": recipe.model_dump(by_alias=True), "git_commit": git_commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in VERSIONS}, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "data": data, "samples": recipe.shadow.samples,
        "seconds_this_process": round(time.time() - started, 1),
        "predictors": quality, "held_out": measured,
    }  # fmt: skip
    write(recipe, gates, section, record, work)
    return Outcome(output, work, recipe.shadow.samples)


def say(row: dict[str, Any]) -> None:
    print(json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}), flush=True)


def section_of(recipe: ShadowRecipe, config: Any) -> DropGateConfig:
    """The ``drop_gate`` section with the sizes of the base. Raises PruneError when the params are wrong."""
    shape = gate_shape(config)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    sizes = {"query_heads": heads, "width": width}
    if recipe.gate.method == "shadow_token":
        sizes["neurons"] = getattr(config, "intermediate_size", 0)
    section = DropGateConfig(
        method=recipe.gate.method, params={**sizes, **recipe.gate.params},
        num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads, hidden_size=shape.hidden_size, dtype="float32",
    )  # fmt: skip
    with torch.device("meta"):
        misfit = section.build_gates()[0].misfit(config)
    if misfit is not None:
        raise PruneError(misfit, "Use another base.")
    if shape.num_layers < 2:
        raise PruneError("the base has one layer, which stays dense.", "ShadowLLM needs a deeper one.")
    return section


def batches(
    recipe: ShadowRecipe, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Token ids [B, T], weights [B, T] and the prompt's length P of each batch to trace."""
    s = recipe.shadow
    length = s.prompt + s.continuation
    steps = math.ceil(s.samples / s.trace_batch)
    training = Training(steps=steps, lengths=length, batch_tokens=s.trace_batch * length, seed=s.seed)
    left = s.samples
    for step, batch in enumerate(Batches(recipe.data, training, tokenizer, 1.0)):
        prompt = int(np.random.default_rng([s.seed, step]).integers(max(1, s.prompt // 4), s.prompt + 1))
        end, rows = prompt + s.continuation, min(left, s.trace_batch)
        yield batch["input_ids"][:rows, :end], batch["loss_weight"][:rows, :end], prompt
        left -= rows


def trace_all(recipe: ShadowRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Traces:
    """Criteria of all samples."""
    parts: list[Traces] = []
    for ids, weight, prompt in batches(recipe, tokenizer):
        parts.append(trace(model, ids, weight, prompt, recipe.shadow.positions))
        if len(parts) % 16 == 0:
            say({"traced": len(parts) * recipe.shadow.trace_batch, "of": recipe.shadow.samples})
    together = Traces.together(parts)
    for field in fields(together):
        if not torch.isfinite(getattr(together, field.name)).all():
            raise PruneError(f"the base's {field.name} are no numbers.", "Its weights or activations overflow.")
    return together


def save_traces(traces: Traces, recipe: ShadowRecipe, data: list[dict[str, Any]], work: Path) -> None:
    """Write them whole or not at all. Raises SaveFailed."""
    said = json.dumps({"recipe": {**recipe.traced(), "positions": recipe.shadow.positions}, "data": data})
    temporary = work / f".{TRACES}.tmp"
    try:
        tensors = {field.name: getattr(traces, field.name).contiguous() for field in fields(traces)}
        save_file(tensors, temporary, metadata={"run": said})
        temporary.replace(work / TRACES)
    except (OSError, SafetensorError) as error:
        raise SaveFailed(f"{work / TRACES} could not be written: {error}.", "Make room, then run again.") from None


def load_traces(recipe: ShadowRecipe, data: list[dict[str, Any]], work: Path) -> Traces | None:
    """Those of an earlier run. Raises PruneError when they are of other fields or data, or damaged."""
    path = work / TRACES
    if not path.is_file():
        return None
    again = "Restore these, give another output, or start over with --no-resume."
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads(file.metadata()["run"])
            traces = Traces(*(file.get_tensor(field.name) for field in fields(Traces)))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PruneError(f"{path} cannot be read: {error}.", "Start over with --no-resume.") from None
    now = json.loads(json.dumps({"recipe": {**recipe.traced(), "positions": recipe.shadow.positions}, "data": data}))
    changed = differences(saved["recipe"], now["recipe"])
    if changed or saved["data"] != now["data"]:
        what = "; ".join(changed) or "files of the data changed"
        raise PruneError(f"the traces in {work} are of another run: {what}.", again)
    print(f"traces of {traces.leaky.shape[0]} samples are taken from {path}", flush=True)
    return traces


def fit_all(recipe: ShadowRecipe, traces: Traces, section: DropGateConfig) -> dict[str, Fit]:
    """Predictors of all layers' heads, and of neurons where the gates want them, from layer 0's attention output.

    Raises:
        PruneError: a loss is no number.
    """
    s, params = recipe.shadow, section.build_gate()
    rows = split(s.samples, s.held_out, s.seed)
    heads = scaled_targets(traces.target("heads", s.criterion), s.scale)
    tasks = {"heads": (heads.flatten(1), params.hidden, heads.shape[2])}  # layer 0 is predicted, never chosen
    if isinstance(params, ShadowTokenGate):
        neurons = scaled_targets(traces.target("neurons", s.of_neurons), s.scale)
        tasks["neurons"] = (neurons[:, 1:].flatten(1), params.neuron_hidden, 0)
    try:
        return {
            name: fit(traces.attended[:, 0], target, hidden, rows, epochs=s.epochs, batch=s.batch, lr=s.lr,
                      weight_decay=s.weight_decay, seed=s.seed, since=since)
            for name, (target, hidden, since) in tasks.items()
        }  # fmt: skip
    except FloatingPointError as error:
        raise PruneError(f"{error}.", "Lower shadow.lr.") from None


def measure(
    recipe: ShadowRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gates: list[Gate],
    section: DropGateConfig, traces: Traces,
) -> dict[str, Any]:  # fmt: skip
    """Perplexity of held-out continuations: open, as served, and with as much closed by two rules that do not look at the
    text: the mean criterion of the traced samples (static), and chance."""
    s, gate = recipe.shadow, gates[0]
    assert isinstance(gate, ShadowGate | ShadowTokenGate)
    length = s.prompt + s.continuation
    windows = held_out_windows(recipe.data, tokenizer, length, s.windows * length)
    heads, group = gate.shape.num_kv_heads, gate.query_heads // gate.shape.num_kv_heads
    mean = scaled_targets(traces.target("heads", s.criterion), s.scale).mean(0).unflatten(-1, (heads, group)).sum(-1)
    mean_neurons = scaled_targets(traces.target("neurons", s.of_neurons), s.scale).mean(0)
    rng = torch.Generator().manual_seed(s.seed)
    rows: dict[str, list[torch.Tensor]] = {"open": [], "static": [], "random": [], "shadow": []}
    closed = []
    for part in windows.split(s.trace_batch):
        attended = attended_at(model, part, s.prompt)
        rows["open"].append(continuation_nll(model, part, s.prompt))
        if isinstance(gate, ShadowGate):
            lanes = torch.stack([gate.close(row, 1.0) for row in attended])
            shut = 0
            rows["shadow"].append(continuation_nll(model, part, s.prompt, ~lanes.repeat_interleave(group, dim=2)))
        else:
            lanes = ~gate.choose(attended, 1.0)[0]
            shut = int(gate.closed_neurons * gate.neurons + 1e-6)
        closed.append(lanes)
        for name in ("static", "random"):
            scores, neurons = (
                x.expand(part.shape[0], *x.shape) if name == "static" else torch.rand(part.shape[0], *x.shape, generator=rng)
                for x in (mean, mean_neurons)
            )  # fmt: skip
            kept = ~_closed(scores, int(lanes[0].sum()), gate.least).repeat_interleave(group, dim=2)
            some = None
            if shut:
                some = neurons > neurons.kthvalue(shut, dim=-1, keepdim=True).values
                some[:, 0] = True
            rows[name].append(continuation_nll(model, part, s.prompt, kept, some))
    if isinstance(gate, ShadowTokenGate):
        twin = GatedModel(model, gates, section).eval()
        with torch.no_grad():
            for part in windows.split(s.trace_batch):
                rows["shadow"].append(nll_after(twin(part, "hard", prompt=s.prompt).logits, part, s.prompt))
    return {
        "windows": len(windows), "prompt": s.prompt, "continuation": s.continuation,
        "lanes_closed": float(torch.cat(closed).float().mean()),
        "neurons_closed": getattr(gate, "closed_neurons", 0.0) * (1 - 1 / gate.shape.num_layers),
        **{f"ppl_{name}": math.exp(float(torch.cat(found).mean())) for name, found in rows.items()},
    }  # fmt: skip


def _closed(scores: torch.Tensor, count: int, least: int) -> torch.Tensor:
    """Lanes closed by scores [B, L, H]: bool [B, L, H], none of layer 0."""
    closed = torch.zeros_like(scores, dtype=torch.bool)
    for row, found in zip(scores, closed, strict=True):
        found[1:] = close_lowest(row[1:], count, least)
    return closed


def write(recipe: ShadowRecipe, gates: list[Gate], section: DropGateConfig, record: dict[str, Any], work: Path) -> None:
    """The finished folder, in one step. Raises SaveFailed."""
    output = Path(recipe.output)
    made = output.with_name(output.name + ".unfinished")
    shutil.rmtree(made, ignore_errors=True)
    brief = {key: record[key] for key in ("git_commit", "versions", "samples", "predictors", "held_out")}
    section = section.model_copy(update={"provenance": brief})
    try:
        file = work / "drop_gate.safetensors"
        save_gates(file, gates, section)
        export(ExportOptions(base=Path(recipe.model), out=made, gates=file, command="vllm-prune train"))
        path = made / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["drop_gate"]["provenance"]["training"] = brief
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (made / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (made / "README.md").write_text(readme(record, section), encoding="utf-8")
        publish(made, output)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise SaveFailed(f"{output} could not be written: {error}.", "Make room, then run the same command.") from None


def readme(record: dict[str, Any], section: DropGateConfig) -> str:
    """README.md of the folder."""
    held = record["held_out"]
    ranks = ", ".join(
        f"{name} {row['spearman']:.3f} (of their mean: {row['spearman_static']:.3f})"
        for name, row in record["predictors"].items()
    )
    return "\n".join([
        "# Trained by vllm-prune: ShadowLLM (arXiv 2406.16635)", "",
        "The base's weights, unchanged, and predictors of what a text does without; served by `vllm serve` where",
        "vllm-prune is installed.", "",
        f"- Gates: {section.method}, parameters {json.dumps(dict(section.params))}",
        f"- Learned from {record['samples']} traced texts; rank correlation on held-out ones: {ranks}",
        f"- Recipe, data hashes, versions: `record.json`; commit {str(record['git_commit'])[:12]}", "",
        f"Held-out text, {held['windows']} windows, {held['continuation']} tokens after a prompt of {held['prompt']}, "
        f"{held['lanes_closed']:.0%} of all KV heads and {held['neurons_closed']:.0%} of all neurons closed there:", "",
        "| | perplexity |", "|---|---|",
        *(f"| {name} | {held[f'ppl_{key}']:.3f} |" for key, name in (
            ("open", "all open"), ("shadow", "closed as served"), ("static", "closed by the mean criterion"),
            ("random", "closed by chance"))), "",
    ])  # fmt: skip
