"""Broken checkpoints and options: refused while the configuration is made, each with a message naming what is wrong. Random ones
are in ``tests/unit/fuzz``."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import save_gated, tiny_config

from vllm_prune.config import GATE_FILE, SECTION

LAYER = "drop_gate.layers.1"
QK, BETA = f"{LAYER}.qk.weight", f"{LAYER}.beta"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save_gated(tmp_path_factory.mktemp("good"), tiny_config("qwen3"), "dcp")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "broken"))


def configure(folder: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        **{"model": str(folder), "skip_tokenizer_init": True, "max_model_len": 256, "enforce_eager": True, **options}
    ).create_engine_config()


def refused(folder: Path, *said: str, **options: Any) -> None:
    """Making the configuration fails with all of ``said`` in the message; no worker was begun for it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(ValueError) as caught:
        configure(folder, **options)
    message = str(caught.value)
    assert "vllm-prune: " in message
    for text in said:
        assert text in message
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit config.json in place."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_the_good_one_is_accepted(folder):
    configure(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Copies: what ``load_file`` returns is mapped from the file that is about to be overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(folder / GATE_FILE).items()}


# The gate file -------------------------------------------------------------------------------------------------------


def test_gate_file_missing(folder):
    (folder / GATE_FILE).unlink()
    refused(folder, f"'{GATE_FILE}' is missing in {folder}", "beside its weights")


def write_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def write_header_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def write_pickle(path: Path) -> None:
    torch.save(tensors_of(path.parent), path)


def write_big_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def write_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILERS = {
    "truncated": write_truncated,
    "header_cut": write_header_cut,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a tensor in sight, and long enough to have a header"),
    "pickle": write_pickle,
    "big_header": write_big_header,
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_gate_file_unreadable(folder, spoiler):
    SPOILERS[spoiler](folder / GATE_FILE)
    refused(folder, f"{GATE_FILE} cannot be read: ", "Copy or export the checkpoint again.")


def test_gate_file_is_a_folder(folder):
    write_folder(folder / GATE_FILE)
    refused(folder, GATE_FILE)


def nan_at_the_end(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[-1] = math.nan
    return tensor


NOT_FINITE = "holds values that are not finite numbers"
# Tensor, what becomes of it (None: removed), what the message says of it.
TENSORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "missing": (QK, lambda t: None, "is missing"),
    "too_narrow": (QK, lambda t: t[:-1].clone(), "has shape [31, 128], expected [32, 128]"),
    "transposed": (QK, lambda t: t.T.contiguous(), "has shape [128, 32], expected [32, 128]"),
    "scalar_as_vector": (BETA, lambda t: t.view(1), "has shape [1], expected []"),
    "nan": (QK, nan_at_the_end, NOT_FINITE),
    "inf": (BETA, lambda t: torch.tensor(math.inf), NOT_FINITE),
    "beyond_float32": (BETA, lambda t: torch.tensor(1e300, dtype=torch.float64), NOT_FINITE),
    "int": (QK, lambda t: t.to(torch.int64), NOT_FINITE),
    "bool": (QK, lambda t: t > 0, NOT_FINITE),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensor(folder, case):
    name, change, said = TENSORS[case]
    tensors = tensors_of(folder)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, folder / GATE_FILE)
    refused(folder, f"tensor '{name}' in {GATE_FILE} {said}")


@pytest.mark.parametrize("name", [f"{LAYER}.extra", "drop_gate.layers.3.beta", "model.norm.weight"])
def test_tensor_too_many(folder, name):
    save_file({**tensors_of(folder), name: torch.zeros(2)}, folder / GATE_FILE)
    refused(folder, f"tensor '{name}' in {GATE_FILE} is not part of this method")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_other_float_types_are_fine(folder, dtype):
    save_file({name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()}, folder / GATE_FILE)
    configure(folder)


# The section ---------------------------------------------------------------------------------------------------------


def test_section_absent(folder):
    rewrite(folder, lambda data: data.pop(SECTION))
    refused(folder, "has no 'drop_gate' section", "vllm-prune export")


@pytest.mark.parametrize(("value", "kind"), [([], "list"), ("dcp", "str"), (3, "int"), (True, "bool"), (0.5, "float")])
def test_section_not_an_object(folder, value, kind):
    rewrite(folder, lambda data: data.update({SECTION: value}))
    refused(folder, f"'drop_gate' in config.json must be an object, got {kind}")


# Changes to the section (None: field removed), what the message says.
SECTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown_method": (
        {"method": "dreams"},
        ["drop_gate.method 'dreams' is unknown", "Known methods: acc, acc_prompt, dcp, "],
    ),
    "method_of_other_type": ({"method": 7}, ["'drop_gate.method' is invalid"]),
    "no_method": ({"method": None}, ["'drop_gate.method' is invalid"]),
    "unknown_field": ({"colour": "red"}, ["'drop_gate.colour' is invalid", "does not know the field"]),
    "unknown_protect_field": (
        {"protect": {"tail": 3}},
        ["'drop_gate.protect.tail' is invalid", "does not know the field"],
    ),
    "future_version": ({"format_version": 2}, ["'drop_gate.format_version' is invalid"]),
    "unknown_param": ({"params": {"rank": 16, "depth": 2}}, ["drop_gate.params of method 'dcp'", "depth"]),
    "param_of_other_method": ({"params": {"rank": 16, "delay": 2}}, ["drop_gate.params of method 'dcp'", "delay"]),
    "params_a_list": ({"params": [16]}, ["'drop_gate.params' is invalid"]),
    "param_an_object": ({"params": {"rank": {}}}, ["'drop_gate.params.rank"]),
    "rank_zero": ({"params": {"rank": 0}}, ["drop_gate.params of method 'dcp'", "rank must be >= 1, got 0"]),
    "rank_text": ({"params": {"rank": "sixteen"}}, ["drop_gate.params.rank must be an integer", "'sixteen'"]),
    "rank_fraction": ({"params": {"rank": 16.5}}, ["drop_gate.params.rank must be an integer", "16.5"]),
    "rank_of_a_terabyte": ({"params": {"rank": 2**30}}, [QK.replace(".1.", ".0."), "has shape"]),
    "rank_beyond_memory": ({"params": {"rank": 2**70}}, ["drop_gate.params.rank must be an integer up to 2^30"]),
    "beta_nan": (
        {"params": {"rank": 16, "beta": math.nan}},
        ["drop_gate.params.beta must be a finite number, got nan"],
    ),
    "beta_text": ({"params": {"rank": 16, "beta": "2"}}, ["drop_gate.params.beta must be a finite number, got '2'"]),
    "dms_delay_fraction": ({"method": "dms", "params": {"delay": 2.5}}, ["drop_gate.params.delay must be an integer"]),
    "dms_delay_negative": ({"method": "dms", "params": {"delay": -1}}, ["delay must be >= 0, got -1"]),
    "dms_delay_overflow": ({"method": "dms", "params": {"delay": 2**31 - 1}}, ["drop_gate.params.delay", "2^30"]),
    "ltp_span_zero": ({"method": "ltp", "params": {"span": 0}}, ["span must be >= 1, got 0"]),
    "ltp_grid_fraction": ({"method": "ltp", "params": {"grid": 32.5}}, ["drop_gate.params.grid must be an integer"]),
    "ltp_theta_nan": ({"method": "ltp", "params": {"theta": math.nan}}, ["drop_gate.params.theta must be a finite"]),
    "acc_grid_too_fine": ({"method": "acc", "params": {"grid": 1}}, ["grid must be between 8 and 1024, got 1"]),
    "acc_least_above_one": ({"method": "acc", "params": {"least": 2}}, ["least must be a share between 0 and 1"]),
    "strength_negative": ({"strength": -0.1}, ["'drop_gate.strength' is invalid"]),
    "strength_nan": ({"strength": math.nan}, ["'drop_gate.strength' is invalid"]),
    "strength_inf": ({"strength": math.inf}, ["'drop_gate.strength' is invalid"]),
    "strength_too_large": ({"strength": 17}, ["'drop_gate.strength' is invalid"]),
    "strength_text": ({"strength": "strong"}, ["'drop_gate.strength' is invalid"]),
    "strength_list": ({"strength": [1.0]}, ["'drop_gate.strength' is invalid"]),
    "keep_zero": ({"expected_keep": 0}, ["'drop_gate.expected_keep' is invalid"]),
    "keep_above_one": ({"expected_keep": 1.01}, ["'drop_gate.expected_keep' is invalid"]),
    "sinks_negative": ({"protect": {"sinks": -1}}, ["'drop_gate.protect.sinks' is invalid"]),
    "window_overflow": ({"protect": {"window": 2**31}}, ["'drop_gate.protect.window' is invalid"]),
    "dtype": ({"dtype": "float16"}, ["'drop_gate.dtype' is invalid"]),
    "layers": ({"num_layers": 4}, ["drop_gate.num_layers is 4 but the base model has 3", "another base"]),
    "heads": ({"num_kv_heads": 4}, ["drop_gate.num_kv_heads is 4 but the base model has 2", "another base"]),
    "hidden": ({"hidden_size": 64}, ["drop_gate.hidden_size is 64 but the base model has 128", "another base"]),
    "no_layers": ({"num_layers": None}, ["'drop_gate.num_layers' is invalid"]),
    "hidden_negative": ({"hidden_size": -128}, ["'drop_gate.hidden_size' is invalid"]),
    "hidden_beyond_memory": ({"hidden_size": 2**62}, ["drop_gate"]),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_section(folder, case):
    changes, said = SECTIONS[case]

    def change(data: dict[str, Any]) -> None:
        for name, value in changes.items():
            if value is None:
                del data[SECTION][name]
            else:
                data[SECTION][name] = value

    rewrite(folder, change)
    refused(folder, *said)


def test_base_of_other_size_than_its_gates(folder):
    """The other way round: config.json of another base."""
    rewrite(folder, lambda data: data.update(num_hidden_layers=2, layer_types=["full_attention"] * 2))
    refused(folder, "drop_gate.num_layers is 3 but the base model has 2")


@pytest.mark.parametrize(("name", "value"), [("profile", 0.0), ("profile", 1.5), ("coefficient", -1.0)])
def test_numbers_that_are_finite_but_senseless(tmp_path, name, value):
    folder = save_gated(tmp_path, tiny_config("qwen3"), "acc")
    configure(folder)
    tensors = tensors_of(folder)
    tensors[f"{LAYER}.{name}"] = torch.tensor(value)
    save_file(tensors, folder / GATE_FILE)
    refused(folder, f"the gate of layer 1 in {GATE_FILE} is wrong: {name} is {value:g}", "Copy or export")


def test_rank_that_no_page_can_hold(tmp_path):
    """Gate keys live in head-pages: a rank that does not divide one is found before any worker is."""
    folder = save_gated(tmp_path, tiny_config("qwen3"), "dcp", rank=24)
    refused(folder, "drop_gate.params.rank does not fit the base", "gate keys of 24")


# Server options ------------------------------------------------------------------------------------------------------

KNOWN = "Known fields: strength, record"
OPTIONS: dict[str, tuple[Any, list[str]]] = {
    "not_an_object": ([1], ["additional_config.vllm_prune must be an object", KNOWN]),
    "null": (None, ["additional_config.vllm_prune must be an object", KNOWN]),
    "unknown": ({"strenght": 1.0}, ["additional_config.vllm_prune.strenght is unknown", KNOWN]),
    "strength_text": ({"strength": "1"}, ["additional_config.vllm_prune.strength must be a number, got '1'"]),
    "strength_bool": ({"strength": True}, ["additional_config.vllm_prune.strength must be a number, got True"]),
    "strength_null": ({"strength": None}, ["additional_config.vllm_prune.strength must be a number, got None"]),
    "strength_negative": ({"strength": -1}, ["additional_config.vllm_prune.strength must lie in 0..16, got -1"]),
    "strength_nan": ({"strength": math.nan}, ["additional_config.vllm_prune.strength must lie in 0..16, got nan"]),
    "strength_large": ({"strength": 16.5}, ["additional_config.vllm_prune.strength must lie in 0..16, got 16.5"]),
    "maps_number": ({"maps": 1}, ["additional_config.vllm_prune.maps must be true or false, got 1"]),
    "spacing_negative": (
        {"snapshot_spacing": -1},
        [
            "additional_config.vllm_prune.snapshot_spacing must be a number of tokens, 0 or more, got -1",
            "0 is for none",
        ],
    ),
    "spacing_share": ({"snapshot_spacing": 0.5}, ["snapshot_spacing must be a number of tokens, 0 or more, got 0.5"]),
    "spacing_bool": ({"snapshot_spacing": True}, ["snapshot_spacing must be a number of tokens, 0 or more, got True"]),
    "record_number": ({"record": 1}, ["additional_config.vllm_prune.record must be true or false, got 1"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(good, case):
    value, said = OPTIONS[case]
    refused(good, *said, additional_config={"vllm_prune": value})


@pytest.mark.parametrize(
    "options", [{}, {"strength": 0}, {"strength": 16.0, "record": True}, {"record": False, "maps": True}]
)
def test_good_options(good, options):
    configure(good, additional_config={"vllm_prune": options, "somebody_else": 1})


def test_option_replaces_a_bad_strength_of_the_checkpoint(folder):
    rewrite(folder, lambda data: data[SECTION].update(strength=-1))
    configure(folder, additional_config={"vllm_prune": {"strength": 1.0}})
