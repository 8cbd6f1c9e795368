"""The trained module's losses against naive ones, schedules, noise, and what gates learn from them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_runs import plain_recipe, recipe_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from vllm_prune_training import objectives
from vllm_prune_training.build import gate_section, make_gates
from vllm_prune_training.masked import GatedModel, past_mean
from vllm_prune_training.objectives import TrainedModel, logistic_noise, row_noise, square_mean, token_losses
from vllm_prune_training.recipe import Alpha, Objective, Recipe, Training
from vllm_prune_training.schedules import GammaController, alpha_at, closed_at, keep_at, leak_at, rate_at

CONFIG = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


def base() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **CONFIG))


def trained(folder: Path, method: str, objective: dict[str, Any], teacher: PreTrainedModel | None = None,
            **gate: Any) -> TrainedModel:  # fmt: skip
    plain = plain_recipe(folder)
    plain["gate"], plain["objective"] = {"method": method, **gate}, objective
    recipe: Recipe = recipe_of(plain)
    model = base()
    if method == "none":
        return TrainedModel(recipe, model, None, teacher)
    section = gate_section(recipe, model.config)
    return TrainedModel(recipe, model, GatedModel(model, make_gates(recipe, section), section), teacher)


def rows(b: int = 2, t: int = 24, weighted: bool = False) -> dict[str, torch.Tensor]:
    maker = torch.Generator().manual_seed(3)
    weight = torch.rand(b, t, generator=maker) + 0.5 if weighted else torch.ones(b, t)
    weight[:, 0] = 0.0
    return {"input_ids": torch.randint(0, 64, (b, t), generator=maker), "loss_weight": weight,
            "weight_total": weight.sum().expand(b), "row_key": torch.arange(b)}  # fmt: skip


@pytest.mark.parametrize("chunk", [5, 4096])
def test_token_losses_are_the_library_s(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(objectives, "ROWS", chunk)
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 17, dtype=torch.float64).float().requires_grad_()
    twin = logits.detach().clone().requires_grad_()
    taught, ids = torch.randn(2, 9, 17), torch.randint(0, 17, (2, 9))
    found = token_losses(logits, ids, taught, {"next_token": 1.0, "kl_forward": 1.0, "kl_reverse": 1.0})
    log_q, log_p = twin[:, :-1].log_softmax(-1), taught[:, :-1].log_softmax(-1)
    expected = {
        "next_token": F.cross_entropy(twin[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 8),
        # kl_div(input, target) is KL(target || input): the teacher's distribution weighs the forward direction.
        "kl_forward": F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1),
        "kl_reverse": F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    scale = torch.arange(8.0)
    sum((found[name] * scale * i).sum() for i, name in enumerate(expected, 1)).backward()
    sum((expected[name] * scale * i).sum() for i, name in enumerate(expected, 1)).backward()
    torch.testing.assert_close(logits.grad, twin.grad, rtol=1e-4, atol=1e-6)


def test_dcp_s_loss_is_weighted_text_and_gamma_times_the_past_pairs(tmp_path: Path) -> None:
    model = trained(tmp_path, "dcp", {"gamma": 0.7}, params={"rank": 4, "beta": 1.0})
    batch, knobs = rows(weighted=True), torch.tensor([1.7, 0.7, 0.0, 0.0])
    out = model(**batch, knobs=knobs)
    naive = model.gated
    naive.visibility = "naive"
    soft = naive(batch["input_ids"], "soft", alpha=1.7)
    losses = F.cross_entropy(soft.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
    weight = batch["loss_weight"][:, 1:].flatten()
    torch.testing.assert_close(out["text_loss"], (losses * weight).sum() / weight.sum())
    kept = torch.stack([past_mean(v) for v in soft.log_visibility]).mean()
    torch.testing.assert_close(out["budget"], 0.7 * kept)
    full = torch.stack([v.exp() for v in soft.log_visibility]).mean()  # ones on and above the diagonal
    torch.testing.assert_close(out["square_mean"], full)
    assert float(out["square_mean"]) > 0.5 > float(square_mean(torch.tensor(0.0), 24)) - 0.03


def test_rows_of_a_step_add_up(tmp_path: Path) -> None:
    teacher = base().eval()
    model = trained(tmp_path, "dms", {"kl_forward": 0.5, "next_token": 0.25, "kl_reverse": 0.1, "closed": 0.5}, teacher,
                    params={"delay": 4})  # fmt: skip
    for gate in model.gated.gates:
        torch.nn.init.normal_(gate.gate.weight, std=0.02)
    batch, knobs = rows(4, weighted=True), torch.tensor([0.0, 0.0, 0.5, 0.0])
    whole = model(**batch, knobs=knobs)
    parts = [model(**{k: v[i : i + 2] for k, v in batch.items()}, knobs=knobs) for i in (0, 2)]
    torch.testing.assert_close(whole["text_loss"], parts[0]["text_loss"] + parts[1]["text_loss"])
    torch.testing.assert_close(whole["budget"], (parts[0]["budget"] + parts[1]["budget"]) / 2)
    total = 0.5 * whole["kl_forward"] + 0.25 * whole["next_token"] + 0.1 * whole["kl_reverse"]
    torch.testing.assert_close(whole["text_loss"].detach(), total)


def test_noise_is_logistic_and_follows_the_row(tmp_path: Path) -> None:
    noise = logistic_noise(torch.zeros(200_000), torch.Generator().manual_seed(0))
    assert abs(noise.mean().item()) < 0.02 and noise.var().item() == pytest.approx(math.pi**2 / 3, rel=0.03)
    both = list(row_noise(torch.tensor([7, 8]), 1, 2, 5, 3))
    assert [tuple(x.shape) for x in both] == [(2, 5, 3)] * 2 and not torch.equal(both[0], both[1])
    other = list(row_noise(torch.tensor([8]), 1, 2, 5, 3))
    assert all(torch.equal(a[1:], b) for a, b in zip(both, other, strict=True))
    assert not torch.equal(other[0], next(row_noise(torch.tensor([8]), 2, 2, 5, 3)))


def test_measuring_is_plain_perplexity(tmp_path: Path) -> None:
    model = trained(tmp_path, "dcp", {"gamma": 0.7}, params={"rank": 4, "beta": 0.5}).eval()
    for gate in model.gated.gates:
        torch.nn.init.normal_(gate.qk.weight, std=0.4)
    ids = rows()["input_ids"]
    for mode in ("open", "hard"):
        logits = model.gated(ids, mode).logits[:, :-1].flatten(0, 1)
        expected = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
        out = model(input_ids=ids, measure=mode)
        torch.testing.assert_close(out["nll"], expected)
        assert out["nll"].requires_grad is False
    hard = model.gated(ids, "hard").expiry  # [B, L, E, T]
    t = ids.shape[1]
    visible = sum(int(e) > n for seq in hard for layer in seq for e_row in layer for j, e in enumerate(e_row.tolist())
                  for n in range(j + 1, t))  # fmt: skip
    assert 0.05 < float(out["kept"]) < 0.95
    assert float(out["kept"]) == pytest.approx(visible / (hard.shape[0] * hard.shape[1] * t * (t - 1) / 2))
    limit = model(input_ids=ids, measure="soft", knobs=torch.tensor([1e6, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(limit["nll"], out["nll"], rtol=1e-4, atol=1e-3)
    assert float(limit["kept"]) == pytest.approx(float(out["kept"]), abs=1e-4)


def test_dcp_learns_to_drop(tmp_path: Path) -> None:
    model = trained(tmp_path, "dcp", {"gamma": 3.0}, params={"rank": 4, "beta": 4.0})
    optimizer = torch.optim.Adam(model.gated.gates.parameters(), 0.1)
    kept = []
    for _ in range(15):
        out = model(**rows(), knobs=torch.tensor([1.2, 3.0, 0.0, 0.0]))
        optimizer.zero_grad()
        (out["text_loss"] + out["budget"]).backward()
        optimizer.step()
        kept.append(out["kept"].item())
    assert kept[-1] < 0.5 * kept[0]


def test_dms_starts_at_the_teacher_and_reaches_its_target(tmp_path: Path) -> None:
    model = trained(tmp_path, "dms", {"kl_forward": 1.0, "closed": 0.5}, base().eval(), params={"delay": 6})
    optimizer = torch.optim.Adam(model.gated.gates.parameters(), 5e-4)
    for step in range(80):
        batch = rows()
        batch["row_key"] += 2 * step
        out = model(**batch, knobs=torch.tensor([0.0, 0.0, 0.5, 0.0]))
        if step == 0:
            assert out["kl_forward"] < 1e-2 and out["closed"] < 0.1
        optimizer.zero_grad()
        (out["text_loss"] + out["budget"]).backward()
        optimizer.step()
    assert out["closed"] > 0.4
    assert not any(name.startswith("teacher") for name in model.state_dict())


def test_alpha() -> None:
    cosine = [alpha_at(Alpha(), i / 50, 2.0) for i in range(51)]
    assert cosine == sorted(cosine) and cosine[0] == pytest.approx(1.02) and cosine[25] == pytest.approx(4.5)
    assert cosine[50] == 8.0
    band = Alpha.model_validate({"schedule": "band"})
    alphas = [alpha_at(band, i / 50, 4.0) for i in range(51)]
    assert alphas == sorted(alphas) and 1.0 / (alphas[0] - 1.0) == pytest.approx(1.3 * 4.0)
    widths = [1.0 / (a - 1.0) for a in alphas[5:40]]
    ratios = [b / a for a, b in itertools.pairwise(widths)]
    assert max(ratios) == pytest.approx(min(ratios))  # equal time at each scale
    linear = Alpha.model_validate({"schedule": "linear", "start": 2.0, "end": 4.0, "from": 0.5, "until": 1.0})
    assert [alpha_at(linear, p, 1.0) for p in (0.0, 0.5, 0.75, 1.0)] == [2.0, 2.0, 3.0, 4.0]


def test_targets() -> None:
    dms = Objective(compression=8.0, ramp=0.5)
    assert [closed_at(dms, p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 1 - 1 / 4.5, 7 / 8, 7 / 8])
    assert closed_at(Objective(closed=0.6, ramp=1.0), 0.5) == pytest.approx(0.3)
    assert keep_at(Objective(keep=0.2, ramp=0.5), 0.25) == pytest.approx(0.6)
    leaky = Objective(keep=0.2, leak=0.04, alpha=Alpha.model_validate({"schedule": "band", "from": 0.2, "until": 0.6}))
    assert [leak_at(leaky, at) for at in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0.04, 0.04, 0.02, 0.0, 0.0])


def test_the_controller_follows_the_target_and_fixed_gamma_stays() -> None:
    controller = GammaController(Objective(keep=0.2), 400)
    before = controller.gamma
    for _ in range(5):
        controller.update(1.0, 1.0)
    assert controller.gamma > before
    again = GammaController(Objective(keep=0.2), 400)
    again.load(controller.state())
    for kept in [0.0] * 60:
        controller.update(kept, 1.0)
        again.update(kept, 1.0)
    assert controller.gamma < before and controller.state() == again.state()
    for _ in range(2000):
        controller.update(1.0, 1.0)
    assert controller.gamma == GammaController.HIGH
    short, long = GammaController(Objective(keep=0.2), 50), GammaController(Objective(keep=0.2), 500)
    short.update(1.0, 1.0)
    long.update(1.0, 1.0)
    assert short.gamma > long.gamma  # the gain is per run
    fixed = GammaController(Objective(gamma=0.3), 400)
    fixed.update(1.0, 1.0)
    assert fixed.gamma == 0.3


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "trapezoid"])
def test_rates_rise_then_follow_their_schedule(schedule: str) -> None:
    training = Training(steps=100, lengths=32, batch_tokens=32, warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
    rates = [rate_at(training, step) for step in range(101)]
    assert rates[0] == 0.02 and rates[5] == pytest.approx(0.5) and rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-9)
