"""The tiled prefill attention against its naive twin, and both against the definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_prune.attention.masked import masked_attention, tiled_attention
from vllm_prune.gates import NEVER


@settings(max_examples=60, deadline=None)
@given(
    chunk=st.integers(1, 300),
    past=st.lists(st.integers(0, 90), min_size=2, max_size=2),
    per_head=st.booleans(),
    shut=st.booleans(),
    group=st.integers(1, 3),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_tiled_equals_naive_and_definition(chunk, past, per_head, shut, group, share, seed):
    g = torch.Generator().manual_seed(seed)
    heads, size, units = 2, 32, 2 if per_head else 1
    lengths = past if per_head else [past[0]] * heads
    start = max(lengths) + 7

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def expiries(n):
        late = torch.randint(start, start + chunk + 5, (units, n), generator=g)
        return torch.where(torch.rand(units, n, generator=g) < share, late, torch.tensor(NEVER)).to(torch.int32)

    query, key, value = rand(chunk, heads * group, size), rand(chunk, heads, size), rand(chunk, heads, size)
    lanes = [(rand(n, size), rand(n, size)) for n in lengths]
    past_expiry, chunk_expiry = expiries(max(lengths)), expiries(chunk)
    own = torch.arange(start, start + chunk, dtype=torch.int32)
    chunk_expiry = torch.maximum(chunk_expiry, own + 1)  # a token always sees itself
    if shut:  # a lane that closed before or within the chunk: later queries see nothing in it, not even themselves
        end = start + int(torch.randint(-5, chunk + 5, (), generator=g))
        past_expiry[-1], chunk_expiry[-1] = end, own.clamp_min(end)
    args = (query, lanes, key, value, past_expiry, chunk_expiry, start, size**-0.5)
    naive = masked_attention(*args)
    each = [[lane] for lane in lanes] if per_head else [lanes]
    shared = [tuple(torch.stack(kind) for kind in zip(*some, strict=True)) for some in each]
    torch.testing.assert_close(tiled_attention(query, shared, *args[2:]), naive, rtol=1e-9, atol=1e-9)
    for i in {0, chunk // 2, chunk - 1}:
        for h in range(heads):
            unit = h if per_head else 0
            see_past = past_expiry[unit, : lengths[h]] > start + i
            see_own = (chunk_expiry[unit] > start + i) & (torch.arange(chunk) <= i)
            k = torch.cat([lanes[h][0][see_past], key[see_own, h]])
            v = torch.cat([lanes[h][1][see_past], value[see_own, h]])
            q = query[i, h * group : (h + 1) * group]
            if not len(k):
                assert (naive[i, h * group : (h + 1) * group] == 0).all()
                continue
            want = (q @ k.T * size**-0.5).softmax(-1) @ v
            torch.testing.assert_close(naive[i, h * group : (h + 1) * group], want, rtol=1e-9, atol=1e-9)
