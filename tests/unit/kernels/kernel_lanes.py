"""Lanes on the device: steps of random requests by kernels and by their twins end with the same lanes, pages and reports."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE, Pool, random_inputs, random_steps, sizes
from vllm_prune_kernels.lanes import INTERPRETED
from vllm_prune_kernels.narrow import FP8, narrow, narrow_naive
from vllm_prune_kernels.single import LISTED

SHAPES = {
    "dcp": ("dcp", {"gate_rank": 8}),
    "dcp-heads": ("dcp", {"gate_rank": 16, "units": 2}),
    "dms": ("dms", {"units": 2}),
    "dms-own": ("dms_own", {"units": 2}),
    "random": ("random", {"units": 2, "heads": 2, "layers": 1}),
    "window": ("random", {"heads": 3, "head_size": 24}),
}


FULL = os.environ.get("VLLM_PRUNE_FULL") == "1" or torch.cuda.is_available()


@pytest.mark.parametrize(("shape", "dtype"), [
    *((shape, torch.float32) for shape in (SHAPES if FULL else ["dcp", "dms", "dms-own", "window"])),
    *((shape, torch.bfloat16) for shape in (SHAPES if FULL else ["dcp-heads"])),
    *((shape, FP8) for shape in (SHAPES if FULL else ["dcp", "dms"])),
])  # fmt: skip
def test_steps(shape, dtype):
    method, given = SHAPES[shape]
    model, cells = (torch.bfloat16, 2) if dtype == FP8 else (dtype, 1)
    s = sizes(**{**given, "gate_rank": cells * given.get("gate_rank", 0)})
    pools = [Pool(s, fast, method, dtype) for fast in (True, False)]
    g = torch.Generator().manual_seed(len(shape))
    seen = {"returned": 0, "dropped": 0, "single": 0}
    for number, (ended, step) in enumerate(random_steps(s, seed=7, steps=18)):
        inputs = [random_inputs(s, sum(step.values()), method, g, model, cells) for _ in range(s.layers)]
        said = []
        for pool in pools:
            pool.begin(ended, step)
            rows = pool.rows(step)
            for layer in range(s.layers):
                pool.layer(layer, rows, step, inputs[layer])
            said.append(pool.end(step, ahead=number % 3, keep_all=number % 5 == 4))
            pool.check()
        torch.testing.assert_close(said[0], said[1], rtol=0, atol=0)
        assert pools[0].contents() == pools[1].contents()
        seen["single"] = pools[0].singles
        seen["returned"] += int((said[0][:, 9] - said[0][:, 8]).sum())
        seen["dropped"] = max(seen["dropped"], int(said[0][:, 7].max()))
    assert seen["returned"] > 3 and seen["dropped"] > 20 and seen["single"] > 3, (
        f"steps must drop and give back: {seen}"
    )


@triton.jit
def _all(x, out, by, n: tl.constexpr, INTERPRETED: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, narrow(tl.load(x + i), out.dtype.element_ty, by, INTERPRETED))


def test_narrow():
    """To the nearest, ties to even, held to what FP8 can say: every number of the type, what lies between, and beyond."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = numbers[numbers.isfinite()].sort().values
    beyond = [1e5, -1e5, 470.0, *([float("nan")] if DEVICE == "cuda" else [])]  # the interpreter makes it 384
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, between, between * (1 + 1e-6), between * (1 - 1e-6), torch.tensor(beyond)])
    x = torch.nn.functional.pad(x, (0, 1024 - len(x))).to(DEVICE)
    for dtype, by in ((FP8, 1.0), (FP8, 2.5), (torch.float32, 2.5)):
        out = torch.zeros(1024, dtype=dtype, device=DEVICE)
        _all[(1,)](x, out, by, n=1024, INTERPRETED=INTERPRETED)
        torch.testing.assert_close(out.float(), narrow_naive(x, dtype, by).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", ["dcp", "dcp-heads"])
def test_many_die_at_once(shape):
    """More than a step of single tokens lists: the lane is searched, with the same result."""
    method, given = SHAPES[shape]
    s = sizes(**{**given, "width": 16, "layers": 1})
    pools = [Pool(s, fast, method, torch.float32) for fast in (True, False)]
    g = torch.Generator().manual_seed(3)
    for tokens, bias in ((200, 50.0), (1, 0.4), (1, 0.0)):
        step = {0: tokens, 2: 1 if tokens == 1 else 33}
        inputs = random_inputs(s, sum(step.values()), method, g, torch.float32)
        inputs["rule"]["biases"] = torch.full((s.units,), bias + 0.01)
        said = []
        for pool in pools:
            pool.begin([], step)
            pool.layer(0, pool.rows(step), step, inputs)
            said.append(pool.end(step, ahead=1))
            pool.check()
        torch.testing.assert_close(said[0], said[1], rtol=0, atol=0)
        assert pools[0].contents() == pools[1].contents()
        if bias == 0.4:
            assert int(pools[1].lanes.dropped[0, 0].max()) > LISTED
