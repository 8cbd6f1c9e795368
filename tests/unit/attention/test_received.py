"""Attention received, tile by tile, against its naive twin."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_prune.attention.received import TILE, attention_received, attention_received_naive


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    chunk=st.one_of(st.integers(1, 40), st.integers(TILE - 2, TILE + 30)),
    past=st.integers(0, 60),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_tiles_equal_one_query_at_a_time(chunk, past, heads, group, seed):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(chunk, heads * group, 32, generator=g)
    keys = [torch.randn(past + chunk, 32, generator=g) for _ in range(heads)]
    found = attention_received(query, keys, 0.4, rank=True, columns=True)
    want = attention_received_naive(query, keys, 0.4)
    torch.testing.assert_close(found.own, want.own, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.columns, want.columns, rtol=1e-4, atol=1e-5)
    assert (found.rank - want.rank).abs().max() <= 1, "equal but for weights within rounding of each other"
    assert ((found.rank - want.rank) != 0).float().mean() < 0.05
    torch.testing.assert_close(found.columns.sum(), torch.tensor(float(chunk)), rtol=1e-4, atol=1e-4)


def test_a_chunk_says_what_the_whole_says():
    g = torch.Generator().manual_seed(1)
    query, keys = torch.randn(90, 4, 32, generator=g), [torch.randn(90, 32, generator=g) for _ in range(2)]
    whole = attention_received(query, keys, 0.2, columns=True)
    parts = [
        attention_received(query[a:b], [k[:b] for k in keys], 0.2, columns=True) for a, b in ((0, 1), (1, 40), (40, 90))
    ]
    torch.testing.assert_close(torch.cat([part.own for part in parts]), whole.own)
    assert torch.equal(torch.cat([part.rank for part in parts]), whole.rank)
    columns = torch.zeros(90)
    for part in parts:
        columns[: len(part.columns)] += part.columns
    torch.testing.assert_close(columns, whole.columns)
