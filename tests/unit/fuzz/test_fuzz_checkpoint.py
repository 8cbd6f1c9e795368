"""A checkpoint that nobody vouches for: its section, gate file and DMS metadata are read right, or refused by name."""

from __future__ import annotations

import json
import math
import os
import resource
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from fuzz import NUMBERS, SCALARS, TEXTS, damaged, deep, examples, json_values, refused_or_fine
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from vllm_prune.calibration import Calibration
from vllm_prune.config import (
    GATE_FILE,
    SECTION,
    TENSOR_PREFIX,
    DropGateConfig,
    find_gate_file,
    load_gates,
    parse_drop_gate,
)
from vllm_prune.errors import PruneError
from vllm_prune.gates import GATES
from vllm_prune.public_dms import METADATA, TRAINING_LOG, public_section, read_gates

BASE = {
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8,
    "intermediate_size": 48,
}  # fmt: skip
SIZES = {"num_layers": 3, "num_kv_heads": 2, "hidden_size": 32}
PARAMS: dict[str, dict[str, Any]] = {
    "dcp": {"rank": 4, "beta": 2.0, "scope": "kv_head"},
    "dms": {"delay": 8, "eps": 1e-6, "form": "separate", "about": "previous", "per": "head", "scale": 100.0, "offset": 5.0},
    "ltp": {"span": 64, "grid": 32, "theta": 0.1}, "ltp_prompt": {"theta": 0.2},
    "acc": {"grid": 32, "sinks": 4, "window": 32, "least": 0.02}, "acc_prompt": {"least": 0.02}, "window": {"window": 9},
    "random": {"keep": 0.5, "delay": 3, "seed": 1}, "ftp": {"kv": "skip", "form": "causal"},
    "shadow": {"query_heads": 4, "width": 32, "hidden": 4, "closed": 0.3, "least": 1},
    "shadow_token": {"query_heads": 4, "width": 32, "neurons": 48, "hidden": 4, "neuron_hidden": 4, "closed": 0.3,
                     "closed_neurons": 0.3, "least": 0},
}  # fmt: skip
ROW = {"live": 0.5, "ppl": 2.0, "kl": 0.1, "length": 64}
TABLE = {
    "version": 1, "length": 64, "tokens": 640, "data_sha256": "d", "gates_sha256": "g", "dtype": "auto", "max_rise": 0.01,
    "safe_strength": 1.0, "noise": 0.0,
    "rows": [{"strength": x, "kept": kept, **ROW} for x, kept in ((0.0, 1.0), (0.5, 0.7), (2.0, 0.2), (4.0, 0.2))],
}  # fmt: skip


def valid(method: str) -> dict[str, Any]:
    return {
        "format_version": 1, "method": method, "params": PARAMS[method], "strength": 1.0, **SIZES, "expected_keep": 0.5,
        "protect": {"sinks": 0, "window": 0}, "dtype": "auto", "tensors": "file", "provenance": {"made": ["by", 1]},
        "calibration": TABLE,
    }  # fmt: skip


NAMES = st.one_of(
    st.sampled_from(
        [*DropGateConfig.model_fields, *Calibration.model_fields, *TABLE["rows"][0], "sinks", "shape", "self"]
    ),
    st.sampled_from(sorted({name for params in PARAMS.values() for name in params})),
    TEXTS,
)
METHODS = st.sampled_from(sorted(GATES))


@st.composite
def sections(draw: Any) -> Any:
    """Anything at all; a valid one with some damage; or one whose parameters alone are odd, where most checks passed already."""
    method = draw(METHODS)
    kind = draw(st.sampled_from(["any", "damaged", "params", "table"]))
    if kind == "any":
        return draw(st.one_of(json_values(NAMES), st.dictionaries(NAMES, json_values(NAMES), max_size=8)))
    if kind == "damaged":
        return draw(damaged(valid(method), NAMES))
    if kind == "table":
        return {**valid(method), "calibration": draw(damaged(TABLE, NAMES))}
    hints = get_type_hints(GATES[method].__init__)
    odd = st.sampled_from(sorted(set(hints) - {"shape", "return"})) if PARAMS[method] else TEXTS
    values = st.one_of(
        NUMBERS, st.sampled_from(["layer", "kv_head", "query", "stream", "prompt", "keep", "own"]), SCALARS
    )
    changes = draw(st.dictionaries(odd, values, min_size=1, max_size=3))
    return {**valid(method), "params": {**PARAMS[method], **changes}, "calibration": None}


def sized(**more: Any) -> dict[str, Any]:
    return {**valid("dcp"), "calibration": None, **more}


@examples(500)
@given(sections(), st.none() | st.floats(0, 16), st.none() | st.floats(0, 1))
@example(sized(params={"rank": 10**5000}), None, None)
@example(sized(params={"rank": -(10**400)}), None, None)
@example(sized(params={"beta": 10**400}), None, None)
@example(sized(num_layers=10**12), None, None)
@example(sized(num_kv_heads=2**64), None, None)
@example(sized(hidden_size=2**64), None, None)
@example(sized(hidden_size=2**62), None, None)
@example(sized(strength=10**400), None, None)
@example(sized(provenance={"deep": deep(3000)}), None, None)
@example(sized(method="x" * 10**6), None, None)
@example(sized(**{"y" * 10**6: 1}), None, None)
@example({**valid("dcp"), "strength": 10**400}, 1.0, None)
@example({**valid("dcp"), "strength": None}, None, 0.5)
def test_any_section(section: Any, strength: float | None, keep: float | None) -> None:
    """Whatever is let through builds gates of every layer and has numbers that admission can plan with."""
    with refused_or_fine("drop_gate", "calibration table", "lies outside", "strength and keep", "base model"):
        parsed = parse_drop_gate(SimpleNamespace(drop_gate=section, **BASE), strength, keep)
        assert (parsed.num_layers, parsed.num_kv_heads, parsed.hidden_size) == (3, 2, 32)
        assert 0 <= parsed.strength <= 16 and 0 < parsed.expected_keep <= 1
        if strength is not None:
            assert parsed.strength == strength
        with torch.device("meta"):
            gates = parsed.build_gates()
        assert len(gates) == 3 and parsed.method == section["method"]
        for at in (0.0, 0.3, 16.0):
            assert 0 < parsed.at_strength(at).expected_keep <= 1


def test_a_base_of_many_layers_does_not_hang() -> None:
    """Where config.json and the section agree on a number that no model has."""
    many = 10**12
    with pytest.raises(PruneError, match=r"drop_gate\.num_layers"):
        parse_drop_gate(SimpleNamespace(drop_gate=sized(num_layers=many), **{**BASE, "num_hidden_layers": many}))


# The gate file ------------------------------------------------------------------------------------------------------

WIDTH = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "I64": 8,
    "BOOL": 1,
    "C64": 8,
    "U16": 2,
}
DTYPES = st.one_of(st.sampled_from([*WIDTH, "F4", "F6_E2M3", "f32", "", "float32", None, 7]), TEXTS)
SHAPES = st.one_of(
    st.lists(
        st.one_of(st.integers(0, 40), st.sampled_from([2**31, 2**32, 2**62, 2**64, -1, 1.5, "3", None])), max_size=4
    ),
    st.sampled_from([None, 4, "4", {}, [[4]]]),
)


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join(header: Any, data: bytes, said: int | None = None) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if said is None else said) + text + data


def gate_file(method: str) -> bytes:
    """A valid one, with numbers of its own in every tensor."""
    section = DropGateConfig.model_validate(valid(method))
    tensors = {}
    for layer, gate in enumerate(section.build_gates()):
        for name, tensor in gate.state_dict().items():
            kept = method in ("acc", "acc_prompt", "random", "ltp_prompt") or name == "sparsity"
            torch.manual_seed(len(name))  # FTP's router is the same in every layer
            tensors[f"{TENSOR_PREFIX}.{layer}.{name}"] = (
                (tensor if kept else torch.randn_like(tensor)).clone().contiguous()
            )
    return save(tensors, {"format": "pt"})


FILES = {method: gate_file(method) for method in sorted(GATES)}


@st.composite
def gate_files(draw: Any) -> tuple[str, bytes]:
    method = draw(METHODS)
    header, data = split(FILES[method])
    meta = header.pop("__metadata__")
    said = None
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(header))) if header else ""
        kind = draw(
            st.sampled_from(
                ["dtype", "shape", "offsets", "remove", "rename", "more", "number", "entry", "retype", "size"]
            )
        )
        if kind == "number" and len(data) >= 4:
            at = 4 * draw(st.integers(0, len(data) // 4 - 1))
            odd = draw(st.sampled_from([math.nan, math.inf, -math.inf, 3e38, 1e-45, -1.0, 0.0]))
            data = data[:at] + struct.pack("<f", odd) + data[at + 4 :]
        elif kind == "size":
            said = draw(st.sampled_from([0, 1, 7, 2**16, 10**8, 2**31, 2**62, 2**63, 2**64 - 1]))
        elif kind == "more":
            header[draw(st.one_of(TEXTS, st.just("drop_gate.layers.٣.beta"), st.just("drop_gate.layers.01.beta")))] = {
                "dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}  # fmt: skip
        elif not header:
            continue
        elif kind == "remove":
            del header[name]
        elif kind == "rename":
            header[draw(st.one_of(TEXTS, st.sampled_from(sorted(header))))] = header.pop(name)
        elif kind == "entry":
            header[name] = draw(json_values())
        elif not isinstance(header[name], dict):
            continue
        elif kind == "dtype":
            header[name]["dtype"] = draw(DTYPES)
        elif kind == "shape":
            header[name]["shape"] = draw(SHAPES)
        elif kind == "offsets":
            header[name]["data_offsets"] = draw(st.lists(NUMBERS, max_size=3))
        elif kind == "retype" and "shape" in header[name]:  # consistent: another type, room for it, offsets moved along
            kind = draw(st.sampled_from([*WIDTH]))
            header, data = retyped(header, data, name, kind)
    if draw(st.booleans()):
        header["__metadata__"] = meta
    raw = bytearray(join(header, data, said))
    for _ in range(draw(st.integers(0, 2))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    if draw(st.integers(0, 3)) == 0:
        del raw[draw(st.integers(0, len(raw))) :]
    return method, bytes(raw)


def retyped(header: dict[str, Any], data: bytes, name: str, dtype: str) -> tuple[dict[str, Any], bytes]:
    made, out = {}, b""
    for key, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            part = data[begin:end]
            if key == name:
                part = bytes(math.prod(entry["shape"]) * WIDTH[dtype])
                entry = {**entry, "dtype": dtype}
        except (TypeError, ValueError, KeyError):
            return header, data
        made[key] = {**entry, "data_offsets": [len(out), len(out) + len(part)]}
        out += part
    return made, out


def plain_read(raw: bytes) -> dict[str, np.ndarray]:
    """Tensors of a file as the format's specification says, for the types that a gate file may have."""
    header, data = split(raw)
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(data[begin:end], "<u2").astype("<u4") << 16).view("<f4")
            else:
                values = np.frombuffer(data[begin:end], types[entry["dtype"]])
            found[name] = values.reshape(entry["shape"])
    return found


@examples(500)
@given(gate_files())
@example(("dcp", join({}, b"")))
@example(("dcp", join([], b"")))
@example(("dcp", join(deep(900), b"")))
def test_any_gate_file(made: tuple[str, bytes]) -> None:
    method, raw = made
    path = Path(os.environ["FUZZ_FOLDER"]) / GATE_FILE
    path.write_bytes(raw)
    section = DropGateConfig.model_validate({**valid(method), "calibration": None})
    with refused_or_fine(GATE_FILE):
        layers = load_gates(str(path), section)
        plain = plain_read(raw)
        assert sum(map(len, layers)) == len(plain)
        for layer, (state, gate) in enumerate(zip(layers, section.build_gates(), strict=True)):
            gate.load_state_dict(state)
            for name, tensor in state.items():
                assert bool(tensor.isfinite().all())
                np.testing.assert_array_equal(tensor.double().numpy(), plain[f"{TENSOR_PREFIX}.{layer}.{name}"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUZZ_FOLDER", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("method", sorted(GATES))
def test_the_good_one_is_read(method: str, folder: Path) -> None:
    (folder / GATE_FILE).write_bytes(FILES[method])
    layers = load_gates(str(folder / GATE_FILE), DropGateConfig.model_validate({**valid(method), "calibration": None}))
    assert sum(map(len, layers)) == len(plain_read(FILES[method]))


@pytest.mark.parametrize("rows", [2**24, 2**33])
def test_a_huge_file_is_refused_without_reading_it(rows: int, folder: Path) -> None:
    """Sparse, of 2 GiB and of 1 TiB, which need not even map: a tensor whose shape is a lie that the file bears out."""
    names = [f"{TENSOR_PREFIX}.{layer}.{name}" for layer in range(3) for name in ("beta", "qk.weight")]
    header, end = {}, 0
    for name in names:
        size = 8 if name.endswith("beta") else 4 * 32 * (rows if name == names[-1] else 8)
        shape = [2] if name.endswith("beta") else [size // 128, 32]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    path = folder / GATE_FILE
    start = join(header, b"")
    path.write_bytes(start)
    os.truncate(path, len(start) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PruneError, match=rf"has shape \[{rows}, 32\]|cannot be read: unable to mmap"):
        load_gates(str(path), DropGateConfig.model_validate({**valid("dcp"), "calibration": None}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, "KiB"


# Files that are no files ----------------------------------------------------------------------------------------------


def put(path: Path, kind: str) -> None:
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "endless":
            path.symlink_to("/dev/zero")
        case "link to nothing":
            path.symlink_to(path.with_name("nothing"))
        case "link to itself":
            path.symlink_to(path)
        case "link to something else":
            path.symlink_to("/etc/hostname" if Path("/etc/hostname").exists() else "/etc/passwd")


KINDS = ["pipe", "folder", "endless", "link to nothing", "link to itself", "link to something else"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_file_that_is_none(kind: str, folder: Path) -> None:
    """Refused, and neither waited for nor read without end."""
    put(folder / GATE_FILE, kind)
    section = DropGateConfig.model_validate({**valid("dcp"), "calibration": None})
    with pytest.raises(PruneError, match=GATE_FILE) as caught:
        load_gates(find_gate_file(str(folder)), section)
    assert "root:" not in str(caught.value), "nothing of another file is told"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_none(kind: str, folder: Path) -> None:
    put(folder / "model.safetensors", kind)
    section = DropGateConfig.model_validate({"method": "dms", "params": {"form": "query"}, "tensors": "base", **SIZES})
    with pytest.raises(PruneError, match=r"model\.safetensors"):
        read_gates(str(folder), section)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [*KINDS, "deep", "huge"])
@pytest.mark.parametrize("name", [METADATA, f"../{TRAINING_LOG}"])
def test_metadata_that_is_none(kind: str, name: str, folder: Path) -> None:
    """What FastDMS leaves in the folder must be right; what lies above it may be anybody's."""
    inner = folder / "model"
    inner.mkdir()
    path = Path(os.path.normpath(inner / name))
    if kind == "deep":
        path.write_text("[" * 100_000)
    elif kind == "huge":
        path.write_text("{}")
        os.truncate(path, 2**40)
    else:
        put(path, kind)
    with refused_or_fine("dms", METADATA):
        public_section(SimpleNamespace(model_type="qwen3", **DMS, **BASE), str(inner))


# Public DMS checkpoints -----------------------------------------------------------------------------------------------

DMS: dict[str, Any] = {"dms_window_size": 8, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_cr": 8}
PUBLIC = {
    "model_type": "qwen3", "auto_map": {"AutoConfig": "configuration_qwen3_dms.Qwen3Config"}, **DMS, "rms_norm_eps": 1e-6,
    "dms_separate_alpha": True, "dms_alpha_per": "head", "dms_disable_eviction": False, "attention_bias": False,
    "dms_format": None, "dms_expected_keep": 0.5,
}  # fmt: skip
FIELDS = st.one_of(st.sampled_from([*PUBLIC, "dms_tau", "dms_alpha_offset", "dms_merge"]), TEXTS)
FASTDMS = {"window_size": 8, "alpha_scale": 100.0, "alpha_offset": 5.0, "zeroing_steps": 3}


@examples(400)
@given(damaged(PUBLIC, FIELDS), st.none() | damaged(FASTDMS, st.sampled_from([*FASTDMS, "config"])))
@example({**PUBLIC, "auto_map": ["configuration_qwen3_dms.Qwen3Config"]}, None)
@example({**PUBLIC, "auto_map": "x"}, None)
@example({**PUBLIC, "dms_window_size": 10**400}, None)
@example({**PUBLIC, "dms_window_size": 10**5000}, None)
@example({**PUBLIC, "model_type": ["qwen3"]}, None)
@example({**PUBLIC, "dms_format": []}, None)
@example({**PUBLIC, "rms_norm_eps": "small"}, None)
@example({**PUBLIC, "dms_alpha_per": deep(2000)}, None)
def test_any_public_config(config: Any, metadata: Any) -> None:
    folder = Path(os.environ["FUZZ_FOLDER"])
    (folder / METADATA).unlink(missing_ok=True)
    if metadata is not None:
        (folder / METADATA).write_text(json.dumps(metadata))
    if not isinstance(config, dict):
        return
    known = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "attention_bias": False, **config, **BASE}
    with refused_or_fine("dms", "DMS", "drop_gate", METADATA, "model_type", "attention_bias", "rms_norm_eps"):
        section = public_section(SimpleNamespace(**known), str(folder))
        if section is not None:
            parsed = parse_drop_gate(SimpleNamespace(**{SECTION: section}, **BASE))
            assert parsed.method == "dms" and parsed.params["delay"] == int(parsed.params["delay"]) >= 0


def test_two_tensors_for_one_gate(folder: Path) -> None:
    """Of a name with and without its prefix, which one counts would be chance."""
    section = DropGateConfig.model_validate({"method": "dms", "params": {"form": "stream"}, "tensors": "base", **SIZES})
    tensors = {}
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.dms_proj_alpha.weight"] = torch.zeros(2, 32)
        tensors[f"model.layers.{layer}.self_attn.dms_proj_alpha_norm.weight"] = torch.ones(32)
    (folder / "model.safetensors").write_bytes(save(tensors))
    assert len(read_gates(str(folder), section)) == 3
    (folder / "more.safetensors").write_bytes(save({"layers.1.self_attn.dms_proj_alpha.weight": torch.ones(2, 32)}))
    with pytest.raises(PruneError, match=r"layers\.1\.self_attn\.dms_proj_alpha\.weight.* twice"):
        read_gates(str(folder), section)
