"""Lanes on the device: steps of random requests by kernels and by their twins end with the same lanes, pages and reports."""

from __future__ import annotations

import pytest
import torch
from device import Pool, random_inputs, random_steps, sizes

SHAPES = {
    "dcp": ("dcp", {"gate_rank": 8}),
    "dcp-heads": ("dcp", {"gate_rank": 16, "units": 2}),
    "dms": ("dms", {"units": 2}),
    "random": ("random", {"units": 2, "heads": 2, "layers": 1}),
    "window": ("random", {"heads": 3, "head_size": 24}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps(shape, dtype):
    method, given = SHAPES[shape]
    s = sizes(**given)
    pools = [Pool(s, fast, method, dtype) for fast in (True, False)]
    g = torch.Generator().manual_seed(len(shape))
    seen = {"returned": 0, "dropped": 0, "moved": 0}
    for number, (ended, step) in enumerate(random_steps(s, seed=7, steps=14)):
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
        seen["returned"] += int((said[0][:, 9] - said[0][:, 8]).sum())
        seen["dropped"] = max(seen["dropped"], int(said[0][:, 7].max()))
    assert seen["returned"] > 3 and seen["dropped"] > 20, f"steps must drop and give back: {seen}"
