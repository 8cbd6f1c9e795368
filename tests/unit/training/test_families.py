"""Gates on every supported family, and the attention that is refused by name before a weight is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from vllm_prune_training.families import (
    attention_modules,
    check_config,
    gate_shape,
    probe,
    same_attention,
    unsupported,
    without_dropout,
)
from vllm_prune_training.masked import GatedModel

from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import GATES

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": SIZES,
    "qwen3": SIZES,
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": None},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
PARAMS = {"dcp": {"rank": 4, "beta": 0.5}, "dms": {"delay": 3}}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    check_config(config, family)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "wte" not in name:
                weight.normal_(std=weight.shape[0] ** -0.5)  # so that attention matters
    without_dropout(model)
    return model


def gated(model: PreTrainedModel, method: str, **kwargs: Any) -> GatedModel:
    shape = gate_shape(model.config)
    section = DropGateConfig(method=method, params=PARAMS[method], num_layers=shape.num_layers,
                             num_kv_heads=shape.num_kv_heads, hidden_size=shape.hidden_size)  # fmt: skip
    torch.manual_seed(1)
    gates = [GATES[method](shape, **PARAMS[method]) for _ in range(shape.num_layers)]
    for gate in gates:
        for p in gate.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=0.3 if method == "dcp" else 0.03)
    return GatedModel(model, gates, section, **kwargs)


@pytest.mark.parametrize("method", ["dcp", "dms"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gates_train_on_every_family(family: str, method: str) -> None:
    model = model_of(family)
    assert len(attention_modules(model)) == 2
    before = probe(model)
    whole = gated(model, method)
    same_attention(before, probe(model), family)
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(2))
    opened, hard = whole(ids, "open").logits, whole(ids, "hard")
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, opened)
    assert not torch.allclose(hard.logits, opened, atol=1e-2)  # the mask reached the attention
    soft = whole(ids, "soft", **({"alpha": torch.tensor(1e6)} if method == "dcp" else {"tau": 1e-6}))
    torch.testing.assert_close(soft.logits, hard.logits, rtol=1e-3, atol=1e-4)
    out = whole(ids, "soft", **({"alpha": torch.tensor(1.5)} if method == "dcp" else {"tau": 1.0}))
    (out.logits.logsumexp(-1).mean() + torch.stack(out.kept).mean()).backward()
    for gate in whole.gates:
        grads = [p.grad for p in gate.parameters()]
        assert all(g is not None and bool(g.isfinite().all()) and float(g.abs().max()) > 0.0 for g in grads)


REFUSED = {
    ("mistral", "sliding_window"): ({**SIZES, "sliding_window": 16}, "a sliding window"),
    ("gemma3_text", "sliding layers"): (SIZES, r"layers of other kinds \(sliding_attention\)"),
    ("qwen3_next", "linear"): (SIZES, r"layers of other kinds \(linear_attention\)"),
    ("deepseek_v3", "mla"): ({"num_hidden_layers": 2}, "multi-head latent attention"),
    ("mamba", "ssm"): ({}, "linear_attention"),
    ("bloom", "alibi"): ({}, "ALiBi positions"),
    ("t5", "encoder-decoder"): ({}, "an encoder-decoder"),
    ("gpt_neo", "local"): ({}, "local attention"),
    ("llava", "multimodal"): ({}, "a multimodal model"),
    ("clip", "no language model"): ({}, "a multimodal model"),
    ("vit", "no language model"): ({}, "no causal language model"),
}


@pytest.mark.parametrize("key", REFUSED, ids=lambda key: f"{key[0]}-{key[1]}")
def test_other_attention_is_refused_by_name(key: tuple[str, str]) -> None:
    fields, said = REFUSED[key]
    config = AutoConfig.for_model(key[0], **fields)
    with pytest.raises(PruneError, match=said):
        check_config(config, key[0])


def test_a_window_that_is_switched_off_is_none() -> None:
    assert unsupported(AutoConfig.for_model("qwen2", **SIZES, sliding_window=16, use_sliding_window=False)) is None


def test_attention_that_is_more_than_softmax_is_found_out() -> None:
    sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1,
             "layer_types": ["full_attention", "full_attention"]}  # fmt: skip
    config = AutoConfig.for_model("gpt_oss", **sizes)  # attention sinks, which the interface does not carry
    check_config(config, "gpt_oss")
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, 3.0)
        torch.nn.init.normal_(layer.self_attn.o_proj.weight)
    before = probe(model)
    gated(model, "dcp")
    with pytest.raises(PruneError, match="more than softmax over keys"):
        same_attention(before, probe(model), "GptOss")
