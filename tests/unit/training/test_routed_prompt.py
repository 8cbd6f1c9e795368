"""FTP's prompt mode in the trainer: against layers that are really run on their tokens only, and its losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_masked import HIDDEN, VOCAB
from test_prompt_pass import LAYERS, T, base
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from vllm_prune_training.ftp import RouterPass, random_decisions, static_decisions
from vllm_prune_training.ftp_search import Rows, kl_cost
from vllm_prune_training.masked import GatedModel

from vllm_prune.config import DropGateConfig
from vllm_prune.gates import NEVER, FTPGate, GateShape
from vllm_prune.gates.ftp import share_router, static_keep
from vllm_prune.gates.prompt import larger_share_naive, received_naive

SCHEDULE = (0.8, 0.3, 0.6)
"""Of the blocks after the first, different: a skipped token's facts stand still, so an equal requirement skips it again."""


def gated(kind: str = "qwen3", kv: str = "skip", **protect: int) -> GatedModel:
    params = {"form": "prompt", "kv": kv}
    section = DropGateConfig.model_validate({
        "method": "ftp", "params": params, "num_layers": LAYERS, "num_kv_heads": 2, "hidden_size": HIDDEN,
        "protect": {"sinks": 1, "window": 2, **protect},
    })  # fmt: skip
    torch.manual_seed(5)
    gates = [FTPGate(GateShape(HIDDEN, 2, LAYERS), **params) for _ in range(LAYERS)]
    for gate, wanted in zip(gates[1:], SCHEDULE, strict=True):
        gate.sparsity.fill_(wanted)
    share_router(gates)
    with torch.no_grad():
        for weight in gates[0].router.parameters():
            weight.normal_(std=2.0 if weight.ndim == 2 else 0.5)
        facts = torch.stack([torch.rand(500) * T, (torch.randn(500) / 3).exp(), torch.rand(500)], dim=-1)
        run, skip = gates[0].logits(facts, torch.tensor(0.6)).unbind(-1)
        gates[0].router[2].bias[0] += (skip - run).median()  # type: ignore[index,operator]
    return GatedModel(base(kind).requires_grad_(False), gates, section).eval()


def really_run(model: GatedModel, ids: torch.Tensor, prompt: int) -> tuple[torch.Tensor, list[torch.Tensor], list[Any]]:
    """Logits [T, V], who ran [T] and facts [T, 3] a layer: each layer on its own tokens, facts by their definition."""
    body: Any = model.model.model
    body.set_attn_implementation("eager")
    hidden, t = body.embed_tokens(ids)[None], len(ids)
    facts = torch.zeros(t, 3)
    facts[:, 0] = torch.arange(t)
    runs, seen = [], []
    keeps = model.gates[0].keeps_kv
    for gate, layer in zip(model.gates, body.layers, strict=True):
        ran = gate.runs_on(facts, 1.0, model.section.protection, prompt)  # type: ignore[operator,union-attr]
        runs.append(ran)
        seen.append(facts.clone())
        there = torch.ones_like(ran) if keeps else ran  # tokens whose keys are there
        pos = there.nonzero()[:, 0]
        cos, sin = body.rotary_emb(hidden, pos[None])
        n = len(pos)
        x = layer.input_layernorm(hidden[:, pos])
        a = layer.self_attn
        q, k = (p(x).view(1, n, -1, 8).transpose(1, 2) for p in (a.q_proj, a.k_proj))
        if hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        causal = torch.full((1, 1, n, n), float("-inf")).triu(1)
        out = layer(hidden[:, pos], attention_mask=causal, position_embeddings=(cos, sin))
        out = out if isinstance(out, torch.Tensor) else out[0]
        hidden = hidden.clone()
        hidden[:, ran] = out[:, ran[pos]]
        m = int((pos < prompt).sum())
        own = ran[pos[:m]].nonzero()[:, 0]
        score = received_naive(q[0].transpose(0, 1)[:m][own], k[0].transpose(0, 1)[:m], a.scaling, own)
        facts[pos[own], 1] = score
        facts[pos[own], 2] = larger_share_naive(score, torch.ones(len(score), dtype=torch.bool))
    return model.model.lm_head(body.norm(hidden))[0], runs, seen  # type: ignore[operator]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kv", ["skip", "keep"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@torch.no_grad()
def test_the_twin_is_layers_that_run_on_their_tokens(kind: str, kv: str, ids: torch.Tensor) -> None:
    model = gated(kind, kv)
    for prompt in (1, 5, 30, T):
        out = model(ids[0], "hard", prompt=prompt)
        found = [facts[0] for facts in out.features]
        logits, runs, seen = really_run(model, ids[0], prompt)
        model.model.set_attn_implementation("vllm_prune_masked")
        assert out.expiry is not None
        ran = torch.stack(out.runs) > 0
        assert torch.equal(ran, torch.stack(runs))
        skipped = torch.full_like(ran, False) if kv == "keep" else ~ran
        assert torch.equal(out.expiry[:, 0] != NEVER, skipped)
        torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
        for layer in range(1, LAYERS):  # what follows the prompt has facts in neither, and nobody asks
            torch.testing.assert_close(
                found[layer][: prompt - 1, 1:], seen[layer][: prompt - 1, 1:], rtol=1e-4, atol=1e-5
            )
        assert ran[:, prompt - 3 if prompt > 2 else 0 :].all() and ran[0].all()
        want = ran[:, :prompt].float().mean(-1)
        kept = torch.ones(LAYERS) if kv == "keep" else want
        torch.testing.assert_close(torch.stack(out.kept), kept)
        if prompt > 20:
            assert 0.2 < want[1:].mean() < 0.9
            assert (ran[2:, :prompt] & ~ran[1:-1, :prompt]).any(), "no cascade: a skipped token may run again"


@torch.no_grad()
def test_rows_and_what_follows_the_prompt_change_no_decision(ids: torch.Tensor) -> None:
    model = gated()
    both = model(ids, "hard", prompt=torch.tensor([30, 12]))
    one, short = model(ids[1], "hard", prompt=12), model(ids[1, :20], "hard", prompt=12)
    other = model(torch.cat([ids[1, :12], ids[0, 12:]]), "hard", prompt=12)
    assert both.expiry is not None and one.expiry is not None and short.expiry is not None and other.expiry is not None
    assert torch.equal(both.expiry[1], one.expiry) and torch.equal(one.expiry[..., :20], short.expiry)
    assert torch.equal(other.expiry, one.expiry) and (one.expiry[..., 11:] == NEVER).all()
    torch.testing.assert_close(both.logits[1, 11:], one.logits[11:], rtol=1e-4, atol=1e-5)
    dense = model(ids, "open").logits
    torch.testing.assert_close(model(ids, "hard", strength=0.0, prompt=20).logits, dense)
    with pytest.raises(ValueError, match="where each prompt ends"):
        model(ids, "hard")


def test_losses_are_about_the_prompts_tokens(ids: torch.Tensor) -> None:
    model, prompt = gated(sinks=0, window=0), torch.tensor([30, 18])
    made = RouterPass(list(model.gates), torch.tensor([1.0, 1.1]), 0.5, None)
    out = model(ids, "soft", collect=False, prompt=prompt, decide=made)
    runs = torch.stack(out.runs[1:])
    skipped = torch.stack([1.0 - runs[:, i, :p].mean(-1) for i, p in enumerate(prompt.tolist())], dim=1)
    torch.testing.assert_close(made.skipped(), skipped)
    torch.testing.assert_close(made.skipped_everywhere(), skipped.sum(0).mean() / LAYERS)
    wanted = torch.tensor(SCHEDULE)[:, None] * torch.tensor([1.0, 1.1])
    torch.testing.assert_close(made.sparsity_loss(), (wanted - skipped).clamp_min(0).sum(0).mean())
    guide = []
    for i, p in enumerate(prompt.tolist()):
        assert runs[:, i, p - 1 :].all()
        logits = torch.stack([x[i, :p] for x in made._logits])
        static = static_keep(p, wanted[:, i]).float()
        guide.append(torch.nn.functional.binary_cross_entropy_with_logits(logits, static))
    torch.testing.assert_close(made.guide_loss(), torch.stack(guide).mean())
    loss = out.logits[:, 30:].float().logsumexp(-1).mean() + made.sparsity_loss()
    grads = torch.autograd.grad(loss, list(model.gates[0].router.parameters()))  # type: ignore[union-attr]
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


@torch.no_grad()
def test_static_and_random_routers_and_the_search_work_on_the_prompt(ids: torch.Tensor) -> None:
    model, prompt = gated(sinks=0, window=0), torch.tensor([30, 18])
    schedule = [0.0] + [0.5] * (LAYERS - 1)
    for decide in (static_decisions(schedule), random_decisions(schedule, 1)):
        out = model(ids, "hard", prompt=prompt, decide=decide)
        for run in out.runs[1:]:
            assert [run[i, :p].sum().item() for i, p in enumerate(prompt.tolist())] == [15, 9]
            assert all(run[i, p - 1 :].all() for i, p in enumerate(prompt.tolist()))
    cost = kl_cost(model, Rows(ids, prompt), trained=False)
    p = [model(row, "open").logits[n - 1 : -1].log_softmax(-1) for row, n in zip(ids, prompt.tolist(), strict=True)]
    q = [
        model(row, "hard", prompt=n, decide=static_decisions(schedule)).logits[n - 1 : -1].log_softmax(-1)
        for row, n in zip(ids, prompt.tolist(), strict=True)
    ]
    want = sum(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in zip(p, q, strict=True)) / 2
    assert want > 1e-3 and cost(schedule) == pytest.approx(want, rel=1e-4) and abs(cost([0.0] * LAYERS)) < 1e-6
