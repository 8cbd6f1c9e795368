"""The borrowed neuron: moving it is exact, and what is moved is what NVIDIA's order of steps reads and zeroes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_prune.errors import PruneError
from vllm_prune.gates import DMSGate, GateShape
from vllm_prune.gates.borrowed import borrow, without_borrowed

H, G, D, HIDDEN = 2, 3, 8, 48
SIZES: dict[str, Any] = dict(vocab_size=50, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=2,
                             num_attention_heads=H * G, num_key_value_heads=H, head_dim=D)  # fmt: skip
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.get_decoder().layers]


def gates(delay: int = 3) -> list[DMSGate]:
    return [DMSGate(GateShape(HIDDEN, H, 2), delay=delay, form="borrowed") for _ in range(2)]


@pytest.mark.parametrize("kind", list(BASES))
@torch.no_grad()
def test_borrowing_is_reading_before_rope_and_zeroing_before_and_after_it(kind: str) -> None:
    torch.manual_seed(0)
    model = BASES[kind]()
    attention, made = attentions(model)[1], gates()
    if attention.q_proj.bias is not None:
        torch.nn.init.normal_(attention.q_proj.bias)
    x, t = torch.randn(1, 9, HIDDEN), 9
    cos, sin = model.model.rotary_emb(x, torch.arange(t)[None])

    # NVIDIA's steps on the untouched base.
    query = attention.q_proj(x).view(1, t, -1, D).transpose(1, 2)
    logits = query[:, ::G, :, -1].clone() * 100.0 - 5.0
    query[:, ::G, :, -1] = 0
    query, _ = apply_rotary_pos_emb(query, query, cos, sin)
    assert query[:, ::G, 1:, -1].abs().min() > 0  # RoPE brings its partner back: the second zero is needed
    query[:, ::G, :, -1] = 0

    # Ours, on the base without the rows.
    borrow(attentions(model), made, keep=1.0)
    ours = attention.q_proj(x).view(1, t, -1, D).transpose(1, 2)
    ours, _ = apply_rotary_pos_emb(ours, ours, cos, sin)
    assert torch.equal(without_borrowed(ours.transpose(1, 2), H).transpose(1, 2), query)
    torch.testing.assert_close(made[1](x).transpose(1, 2), logits, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_by_default_no_key_is_dropped_at_first_and_the_rest_of_the_base_is_untouched() -> None:
    torch.manual_seed(0)
    model, made = BASES["qwen2"](), gates()
    before = {name: p.clone() for name, p in model.named_parameters()}
    borrow(attentions(model), made)
    assert (made[0](torch.randn(4, HIDDEN)) == -5.0).all()
    rows = [D - 1, G * D + D - 1]
    for name, p in model.named_parameters():
        if ".q_proj." in name:
            assert (p[rows] == 0).all()
            left = [i for i in range(len(p)) if i not in rows]
            assert torch.equal(p[left], before[name][left])
        else:
            assert torch.equal(p, before[name])


def test_zeros_are_where_they_belong_and_let_gradients_through_elsewhere() -> None:
    query = torch.ones(2, 3, H * G, D, requires_grad=True)
    out = without_borrowed(query, H)
    expected = torch.ones(H * G, D)
    expected[[0, G], -1] = 0.0
    assert torch.equal(out, expected.expand(2, 3, -1, -1))
    out.sum().backward()
    assert torch.equal(query.grad, out.detach())  # type: ignore[arg-type]


def test_bases_that_cannot_lend_are_refused_untouched() -> None:
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    before = attentions(qwen3)[0].q_proj.weight.clone()
    with pytest.raises(PruneError, match="norms its queries"):
        borrow(attentions(qwen3), gates())
    assert torch.equal(attentions(qwen3)[0].q_proj.weight, before)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=16))
    with pytest.raises(PruneError, match="no q_proj"):
        borrow([block.attn for block in gpt2.transformer.h], gates())
    with pytest.raises(ValueError, match="borrowed form"):
        borrow(attentions(BASES["llama"]()), [DMSGate(GateShape(HIDDEN, H, 2)) for _ in range(2)])
