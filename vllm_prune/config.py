"""The gated checkpoint's ``drop_gate`` section of config.json, and its gate file.

A gated checkpoint is an ordinary Hugging Face folder: ``architectures: ["Pruned<Base>ForCausalLM"]``, the base weights,
a ``drop_gate`` section and ``drop_gate.safetensors``. Read in the front end (to refuse early) and in the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from vllm_prune.calibration import Calibration, gates_digest
from vllm_prune.errors import PruneError, short
from vllm_prune.gates import GATES, Gate, GateShape, Protection, Reads
from vllm_prune.json_text import parse_object

SECTION = "drop_gate"
GATE_FILE = "drop_gate.safetensors"
TENSOR_PREFIX = "drop_gate.layers"
AGAIN = "Copy or export the checkpoint again."
MAX_STRENGTH = 16.0
MAX_TOKENS = 2**30
"""Bound of every count of tokens: positions plus a delay must fit int32."""
MAX_LAYERS, MAX_HEADS, MAX_HIDDEN = 2**12, 2**16, 2**20
"""Bounds of what a base may have: a gate is built for every layer before anything is compared with a file."""
GATE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProtectConfig(_Strict):
    """Keys exempt from dropping, in tokens: the first ``sinks``, and any younger than ``window``."""

    sinks: int = Field(0, ge=0, le=MAX_TOKENS)
    window: int = Field(0, ge=0, le=MAX_TOKENS)


class DropGateConfig(_Strict):
    """The ``drop_gate`` section.

    Attributes:
        format_version: of this section; only 1 exists.
        method: a name in ``vllm_prune.gates.GATES``.
        params: keyword arguments of the gate class (DCP: rank, beta; DMS: delay, eps; LTP: span, grid, theta; ACC: grid,
            sinks, window, least; window: window; random: keep, delay, seed).
        strength: 0 opens every gate, 1 is as trained, larger drops more.
        num_layers, num_kv_heads, hidden_size: of the base the gates were trained on; must match config.json.
        protect: keys no gate may drop.
        expected_keep: mean fraction of KV kept at this strength; admission plans with it (a wrong value costs
            preemptions, never correctness). With a calibration table it follows from that, at any strength.
        calibration: what each strength keeps and costs, measured by ``vllm-prune calibrate``.
        dtype: of the gate tensors once loaded; ``auto`` is the model's.
        tensors: where they lie: in the gate ``file``, or, of public checkpoints, among the ``base``'s weights
            (``public_dms.py``).
        provenance: how the gates were made, free form; not read by the server.
    """

    format_version: Literal[1] = 1
    method: str
    params: dict[str, int | float | str] = Field(default_factory=dict)
    strength: float = Field(1.0, ge=0.0, le=MAX_STRENGTH, allow_inf_nan=False)
    num_layers: int = Field(gt=0, le=MAX_LAYERS)
    num_kv_heads: int = Field(gt=0, le=MAX_HEADS)
    hidden_size: int = Field(gt=0, le=MAX_HIDDEN)
    protect: ProtectConfig = Field(default_factory=lambda: ProtectConfig(sinks=0, window=0))
    expected_keep: float = Field(1.0, gt=0.0, le=1.0)
    calibration: Calibration | None = None
    dtype: Literal["auto", "float32"] = "auto"
    tensors: Literal["file", "base"] = "file"
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def shape(self) -> GateShape:
        return GateShape(self.hidden_size, self.num_kv_heads, self.num_layers)

    @property
    def protection(self) -> Protection:
        return Protection(self.protect.sinks, self.protect.window)

    def strength_for(self, keep: float, tokens: int | None = None) -> float:
        """The strength that keeps this fraction of past pairs, read from the calibration table.

        Args:
            tokens: among so many (``Calibration.kept_of``).

        Raises:
            PruneError: there is no table, or it does not reach so far.
        """
        if self.calibration is None:
            raise PruneError(
                f"keep {keep:g} was asked for, but this checkpoint has no calibration table (drop_gate.calibration).",
                "Run `vllm-prune calibrate DIR --data TEXT`, or give a strength.",
            )
        low, high = self.calibration.keep_range
        if not low <= keep <= high:
            raise PruneError(
                f"keep {keep:g} lies outside of what was measured: {low:.4g} to {high:.4g} "
                f"at strengths 0 to {self.calibration.strongest:g}, {self.calibration.length} tokens.",
                "Ask for a fraction within, or run `vllm-prune calibrate` with other --strengths.",
            )
        return self.calibration.strength_at(keep, tokens)

    def at_strength(self, strength: float, tokens: int | None = None) -> DropGateConfig:
        """The section as served at a strength, with the ``expected_keep`` that goes with it.

        Without a table a weaker strength than the checkpoint's own plans with everything kept.

        Args:
            tokens: what is planned is as long as that (``Calibration.kept_of``).

        Raises:
            PruneError: the strength is out of range.
        """
        if not 0.0 <= strength <= MAX_STRENGTH:
            raise PruneError(f"strength must lie in 0..{MAX_STRENGTH:g}, got {strength}.", "0 opens every gate.")
        if self.calibration is not None:
            keep = self.calibration.keep_at(strength, tokens)
        else:
            keep = 1.0 if strength < self.strength else self.expected_keep
        return self.model_copy(update={"strength": strength, "expected_keep": keep})

    def build_gate(self) -> Gate:
        """A fresh gate of one layer. Raises PruneError for an unknown method or parameter."""
        if self.method not in GATES:
            raise PruneError(
                f"drop_gate.method {short(self.method)} is unknown.", f"Known methods: {', '.join(sorted(GATES))}."
            )
        hints = get_type_hints(GATES[self.method].__init__)
        correct = "Export the checkpoint again, or correct config.json."
        for name, value in self.params.items():
            if hints.get(name) is int and not (isinstance(value, int) and abs(value) <= MAX_TOKENS):
                raise PruneError(f"drop_gate.params.{name} must be an integer up to 2^30, got {short(value)}.", correct)
            if hints.get(name) is float and not (isinstance(value, int | float) and abs(value) <= 1e30):
                raise PruneError(f"drop_gate.params.{name} must be a finite number, got {short(value)}.", correct)
        try:
            return GATES[self.method](self.shape, **self.params)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError) as error:
            raise PruneError(f"drop_gate.params of method '{self.method}' are wrong: {error}.", correct) from None

    def build_gates(self) -> list[Gate]:
        """Fresh gates of all L layers, each told which it is. Raises as ``build_gate``."""
        return [self.build_gate().at_layer(layer) for layer in range(self.num_layers)]


def parse_drop_gate(
    hf_config: Any, override_strength: float | None = None, keep: float | None = None
) -> DropGateConfig:
    """The validated section of a loaded Hugging Face config, at the strength that is served.

    Args:
        hf_config: the base model's config object with the raw section as an attribute.
        override_strength: replaces the checkpoint's strength when given.
        keep: replaces it by the strength that keeps this fraction, by the checkpoint's calibration table.

    Raises:
        PruneError: the section is absent, malformed, names an unknown method or field, or does not fit the base; or
            both a strength and a fraction are given, or the table does not know the fraction.
    """
    if override_strength is not None and keep is not None:
        raise PruneError(
            "additional_config.vllm_prune has both strength and keep.", "Give one: each decides the other."
        )
    raw = getattr(hf_config, SECTION, None)
    if raw is None:
        raise PruneError(
            f"config.json names a gated architecture but has no '{SECTION}' section.",
            "Export the checkpoint again with `vllm-prune export`, or serve the base model under its own architecture.",
        )
    if not isinstance(raw, dict):
        raise PruneError(f"'{SECTION}' in config.json must be an object, got {type(raw).__name__}.", "Export again.")
    if override_strength is not None or keep is not None:
        own = raw.get("strength", 1.0)
        if isinstance(own, bool) or not isinstance(own, int | float) or not 0.0 <= own <= MAX_STRENGTH:
            raw = {**raw, "strength": MAX_STRENGTH}  # replaced below; the strongest, so that nothing is planned on it
    try:
        section = DropGateConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([SECTION, *(str(part)[:80] for part in first["loc"])])
        hint = "This version does not know the field." if first["type"] == "extra_forbidden" else first["msg"] + "."
        raise PruneError(f"config.json field '{where}' is invalid: {hint}", "Correct it or export again.") from None
    strength = section.strength if override_strength is None else override_strength
    section = section.at_strength(strength if keep is None else section.strength_for(keep))
    base = {
        "num_layers": hf_config.num_hidden_layers,
        "num_kv_heads": getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads,
        "hidden_size": hf_config.hidden_size,
    }
    for field, expected in base.items():
        if getattr(section, field) != expected:
            raise PruneError(
                f"drop_gate.{field} is {getattr(section, field)} but the base model has {expected}.",
                "The gates belong to another base model: export them with the base they were trained on.",
            )
    with torch.device("meta"):  # sizes are checked, nothing is allocated
        gate = section.build_gate()
    if not gate.protects and section.protection != Protection():
        raise PruneError(
            f"drop_gate.protect means nothing to method '{section.method}', which does not choose keys.",
            "Remove it from config.json.",
        )
    misfit = gate.misfit(hf_config)
    if misfit is not None:
        raise PruneError(misfit, "Export the gates with the base model that they were trained on.")
    return section


def server_options(vllm_config: Any) -> dict[str, Any]:
    """The plugin's own part of ``--additional-config``; empty when there is none."""
    additional = vllm_config.additional_config
    return additional.get("vllm_prune", {}) if isinstance(additional, dict) else {}


def served_section(vllm_config: Any) -> DropGateConfig:
    """The checkpoint's section as an engine serves it: with the strength or the kept fraction of its options."""
    options = server_options(vllm_config)
    return parse_drop_gate(vllm_config.model_config.hf_config, options.get("strength"), options.get("keep"))


def gate_reads(vllm_config: Any) -> Reads:
    """What the served gates read of a token."""
    with torch.device("meta"):
        return served_section(vllm_config).build_gate().reads


def serves_stock(vllm_config: Any) -> bool:
    """Whether every gate is open on a device where open lanes have nothing to say for themselves: vLLM's own attention then
    serves the base as it is. On CPU lanes are vLLM's kernel in any case."""
    return vllm_config.device_config.device_type == "cuda" and served_section(vllm_config).strength == 0.0


def check_calibration(gate_file: str, section: DropGateConfig) -> None:
    """Raises PruneError when the calibration table was measured with other gates than these."""
    table = section.calibration
    if table is not None and table.gates_sha256 != gates_digest(gate_file, section.model_dump(exclude={"provenance"})):
        raise PruneError(
            "drop_gate.calibration was measured with other gates than this checkpoint has.",
            "Run `vllm-prune calibrate` on it again, or remove the field from config.json.",
        )


def find_gate_file(model: str, revision: str | None = None) -> str:
    """Path of the gate file of a local folder or a hub id. Raises PruneError when there is none."""
    from transformers.utils.hub import cached_file

    path = cached_file(model, GATE_FILE, revision=revision, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)  # fmt: skip
    if path is None:
        raise PruneError(f"'{GATE_FILE}' is missing in {model}.", "A gated checkpoint needs it beside its weights.")
    return str(path)


def load_gates(path: str, section: DropGateConfig) -> list[dict[str, torch.Tensor]]:
    """Read and check the gate tensors of every layer.

    Args:
        path: of the gate file (safetensors only; nothing is ever unpickled).
        section: the validated ``drop_gate`` section.

    Returns:
        One state dict a layer, L of them.

    Raises:
        PruneError: the file is truncated or no safetensors, a tensor is missing, unknown, of a wrong shape, or not finite,
            or the tensors make no sense to the method.
    """
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(set(file.keys()), section, GATE_FILE)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file, no dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, PruneError):
            raise
        raise PruneError(f"{GATE_FILE} cannot be read: {error}.", AGAIN) from None
    return gate_states(tensors, section, GATE_FILE)


def _wanted(section: DropGateConfig) -> dict[str, torch.Size]:
    """Names and shapes of the gate tensors of every layer."""
    with torch.device("meta"):
        return {
            f"{TENSOR_PREFIX}.{layer}.{name}": tensor.shape
            for layer, gate in enumerate(section.build_gates())
            for name, tensor in gate.state_dict().items()
        }


def _check_names(found: set[str], section: DropGateConfig, where: str, shown: Callable[[str], str] = str) -> None:
    wanted = set(_wanted(section))
    for name in sorted(wanted ^ found):
        kind = "missing" if name in wanted else "not part of this method"
        raise PruneError(f"tensor '{shown(name)}' in {where} is {kind}.", AGAIN)


def gate_states(
    tensors: dict[str, torch.Tensor], section: DropGateConfig, where: str, shown: Callable[[str], str] = str
) -> list[dict[str, torch.Tensor]]:
    """Check the gate tensors of every layer.

    Args:
        tensors: by the names of a gate file.
        section: the validated ``drop_gate`` section.
        where: they were read, for messages.
        shown: the name a tensor has there.

    Returns:
        One state dict a layer, L of them.

    Raises:
        PruneError: as ``load_gates``.
    """
    _check_names(set(tensors), section, where, shown)
    wanted = _wanted(section)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            raise PruneError(
                f"tensor '{shown(name)}' in {where} has shape {list(tensor.shape)}, expected {list(wanted[name])}.",
                AGAIN,
            )
        if tensor.dtype not in GATE_DTYPES or not bool(torch.isfinite(tensor.float()).all()):
            raise PruneError(f"tensor '{shown(name)}' in {where} holds values that are not finite numbers.", AGAIN)
    layers: list[dict[str, torch.Tensor]] = [{} for _ in range(section.num_layers)]
    for name, tensor in tensors.items():
        layer, _, key = name.removeprefix(TENSOR_PREFIX + ".").partition(".")
        layers[int(layer)][key] = tensor
    for index, state in enumerate(layers):
        problem = GATES[section.method].state_problem(state)
        if problem is not None:
            raise PruneError(f"the gate of layer {index} in {where} is wrong: {problem}.", AGAIN)
    try:
        GATES[section.method].check_states(layers)
    except ValueError as error:
        raise PruneError(f"{where} holds no gates of method '{section.method}': {error}.", AGAIN) from None
    return layers


def read_config_json(model_dir: str) -> dict[str, Any]:
    """config.json of a local folder, for tools outside vLLM. Raises PruneError when it cannot be read."""
    path = Path(model_dir) / "config.json"
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PruneError(f"{path} cannot be read: {error}.", "Name a local Hugging Face model folder.") from None
