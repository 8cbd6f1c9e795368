"""The benchmark's fast paths against their naive twins, on tiny random models."""

from __future__ import annotations

import pytest
import torch
from baselines.branches import BranchRunner, Chosen, Dense, GatePolicy, Watcher, after
from baselines.case_file import Case, Question
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3Config
from vllm_prune_training.masked import GatedModel

from vllm_prune.config import DropGateConfig
from vllm_prune.gates import Gate, expiry_mask

LAYERS, KV_HEADS, VOCAB = 2, 2, 64


def tiny(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = Qwen3Config(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
                         num_attention_heads=4, num_key_value_heads=KV_HEADS, head_dim=16,
                         max_position_embeddings=256)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.2 / weight.shape[1] ** 0.5)
    return model


METHODS = {
    "dcp": {"rank": 4, "beta": 1.0},
    "dms": {"delay": 3},
    "window": {"window": 9},
    "random": {"keep": 0.4, "delay": 3, "seed": 5},
}


def gates_of(method: str) -> tuple[list[Gate], DropGateConfig]:
    section = DropGateConfig.model_validate({
        "method": method, "params": METHODS[method], "num_layers": LAYERS, "num_kv_heads": KV_HEADS, "hidden_size": 32,
        "protect": {"sinks": 2},
    })  # fmt: skip
    gates = section.build_gates()
    torch.manual_seed(7)
    for gate in gates:
        for weight in gate.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.3 if method == "dcp" else 0.03)
    return gates, section


def ids(seed: int, n: int) -> list[int]:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def case(seed: int, context: int, lengths: list[int]) -> Case:
    questions = [Question(ids(seed + 1 + i, n), ids(seed + 50 + i, 2)) for i, n in enumerate(lengths)]
    return Case("c", "t", "test", ids(seed, context), questions)


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_branches_are_the_whole_sequences_of_the_masked_model(method: str, strength: float) -> None:
    gates, section = gates_of(method)
    item = case(3, 40, [5, 1, 9])
    gated = GatedModel(tiny(), gates, section)
    wholes = []
    with torch.no_grad():
        for branch, _ in item.branches():
            wholes.append(gated(torch.tensor(item.context + branch), mode="hard", strength=strength))
    runner = BranchRunner(tiny())
    policy = GatePolicy(gates, section, strength)
    cache = runner.context(item.context, policy)
    found = runner.branches(cache, 40, item.padded(), policy)
    dropped = False
    for row, (branch, _), whole in zip(found, item.branches(), wholes, strict=True):
        torch.testing.assert_close(row[: len(branch)], whole.logits[40:], rtol=1e-4, atol=1e-4)
        dropped |= bool((whole.expiry <= 40 + len(branch) - 1).any())
    assert dropped == (strength > 0.0), "gates must have dropped something, unless they are open"
    context = gated(torch.tensor(item.context), mode="hard", strength=strength).expiry
    assert policy.kept() == pytest.approx(float((context > 40).double().mean()))
    assert (policy.kept() < 0.95) == (strength > 0.0)


def test_dense_branches_are_the_plain_model() -> None:
    item = case(11, 30, [4, 7])
    model = tiny(2)
    with torch.no_grad():
        wants = [model(torch.tensor([item.context + branch])).logits[0, 30:] for branch, _ in item.branches()]
    runner = BranchRunner(tiny(2))
    cache = runner.context(item.context, Dense())
    for _ in range(2):  # the context's cache is not used up
        found = runner.branches(cache, 30, item.padded(), Dense())
        for row, (branch, _), want in zip(found, item.branches(), wants, strict=True):
            torch.testing.assert_close(row[: len(branch)], want, rtol=1e-4, atol=1e-4)


def test_the_oracle_keeps_what_the_branch_attends_to() -> None:
    item = case(21, 24, [6, 3])
    model = tiny(4)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wants = []
        for branch, _ in item.branches():
            weights = model(torch.tensor([item.context + branch]), output_attentions=True).attentions
            wants.append([w[0, :, 24:, :24].sum(1).view(KV_HEADS, 2, 24).sum(1) for w in weights])
    runner = BranchRunner(tiny(4))
    cache = runner.context(item.context, Dense())
    watcher = Watcher([len(branch) for branch, _ in item.branches()], 24)
    runner.branches(cache, 24, item.padded(), watcher)
    policy = watcher.best(0.25)
    for b, rows in enumerate(wants):
        for layer, want in enumerate(rows):
            torch.testing.assert_close(watcher.received[layer][b], want, rtol=1e-4, atol=1e-5)
            best = want.topk(6, dim=-1).indices
            assert all(policy.keep[layer][b, h, best[h]].all() for h in range(KV_HEADS))
    assert policy.kept() == pytest.approx(6 / 24)
    everything = runner.branches(cache, 24, item.padded(), watcher.best(1.0))
    dense = runner.branches(cache, 24, item.padded(), Dense())
    torch.testing.assert_close(everything, dense)
    assert not torch.allclose(runner.branches(cache, 24, item.padded(), policy), dense, atol=1e-3)


def test_chosen_keys_are_gone_for_the_whole_branch() -> None:
    keep = torch.zeros(1, KV_HEADS, 5, dtype=torch.bool)
    keep[0, 0, 3] = keep[0, 1, 0] = True
    seen = Chosen([keep]).branch_seen(0, torch.zeros(1, 2, 8))
    assert seen is not None
    assert seen[0].int().tolist() == [
        [[0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1, 1]],
        [[1, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1, 1]],
    ]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000))
def test_after_is_the_last_rows_of_the_expiry_mask(tokens: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = tokens + length
    expiry = torch.arange(total) + 1 + torch.randint(0, total, (3, 2, total), generator=generator)
    for row, found in zip(expiry, after(expiry, tokens), strict=True):
        assert torch.equal(found, expiry_mask(row)[:, tokens:])
