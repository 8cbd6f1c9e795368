"""The masked twin of prompt gates: against tokens that are really taken out, and its soft form."""

from __future__ import annotations

import pytest
import torch
from test_masked import HIDDEN, VOCAB
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from vllm_prune_training.masked import GatedModel

from vllm_prune.config import DropGateConfig
from vllm_prune.gates import GATES, NEVER, ACCPromptGate, GateShape, LTPPromptGate
from vllm_prune.gates.prompt import received_naive

LAYERS, T = 4, 40
SIZES = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip
METHODS = ["ltp_prompt", "acc_prompt"]


def base(kind: str = "qwen3") -> PreTrainedModel:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)) if kind == "qwen3" else LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.normal_(std=1.5 / p.shape[1] ** 0.5)  # attention that is not uniform
            elif "q_norm" in name:
                p.fill_(3.0)
    return model.eval()


def gated(method: str, kind: str = "qwen3", visibility: str = "lean", **section: object) -> GatedModel:
    fields = {"method": method, "num_layers": LAYERS, "num_kv_heads": 2, "hidden_size": HIDDEN,
              "protect": {"sinks": 1, "window": 2}, **section}  # fmt: skip
    gates = [GATES[method](GateShape(HIDDEN, 2, LAYERS)).at_layer(layer) for layer in range(LAYERS)]
    for layer, gate in enumerate(gates):
        if isinstance(gate, LTPPromptGate):
            gate.theta.data.fill_(0.35 + 0.1 * layer)
        elif isinstance(gate, ACCPromptGate):
            gate.tune(0.9 - 0.15 * layer, 0.9)
    checked = DropGateConfig.model_validate(fields)
    return GatedModel(base(kind), gates, checked, visibility=visibility).eval()  # type: ignore[arg-type]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(3))


def taken_out(model: GatedModel, ids: torch.Tensor, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of those who are left in the end, and expiries [L, T]: each layer really runs on its survivors only."""
    body = model.model.model
    body.set_attn_implementation("eager")
    hidden, pos = body.embed_tokens(ids)[None], torch.arange(len(ids))
    expiries = []
    found: list[torch.Tensor] = []

    def look(_module: object, query: torch.Tensor, key: torch.Tensor, *_: object) -> None:
        found[:] = [query[0].transpose(0, 1), key[0].transpose(0, 1)]

    for index, layer in enumerate(body.layers):
        expiry = torch.arange(len(ids))
        expiry[pos] = NEVER
        expiries.append(expiry)
        cos, sin = body.rotary_emb(hidden, pos[None])
        n = len(pos)
        causal = torch.full((1, 1, n, n), float("-inf")).triu(1)
        x = layer.input_layernorm(hidden)
        a = layer.self_attn
        q, k = (p(x).view(1, n, -1, 8).transpose(1, 2) for p in (a.q_proj, a.k_proj))
        if hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        hidden = layer(hidden, attention_mask=causal, position_embeddings=(cos, sin))
        hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
        m = int((pos < prompt).sum())
        if index < LAYERS - 1:
            scores = received_naive(q[0].transpose(0, 1)[:m], k[0].transpose(0, 1)[:m], a.scaling)
            left = model.gates[index].survives(scores, pos[:m], prompt, 1.0, model.section.protection)
            left = torch.cat([left, torch.ones(n - m, dtype=torch.bool)])
            pos, hidden = pos[left], hidden[:, left]
    return model.model.lm_head(body.norm(hidden))[0], torch.stack(expiries)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_masking_is_taking_out(method: str, kind: str, ids: torch.Tensor) -> None:
    for prompt in (1, 5, 30, T):
        model = gated(method, kind)
        out = model(ids[0], "hard", prompt=prompt)
        logits, expiry = taken_out(model, ids[0], prompt)
        assert out.expiry is not None
        assert torch.equal(out.expiry[:, 0], expiry)
        left = expiry[-1] == NEVER
        torch.testing.assert_close(out.logits[left], logits, rtol=1e-4, atol=1e-5)
        if prompt > 20:
            gone = (expiry[:, :prompt] != NEVER).float().mean(1)
            assert gone[0] == 0 and (gone[1:] >= gone[:-1]).all() and 0.2 < gone[-1] < 0.95
            assert left[0] and left[prompt - 3 :].all()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_open_is_the_base_and_hard_is_the_limit_of_soft(method: str, ids: torch.Tensor) -> None:
    model = gated(method)
    prompt = torch.tensor([31, 18])
    expected = base()(ids).logits
    torch.testing.assert_close(model(ids, "open").logits, expected, rtol=1e-4, atol=1e-5)
    open_ = model(ids, "hard", strength=0.0, prompt=prompt)
    torch.testing.assert_close(open_.logits, expected, rtol=1e-4, atol=1e-5)
    hard = model(ids, "hard", prompt=prompt)
    assert (hard.logits - expected)[:, 31:].abs().max() > 1e-3
    soft = model(ids, "soft", prompt=prompt, tau=1e-7)
    if method == "acc_prompt":  # a rank among those who are left has no soft form: only its first layer is the same
        return
    for row, p in enumerate(prompt.tolist()):
        torch.testing.assert_close(soft.logits[row, p - 1 :], hard.logits[row, p - 1 :], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.stack(soft.kept), torch.stack(hard.kept), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_rows_and_what_follows_the_prompt_change_no_decision(method: str, ids: torch.Tensor) -> None:
    """Neither the other rows of a batch, nor padding and text behind the prompt."""
    model = gated(method)
    both = model(ids, "hard", prompt=torch.tensor([30, 12]))
    one = model(ids[1], "hard", prompt=12)
    short = model(ids[1, :20], "hard", prompt=12)
    assert both.expiry is not None and one.expiry is not None and short.expiry is not None
    assert torch.equal(both.expiry[1], one.expiry)
    assert torch.equal(one.expiry[..., :20], short.expiry)
    assert (one.expiry[..., 12:] == NEVER).all()
    torch.testing.assert_close(both.logits[1, 11:], one.logits[11:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["hard", "soft"])
@torch.no_grad()
def test_a_token_changes_no_logits_before_it_from_the_prompts_end_on(how: str, ids: torch.Tensor) -> None:
    model = gated("ltp_prompt")
    knobs = {} if how == "hard" else {"tau": 0.2}
    before = model(ids[:1], how, prompt=20, **knobs).logits  # type: ignore[arg-type]
    for m in (20, 25, 39):
        changed = ids[:1].clone()
        changed[0, m] = (ids[0, m] + 1) % VOCAB
        after = model(changed, how, prompt=20, **knobs).logits  # type: ignore[arg-type]
        torch.testing.assert_close(after[:, 19:m], before[:, 19:m], rtol=1e-5, atol=1e-5)
        assert (after[:, m:] - before[:, m:]).abs().max() > 1e-3


def test_gradients_reach_thresholds_and_attention_and_do_not_depend_on_recomputing(ids: torch.Tensor) -> None:
    found = []
    for visibility in ("lean", "naive"):
        model = gated("ltp_prompt", visibility=visibility)
        out = model(ids, "soft", prompt=torch.tensor([30, 22]), tau=0.2)
        (out.logits[:, 30:].square().mean() + torch.stack(out.kept).mean()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    theta = [found[0][f"gates.{layer}.theta"] for layer in range(LAYERS)]
    assert all(float(g) != 0.0 for g in theta[:-1]) and theta[-1] is None  # type: ignore[arg-type]
    assert found[0]["model.model.layers.0.self_attn.q_proj.weight"] is not None
    for name, grad in found[0].items():
        if grad is not None:
            torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-6)


def test_the_prompts_length_must_be_told(ids: torch.Tensor) -> None:
    model = gated("acc_prompt")
    with pytest.raises(ValueError, match="where each prompt ends"):
        model(ids, "hard")
    for wrong in (0, T + 1):
        with pytest.raises(ValueError, match="between 1 and"):
            model(ids, "hard", prompt=wrong)
