"""Products with chosen rows against dense products, and one token's result against that of a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_prune.compute.sparse import MLPWeights, add_rows, dot_rows, sparse_mlp, sparse_mlp_naive

DTYPES = [torch.bfloat16, torch.float32]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(DTYPES), st.integers(0, 9999), st.integers(1, 40), st.integers(1, 200), st.integers(1, 4),
    st.integers(0, 45),
)  # fmt: skip
def test_rows_are_picked_and_summed(dtype, seed, n, k, tokens, count):
    weight = random(seed, n, k).to(dtype)
    index = torch.randint(0, n, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    x, a = random(seed + 1, tokens, k).to(dtype), random(seed + 2, tokens, count)
    rows = weight.double()[index.long()]
    torch.testing.assert_close(dot_rows(weight, index, x).double(), x.double() @ rows.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(add_rows(weight, index, a).double(), a.double() @ rows, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(DTYPES), st.integers(0, 9999), st.integers(1, 70), st.integers(1, 90), st.integers(1, 5),
       st.floats(0, 1))  # fmt: skip
def test_the_mlp_is_its_twin_and_a_token_does_not_see_the_batch(dtype, seed, neurons, size, tokens, share):
    weights = MLPWeights(
        (random(seed, 2 * neurons, size) / size**0.5).to(dtype), (random(seed + 1, neurons, size) / 4).to(dtype)
    )
    x = random(seed + 2, tokens, size).to(dtype)
    chosen = torch.rand(tokens, neurons, generator=torch.Generator().manual_seed(seed)) < share
    found = sparse_mlp(weights, x, chosen)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, sparse_mlp_naive(weights, x, chosen), rtol=tolerance, atol=tolerance)
    assert found.dtype == dtype
    if dtype is torch.float32:
        for i in range(tokens):  # other neurons' terms are exact zeros, but partial sums are grouped by four
            alone = sparse_mlp(weights, x[i : i + 1], chosen[i : i + 1])
            torch.testing.assert_close(alone[0], found[i], rtol=1e-5, atol=1e-6)


def test_nothing_chosen_says_nothing():
    weights = MLPWeights(random(0, 8, 16), random(1, 4, 16))
    assert (sparse_mlp(weights, random(2, 2, 16), torch.zeros(2, 4, dtype=torch.bool)) == 0).all()


def test_what_the_loops_cannot_read_is_refused():
    index = torch.zeros(1, dtype=torch.int32)
    for weight in (random(0, 4, 4).half(), random(0, 4, 4).T, random(0, 4, 4).double()):
        with pytest.raises(ValueError, match="contiguous"):
            dot_rows(weight, index, random(0, 1, 4))
    with pytest.raises(ValueError, match="int32"):
        add_rows(random(0, 4, 4), index.long(), random(0, 1, 1))
