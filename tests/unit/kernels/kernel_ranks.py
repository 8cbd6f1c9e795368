"""The end of a step on a device whose lanes are one rank's of two: it keeps what the other needs, and reports for both."""

from __future__ import annotations

import device
import pytest
import torch
from device import Pool, random_inputs, random_steps, sizes
from kernel_lanes import SHAPES
from vllm_prune_kernels.close import close, close_naive
from vllm_prune_kernels.lanes import AHEAD, REPORT

from vllm_prune.cache.device_store import counts_of, with_counts, with_need
from vllm_prune.cache.ranks import joined


@pytest.mark.parametrize(
    ("shape", "fast"), [("dcp", True), ("dcp-heads", True), ("dms", False), ("random", False), ("window", False)]
)
def test_two_ranks(shape, fast, monkeypatch):
    method, given = SHAPES[shape]
    s = sizes(**given)
    pool, g, kept = Pool(s, fast, method), torch.Generator().manual_seed(1), []

    def end_of_one_of_two(lanes, kv, rows, *most):
        grants = lanes.n_live[rows[:, 0].long()].clone()
        mine = counts_of(lanes, rows)
        more = torch.arange(len(rows), device=rows.device) % 3  # blocks that the other rank needs beyond this one
        others = mine.columns() + 1
        others[:, 0] += more * s.block_pages
        both = joined(torch.stack([mine.columns(), others]), 2 + 2 * AHEAD, split=True)
        out = (close if fast else close_naive)(lanes, kv, with_need(rows, both, mine.pages[:, 1]), *most)
        # What this rank counted is what the end of the step counts.
        assert torch.equal(out[:, :AHEAD].long(), mine.pages[:, 1 : 1 + AHEAD])
        assert torch.equal(mine.pages[:, 1 + AHEAD : -1], mine.pages[:, 1 : 1 + AHEAD]), "nothing is settled here"
        assert torch.equal(out[:, 6].long(), mine.held) and torch.equal(out[:, 7].long(), mine.dropped.sum(1))
        assert torch.equal(out[:, 11:15].long(), mine.by_layer())
        # Blocks for the one that needs most, where it may give up any and has more.
        stay = torch.minimum((both.need + s.block_pages - 1) // s.block_pages, grants.long())
        assert torch.equal(out[:, 8].long(), torch.where(rows[:, 3] > 0, stay, grants.long()))
        kept.append(int((out[:, 8].long() > (mine.need + s.block_pages - 1) // s.block_pages).sum()))
        said = with_counts(out, both)
        assert said.shape[1] == REPORT + 1 + AHEAD
        assert torch.equal(said[:, :AHEAD].long(), both.pages[:, 1 : 1 + AHEAD]) and torch.equal(
            said[:, 6].long(), 2 * mine.held + 1
        )
        assert torch.equal(said[:, 5], out[:, 5]) and torch.equal(said[:, 8:11], out[:, 8:11])
        assert torch.equal(said[:, REPORT].long(), 2 * mine.pages[:, 0] + 1)
        assert torch.equal(said[:, REPORT + 1 :].long(), both.pages[:, 1 + AHEAD : -1]) and bool(
            (said[:, 15] == 1).all()
        )
        return out

    monkeypatch.setattr(device, "close" if fast else "close_naive", end_of_one_of_two)
    for number, (ended, step) in enumerate(random_steps(s, seed=7, steps=14)):
        inputs = [random_inputs(s, sum(step.values()), method, g, torch.float32) for _ in range(s.layers)]
        pool.begin(ended, step)
        rows = pool.rows(step)
        for layer in range(s.layers):
            pool.layer(layer, rows, step, inputs[layer])
        pool.end(step, ahead=number % 3, keep_all=number % 5 == 4)
        pool.check()
    assert sum(kept) > 0, "the other rank must have kept blocks here"
