"""What the comparison of methods counts and joins: the token form's share, bases of gated folders, earlier runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from claims_ltp_acc import over_seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import Point, earlier, token_form_share, ungated

from vllm_prune.gates import GateShape, ShadowTokenGate

LAYERS, KV_HEADS, GROUP, HEAD_DIM, HIDDEN, MLP = 3, 4, 2, 8, 24, 40
HEADS = KV_HEADS * GROUP


def folder_of(path: Path, closed: float, closed_neurons: float, least: int) -> Path:
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": 10,
             "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": MLP}  # fmt: skip
    params = {"closed": closed, "closed_neurons": closed_neurons, "least": least}
    config = {
        **shape,
        "architectures": ["PrunedQwen3ForCausalLM"],
        "drop_gate": {"method": "shadow_token", "params": params},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def counted(gate: ShadowTokenGate, strength: float, context: int) -> float:
    """Multiplications of one token, matrix by matrix, by what the gate chooses for it, over those of a dense one."""
    groups, neurons = gate.choose(torch.rand(1, HEADS * HEAD_DIM), strength)
    ran = whole = 0
    for layer in range(LAYERS):
        for run in (False, True):
            heads = GROUP * (int(groups[0, layer].sum()) if run else KV_HEADS)
            rows = int(neurons[0, layer].sum()) if run else MLP
            work = 2 * HIDDEN * KV_HEADS * HEAD_DIM  # K and V
            work += heads * HEAD_DIM * HIDDEN * 2  # Q and output
            work += heads * HEAD_DIM * context * 2  # scores and values
            work += rows * HIDDEN * 3
            ran, whole = (ran + work, whole) if run else (ran, whole + work)
    return ran / whole


@settings(max_examples=60)
@given(
    closed=st.floats(0, 1), neurons=st.floats(0, 1), least=st.integers(0, 4), strength=st.floats(0, 4),
    context=st.integers(1, 999),
)  # fmt: skip
def test_the_token_forms_share_is_what_the_gate_chooses(tmp_path_factory, closed, neurons, least, strength, context):
    folder = folder_of(tmp_path_factory.mktemp("gated"), closed, neurons, least)
    gate = ShadowTokenGate(
        GateShape(HIDDEN, KV_HEADS, LAYERS), HEADS, HEADS * HEAD_DIM, MLP, 8, 8, closed, neurons, least
    ).at_layer(0)
    assert isinstance(gate, ShadowTokenGate)
    assert token_form_share(folder, strength, context) == pytest.approx(counted(gate, strength, context), abs=1e-9)


def test_the_base_of_a_gated_folder(tmp_path):
    gated, where = tmp_path / "gated", tmp_path / "base"
    gated.mkdir()
    where.mkdir()
    folder_of(gated, 0.5, 0.5, 0)
    (gated / "model.safetensors").write_bytes(b"weights")
    (gated / "drop_gate.safetensors").write_bytes(b"gates")
    assert ungated(gated, where) == where
    config = json.loads((where / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and "drop_gate" not in config
    assert sorted(path.name for path in where.iterdir()) == ["config.json", "model.safetensors"]
    assert ungated(where, tmp_path / "nowhere") == where


def result(*points: Point, keeps: tuple[float, ...] = (0.5,)) -> dict:
    origin = {"command": "it", "git_commit": "abc", "date": "today", "versions": {}, "machine": {}}
    return {"plan": {"tokens": 8}, "keeps": list(keeps), "points": [asdict(p) for p in points], **origin}


def point(method: str, perplexity: float = 2.0) -> Point:
    return Point(method, 0.5, 1.0, 0.5, 1.0, perplexity, 1.0, 0.5, 4)


def test_only_the_same_cases_stand_beside_each_other(tmp_path):
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(result(point("dense"), point("DCP"), point("LTP"))))
    points, source = earlier(path, ["DCP"], {"tokens": 8}, [0.5], point("dense"))
    assert [p.method for p in points] == ["LTP"] and source["LTP"]["git_commit"] == "abc"
    with pytest.raises(SystemExit, match="other perplexity"):
        earlier(path, ["DCP"], {"tokens": 8}, [0.5], point("dense", 2.1))
    with pytest.raises(SystemExit, match="other keeps"):
        earlier(path, ["DCP"], {"tokens": 8}, [0.3], point("dense"))


def test_over_seeds():
    found = over_seeds([{"a": 1.0, "b": [2, 4], "c": {"d": True}}, {"a": 3.0, "b": [2, 8], "c": {"d": False}}])
    assert found["a"] == {"mean": 2.0, "std": 1.4142} and found["c"] == {"d": [True, False]}
    assert [row["mean"] for row in found["b"]] == [2, 6]
    assert over_seeds([{"a": 1}])["a"] == {"mean": 1, "std": None}
