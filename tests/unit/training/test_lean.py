"""Lean attention against its naive twin: outputs, kept and every gradient; what it refuses; what it keeps in memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_prune_training import lean
from vllm_prune_training.masked import attend, past_mean

from vllm_prune.errors import PruneError
from vllm_prune.gates import DCPGate, DMSGate, Gate, GateShape, RandomGate, WindowGate

H, GROUP, D = 2, 2, 8
SHAPE = GateShape(hidden_size=16, num_kv_heads=H, num_layers=1)
GATES: dict[str, Any] = {
    "dcp": lambda: DCPGate(SHAPE, rank=4, beta=0.5),
    "dcp_kv_head": lambda: DCPGate(SHAPE, rank=8, beta=0.5, scope="kv_head"),
    "dms": lambda: DMSGate(SHAPE, delay=5),
    "dms_own": lambda: DMSGate(SHAPE, delay=5, about="own"),
    "window": lambda: WindowGate(SHAPE, 9),
    "random": lambda: RandomGate(SHAPE, keep=0.5, delay=4).at_layer(0),
}
Tensors = dict[str, torch.Tensor]


def make(name: str, b: int, t: int, dtype: torch.dtype) -> tuple[Gate, Tensors, dict[str, Any]]:
    """A gate, tensors as an attention module hands them over (transposed, not contiguous), and temperatures."""
    gate = GATES[name]()
    wide = 1.5 if name.startswith("dcp") else 3.0
    tensors = {
        "query": torch.randn(b, t, H * GROUP, D).transpose(1, 2),
        "key": torch.randn(b, t, H, D).transpose(1, 2),
        "value": torch.randn(b, t, H, D).transpose(1, 2),
        "features": torch.randn(b, t, gate.num_features) * wide,
    }
    tensors = {key: x.to(dtype).detach().requires_grad_() for key, x in tensors.items()}
    soft = {"alpha": torch.tensor(1.4, dtype=dtype)} if name.startswith("dcp") else {"tau": 0.7}
    return gate.to(dtype), tensors, soft


def naive(gate: Gate, x: Tensors, soft: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    log_v = gate.log_visibility(x["features"], **soft)
    return attend(x["query"], x["key"], x["value"], 0.3, log_v), past_mean(log_v)


def lean_form(gate: Gate, x: Tensors, soft: dict[str, Any], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = gate.soft_inputs(x["features"])
    return lean.lean_attention(x["query"], x["key"], x["value"], inputs, lean.register(gate), 0.3, soft, rows)


def gradients(gate: Gate, x: Tensors, out: torch.Tensor, kept: torch.Tensor) -> Tensors:
    """Of a scalar in which every output counts, with respect to the inputs and the gate's parameters."""
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape).to(out.dtype)
    leaves = {**x, **{f"gate.{name}": p for name, p in gate.named_parameters()}}
    found = torch.autograd.grad((out * weights).sum() + 7.0 * kept, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(GATES)), st.integers(1, 2), st.integers(1, 41), st.integers(1, 19),
    st.sampled_from([torch.float64, torch.float32]), st.integers(0, 1000),
)  # fmt: skip
def test_lean_equals_naive(name: str, b: int, t: int, rows: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    gate, x, soft = make(name, b, t, dtype)
    one, other = naive(gate, x, soft), lean_form(gate, x, soft, rows)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-4}
    for a, c in zip(one, other, strict=True):
        assert a.dtype == c.dtype == dtype and a.shape == c.shape
        torch.testing.assert_close(c, a, **tolerance)
    expected, found = gradients(gate, x, *one), gradients(gate, x, *other)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["dcp", "dcp_kv_head", "dms"])
def test_the_samples_have_gradients_and_middling_visibility(name: str) -> None:
    """Otherwise the property above would compare zeros."""
    torch.manual_seed(0)
    gate, x, soft = make(name, 2, 40, torch.float64)
    out, kept = naive(gate, x, soft)
    assert 0.05 < kept < 0.95
    found = gradients(gate, x, out, kept)
    if name == "dms":  # its parameters act before the features
        found = {key: grad for key, grad in found.items() if not key.startswith("gate.")}
    else:
        assert found.pop("gate.qk.weight").abs().sum() == 0  # acts before the features as well
        assert found["gate.beta"].shape == (() if name == "dcp" else (H,))
    assert all(grad.abs().max() > 1e-3 for grad in found.values())


def test_sums_below_the_floor_are_clamped_but_carried_unclamped() -> None:
    """A key whose sum went under the floor in an earlier block stays there: the carry must not be the clamped value."""
    torch.manual_seed(0)
    gate, x, _ = make("dcp", 1, 40, torch.float64)
    soft = {"alpha": 1.0}
    with torch.no_grad():
        x["features"] -= 3.0
        x["features"][..., :4] += 4.0  # scores of about -3: a nat or more a query
    one, other = naive(gate, x, soft), lean_form(gate, x, soft, 8)
    assert gate.log_visibility(x["features"], **soft).min() == -30.0
    for a, c in zip(one, other, strict=True):
        torch.testing.assert_close(c, a, rtol=1e-9, atol=1e-9)
    expected, found = gradients(gate, x, *one), gradients(gate, x, *other)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-9)


def test_the_operator_keeps_its_promises_to_torch() -> None:
    torch.manual_seed(0)
    gate, x, soft = make("dcp", 2, 11, torch.float64)
    inputs = gate.soft_inputs(x["features"]).detach().requires_grad_()
    args = (x["query"], x["key"], x["value"], inputs, [soft["alpha"]], "alpha", lean.register(gate), 0.3, 4, False)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vllm_prune_training.lean_attention.default, args, test_utils=tests)
    out, total, carries = torch.ops.vllm_prune_training.lean_attention(*args)
    back = (out.detach(), total.detach(), *(y.detach() for y in args[:4]), carries.detach(), *args[4:])  # type: ignore[union-attr]
    backward = torch.ops.vllm_prune_training.lean_attention_backward.default
    torch.library.opcheck(backward, back, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_queries_with_float32_visibility(dtype: torch.dtype) -> None:
    """As under autocast: attention in bfloat16, decisions and softmax in float32."""
    torch.manual_seed(0)
    gate, x, soft = make("dcp", 2, 37, torch.float32)
    wide = naive(gate, x, soft)
    narrow = {key: y.detach().to(dtype).requires_grad_() for key, y in x.items() if key != "features"}
    out, kept = lean_form(gate, {**narrow, "features": x["features"]}, soft, 8)
    assert out.dtype == dtype and kept.dtype == torch.float32
    torch.testing.assert_close(out.float(), wide[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(kept, wide[1])
    grads = torch.autograd.grad(out.float().square().sum() + kept, [*narrow.values(), x["features"]])
    assert [g.dtype for g in grads] == [dtype] * 3 + [torch.float32]
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


def test_a_gate_whose_rows_read_a_parameter_is_refused() -> None:
    """Recomputed rows would give the parameter no gradient."""

    class Forgetful(DMSGate):
        def visibility_rows(self, inputs, start, carry, **soft):  # type: ignore[no-untyped-def]
            log_v, carry = super().visibility_rows(inputs, start, carry, **soft)
            return log_v * self.gate.weight.sum().exp(), carry

    _, x, soft = make("dms", 1, 9, torch.float32)
    gate = Forgetful(SHAPE, delay=2)
    out, _ = lean_form(gate, x, soft, 4)
    with pytest.raises(PruneError, match="soft_inputs"):
        out.sum().backward()


def test_a_gate_that_is_gone_before_the_backward_pass_is_an_error() -> None:
    gate, x, soft = make("dcp", 1, 9, torch.float32)
    out, _ = lean_form(gate, x, soft, 4)
    del gate
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        out.sum().backward()


def test_nothing_of_t_by_t_is_saved_for_the_backward_pass() -> None:
    gate, x, soft = make("dcp", 1, 128, torch.float32)
    sizes: list[int] = []

    def pack(y: torch.Tensor) -> torch.Tensor:
        sizes.append(y.numel())
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        lean_form(gate, x, soft, 16)
        assert 0 < max(sizes) < 128 * 128
        sizes.clear()
        naive(gate, x, soft)
        assert max(sizes) >= 128 * 128  # the measure measures


@pytest.mark.slow
def test_the_compiled_block_is_the_same() -> None:
    torch.manual_seed(0)
    gate, x, soft = make("dcp", 2, 32, torch.float32)  # a piece is compiled once for each of its places
    compiled = torch.compile(lambda x, soft: lean_form(gate, x, soft, 16), dynamic=False)
    one, other = lean_form(gate, x, soft, 16), compiled(x, soft)
    for a, c in zip(one, other, strict=True):
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-5)
    expected, found = gradients(gate, x, *one), gradients(gate, x, *other)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)
