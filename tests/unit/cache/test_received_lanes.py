"""The compiled second pass over lanes against the walk that defines it: masses and drops, whatever the chunking."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_prune.cache.geometry import LaneGeometry
from vllm_prune.cache.lane_ops import Boundary, Tokens, check, lib
from vllm_prune.cache.lanes import LaneStore
from vllm_prune.gates import NEVER, BoundaryRule
from vllm_prune.gates.boundary import walk

H, G, D, N, SCALE = 2, 2, 32, 32, 0.3
RULES = {
    "ltp": BoundaryRule(grid=16, span=20, after=20, sinks=1, threshold=0.9),
    "acc": BoundaryRule(grid=16, span=0, after=10, sinks=2, keep=0.4),
    "coarse": BoundaryRule(grid=64, span=0, after=10, sinks=2, keep=0.4),
}


def serve(
    rule: BoundaryRule, query: torch.Tensor, key: torch.Tensor, chunks: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Expiries [T] and masses [T] (NaN of dropped keys) after chunks. query [T, H * G, D], key [T, H, D]."""
    t = len(query)
    geometry = LaneGeometry(1, H, D, N)
    store = LaneStore(geometry, 1, 320, 12, query.dtype, 1, record=True, received=True)
    store.bind([torch.zeros(12, H, N, 2 * D, dtype=query.dtype)])
    store.update("r", 1, list(range(1, 12)))
    store.reserve_events(t)
    given_ = Boundary(
        group=G, grid=rule.grid, span=rule.span, after=rule.after, sinks=rule.sinks, scale=SCALE,
        threshold=rule.threshold or 0.0, keep=-1.0 if rule.keep is None else rule.keep,
    ).point(query)  # fmt: skip
    tokens = Tokens().point(key, key, None)
    slot = store.slots["r"].slot
    victims = np.empty(t, np.int32)
    at = 0
    for size in chunks:
        end = min(at + size, t)
        while at < end:
            if at % rule.grid == 0:
                gone = check(lib.boundary_decide(store.lanes.ref, slot, 0, given_, at, victims.ctypes.data))
                check(lib.boundary_drop(store.lanes.ref, slot, 0, at, victims.ctypes.data, gone))
            stop = min(end, at - at % rule.grid + rule.grid)
            check(lib.boundary_write(store.lanes.ref, slot, 0, given_, at, at, stop - at, tokens))
            at = stop
    mass = np.full(t, np.nan)
    lanes = store.lanes
    for i in range(int(lanes.length[slot, 0])):
        place = lanes.table[slot, 0, i // N], i % N
        mass[lanes.pos[place]] = lanes.mass[place]
    return store.expiries("r", t)[0, 0], mass


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(RULES)),
    t=st.integers(1, 150),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=6),
)
def test_lanes_receive_what_the_walk_says(name, t, seed, dtype, sizes):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(t, H * G, D, generator=g).to(dtype)
    key = (1.5 * torch.randn(t, H, D, generator=g)).to(dtype)
    rule = RULES[name]
    expiry, mass = serve(rule, query, key, [*sizes, t])
    want, received = walk(rule, query.transpose(0, 1)[None], key.transpose(0, 1)[None], SCALE)
    np.testing.assert_array_equal(np.where(expiry < NEVER, expiry, NEVER), want[0, 0].numpy())
    alive = want[0, 0].numpy() == NEVER
    np.testing.assert_array_equal(np.isnan(mass), ~alive)
    np.testing.assert_allclose(mass[alive], received[0].numpy()[alive], rtol=2e-4, atol=1e-6)
    again, same = serve(rule, query, key, [t])
    np.testing.assert_array_equal(expiry, again)
    np.testing.assert_array_equal(mass[alive], same[alive])  # to the last bit
