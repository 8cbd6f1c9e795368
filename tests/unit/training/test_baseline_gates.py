"""Baseline folders: hard links, what they say, what they drop, and what is refused; bases fine-tuned under a window."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm_prune_training.baseline_gates import make_baseline, read_params
from vllm_prune_training.masked import GatedModel, load_gated

from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_window_folder(base: Path, tmp_path: Path) -> None:
    before = (base / "config.json").read_bytes()
    out = make_baseline(base, tmp_path / "a" / "out", "window", {"window": 6}, {"sinks": 2})
    assert (base / "config.json").read_bytes() == before
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (out / name).samefile(base / name), "linked, not copied"
    assert not (out / "config.json").samefile(base / "config.json")
    section = json.loads((out / "config.json").read_text())["drop_gate"]
    assert section["method"] == "window" and section["params"] == {"window": 6} and section["protect"]["sinks"] == 2
    assert [path.name for path in tmp_path.joinpath("a").iterdir()] == ["out"], "nothing is left beside it"
    with torch.no_grad():
        found = load_gated(out)(torch.arange(20), mode="hard").expiry
    assert found[:, 0].tolist() == [[NEVER] * 2 + [j + 7 for j in range(2, 20)]] * 2


def test_a_random_folder_drops_what_its_seed_says_in_each_layer(base: Path, tmp_path: Path) -> None:
    params = {"keep": 0.5, "delay": 3, "seed": 9}
    out = make_baseline(base, tmp_path / "out", "random", params, strength=2.0)
    config = json.loads((out / "config.json").read_text())["drop_gate"]
    assert config["expected_keep"] == 0.25 and config["strength"] == 2.0
    gated = load_gated(out)
    with torch.no_grad():
        found = gated(torch.arange(60), mode="hard").expiry
    section = DropGateConfig(method="random", params=params, num_layers=2, num_kv_heads=2, hidden_size=32)
    want = [gate.expiry(torch.empty(60, 0), 2.0, section.protection) for gate in section.build_gates()]
    assert torch.equal(found, torch.stack(want))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0, 0], found[0, 1])


@pytest.mark.parametrize(
    "method,params,protect,reason",
    [
        ("dcp", {}, {}, "must be trained"),
        ("h2o", {}, {}, "unknown"),
        ("window", {"size": 4}, {}, "params"),
        ("window", {"window": "many"}, {}, "integer"),
        ("random", {"keep": 2}, {}, "probability"),
        ("window", {"window": 4}, {"sink": 4}, "protect"),
        ("window", {"window": 4}, {"sinks": -1}, "protect"),
        ("window", {"window": [4]}, {}, "params"),
    ],
)
def test_refused(base: Path, tmp_path: Path, method: str, params: dict, protect: dict, reason: str) -> None:
    with pytest.raises(PruneError, match=reason):
        make_baseline(base, tmp_path / "out", method, params, protect)
    assert not list(tmp_path.iterdir())


def test_folders_that_do_not_do(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PruneError, match=r"no config\.json"):
        make_baseline(tmp_path, tmp_path / "out", "window", {})
    made = make_baseline(base, tmp_path / "out", "window", {})
    with pytest.raises(PruneError, match="gated checkpoint already"):
        make_baseline(made, tmp_path / "again", "window", {})
    with pytest.raises(PruneError, match="not empty"):
        make_baseline(base, made, "window", {})
    with pytest.raises(PruneError, match="strength"):
        make_baseline(base, tmp_path / "strong", "window", {}, strength=-1.0)


def test_params_of_the_command_line() -> None:
    assert read_params('{"window": 5}') == {"window": 5}
    for wrong in ("{", "5", "[]"):
        with pytest.raises(PruneError, match="JSON"):
            read_params(wrong)


@pytest.mark.parametrize("visibility", ["lean", "naive"])
@pytest.mark.parametrize("method,params", [("window", {"window": 6}), ("random", {"keep": 0.3, "delay": 3})])
def test_a_base_can_be_trained_under_its_mask(base: Path, method: str, params: dict, visibility: str) -> None:
    """Soft mode is hard mode up to the floor of log visibility, and the base gets gradients through it."""
    section = DropGateConfig(method=method, params=params, num_layers=2, num_kv_heads=2, hidden_size=32)
    gated = GatedModel(
        AutoModelForCausalLM.from_pretrained(base), section.build_gates(), section, visibility=visibility
    )
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    soft, hard = gated(ids, mode="soft"), gated(ids, mode="hard")
    torch.testing.assert_close(soft.logits, hard.logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(soft.logits, gated(ids, mode="open").logits, atol=1e-3)
    soft.logits.square().mean().backward()
    grads = [weight.grad for name, weight in gated.model.named_parameters() if "q_proj" in name]
    assert len(grads) == 2 and all(grad is not None and 0 < float(grad.abs().sum()) < float("inf") for grad in grads)
    kept = torch.stack([x.detach() for x in soft.kept]).mean()
    assert 0.1 < float(kept) < 0.9
