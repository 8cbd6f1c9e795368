"""Training LTP by age and ACC-style gates: the profile, the budget, the two stages, and what a recipe may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_masked import HIDDEN, LAYERS, VOCAB, base
from training_runs import plain_recipe, recipe_of
from vllm_prune_training.boundary_profile import coverage, kept_share, tune_boundaries
from vllm_prune_training.boundary_recipe import Boundaries
from vllm_prune_training.calibrate import measure_table
from vllm_prune_training.masked import GatedModel
from vllm_prune_training.train import run

from vllm_prune.config import GATE_FILE, DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import BoundaryRule
from vllm_prune.gates.boundary import hard_walk

LTP = {"gate": {"method": "ltp", "params": {"span": 6, "grid": 8, "theta": 1.0}},
       "objective": {"keep": 0.7, "tau": 0.2}}  # fmt: skip
ACC = {"gate": {"method": "acc", "params": {"grid": 8, "sinks": 1, "window": 6}}, "objective": {"keep": 0.6}}
TOLD = {"boundaries": {"calibration_tokens": 192}}


def plain(folder: Path, name: str, sections: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {**plain_recipe(folder, name, **training), **sections}


def gated(method: str, **params: Any) -> GatedModel:
    section = DropGateConfig(method=method, params=params, num_layers=LAYERS, num_kv_heads=2, hidden_size=HIDDEN)
    return GatedModel(base(), section.build_gates(), section).eval()


def test_coverage_is_the_share_of_the_best_that_holds_enough() -> None:
    scores = torch.tensor([[1.0] * 10, [91.0] + [1.0] * 9, [45.0, 45.0] + [1.25] * 8])
    assert coverage(scores, 0.9).tolist() == pytest.approx([0.9, 0.1, 0.2])


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.37, 0.8, 1.0])
@pytest.mark.parametrize(("sinks", "after"), [(0, 1), (3, 20)])
def test_what_a_budget_leaves_follows_from_counting(keep: float, sinks: int, after: int) -> None:
    rule, t = BoundaryRule(grid=8, span=0, after=after, sinks=sinks, keep=keep), 101
    expiry = hard_walk(rule, torch.randn(1, 2, t, 8), torch.randn(1, 2, t, 8), 0.5)[0, 0]
    pairs = (expiry.clamp(max=t) - torch.arange(t) - 1).sum().item()
    assert kept_share(rule, t) == pytest.approx(pairs / (t * (t - 1) // 2), abs=1e-12)


@pytest.mark.parametrize("budget", ["kv", "flops"])
def test_the_coefficient_fits_the_budget(budget: str) -> None:
    model = gated("acc", grid=8, sinks=1, window=4)
    ids = torch.randint(0, VOCAB, (3, 96), generator=torch.Generator().manual_seed(0))
    target = 0.4 if budget == "kv" else 0.9
    found = tune_boundaries(model, ids, Boundaries(budget=budget), target)  # type: ignore[arg-type]
    assert found["profile"] == sorted(found["profile"], reverse=True) and 0 < found["profile"][-1] <= 1
    kept = model(ids, "hard").kept
    assert torch.stack(kept).mean().item() == pytest.approx(found["kept"], abs=1e-6)
    if budget == "kv":
        assert found["kept"] == pytest.approx(0.4, abs=0.02)
    else:
        assert 0.05 < found["kept"] < 0.95
    weaker, stronger = (torch.stack(model(ids, "hard", strength=s).kept).mean().item() for s in (0.5, 2.0))
    assert stronger < found["kept"] < weaker
    assert torch.stack(model(ids, "hard", strength=0.0).kept).min() == 1.0


def test_a_budget_out_of_reach_is_refused() -> None:
    model = gated("acc", grid=8, sinks=1, window=40)
    with pytest.raises(PruneError, match=r"below what is possible here.*sinks, window and gate\.params\.least"):
        tune_boundaries(model, torch.randint(0, VOCAB, (1, 64)), Boundaries(), 0.1)


def test_every_weight_learns_in_the_soft_stage_and_the_base_alone_in_the_hard() -> None:
    ids = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))
    model = gated("ltp", span=6, grid=8, theta=2.0).train()
    out = model(ids, "soft", tau=0.3)
    (out.logits.square().mean() + torch.stack(out.kept).mean()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
    model.zero_grad()
    model(ids, "hard").logits.square().mean().backward()
    assert all(gate.theta.grad is None for gate in model.gates)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.parameters())


def test_thresholds_stay_in_the_hard_stage(tmp_path: Path) -> None:
    recipe = recipe_of(
        plain(tmp_path, "run", {**LTP, "boundaries": {"hard_from": 0.5}}, save_steps=1, keep_checkpoints=9)
    )
    run(recipe)
    states = [load_file(tmp_path / f"run-work/checkpoint-{step}/model.safetensors") for step in (1, 4, 5, 8)]
    thetas = [torch.stack([v for k, v in sorted(s.items()) if k.endswith("theta")]) for s in states]
    assert not torch.equal(thetas[0], thetas[1]) and torch.equal(thetas[1], thetas[3])
    norms = [next(v for k, v in sorted(s.items()) if k.endswith("k_proj.weight")) for s in states]
    assert not torch.equal(norms[1], norms[3]), "the base goes on learning"
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "gamma" in row] == [1, 2, 3, 4]
    config = json.loads((tmp_path / "run/config.json").read_text())["drop_gate"]
    assert config["method"] == "ltp" and config["dtype"] == "float32"


def test_acc_tells_its_profile_and_goes_on_with_it(tmp_path: Path) -> None:
    recipe = recipe_of(plain(tmp_path, "run", {**ACC, **TOLD}))
    run(recipe)
    record = json.loads((tmp_path / "run/record.json").read_text())
    tensors = load_file(tmp_path / "run" / GATE_FILE)
    for layer, share in enumerate(record["profile"]["profile"]):
        assert tensors[f"drop_gate.layers.{layer}.profile"].item() == pytest.approx(share, abs=1e-6)
        assert tensors[f"drop_gate.layers.{layer}.coefficient"].item() == pytest.approx(
            record["profile"]["coefficient"], rel=1e-5
        )
    assert record["held_out"]["kept_hard"] == pytest.approx(record["profile"]["kept"], abs=1e-6)
    assert "ppl_soft" not in record["held_out"]


@pytest.mark.parametrize("method", ["ltp", "acc"])
def test_strengths_are_measured_as_for_other_gates(method: str) -> None:
    """`calibrate`, and with its table the option `keep`."""
    model = gated(method, **({"span": 6, "grid": 8, "theta": 2.0} if method == "ltp" else {"grid": 8, "window": 4}))
    if method == "acc":
        for gate in model.gates:
            gate.profile.fill_(0.5)  # type: ignore[union-attr, operator]
    points = measure_table(
        model, torch.randint(0, VOCAB, (2, 64), generator=torch.Generator().manual_seed(1)), (0.5, 1.0, 2.0)
    )
    kept = [point.kept.mean().item() for point in points]
    assert [point.strength for point in points] == [0.0, 0.5, 1.0, 2.0] and kept[0] == 1.0
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.7
    assert points[0].kl == 0.0 and points[-1].kl > 0.0


def test_strengths_of_steps_follow_the_seed_and_stay_within() -> None:
    told = Boundaries(strengths=[0.5, 2.0])
    found = [told.strength_at(1, step) for step in range(200)]
    assert 0.5 <= min(found) < 0.6 and 1.7 < max(found) <= 2.0
    assert found == [told.strength_at(1, step) for step in range(200)] != [told.strength_at(2, s) for s in range(200)]
    assert Boundaries().strength_at(1, 0) == 1.0


@pytest.mark.parametrize(
    ("sections", "change", "said"),
    [
        (LTP, {"objective": {"gamma": 0.1}}, "exactly one of gamma and keep for method ltp"),
        (LTP, {"objective": {"leak": 0.1}}, "objective.leak belongs to dcp, not to ltp"),
        (LTP, {"boundaries": {"strengths": [0.5, 1.0]}}, "boundaries.strengths belongs to acc, not to ltp"),
        (LTP, {"training": {"compile": True}}, "compile is not supported with method ltp"),
        (LTP, {"launch": {"kind": "accelerate", "workers": 2}}, "workers must be 1 with method ltp"),
        (LTP, {"gate": {"train_base": False}}, "nothing to train in the hard stage"),
        (ACC, {"objective": {"keep": None}}, "objective needs keep for method acc"),
        (ACC, {"objective": {"tau": 0.1}}, "objective.tau belongs to .*, not to acc"),
        (ACC, {"boundaries": {"hard_from": 0.5}}, "boundaries.hard_from belongs to ltp, not to acc"),
        (ACC, {"boundaries": {"strengths": [2.0, 1.0]}}, "strengths must be"),
        (ACC, {"gate": {"train_base": False}}, "train_base false leaves nothing to train with method acc"),
        ({}, {"boundaries": {"hard_from": 0.5}}, "boundaries belongs to ltp and acc, not to dcp"),
    ],
)
def test_what_a_recipe_may_not_say(tmp_path: Path, sections: Any, change: dict[str, Any], said: str) -> None:
    with pytest.raises(PruneError, match=said):
        recipe_of(plain(tmp_path, "run", sections), **change)
