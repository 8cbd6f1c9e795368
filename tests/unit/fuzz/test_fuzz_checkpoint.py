"""A checkpoint that nobody vouches for: its section, gate file and DMS metadata are read right, or refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fuzz import TEXTS, damaged, deep, examples, refused_or_fine
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save
from sections import BASE, SIZES, TABLE, sections, sized, valid

from vllm_prune.config import (
    SECTION,
    DropGateConfig,
    parse_drop_gate,
)
from vllm_prune.errors import PruneError
from vllm_prune.public_dms import METADATA, public_section, read_gates


@examples(300)
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
@example(
    {**valid("dcp"), "calibration": {**TABLE, "rows": [*TABLE["rows"][:3], {**TABLE["rows"][3], "kept": 0.0}]}},
    4.0,
    None,
)
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
