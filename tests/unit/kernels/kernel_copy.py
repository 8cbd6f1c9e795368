"""Lanes copied from slot to slot, pages shared, and rows cut at positions: kernels and their twins, and what both are for."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE, Pool, random_inputs, sizes
from kernel_lanes import SHAPES
from vllm_prune_kernels.copy import copy_lanes, copy_lanes_naive
from vllm_prune_kernels.lanes import NEVER
from vllm_prune_kernels.rows import Rows, parts_of
from vllm_prune_kernels.share import sort_lanes, sort_lanes_naive


def step(pools, tokens, inputs, origin=None, cuts=()):
    """One step of all pools. ``origin``: slots that begin with another's lanes; ``cuts``: (position, slot, snapshot) of rows."""
    said = []
    for pool in pools:
        copy, sort = (copy_lanes, sort_lanes) if pool.fast else (copy_lanes_naive, sort_lanes_naive)
        pool.begin([], tokens, origin, starts=True)
        for slot, begun in (origin or {}).items():
            copy(pool.lanes, pool.kv, torch.tensor([[begun, slot]], dtype=torch.int32, device=pool.device))
            pool.requests[slot].tokens = pool.requests[begun].tokens
        if cuts:
            for at, slot, snapshot in cuts:
                more = {snapshot: at - pool.requests[slot].tokens}
                pool.begin([], more, {snapshot: slot})
                pool.requests[snapshot].tokens = at
            at = torch.full((pool.sizes.slots, len(cuts)), NEVER, dtype=torch.int32)
            at[cuts[0][1]] = torch.tensor([position for position, _, _ in cuts], dtype=torch.int32)
            parts = parts_of(pool.rows(tokens), at.to(pool.device))
        else:
            parts = [pool.rows(tokens)]
        for layer in range(pool.sizes.layers):
            for number, rows in enumerate(parts):
                pool.layer(layer, rows, tokens, inputs[layer])
                if number < len(cuts):
                    at, slot, snapshot = cuts[number]
                    told = torch.tensor([[slot, snapshot, at - 1]], dtype=torch.int32, device=pool.device)
                    (copy if pool.method == "dcp" else sort)(pool.lanes, pool.kv, told, layer)
        done = {**tokens, **{snapshot: 0 for _, _, snapshot in cuts}}
        said.append(pool.end(done, ahead=1))
        pool.check()
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=0)
    assert pools[0].contents() == pools[1].contents()


def of(pool, slot):
    """What a slot holds, by position: the order in a lane hangs on how tokens came."""
    s, found = pool.sizes, pool.contents()
    said = {name: found[slot, name] for name in ("dropped", "recorded")}
    for lane in range(s.lanes):
        at, h = divmod(lane, s.per_layer)
        who = found[slot, at * s.per_layer + (0 if s.units == 1 else h % s.heads), "who"]
        said[lane] = sorted(zip(who, found[slot, lane], strict=True))
    return said


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prefix_goes_on_as_if_it_had_been_computed(shape):
    """Slots 0 and 1 compute the same tokens; one in steps, the other leaves snapshots on the way, in the middle of chunks, at
    their ends and of a part of one token. Whoever starts from a copy goes on like them."""
    method, given = SHAPES[shape]
    s = sizes(**{**given, "slots": 5, "blocks": 120})
    pools = [Pool(s, fast, method) for fast in (True, False)]
    for pool in pools:  # all decide alike
        for numbers in (pool.lanes.shift, pool.lanes.limit, pool.lanes.delay, pool.lanes.spared, pool.lanes.n_spared):
            numbers.copy_(numbers[0].expand_as(numbers).clone())
    g = torch.Generator().manual_seed(5)
    all_inputs = [random_inputs(s, 70, method, g, torch.float32) for _ in range(s.layers)]

    def part(*pieces):
        """Inputs of tokens [begin, end), one row after the other."""
        return [
            {
                name: value if name == "rule" else torch.cat([value[a:b] for a, b in pieces])
                for name, value in one.items()
            }
            for one in all_inputs
        ]

    for begin, end in ((0, 16), (16, 33), (33, 48), (48, 49), (49, 60)):
        step(pools, {0: end - begin}, part((begin, end)))
    step(pools, {1: 20}, part((0, 20)), cuts=[(16, 1, 2)])
    step(pools, {1: 29}, part((20, 49)), cuts=[(33, 1, 3), (48, 1, 4)])
    step(pools, {1: 11}, part((49, 60)))
    assert of(pools[0], 0) == of(pools[0], 1)
    dropped = sum(map(sum, pools[0].lanes.dropped[1].tolist()))
    assert dropped > 10
    for pool in pools:  # slot 0 ends, and begins anew from the snapshot at 33
        kept = of(pool, 1)
        pool.begin([0], {2: 1})
        pool.end({2: 0}, ahead=1)
    begun = [of(pool, snapshot) for pool in pools for snapshot in (3, 4)]
    step(pools, {0: 27}, part((33, 60)), origin={0: 3})
    for pool in pools:
        assert of(pool, 0) == kept
        assert (int(pool.lanes.shared[0].sum()) > 0) == (int(pool.lanes.settled[3].sum()) > 0)
    for pool in pools:
        pool.begin([0], {2: 1})
        pool.end({2: 0}, ahead=1)
    step(pools, {0: 1, 1: 3}, part((48, 49), (60, 63)), origin={0: 4})
    step(pools, {0: 14}, part((49, 63)))
    assert of(pools[0], 0) == of(pools[0], 1)
    assert [of(pool, snapshot) for pool in pools for snapshot in (3, 4)] == begun, "nobody wrote to what is shared"
    assert (int(pools[0].lanes.shared[0].sum()) > 0) == (shape in ("dms", "dms-own", "random"))


def test_parts():
    """Rows of 5, 1, 4, 0 tokens at positions 3, 8, 0 and padding."""
    first = torch.tensor([0, 5, 6, 10, 10], dtype=torch.int32, device=DEVICE)
    rows = Rows.make(4, 2, first, DEVICE)
    rows.slot.copy_(torch.tensor([2, 0, 1, -1]))
    rows.start.copy_(torch.tensor([3, 8, 0, 0]))
    cuts = torch.full((3, 2), NEVER, dtype=torch.int32)
    cuts[2] = torch.tensor([4, 8])  # the second where the row ends
    cuts[1, 0] = 2
    found = []
    for part in parts_of(rows, cuts.to(DEVICE)):
        count = part.first.diff().tolist()
        rest = zip(part.slot.tolist(), part.first.tolist(), count, part.start.tolist(), strict=False)
        found.append([one for one in rest if one[0] >= 0])
        assert part.settled.shape == (9, 2, 2) and int(part.first[-1]) == 10
    assert found == [[(2, 0, 1, 3), (0, 5, 1, 8), (1, 6, 2, 0)], [(2, 1, 4, 4), (1, 8, 2, 2)], []]
