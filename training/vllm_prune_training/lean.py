"""Soft-gated attention without T x T tensors: blocks of query rows, recomputed in the backward pass.

The naive form (``masked.attend`` over ``Gate.log_visibility``) keeps several float32 [B, E, T, T] and [B, H, G, T, T] a
layer for the backward pass. Here a block of R query rows computes its rows of log visibility, its logits, softmax and
output, and is thrown away; the backward pass walks the blocks from last to first and computes each again. What one
layer keeps is its inputs and one carry [B, E, T] a block: T / R times less. A gate whose rows depend on earlier rows
(DCP: running sums of log p) says so by the carry, which chains the blocks and their gradients.

It is one opaque operator to ``torch.compile``: a compiled decoder stays one graph whatever T is, and the block is
compiled by itself, once for all layers, lengths and temperatures.

Dimension letters: B batch, T tokens, R rows of a block, S keys that a block sees (all up to its last row), H KV heads,
G query heads per KV head, D head size, E eviction units of a layer (1 or H), F' numbers of ``Gate.soft_inputs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from vllm_prune.errors import PruneError
from vllm_prune.gates import Gate

ROWS = 256
"""R unless said otherwise."""

_gates: WeakValueDictionary[int, Gate] = WeakValueDictionary()
_checked: WeakSet[Gate] = WeakSet()
_compiled: list[Callable[..., Any]] = []


def register(gate: Gate) -> int:
    """A number that names the gate to the operator, which cannot take objects."""
    _gates[id(gate)] = gate
    return id(gate)


def _gate(number: int) -> Gate:
    gate = _gates.get(number)
    if gate is None:
        raise RuntimeError(
            "the gate of a lean attention call no longer exists; keep the gated model until the backward"
        )
    return gate


def block(
    gate: Gate,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: Tensor,
    carry: Tensor | None,
    scaling: float,
    soft: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of the last R of S tokens.

    Args:
        gate: of the layer.
        query: [B, H * G, R, D]; key, value: [B, H, S, D].
        inputs: [B, S, F'], ``gate.soft_inputs`` of these tokens.
        carry: as ``gate.visibility_rows`` takes it.
        scaling: of the logits.
        soft: temperatures.

    Returns:
        Output [B, H * G, R, D] in the values' dtype, the sum of the visibilities of past pairs (a scalar), the carry.
    """
    b, heads, r, d = query.shape
    h, s = key.shape[1], key.shape[2]
    log_v, carry = gate.visibility_rows(inputs, s - r, carry, **soft)  # [B, E, R, S]
    pos = torch.arange(s, device=query.device)
    row = pos[s - r :, None]
    kept = torch.where(pos < row, log_v.exp(), 0.0).sum()
    bias = log_v.masked_fill(pos > row, float("-inf"))
    grouped = query.reshape(b, h, heads // h * r, d)
    logits = (grouped @ key.transpose(-1, -2)).reshape(b, h, heads // h, r, s)
    logits = logits.to(bias.dtype) * scaling + bias[:, :, None]
    weights = logits.softmax(dim=-1).to(value.dtype).reshape(b, h, heads // h * r, s)
    return (weights @ value).reshape(b, heads, r, d), kept, carry


def _run(compiled: bool) -> Callable[..., Any]:
    """``block``, or its compiled twin: one graph for the first block, and one for all others, free in S."""
    if not compiled:
        return block
    if not _compiled:
        _compiled.append(torch.compile(block))

    def run(
        gate: Gate, query: Tensor, key: Tensor, value: Tensor, inputs: Tensor, carry: Tensor | None, *rest: Any
    ) -> Any:
        if key.shape[2] > query.shape[2]:
            for x, dim in ((key, 2), (value, 2), (inputs, 1), (carry, 2)):
                if x is not None:
                    torch._dynamo.maybe_mark_dynamic(x, dim)
        with torch._dynamo.config.patch(recompile_limit=64):  # gates, batch sizes, with and without gradients
            return _compiled[0](gate, query, key, value, inputs, carry, *rest)

    return run


def _blocks(tokens: int, rows: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every block of rows. The first takes the remainder, so that all others have one shape."""
    start, stop = 0, tokens % rows or min(rows, tokens)
    while start < tokens:
        yield start, stop
        start, stop = stop, stop + rows


def _slices(start: int, stop: int, query: Tensor, key: Tensor, value: Tensor, inputs: Tensor) -> list[Tensor]:
    """What a block reads, as ``_copy``."""
    parts = query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], inputs[:, :stop]
    return [_copy(part) for part in parts]


def _copy(part: Tensor) -> Tensor:
    """Always a copy, always contiguous: it is small, and leaves a compiled block no stride or offset to depend on."""
    return part.detach().clone(memory_format=torch.contiguous_format)


def _soft(words: str, tensors: list[Tensor]) -> dict[str, Any]:
    """Temperatures by name. ``words``: "name=number" with a number given as such, "name" with one of the tensors."""
    left = iter(tensors)
    pairs = (word.partition("=") for word in words.split())
    return {name: float(number) if number else next(left) for name, _, number in pairs}


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: Tensor,
    tensors: list[Tensor],
    words: str,
    gate: int,
    scaling: float,
    rows: int,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H * G, T, D], sum of past visibilities, and the carry that each block but the first starts with."""
    module, run, soft = _gate(gate), _run(compiled), _soft(words, tensors)
    t = query.shape[2]
    out = torch.empty_like(query, dtype=value.dtype, memory_format=torch.contiguous_format)
    total = inputs.new_zeros(())
    carries = inputs.new_zeros(_carry_shape(module, inputs, rows))
    carry: Tensor | None = None
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        for i, (start, stop) in enumerate(_blocks(t, rows)):
            if module.row_carry:
                carry = _copy(carries[i, ..., :stop])
            out[:, :, start:stop], kept, after = run(
                module, *_slices(start, stop, query, key, value, inputs), carry, scaling, soft
            )
            total += kept
            if after is not None and i + 1 < len(carries):
                carries[i + 1, ..., :stop] = after
    return out, total, carries


def _carry_shape(gate: Gate, inputs: Tensor, rows: int) -> tuple[int, ...]:
    b, t, _ = inputs.shape
    return (-(-t // rows), b, gate.num_units, t) if gate.row_carry else (0,)


def _forward_fake(query, key, value, inputs, tensors, words, gate, scaling, rows, compiled):  # type: ignore[no-untyped-def]
    out = torch.empty_like(query, dtype=value.dtype, memory_format=torch.contiguous_format)
    return out, inputs.new_empty(()), inputs.new_empty(_carry_shape(_gate(gate), inputs, rows))


def _backward(
    grad_out: Tensor,
    grad_kept: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: Tensor,
    carries: Tensor,
    tensors: list[Tensor],
    words: str,
    gate: int,
    scaling: float,
    rows: int,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and inputs, summed over the blocks in float32 or better."""
    module, run, soft = _gate(gate), _run(compiled), _soft(words, tensors)
    _check_inputs(module, inputs, soft)
    wide = inputs.dtype
    plain = torch.contiguous_format  # transposed inputs, as attention modules make them, have plain gradients
    d_query = torch.empty_like(query, memory_format=plain)
    d_key, d_value, d_inputs = (torch.zeros_like(x, dtype=wide, memory_format=plain) for x in (key, value, inputs))
    d_carry: Tensor | None = None
    with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
        for i, (start, stop) in reversed(list(enumerate(_blocks(query.shape[2], rows)))):
            leaves = _slices(start, stop, query, key, value, inputs)
            if module.row_carry:
                leaves.append(_copy(carries[i, ..., :stop]))
            leaves = [leaf.requires_grad_() for leaf in leaves]
            q, k, v, x, *before = leaves
            out, kept, after = run(module, q, k, v, x, before[0] if before else None, scaling, soft)
            outputs, grads = [out, kept], [grad_out[:, :, start:stop], grad_kept]
            if after is not None:
                outputs.append(after)
                grads.append(torch.zeros_like(after) if d_carry is None else d_carry[..., :stop])
            # A gate without parameters: what is kept has no gradient, and its inputs are not used.
            pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
            found = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], materialize_grads=True)
            d_query[:, :, start:stop] = found[0]
            d_key[:, :, :stop] += found[1]
            d_value[:, :, :stop] += found[2]
            d_inputs[:, :stop] += found[3]
            if before:
                d_carry = found[4]
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_inputs


def _check_inputs(gate: Gate, inputs: Tensor, soft: dict[str, Any]) -> None:
    """Refuse a gate whose rows read a parameter directly: recomputed here, its gradient would be lost without a word."""
    if gate in _checked:
        return
    carry = inputs.new_zeros(inputs.shape[0], gate.num_units, 1) if gate.row_carry else None
    with torch.enable_grad():
        log_v, _ = gate.visibility_rows(inputs[:, :1].detach(), 0, carry, **soft)
    if log_v.requires_grad:
        raise PruneError(
            f"visibility_rows of {type(gate).__name__} reads a parameter of the gate, which would get no gradient.",
            "Hand the parameter through soft_inputs, or train with visibility='naive'.",
        )
    _checked.add(gate)


def _backward_fake(grad_out, grad_kept, query, key, value, inputs, *rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, inputs))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, x, tensors, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, x, output[2], *tensors)


def _gradient(ctx: Any, grad_out: Tensor, grad_kept: Tensor, _: Tensor) -> tuple[Any, ...]:
    query, key, value, inputs, carries, *tensors = ctx.saved_tensors
    found = _ops.lean_attention_backward(grad_out, grad_kept, query, key, value, inputs, carries, tensors, *ctx.rest)
    return (*found, [None] * len(tensors), *[None] * len(ctx.rest))


# Not ``torch.library.custom_op``: it runs its function below autograd and hides it from torch.compile; ours needs both.
_library = torch.library.Library("vllm_prune_training", "FRAGMENT")
for _name, _function, _fake in (
    ("lean_attention", _forward, _forward_fake),
    ("lean_attention_backward", _backward, _backward_fake),
):
    _library.define(_name + torch.library.infer_schema(_function, mutates_args=()))
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_prune_training::{_name}", _fake, lib=_library)
torch.library.register_autograd("vllm_prune_training::lean_attention", _gradient, setup_context=_setup, lib=_library)
_ops = torch.ops.vllm_prune_training


def lean_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: Tensor,
    gate: int,
    scaling: float,
    soft: dict[str, Any],
    rows: int = ROWS,
) -> tuple[Tensor, Tensor]:
    """Causal grouped-query attention under a gate's soft visibility, differentiable in its four tensors.

    Args:
        query: [B, H * G, T, D]; key, value: [B, H, T, D], all of one dtype.
        inputs: float32 or float64 [B, T, F'], ``Gate.soft_inputs`` of the tokens' features.
        gate: from ``register``; it must live until the backward pass is done.
        scaling: of the logits.
        soft: the gate's temperatures; 0-dim tensors, so that a compiled block serves them all, or numbers.
        rows: R.

    Returns:
        [B, T, H * G, D], and the mean visibility of past pairs (j < n), a scalar in the inputs' dtype.
    """
    words = " ".join(name if isinstance(x, Tensor) else f"{name}={x!r}" for name, x in soft.items())
    tensors = [x for x in soft.values() if isinstance(x, Tensor)]
    compiled = torch.compiler.is_compiling()
    out, total, _ = _ops.lean_attention(query, key, value, inputs, tensors, words, gate, scaling, rows, compiled)
    b, t, _ = inputs.shape
    return out.transpose(1, 2), total / max(1, b * _gate(gate).num_units * (t * (t - 1) // 2))
