"""``vllm-prune export``: base weights and gates as one folder that ``vllm serve`` takes.

Weights are hard links to the base's files (copies where the file system makes none), small files are copied, config.json
is written anew. The folder is built beside its place and renamed: it is there whole or not at all, and the base is never
written to. Gates that were trained together with their base cannot be separated from it: their folder is already what
export makes, and gates put on other weights than they were trained on are refused unless that is asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_prune.checkpoint import gated_architecture, save_gates, write_json
from vllm_prune.config import (
    GATE_FILE,
    SECTION,
    DropGateConfig,
    check_calibration,
    load_gates,
    parse_drop_gate,
    read_config_json,
)
from vllm_prune.errors import PruneError
from vllm_prune.json_text import parse_object

from .baseline_gates import baseline_section
from .export_files import Placed, place, same_weights, weight_files, weight_hashes
from .provenance import git_commit

RECORDS = ("record.json", "log.jsonl")
"""Of how gates were trained, taken along."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of the command.

    Attributes:
        base: ordinary Hugging Face folder with safetensors weights.
        out: the folder to make.
        gates: gated folder, or a gate file; None with a method that needs no training.
        method, params: of gates without training, or of a gate file that does not say.
        protect: ``sinks`` and ``window`` in tokens, for gates without training.
        strength: None is the gates' own.
        overwrite: replace ``out`` when it holds something.
        other_weights: put the gates on weights that they were not trained on.
        command: as the user typed it, for provenance.
    """

    base: Path
    out: Path
    gates: Path | None = None
    method: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    protect: Mapping[str, int] = field(default_factory=dict)
    strength: float | None = None
    overwrite: bool = False
    other_weights: bool = False
    command: str = ""


@dataclass(frozen=True)
class Exported:
    """The folder, and how its weights got there."""

    folder: Path
    placed: Placed
    section: DropGateConfig


@dataclass(frozen=True)
class _Gates:
    """Gates to export: their section, their file (None: made here), and the folder that they come from."""

    section: DropGateConfig
    file: Path | None
    folder: Path | None


def export(options: ExportOptions) -> Exported:
    """Make the folder.

    Raises:
        PruneError: base, gates or target are unusable, or do not belong together; nothing was changed.
    """
    base, out = options.base, options.out
    config = _base_config(base)
    weights = weight_files(base)
    _check_target(out, [base, *([] if options.gates is None else [options.gates])], options.overwrite)
    gates = _find_gates(options)
    hf_config = _hf_config(base, gates.section)
    section = parse_drop_gate(hf_config)  # refuses a base of other sizes
    if gates.file is not None:
        load_gates(str(gates.file), section)
        check_calibration(str(gates.file), gates.section)
    changed = _other_weights(options, gates)
    section = gates.section.at_strength(gates.section.strength if options.strength is None else options.strength)
    if changed:
        section = section.model_copy(update={"calibration": None, "expected_keep": 1.0})
    provenance = _provenance(options, gates, weight_hashes(weights), changed)
    section = section.model_copy(update={"provenance": provenance})
    _make_parent(out)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        placed = place(base, weights, work)
        _place_gates(gates, section, work)
        config["architectures"] = [gated_architecture(config["architectures"][0])]
        config[SECTION] = section.model_dump(mode="json", exclude_none=True)
        write_json(work / "config.json", config)
        (work / "README.md").write_text(model_card(section, placed), encoding="utf-8")
        _prove(work)
        work.chmod(0o755)
        _rename(work, out, options.overwrite)
    except OSError as error:
        raise PruneError(f"{out} cannot be written: {error}.", "Nothing was changed.") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Exported(out, placed, section)


def _base_config(base: Path) -> dict[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    path = base / "config.json"
    if not path.is_file():
        raise PruneError(f"{base} has no config.json.", "Name a local Hugging Face model folder with --base.")
    config = read_config_json(str(base))
    architectures = config.get("architectures")
    if config.pop(SECTION, None) is not None:  # a gated folder as the base: its weights alone count
        found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""))
        architectures = config["architectures"] = [] if found is None else [found]
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise PruneError(f"{path} does not name one architecture.", "Name the folder of a causal language model.")
    return config


def _hf_config(base: Path, section: DropGateConfig) -> Any:
    """The base's Hugging Face config with this ``drop_gate`` section in it."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(base, trust_remote_code=False)
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            getattr(found, name)
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise PruneError(f"{base}/config.json is no decoder's: {error}.", "Name a causal language model.") from None
    setattr(found, SECTION, section.model_dump(mode="json", exclude_none=True))
    return found


def _check_target(out: Path, sources: list[Path], overwrite: bool) -> None:
    target = out.resolve()
    for source in sources:
        found = source.resolve()
        if target == found or target in found.parents or found in target.parents:
            raise PruneError(f"--out {out} and {source} lie in each other.", "Choose a folder beside it.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (overwrite and out.is_dir()):
        raise PruneError(f"{out} exists and is not empty.", "Choose another --out, or pass --overwrite.")


def _find_gates(options: ExportOptions) -> _Gates:
    if options.gates is None:
        if options.method is None:
            raise PruneError("neither --gates nor --method is given.", "--method window needs no trained gates.")
        section = baseline_section(options.base, options.method, options.params, options.protect)
        return _Gates(section, None, None)
    if options.protect:
        raise PruneError("--protect is for gates without training.", "Trained gates bring their own protection.")
    path = options.gates
    if path.is_dir():
        if options.method or options.params:
            raise PruneError(
                "--method and --params are for a bare gate file.", "A gated folder says what its gates are."
            )
        return _gates_of_folder(path)
    if not path.is_file():
        raise PruneError(f"{path} does not exist.", "Name a gated folder or its gate file with --gates.")
    return _gates_of_file(path, options)


def _gates_of_folder(folder: Path) -> _Gates:
    for name in ("config.json", GATE_FILE):
        if not (folder / name).is_file():
            raise PruneError(f"{folder} is no gated folder: {name} is missing.", "Name one that training made.")
    raw = read_config_json(str(folder)).get(SECTION)
    if raw is None:
        raise PruneError(f"{folder}/config.json has no '{SECTION}' section.", "Name a gated folder.")
    return _Gates(_section(raw, f"{folder}/config.json"), folder / GATE_FILE, folder)


def _gates_of_file(path: Path, options: ExportOptions) -> _Gates:
    """A gate file says what its gates are; an older one is told by the options, sizes follow from the base."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PruneError(f"{path} cannot be read: {error}.", "Name a gate file that training made.") from None
    if SECTION in metadata:
        if options.method or options.params:
            raise PruneError("--method and --params are given, but the gate file has its own.", "Leave them out.")
        try:
            return _Gates(_section(parse_object(metadata[SECTION]), str(path)), path, None)
        except ValueError as error:
            raise PruneError(f"the metadata of {path} is damaged: {error}.", "Copy the file again.") from None
    method = options.method or metadata.get("method")
    if method is None or not options.params:
        raise PruneError(f"{path} does not say what its gates are.", "Give --method and --params, or the gated folder.")
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(options.base, trust_remote_code=False)
    heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
    raw = {"method": method, "params": dict(options.params), "num_layers": base.num_hidden_layers,
           "num_kv_heads": heads, "hidden_size": base.hidden_size}  # fmt: skip
    return _Gates(_section(raw, "--params"), path, None)


def _section(raw: Any, where: str) -> DropGateConfig:
    from pydantic import ValidationError

    try:
        section = DropGateConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise PruneError(
            f"{where}: drop_gate.{at} is invalid: {first['msg']}.", "Name gates that training made."
        ) from None
    section.build_gate()
    return section


def _other_weights(options: ExportOptions, gates: _Gates) -> bool:
    """Whether the gates are known to go on weights that they were not trained on."""
    if gates.folder is None:
        return False
    different = same_weights(options.base, gates.folder)
    if different is None:
        return False
    if not options.other_weights:
        raise PruneError(
            f"the gates of {gates.folder} were trained on other weights than those of {options.base}: {different}.",
            "Serve the gated folder as it is, or pass --other-weights and calibrate and judge the result anew.",
        )
    return True


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _provenance(
    options: ExportOptions, gates: _Gates, hashes: dict[str, str], changed: bool
) -> dict[str, Any]:  # fmt: skip
    made = {
        "command": options.command, "git_commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("vllm-prune", "torch", "transformers", "safetensors")},
        "base_weights_sha256": hashes, "trained_on_other_weights": changed,
    }  # fmt: skip
    training = gates.section.provenance or ("none" if gates.file is None else "unknown")
    return {"export": made, "training": training}


def _place_gates(gates: _Gates, section: DropGateConfig, work: Path) -> None:
    if gates.file is not None:
        shutil.copyfile(gates.file, work / GATE_FILE)
    else:
        save_gates(work / GATE_FILE, section.build_gates(), section)
    for name in RECORDS:
        if gates.folder is not None and (gates.folder / name).is_file():
            shutil.copyfile(gates.folder / name, work / name)


def _prove(folder: Path) -> None:
    """What the server will check, before anybody sees the folder."""
    from transformers import AutoConfig

    found = parse_drop_gate(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    load_gates(str(folder / GATE_FILE), found)
    check_calibration(str(folder / GATE_FILE), found)


def _make_parent(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PruneError(f"{out.parent} cannot be made: {error}.", "Choose another --out.") from None


def _rename(work: Path, out: Path, overwrite: bool) -> None:
    """Put the folder in its place; an old one is moved aside first and removed last."""
    old = None
    if out.exists() and any(out.iterdir()) and overwrite:
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
        os.rename(out, old)  # onto an empty folder
    try:
        os.rename(work, out)
    except OSError:
        if old is not None:
            os.rename(old, out)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def model_card(section: DropGateConfig, placed: Placed) -> str:
    """README.md of an exported folder."""
    made = section.provenance["export"]
    lines = [
        f"# {section.method} drop gates on a base model", "",
        "Weights are the base's, unchanged; gates decide which cached keys each layer forgets. Serve with",
        "`vllm serve` where vllm-prune is installed.", "",
        f"- Gates: {section.method}, parameters {json.dumps(dict(section.params))}, strength {section.strength:g}",
        f"- Kept: {section.expected_keep:.3f} of past pairs"
        + (" (calibrated)" if section.calibration else " (planned; run `vllm-prune calibrate` to measure)"),
    ]  # fmt: skip
    if section.calibration is not None:
        table = section.calibration
        lines.append(f"- Safe up to strength {table.safe_strength:.3g} at {table.length} tokens")
    if made["trained_on_other_weights"]:
        lines.append("- **The gates were trained on other weights than these**: judge the result anew")
    lines += [
        f"- Weights: {len(placed.linked)} files hard-linked, {len(placed.copied)} copied; their sha256 in config.json",
        f"- Made {made['date']} by `{made['command'] or 'vllm_prune_training.export'}`, commit {made['git_commit'][:12]}",
    ]
    return "\n".join(lines) + "\n"
