"""Servable folders of gates that need no training (window, random), made from any Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
from transformers import AutoConfig

from vllm_prune.checkpoint import add_gates
from vllm_prune.config import GATE_FILE, SECTION, DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import GATES

UNTRAINED = ("window", "random")
"""Methods whose gates hold nothing that could be trained."""


def baseline_section(
    base_dir: Path, method: str, params: Mapping[str, Any], protect: Mapping[str, int] | None = None,
    strength: float = 1.0,
) -> DropGateConfig:  # fmt: skip
    """The ``drop_gate`` section of a method without training on the base in ``base_dir``.

    Raises:
        PruneError: the method is unknown or wants training, a parameter or a field is wrong, or the base is not a
            Hugging Face folder with a decoder's sizes in its config.json.
    """
    if method not in UNTRAINED:
        known = f"{', '.join(UNTRAINED)} need no training."
        if method in GATES:
            raise PruneError(f"method '{method}' has weights that must be trained.", f"Use `vllm-prune train`; {known}")
        raise PruneError(
            f"method '{method}' is unknown.", f"{known} Trained: {', '.join(set(GATES) - set(UNTRAINED))}."
        )
    if not (base_dir / "config.json").is_file():
        raise PruneError(f"{base_dir} has no config.json.", "Give a local Hugging Face model folder.")
    try:
        config = AutoConfig.from_pretrained(base_dir, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise PruneError(f"{base_dir}/config.json cannot be read: {error}.", "Give a Hugging Face decoder.") from None
    if hasattr(config, SECTION):
        raise PruneError(f"{base_dir} is a gated checkpoint already.", "Give the base model that it was made from.")
    try:
        section = DropGateConfig.model_validate({
            "method": method, "params": dict(params), "protect": dict(protect or {}), "strength": strength,
            "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
            "num_kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        })  # fmt: skip
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PruneError(f"'{where}' is wrong: {first['msg']}.", "Correct the option.") from None
    except AttributeError as error:
        raise PruneError(f"{base_dir}/config.json is no decoder's: {error}.", "Give a causal language model.") from None
    section.build_gate()
    return section


def make_baseline(
    base_dir: Path, out_dir: Path, method: str, params: Mapping[str, Any], protect: Mapping[str, int] | None = None,
    strength: float = 1.0,
) -> Path:  # fmt: skip
    """A gated checkpoint of a method without training: the base's files hard-linked (copied where links cannot be made).

    The folder appears whole or not at all. ``expected_keep`` is the survival probability of random, and 1 for a window,
    whose kept fraction depends on the length: ``vllm-prune calibrate`` measures it.

    Args:
        base_dir: an ordinary Hugging Face folder.
        out_dir: must not exist, or be empty.
        method: one of ``UNTRAINED``.
        params: of the gate (window: ``window`` in tokens; random: ``keep``, ``delay`` in tokens, ``seed``).
        protect: ``sinks`` and ``window``, in tokens.
        strength: see the gate.

    Raises:
        PruneError: see ``baseline_section``, or ``out_dir`` holds something.
    """
    base_dir, out_dir = Path(base_dir), Path(out_dir)
    section = baseline_section(base_dir, method, params, protect, strength)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise PruneError(f"{out_dir} exists and is not empty.", "Choose another --out, or remove it.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        for path in sorted(base_dir.iterdir()):
            if path.is_file() and path.name not in ("config.json", GATE_FILE):
                _link(path.resolve(), work / path.name)
        shutil.copyfile(base_dir / "config.json", work / "config.json")
        fields = section.model_dump()
        if method == "random":
            fields["expected_keep"] = min(1.0, max(1e-3, float(params.get("keep", 0.5)) ** strength))
        fields["provenance"] = {"made_by": "make_baseline", "training": "none"}
        add_gates(work, section.build_gates(), fields)
        work.chmod(0o755)
        if out_dir.exists():
            out_dir.rmdir()
        work.rename(out_dir)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return out_dir


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def read_params(text: str) -> dict[str, Any]:
    """The JSON object of a ``--params`` option. Raises PruneError when it is none."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise PruneError(f"--params is not JSON: {error}.", """For example: --params '{"window": 512}'""") from None
    if not isinstance(found, dict):
        raise PruneError("--params must be a JSON object.", """For example: --params '{"window": 512}'""")
    return found
