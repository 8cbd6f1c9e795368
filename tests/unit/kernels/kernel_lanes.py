"""Lanes on the device: steps of random requests by kernels and by their twins end with the same lanes, pages and reports."""

from __future__ import annotations

import os

import pytest
import torch
from device import Pool, random_inputs, random_steps, sizes
from vllm_prune_kernels.single import LISTED

SHAPES = {
    "dcp": ("dcp", {"gate_rank": 8}),
    "dcp-heads": ("dcp", {"gate_rank": 16, "units": 2}),
    "dms": ("dms", {"units": 2}),
    "random": ("random", {"units": 2, "heads": 2, "layers": 1}),
    "window": ("random", {"heads": 3, "head_size": 24}),
}


FULL = os.environ.get("VLLM_PRUNE_FULL") == "1" or torch.cuda.is_available()


@pytest.mark.parametrize(("shape", "dtype"), [
    *((shape, torch.float32) for shape in (SHAPES if FULL else ["dcp", "dms", "window"])),
    *((shape, torch.bfloat16) for shape in (SHAPES if FULL else ["dcp-heads"])),
])  # fmt: skip
def test_steps(shape, dtype):
    method, given = SHAPES[shape]
    s = sizes(**given)
    pools = [Pool(s, fast, method, dtype) for fast in (True, False)]
    g = torch.Generator().manual_seed(len(shape))
    seen = {"returned": 0, "dropped": 0, "single": 0}
    for number, (ended, step) in enumerate(random_steps(s, seed=7, steps=18)):
        inputs = [random_inputs(s, sum(step.values()), method, g, dtype) for _ in range(s.layers)]
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
