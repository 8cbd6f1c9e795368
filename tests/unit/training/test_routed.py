"""Routing in the trainer: the differentiable twin against a naive one, FTP's losses, the schedule search."""

from __future__ import annotations

import math
import random

import pytest
import torch
from test_masked import VOCAB, base
from vllm_prune_training.ftp import RouterPass, guide_at, random_decisions, row_scales, static_decisions, tau_at
from vllm_prune_training.ftp_search import HIGHEST, search
from vllm_prune_training.masked import GatedModel
from vllm_prune_training.recipe_ftp import FTPObjective, FTPSearch
from vllm_prune_training.routed import Routes, bypass, routed_attention

from vllm_prune.attention.received import attention_received_naive
from vllm_prune.config import DropGateConfig
from vllm_prune.gates import FTPGate, GateShape
from vllm_prune.gates.ftp import share_router


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """One row at a time over the keys that are there: [T, H * G, D] of one sequence, q [H * G, T, D]."""
    heads, t, _ = q.shape
    group = heads // k.shape[0]
    out = torch.zeros(t, heads, q.shape[2])
    for n in range(t):
        there = [j for j in range(n) if gate[j] > 0] + [n]
        for h in range(heads):
            weights = (k[h // group, there] @ q[h, n] * 0.3).softmax(0)
            out[n, h] = weights @ v[h // group, there]
    return out


@pytest.mark.parametrize("grad", [False, True])
def test_attention_over_the_keys_that_are_there(grad):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    gate = (torch.rand(1, 20) > 0.5).float().requires_grad_(grad)
    out, weights, live = routed_attention(q, k, v, 0.3, gate)
    torch.testing.assert_close(out[0], naive(q[0], k[0], v[0], gate[0]), rtol=1e-4, atol=1e-5)
    hard = gate.detach()
    assert live[0].tolist() == [int(hard[0, :n].sum()) + 1 for n in range(20)]
    routes = Routes.start(1, 20, torch.device("cpu"))
    routes.update(weights, live, torch.ones(1, 20, dtype=torch.bool))
    whole, _, _ = routed_attention(q, k, v, 0.3, None)
    torch.testing.assert_close(whole, routed_attention(q, k, v, 0.3, torch.ones(1, 20))[0])
    if grad:
        (found,) = torch.autograd.grad(out.square().sum(), gate)
        assert torch.isfinite(found).all() and (found[hard == 0] != 0).any(), "hidden keys have gradients"


def test_facts_are_those_of_the_server():
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    _, weights, live = routed_attention(q, k, v, 0.3, None)
    routes = Routes.start(1, 30, torch.device("cpu"))
    routes.update(weights, live, torch.ones(1, 30, dtype=torch.bool))
    served = attention_received_naive(q[0].transpose(0, 1), list(k[0]), 0.3)
    count = torch.arange(1, 31).float()
    torch.testing.assert_close(routes.facts[0, :, 1], served.own * count, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routes.facts[0, :, 2], served.rank / count)
    before = routes.facts
    routes.update(weights.roll(1, -1), live, torch.zeros(1, 30, dtype=torch.bool))
    assert torch.equal(routes.facts, before), "a skipped token keeps its facts"


def test_bypass_is_exact_without_gradients_and_differentiable_with():
    x, ran = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    gate = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    assert torch.equal(bypass(x, ran, gate), torch.where(gate[..., None] > 0, ran, x))
    gate.requires_grad_()
    (grad,) = torch.autograd.grad(bypass(x, ran, gate).sum(), gate)
    torch.testing.assert_close(grad, (ran - x).sum(-1))


def model(sparsity: float = 0.5) -> GatedModel:
    torch.manual_seed(3)
    network = base("llama")
    layers, hidden = network.config.num_hidden_layers, network.config.hidden_size
    gates = [FTPGate(GateShape(hidden, 2, layers)) for _ in range(layers)]
    share_router(gates)
    for gate in gates[1:]:
        gate.sparsity.fill_(sparsity)
    section = DropGateConfig(method="ftp", num_layers=layers, num_kv_heads=2, hidden_size=hidden)
    return GatedModel(network.requires_grad_(False), gates, section)


def test_the_losses_reach_the_router_and_say_what_they_should():
    gated = model()
    ids = torch.randint(0, VOCAB, (2, 24))
    made = RouterPass(list(gated.gates), torch.tensor([1.0, 1.6]), 0.5, None)
    out = gated(ids, "soft", collect=False, decide=made)
    assert len(made.runs) == len(gated.gates) - 1 and len(out.runs) == len(gated.gates)
    skipped = made.skipped()
    want = (torch.tensor([0.5, 0.8]) - skipped).clamp_min(0).sum(0).mean()
    torch.testing.assert_close(made.sparsity_loss(), want)
    loss = out.logits.float().logsumexp(-1).mean() + made.sparsity_loss() + made.guide_loss()
    grads = torch.autograd.grad(loss, list(gated.gates[0].router.parameters()))  # type: ignore[union-attr]
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


@torch.no_grad()
def test_given_decisions_are_what_runs():
    gated = model()
    ids = torch.randint(0, VOCAB, (2, 20))
    schedule = [0.0] + [0.5] * (len(gated.gates) - 1)
    static = gated(ids, "hard", decide=static_decisions(schedule))
    assert static.runs[0].all() and static.runs[1][0].tolist() == [1.0] + [0.0] * 10 + [1.0] * 9
    chance = gated(ids, "hard", decide=random_decisions(schedule, 1))
    assert chance.runs[1].sum(-1).tolist() == [10.0, 10.0]
    assert not torch.equal(chance.runs[1][0], chance.runs[1][1])
    dense = gated(ids, "open").logits
    torch.testing.assert_close(gated(ids, "hard", strength=0.0).logits, dense)
    assert (static.logits - dense).abs().max() > 1e-3


def test_schedules_of_the_run():
    options = FTPObjective(sparsity=0.2)
    assert tau_at(options, 0.0) == 1.0 and tau_at(options, 1.0) == pytest.approx(0.1)
    assert [guide_at(options, x) for x in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.5, 0.0, 0.0]
    keys = torch.arange(100)
    scales = row_scales(keys, 1, 0.25, 1.5)
    assert torch.equal(scales[40:60], row_scales(keys[40:60], 1, 0.25, 1.5)), "a row's scale is its own"
    assert scales.min() >= 0.25 and scales.max() <= 1.5 and scales.std() > 0.2


def test_search_finds_the_better_plan_keeps_the_mean_and_leaves_the_generator_alone():
    value = [0.0, 0.05, 0.4, 0.1, 0.45, 0.2]
    start = [0.0] + [0.24] * 5

    def cost(plan):
        return math.dist(plan, value)

    state = random.getstate()
    options = FTPSearch(population=24, elite=4)
    plan, history = search(start, cost, options, 20, seed=1)
    assert random.getstate() == state
    assert history == sorted(history, reverse=True) and history[-1] < 0.3 * history[0]
    assert sum(plan) == pytest.approx(sum(start), abs=1e-4) and plan[0] == 0.0
    assert all(0.0 <= share <= HIGHEST for share in plan)
    assert search(start, cost, options, 20, seed=1) == (plan, history)
    assert search(start, cost, options, 0, seed=1) == (start, [cost(start)])
