"""Losses of gate training: schedules, budgets, and a few steps that lower what is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_masked import VOCAB, base, gated
from vllm_prune_training.gate_objectives import DCPObjective, DMSObjective, logistic_noise, reference_settings


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "answer_mask": torch.zeros_like(ids, dtype=torch.bool)}


def test_the_band_of_dcp_shrinks_to_its_end() -> None:
    settings = reference_settings("dcp", 1.0)
    objective = DCPObjective(settings)
    alphas = [objective.alpha(i / 50) for i in range(51)]
    assert alphas == sorted(alphas)
    assert 1.0 / (alphas[0] - 1.0) == pytest.approx(settings.band_start * settings.params["beta"])
    assert alphas[-1] == pytest.approx(settings.alpha_end)
    assert objective.target(0.0, 1.0) == 1.0 and objective.target(0.9, 1.0) == settings.target


def test_gamma_rises_while_too_much_is_kept() -> None:
    objective = DCPObjective(reference_settings("dcp", 1.0))
    model = gated("dcp")
    with torch.no_grad():
        for gate in model.gates:
            gate.beta.fill_(50.0)
    before = objective.state["gamma"]
    loss, stats = objective.loss(model, batch(), 0.9, None)
    assert stats["soft_kept"] == pytest.approx(1.0)
    assert objective.state["gamma"] > before
    assert loss.item() == pytest.approx(stats["ce"] + objective.state["gamma"] * stats["soft_kept"], rel=1e-4)


def test_dcp_training_drops() -> None:
    model = gated("dcp")
    for gate in model.gates:
        torch.nn.init.normal_(gate.qk.weight, std=0.02)
        torch.nn.init.constant_(gate.beta, 4.0)
    objective = DCPObjective(reference_settings("dcp", 1.0))
    objective.state["gamma"] = 3.0
    optimizer = torch.optim.Adam(model.gates.parameters(), 0.1)
    kept = []
    for _ in range(15):
        loss, stats = objective.loss(model, batch(), 0.0, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kept.append(stats["soft_kept"])
    assert kept[-1] < 0.5 * kept[0]


def test_dms_training_reaches_its_target_and_starts_at_the_teacher() -> None:
    model = gated("dms")
    for gate in model.gates:
        torch.nn.init.zeros_(gate.gate.weight)
    objective = DMSObjective(replace(reference_settings("dms", 1.0), compile=False), base())
    torch.manual_seed(0)
    loss, stats = objective.loss(model, batch(), 0.0, None)
    assert stats["kl"] < 1e-2 and stats["closed"] < 0.1 and stats["target_closed"] == 0.0
    optimizer = torch.optim.Adam(model.gates.parameters(), 5e-4)
    for _ in range(80):
        loss, stats = objective.loss(model, batch(), 1.0, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert stats["closed"] > 0.4


def test_noise_is_logistic() -> None:
    torch.manual_seed(0)
    noise = logistic_noise(torch.zeros(200_000))
    assert abs(noise.mean().item()) < 0.02
    assert noise.var().item() == pytest.approx(torch.pi**2 / 3, rel=0.03)
