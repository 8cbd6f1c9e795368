"""Profile and coefficient of ACC-style gates, and the prompts section of recipes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_prompt_pass import LAYERS, VOCAB, T, gated
from vllm_prune_training.acc_profile import (
    coverage,
    flops_share,
    kv_share,
    layer_flops,
    profile_of,
    shares_left,
    solve_coefficient,
    tune,
)
from vllm_prune_training.prompt_recipe import Prompts
from vllm_prune_training.recipe import Recipe

from vllm_prune.errors import PruneError

profiles = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=8).map(lambda x: sorted(x, reverse=True))


def test_coverage_is_the_share_of_the_best() -> None:
    scores = torch.tensor([1.0, 5.0, 1.0, 3.0, 0.0, 99.0])  # the last is not looked at
    assert coverage(scores, 0.5) == 1 / 6 and coverage(scores, 0.8) == 2 / 6 and coverage(scores, 0.9) == 3 / 6
    assert coverage(torch.ones(101), 0.9) == 90 / 101


def test_the_profile_never_rises() -> None:
    table = torch.tensor([[0.9, 0.4, 0.6], [0.7, 0.6, 0.8], [0.2, 0.5, 0.1]])
    assert profile_of(table, "mean") == pytest.approx([0.6, 0.5, 0.5])
    assert profile_of(table, "median") == pytest.approx([0.7, 0.5, 0.5])


@given(profiles, st.floats(0.3, 0.99), st.floats(0.01, 10.0))
def test_the_coefficient_meets_its_budget(profile: list[float], target: float, pair: float) -> None:
    for share in (
        lambda a: kv_share(shares_left(a, profile, 0.01)),
        lambda a: flops_share(shares_left(a, profile, 0.01), 1.0, pair),
    ):
        if share(1e-4) > target:
            with pytest.raises(PruneError, match="below what is possible"):
                solve_coefficient(share, target)
            continue
        found = share(solve_coefficient(share, target))
        assert found == pytest.approx(target, abs=1e-6)


def test_flops_of_the_whole_are_one_and_of_half_between_quarter_and_half() -> None:
    assert flops_share([1.0, 1.0], 3.0, 5.0) == 1.0
    assert 0.25 < flops_share([0.5, 0.5], 3.0, 5.0) < 0.5
    token, pair = layer_flops(gated("acc_prompt").config, T)
    assert token > 0 and pair == 2 * T * 4 * 8


def test_a_model_is_tuned_to_its_budget_and_eliminates_that_much() -> None:
    model = gated("acc_prompt", protect={"sinks": 0, "window": 0})
    ids = torch.randint(0, VOCAB, (4, T), generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([T, T - 3, 30, 20])
    found = tune(model, ids, prompt, Prompts(), 0.6)
    assert len(found["profile"]) == LAYERS and found["profile"] == sorted(found["profile"], reverse=True)
    assert all(0.2 < share < 1.0 for share in found["coverage"])
    out = model(ids, "hard", prompt=prompt)
    assert torch.stack(out.kept).mean().item() == pytest.approx(0.6, abs=0.03)
    uniform = tune(model, ids, prompt, Prompts(profile="uniform"), 0.6)
    assert uniform["shares"][1:] == pytest.approx([(0.6 * LAYERS - 1) / (LAYERS - 1)] * (LAYERS - 1), abs=1e-5)


def test_where_prompts_end() -> None:
    prompts = Prompts(share=[0.25, 0.5])
    lengths = [prompts.length(np.random.default_rng(i), 100, []) for i in range(200)]
    assert min(lengths) == 25 and max(lengths) == 50
    starts = {prompts.length(np.random.default_rng(i), 100, [40, 41, 42, 90, 91]) for i in range(50)}
    assert starts == {40, 90}
    assert Prompts(share=[0.0, 0.0]).length(np.random.default_rng(0), 100, []) == 2
    assert Prompts(share=[1.0, 1.0]).length(np.random.default_rng(0), 100, []) == 99


def test_strengths_follow_the_step() -> None:
    prompts = Prompts(strengths=[0.5, 2.0])
    drawn = [prompts.strength_at(1, step) for step in range(300)]
    assert 0.5 <= min(drawn) < 0.55 and 1.9 < max(drawn) <= 2.0 and drawn[7] == prompts.strength_at(1, 7)
    assert 0.9 < float(np.median(drawn)) < 1.1
    assert Prompts().strength_at(1, 3) == 1.0


def recipe(method: str, **changed: Any) -> dict[str, Any]:
    base = {"model": "m", "output": "o", "gate": {"method": method}, "objective": {"keep": 0.5},
            "data": {"train": [{"path": "a", "format": "text"}], "held_out": [{"path": "b", "format": "text"}]},
            "training": {"steps": 1, "lengths": 128, "batch_tokens": 128}}  # fmt: skip
    for name, value in changed.items():
        base[name] = {**base.get(name, {}), **value}  # type: ignore[dict-item]
    return base


@pytest.mark.parametrize(
    ("method", "changed", "said"),
    [
        (
            "dcp",
            {"prompts": {"share": [0.2, 0.4]}},
            "belongs to ltp_prompt, acc_prompt and ftp with params.form prompt, not to dcp",
        ),
        ("ltp_prompt", {"prompts": {"strengths": [1.0, 2.0]}}, "prompts.strengths belongs to acc_prompt"),
        ("acc_prompt", {"prompts": {"hard_from": 0.5}}, "prompts.hard_from belongs to ltp_prompt"),
        ("acc_prompt", {"prompts": {"strengths": [2.0, 1.0]}}, "strengths must be"),
        ("acc_prompt", {"prompts": {"share": [0.9, 0.1]}}, "share must be"),
        ("acc_prompt", {"objective": {"keep": None}}, "needs keep"),
        ("acc_prompt", {"objective": {"tau": 0.2}}, "objective.tau belongs to"),
        ("acc_prompt", {"gate": {"train_base": False}}, "nothing to train"),
        ("ltp_prompt", {"objective": {"gamma": 1.0}}, "exactly one of gamma and keep"),
        ("ltp_prompt", {"gate": {"train_base": False}}, "prompts.hard_from 1"),
        ("ltp_prompt", {"training": {"compile": True}}, "training.compile"),
        ("ltp_prompt", {"launch": {"kind": "accelerate", "workers": 2}}, "launch.workers must be 1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(method: str, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        Recipe.model_validate(recipe(method, **changed))


@pytest.mark.parametrize("method", ["ltp_prompt", "acc_prompt"])
def test_recipes_that_do_are_not(method: str) -> None:
    made = Recipe.model_validate(recipe(method, prompts={"share": [0.3, 0.6]}))
    assert made.told_prompts.share == [0.3, 0.6]
    assert Recipe.model_validate(recipe(method)).told_prompts == Prompts()
    frozen = recipe("ltp_prompt", gate={"train_base": False}, prompts={"hard_from": 1.0})
    assert not Recipe.model_validate(frozen).gate.train_base
