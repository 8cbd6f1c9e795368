"""ShadowLLM's criteria, regression and measurement against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masked import LAYERS, VOCAB, base
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_prune_training.masked import GatedModel
from vllm_prune_training.shadow.criteria import places, trace, watched
from vllm_prune_training.shadow.measure import attended_at, continuation_nll, masked
from vllm_prune_training.shadow.predictor import fit, scaled_targets, spearman, split
from vllm_prune_training.shadow.weights import into_neurons, weight_scores
from vllm_prune_training.sweep import sweep

from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER

P, T = 7, 15


def model_and_ids(seed: int = 0):
    model = base("llama").eval().requires_grad_(False)
    ids = torch.randint(3, VOCAB, (3, T), generator=torch.Generator().manual_seed(seed))
    return model, ids, torch.ones(3, T)


def loss_of(model, ids) -> torch.Tensor:
    logits = model(ids).logits[:, P - 1 : -1]
    return cross_entropy(logits.flatten(0, 1), ids[:, P:].flatten(), reduction="sum")


def test_gradients_are_of_the_continuation_alone_and_of_each_text_alone():
    """By finite differences: scaling one head's output at one position changes the loss as C . dLoss/dC says."""
    model, ids, weight = model_and_ids()
    model.double()
    with watched(places(model)[0]) as seen:
        model(ids)
    heads = model.config.num_attention_heads
    layer, head, row, step = LAYERS - 1, 1, 2, 3e-3
    size = seen[layer].shape[-1] // heads
    slopes = []
    for at in range(T):
        losses = []
        for sign in (1.0, -1.0):

            def scale(_module, args, at=at, sign=sign):
                x = args[0].clone()
                x[row, at, head * size : (head + 1) * size] *= 1.0 + sign * step
                return (x,)

            hook = places(model)[0][layer].register_forward_pre_hook(scale)
            losses.append(loss_of(model, ids))
            hook.remove()
        slopes.append(float(losses[0] - losses[1]) / (2 * step))
    assert any(abs(slope) > 1e-3 for slope in slopes)
    found = trace(model, ids, weight.double(), P, "all").heads_plainact[row, layer, head]
    assert float(found) == pytest.approx(sum(map(abs, slopes)), rel=1e-2)  # norms are float32
    later = trace(model, ids, weight.double(), P).heads_plainact[row, layer, head]
    assert float(later) == pytest.approx(sum(map(abs, slopes[P:])), rel=1e-2)


def test_what_is_traced():
    model, ids, weight = model_and_ids()
    with watched(places(model)[0]) as out, watched(places(model)[1]) as down, torch.no_grad():
        model(ids)
    found = trace(model, ids, weight, P)
    heads = model.config.num_attention_heads
    torch.testing.assert_close(found.attended, torch.stack([x[:, P - 1] for x in out], 1))
    torch.testing.assert_close(found.leaky, out[0][:, -1])
    torch.testing.assert_close(attended_at(model, ids, P), found.attended[:, 0])
    norms = [x[:, P:].unflatten(-1, (heads, -1)).norm(dim=-1).sum(1) for x in out]
    torch.testing.assert_close(found.heads_l2, torch.stack(norms, 1))
    torch.testing.assert_close(found.neurons_l2, torch.stack([x[:, P:].abs().sum(1) for x in down], 1))
    assert found.neurons_plainact.shape == (3, LAYERS, model.config.intermediate_size)
    alone = trace(model, ids[1:2], weight[1:2], P)
    torch.testing.assert_close(alone.neurons_plainact[0], found.neurons_plainact[1], rtol=1e-4, atol=1e-6)
    zero = weight.clone()
    zero[:, P:] = 0
    assert trace(model, ids, zero, P).heads_plainact.abs().max() == 0, "the prompt's own labels do not count"
    for wrong in (0, T):
        with pytest.raises(ValueError, match="prompt"):
            trace(model, ids, weight, wrong)


def test_the_papers_neuron_criterion_is_autograds():
    """| W * W.grad | of one text at a time, summed over a neuron's rows of gate and up: the naive twin of delta^T x."""
    model, ids, weight = model_and_ids()
    weight[:, P + 2] = 0.3
    found = trace(model, ids, weight, P, "all").neurons_weight
    layers = model.get_decoder().layers
    for row in range(len(ids)):
        want = []
        model.requires_grad_(True).zero_grad()
        each = cross_entropy(model(ids[row : row + 1]).logits[0, P - 1 : -1], ids[row, P:], reduction="none")
        (each * weight[row, P:]).sum().backward()
        for layer in layers:
            rows = (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
            want.append(sum((w.detach() * w.grad).abs().sum(1) for w in rows))
        torch.testing.assert_close(found[row], torch.stack(want), rtol=1e-4, atol=1e-6)
    assert (found > 0).any() and found.shape == (3, LAYERS, model.config.intermediate_size)
    later = trace(model, ids, weight, P).neurons_weight
    assert not torch.allclose(later, found, rtol=1e-2), "prompt positions count in the published form only"


def test_weight_scores_token_by_token():
    g = torch.Generator().manual_seed(0)
    weight, x, delta = (
        torch.randn(5, 4, generator=g),
        torch.randn(2, 7, 4, generator=g),
        torch.randn(2, 7, 5, generator=g),
    )
    for row in range(2):
        slope = sum(torch.outer(d, a) for d, a in zip(delta[row], x[row], strict=True))
        want = torch.tensor([sum(abs(float(w * s)) for w, s in zip(*pair, strict=True)) for pair in zip(weight, slope)])  # noqa: B905
        torch.testing.assert_close(weight_scores(weight, x, delta)[row], want)


def test_mlps_of_another_form_have_no_weight_criterion():
    config = AutoConfig.for_model("phi3", vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert into_neurons(model) == [[], []]
    ids = torch.randint(1, 64, (2, T), generator=torch.Generator().manual_seed(0))
    found = trace(model, ids, torch.ones(2, T), P)
    assert found.neurons_weight.shape == (2, 2, 0) and found.neurons_plainact.shape == (2, 2, 24)


def test_a_model_of_another_make_is_refused():
    with pytest.raises(PruneError, match=r"o_proj, and mlp\.down_proj"):
        places(
            AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=9))
        )


def test_masks_are_what_the_request_form_serves():
    """Zeros after the prompt at the output projection, and expired lanes in the gated model: the same logits."""
    model, ids, _ = model_and_ids()
    kv, heads = model.config.num_key_value_heads, model.config.num_attention_heads
    width = places(model)[0][0].in_features
    section = DropGateConfig(
        method="shadow", params={"query_heads": heads, "width": width, "hidden": 8, "closed": 0.6},
        num_layers=LAYERS, num_kv_heads=kv, hidden_size=model.config.hidden_size,
    )  # fmt: skip
    gates = section.build_gates()
    closed = torch.stack([gates[0].close(row, 1.0) for row in attended_at(model, ids, P)])
    with masked(model, P, ~closed.repeat_interleave(heads // kv, 2), None), torch.no_grad():
        want = model(ids).logits
    plain = continuation_nll(model, ids, P)
    twin = GatedModel(model, gates, section).eval()
    with torch.no_grad():
        found = twin(ids, "hard", prompt=P)
        torch.testing.assert_close(found.logits, want, rtol=1e-4, atol=1e-4)
        assert (found.logits[:, P:] - twin(ids, "open").logits[:, P:]).abs().max() > 1e-3
        torch.testing.assert_close(found.logits[:, :P], twin(ids, "open").logits[:, :P])
        assert torch.equal(found.expiry[:, :, :, 0] == P, closed)
        assert (twin(ids, "hard", strength=0.0, prompt=P).expiry == NEVER).all()
        for index in range(3):  # a text's decision is its own
            torch.testing.assert_close(twin(ids[index], "hard", prompt=P).expiry, found.expiry[index])
    assert plain.shape == (3,) and bool((plain > 0).all())
    for options, said in (({}, "the prompt's end, which is not given"), ({"prompt": 0}, "not given")):
        with pytest.raises(PruneError, match=said):
            twin(ids, "hard", **options)
    with pytest.raises(PruneError, match="no soft form"):
        twin(ids, "soft")


def test_the_request_form_is_calibrated_on_halves():
    """As for other gates of the prompt's end: kept is of the prompt's keys, losses are of what follows."""
    model, ids, _ = model_and_ids()
    kv, heads = model.config.num_key_value_heads, model.config.num_attention_heads
    params = {"query_heads": heads, "width": places(model)[0][0].in_features, "hidden": 8, "closed": 0.5}
    section = DropGateConfig(
        method="shadow", params=params, num_layers=LAYERS, num_kv_heads=kv, hidden_size=model.config.hidden_size
    )
    twin = GatedModel(model, section.build_gates(), section).eval()
    points = sweep(twin, ids[:, :14], [0.0, 1.0, 4.0])
    lanes = LAYERS * kv
    closed = [0, int(0.5 * (LAYERS - 1) * kv + 1e-6), int((1 - 0.5**4) * (LAYERS - 1) * kv + 1e-6)]
    assert [float(point.kept.mean()) for point in points] == pytest.approx([1 - n / lanes for n in closed])
    assert points[0].kl == 0.0 and points[1].kl > 0.0 and points[1].ppl != points[0].ppl


def test_a_later_token_changes_no_decision():
    model, ids, _ = model_and_ids()
    changed = ids.clone()
    changed[:, P:] = 3
    assert torch.equal(attended_at(model, ids, P), attended_at(model, changed, P))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(2, 12))
def test_rank_correlation(seed, n):
    """Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)); with ties, Pearson's of mean ranks."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(1, n, generator=g), torch.rand(1, n, generator=g)
    d = x.argsort().argsort() - y.argsort().argsort()
    assert spearman(x, y) == pytest.approx(1 - 6 * float(d.square().sum()) / (n * (n * n - 1)), abs=1e-9)
    assert spearman(x, x) == pytest.approx(1.0)
    assert spearman(torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]])) == pytest.approx(0.75**0.5)
    assert spearman(torch.ones(1, 3), torch.rand(1, 3)) != spearman(x, x)  # nan


def test_targets_and_split():
    scores = torch.rand(4, 3, 5) * torch.tensor([1.0, 10.0, 0.1])[:, None]
    layer, whole = scaled_targets(scores, "layer"), scaled_targets(scores, "global")
    assert torch.equal(layer.amax(2), torch.ones(4, 3)) and torch.equal(layer.amin(2), torch.zeros(4, 3))
    assert torch.equal(whole.flatten(1).amax(1), torch.ones(4)) and (whole[:, 2].amax(1) < 0.5).all()
    learn, measure = split(50, 0.2, 3)
    assert len(measure) == 10 and sorted([*learn.tolist(), *measure.tolist()]) == list(range(50))
    assert torch.equal(split(50, 0.2, 3)[0], learn) and not torch.equal(split(50, 0.2, 4)[0], learn)


def test_the_regression_learns_and_is_repeatable():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(200, 6, generator=g)
    x[:, 0], x[:, 1] = 0.0, 1.0  # scaling to [0, 1] changes nothing
    y = torch.cat([x[:, 2:4], 1 - x[:, 2:4]], 1)
    options = {"epochs": 80, "batch": 20, "lr": 1e-2, "weight_decay": 0.0}
    one = fit(x, y, 16, split(200, 0.2, 1), **options, seed=5)
    again = fit(x, y, 16, split(200, 0.2, 1), **options, seed=5)
    assert one.rho > 0.8 > 0.4 > one.static and one.loss < 0.02
    assert all(torch.equal(a, b) for a, b in zip(one.predictor.parameters(), again.predictor.parameters(), strict=True))
    with pytest.raises(FloatingPointError):
        fit(x * torch.nan, y, 16, split(200, 0.2, 1), **options, seed=5)
