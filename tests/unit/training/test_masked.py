"""Gated models in their three modes, on tiny models with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from vllm_prune_training.gate_evaluation import AsCausalLM, final_live, past_pair_kept
from vllm_prune_training.masked import GatedModel, load_gated, past_mean

from vllm_prune.checkpoint import add_gates
from vllm_prune.config import DropGateConfig
from vllm_prune.gates import GATES, NEVER, Gate, GateShape, expiry_mask

LAYERS, HIDDEN, VOCAB = 2, 32, 64
SIZES = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip
PARAMS = {"dcp": {"rank": 4, "beta": 0.7}, "dms": {"delay": 6}}
SHARP = {"dcp": {"alpha": 1e6}, "dms": {"tau": 1e-6}}


def base(kind: str = "qwen3") -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def random_gates(method: str) -> list[Gate]:
    torch.manual_seed(1)
    gates = [GATES[method](GateShape(HIDDEN, 2, LAYERS), **PARAMS[method]) for _ in range(LAYERS)]
    for gate in gates:
        for p in gate.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=0.3 if method == "dcp" else 0.02)
    return gates


def gated(method: str, kind: str = "qwen3", **section: object) -> GatedModel:
    fields = {"method": method, "params": PARAMS[method], "num_layers": LAYERS, "num_kv_heads": 2,
              "hidden_size": HIDDEN, **section}  # fmt: skip
    return GatedModel(base(kind), random_gates(method), DropGateConfig.model_validate(fields)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("method", ["dcp", "dms"])
@torch.no_grad()
def test_open_is_the_base_and_hard_is_the_limit_of_soft(method: str, kind: str, ids: torch.Tensor) -> None:
    model = gated(method, kind)
    expected = base(kind)(ids).logits
    torch.testing.assert_close(model(ids, "open").logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(ids, "hard", strength=0.0).logits, expected, rtol=1e-4, atol=1e-5)
    hard, soft = model(ids, "hard"), model(ids, "soft", **SHARP[method])
    assert hard.expiry is not None and 0.02 < (hard.expiry < NEVER).float().mean() < 0.99
    assert (hard.logits - expected).abs().max() > 1e-3
    torch.testing.assert_close(soft.logits, hard.logits, rtol=1e-4, atol=1e-5)
    kept = past_pair_kept(hard.expiry).mean(dim=(0, 2))
    torch.testing.assert_close(torch.stack(soft.kept).double(), kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dcp", "dms"])
@torch.no_grad()
def test_unbatched_input_is_the_first_row(method: str, ids: torch.Tensor) -> None:
    model = gated(method)
    both, one = model(ids), model(ids[0])
    assert one.expiry is not None and both.expiry is not None
    assert one.expiry.shape == (LAYERS, model.gates[0].num_units, 40)
    assert torch.equal(one.expiry, both.expiry[0])
    torch.testing.assert_close(one.logits, both.logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_strength_and_protection_of_the_section_are_honoured(ids: torch.Tensor) -> None:
    plain = gated("dcp")(ids).expiry
    strong = gated("dcp", strength=4.0)(ids).expiry
    held = gated("dcp", protect={"sinks": 3, "window": 10})(ids).expiry
    assert (strong[:, 0] <= plain[:, 0]).all() and (strong[:, 0] < plain[:, 0]).any()  # type: ignore[index]
    assert (held[..., :3] == NEVER).all()  # type: ignore[index]
    assert (held > torch.arange(40) + 10).all()


@pytest.mark.parametrize("method", ["dcp", "dms"])
def test_every_weight_gets_a_gradient(method: str, ids: torch.Tensor) -> None:
    model = gated(method).train()
    soft = {"alpha": 1.3} if method == "dcp" else {"tau": 1.0}
    out = model(ids, "soft", **soft)
    (out.logits.square().mean() + torch.stack(out.kept).mean()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("method", ["dcp", "dms"])
@torch.no_grad()
def test_a_written_checkpoint_comes_back(method: str, dtype: str, ids: torch.Tensor, tmp_path: Path) -> None:
    base().to(torch.bfloat16).save_pretrained(tmp_path)
    add_gates(tmp_path, random_gates(method), {"params": PARAMS[method], "dtype": dtype})
    model = load_gated(tmp_path)
    assert model.model.dtype == torch.bfloat16
    assert model.gates[0].state_dict().popitem()[1].dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    out = model(ids, "hard")
    assert {x.dtype for x in out.features} == {torch.bfloat16}
    again = [
        gate.expiry(x[0], 1.0, model.section.protection) for gate, x in zip(model.gates, out.features, strict=True)
    ]
    assert torch.equal(torch.stack(again), out.expiry[0])  # type: ignore[index]
    assert (load_gated(tmp_path, strength=0.0)(ids).expiry == NEVER).all()


def test_kept_pairs_are_those_of_the_mask() -> None:
    t = 30
    expiry = torch.randint(1, 40, (3, 2, t), generator=torch.Generator().manual_seed(0)) + torch.arange(t)
    mask = torch.stack([expiry_mask(e) for e in expiry])
    past = torch.ones(t, t, dtype=torch.bool).tril(-1)
    expected = (mask & past).sum((-1, -2)).double() / (t * (t - 1) // 2)
    torch.testing.assert_close(past_pair_kept(expiry), expected)
    torch.testing.assert_close(
        past_mean(mask.float().clamp_min(1e-30).log()).double(), expected.mean(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(final_live(expiry), mask[:, :, -1].double().mean(-1))


@torch.no_grad()
def test_as_causal_lm_adds_up_what_is_kept(ids: torch.Tensor) -> None:
    model = AsCausalLM(gated("dms"), "hard")
    model(input_ids=ids, use_cache=False)
    model(input_ids=ids, use_cache=False)
    assert len(model.kept) == 4 and model.kept[0].shape == (LAYERS,)
