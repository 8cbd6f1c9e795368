"""Any file in place of a gate file or of metadata: read as the format's specification says, or refused by name."""

from __future__ import annotations

import json
import math
import os
import resource
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import NUMBERS, TEXTS, damaged, deep, examples, json_values, refused_or_fine
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save
from sections import BASE, METHODS, SIZES, valid
from vllm_prune_training.export import ExportOptions, _gates_of_file

from vllm_prune.config import (
    GATE_FILE,
    TENSOR_PREFIX,
    DropGateConfig,
    find_gate_file,
    load_gates,
)
from vllm_prune.errors import PruneError
from vllm_prune.gates import GATES
from vllm_prune.public_dms import METADATA, TRAINING_LOG, public_section, read_gates

DMS: dict[str, Any] = {"dms_window_size": 8, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_cr": 8}


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
    """A method, and a valid file of it with something done to its header or numbers, to single bytes, or cut off."""
    method = draw(METHODS)
    header, data = split(FILES[method])
    meta = header.pop("__metadata__")
    said = None
    how = draw(st.sampled_from(["parts", "parts", "bytes", "cut"]))
    for _ in range(draw(st.integers(0, 2)) if how == "parts" else 0):
        name = draw(st.sampled_from(sorted(header))) if header else ""
        kind = draw(
            st.sampled_from(
                ["number", "number", "retype", "dtype", "shape", "offsets", "remove", "rename", "more", "entry", "size"]
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
    for _ in range(draw(st.integers(1, 3)) if how == "bytes" else 0):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    if how == "cut":
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


def of_four_bits() -> bytes:
    """Torch has the type and cannot even compare its numbers."""
    header, data = split(FILES["dcp"])
    del header["__metadata__"]
    name = f"{TENSOR_PREFIX}.2.qk.weight"
    header, data = retyped(header, data, name, "I8")
    begin, end = header[name]["data_offsets"]
    header[name] |= {"dtype": "F4", "shape": [8, 64], "data_offsets": [begin, begin + 256]}
    assert end == len(data) and end - begin == 256
    return join(header, data)


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


@examples(400)
@given(gate_files())
@example(("dcp", join({}, b"")))
@example(("dcp", join([], b"")))
@example(("dcp", of_four_bits()))
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


@examples(100)
@given(st.one_of(damaged(valid("dcp"), TEXTS), TEXTS, st.sampled_from(["[" * 100_000, "[]", "7", "{", "null"])))
def test_any_description_in_a_gate_file(described: Any) -> None:
    """What ``vllm-prune export`` reads of a gate file that comes without its folder."""
    text = described if isinstance(described, str) else json.dumps({**described, "calibration": None})
    header, data = split(FILES["dcp"])
    header["__metadata__"] = {"format": "pt", "drop_gate": text}
    path = Path(os.environ["FUZZ_FOLDER"]) / GATE_FILE
    path.write_bytes(join(header, data))
    with refused_or_fine("drop_gate", GATE_FILE):
        found = _gates_of_file(path, ExportOptions(path.parent, path.parent / "out"))
        assert found.section == DropGateConfig.model_validate(json.loads(text))
