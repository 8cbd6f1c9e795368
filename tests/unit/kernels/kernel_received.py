"""Attention received on Triton against its naive twin, and that against the walk that defines what gates decide by."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE
from vllm_prune_kernels.received import received, received_naive

from vllm_prune.gates import NEVER, BoundaryRule
from vllm_prune.gates.boundary import walk


def rows(c: int, s: int, kv_heads: int, group: int, size: int, seed: int, dtype: torch.dtype = torch.float32):
    """Queries at positions s .. s + c - 1 over keys of the past and their own, some dead, in a random order."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(c, kv_heads * group, size, generator=g).to(dtype)
    key = torch.randn(s + c, kv_heads, size, generator=g).to(dtype)
    position = torch.randperm(s + c, generator=g).int()
    dies = position + 1 + torch.randint(0, s + c, (s + c,), generator=g).int()
    expiry = torch.where(torch.rand(s + c, generator=g) < 0.4, dies, NEVER).int()
    n = torch.arange(s, s + c)[:, None]
    sees = (position <= n) & (n < expiry)
    keys = key.double().repeat_interleave(group, dim=1)
    logits = torch.einsum("chd,shd->chs", query.double(), keys) * 0.3
    lse = logits.masked_fill(~sees[:, None], float("-inf")).logsumexp(-1).float()
    seen = sees.sum(1).float()
    return [x.to(DEVICE) for x in (query, key, lse, position, expiry, seen)], s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("c", "s", "kv_heads", "group", "size", "span"),
    [(1, 0, 1, 1, 32, 0), (1, 70, 2, 2, 64, 0), (32, 33, 2, 1, 64, 20), (45, 60, 1, 4, 96, 0), (7, 100, 2, 3, 128, 5)],
)
def test_the_kernel_is_its_twin(c, s, kv_heads, group, size, span, dtype):
    inputs, start = rows(c, s, kv_heads, group, size, seed=c + s, dtype=dtype)
    found = received(*inputs, start, 0.3, span)
    want = received_naive(*inputs, start, 0.3, span)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)


def test_the_twin_is_what_gates_decide_by():
    """Segment after segment of a sequence in which keys expire: the same mass as the walk's."""
    t, rule, scale = 100, BoundaryRule(grid=16, span=24, after=24, sinks=1, threshold=0.95), 0.4
    g = torch.Generator().manual_seed(1)
    query, key = torch.randn(t, 4, 32, generator=g), torch.randn(t, 2, 32, generator=g)
    expiry, mass = walk(rule, query.transpose(0, 1)[None], key.transpose(0, 1)[None], scale)
    expiry, position = expiry[0, 0].int(), torch.arange(t).int()
    assert 0.1 < (expiry < NEVER).float().mean() < 0.9
    n = torch.arange(t)[:, None]
    sees = (position <= n) & (n < expiry)
    logits = torch.einsum("chd,shd->chs", query, key.repeat_interleave(2, dim=1)) * scale
    lse = logits.masked_fill(~sees[:, None], float("-inf")).logsumexp(-1)
    total = torch.zeros(t, dtype=torch.float64)
    for start in range(0, t, 16):
        part = slice(start, min(start + 16, t))
        total += received_naive(
            query[part], key, lse[part], position, expiry, sees[part].sum(1).float(), start, scale, 24
        )
    torch.testing.assert_close(total, mass[0], rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    inputs, start = rows(2, 5, 2, 1, 32, seed=0)
    with pytest.raises(ValueError, match="multiple"):
        received(inputs[0][:, :1], *inputs[1:], start, 0.3)
