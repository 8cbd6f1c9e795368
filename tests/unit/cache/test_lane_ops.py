"""Under the lane store: the cache's view as head-pages, the arrays, and the calls of the compiled loops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_lanes import BLOCKS, GEOMETRY, D, H, L, N, store_of

from vllm_prune.cache import lane_ops
from vllm_prune.cache.geometry import LaneGeometry
from vllm_prune.cache.lane_ops import NEVER, Boundary, Lanes, Tokens, check
from vllm_prune.cache.views import layers_in_one


def test_all_layers_are_one_row_of_pages():
    cache = torch.arange(L * BLOCKS * H * N * 2 * D).float().view(L, BLOCKS, H, N, 2 * D)
    flat = layers_in_one(list(cache), BLOCKS, H, N, D)
    assert flat.shape == (L * BLOCKS * H, 2 * N * D) and flat.data_ptr() == cache.data_ptr()
    assert torch.equal(flat[(1 * BLOCKS + 4) * H + 1], cache[1, 4, 1].flatten())
    part = torch.cat([cache[:1], cache])[1:]  # not at the beginning of its storage
    assert torch.equal(layers_in_one(list(part), BLOCKS, H, N, D), flat)


@pytest.mark.parametrize(
    "layers",
    [
        [torch.zeros(BLOCKS, H, N, 2 * D), torch.zeros(BLOCKS, H, N, 2 * D)],
        list(torch.zeros(2, BLOCKS + 1, H, N, 2 * D)),
        list(torch.zeros(2, BLOCKS, N, H, 2 * D).transpose(2, 3)),
        [torch.zeros(2, BLOCKS, H, N, 2 * D)[i] for i in (1, 0)],
    ],
    ids=["apart", "another shape", "another layout", "turned round"],
)
def test_another_layout_is_refused(layers):
    with pytest.raises(RuntimeError, match=r"layer [01] of the KV cache is .* the layout LBHNC"):
        layers_in_one(layers, BLOCKS, H, N, D)


def test_shapes_of_the_arrays():
    g = LaneGeometry(L, H, D, N, 16, 2)
    lanes = Lanes(g, BLOCKS, 5, width=11, free_width=70, units=2, elem=2, received=True)
    pages = L * BLOCKS * H
    assert lanes.table.shape == (5, L * 4, 11) and lanes.length.shape == (5, L * 4)
    assert lanes.free_pages.shape == (5, 70) and lanes.n_free.shape == (5,) and (lanes.page_lane == -1).all()
    assert lanes.pos.shape == lanes.exp.shape == lanes.mass.shape == (pages, N) and lanes.page_index.shape == (pages,)
    assert lanes.dropped.shape == lanes.closed.shape == (5, L, 2) and (lanes.prompt == NEVER).all()
    assert lanes.spared.shape == (5, 11 * N) and lanes.events.shape == (0, 4)
    s = lanes.store
    sizes = (s.lanes, s.W, s.F, s.T, s.L, s.H, s.B, s.N, s.D, s.r, s.Ng, s.per_layer, s.units, s.elem, s.events_cap)
    assert sizes == (L * 4, 11, 70, 11 * N, L, H, BLOCKS, N, D, 16, 128, 4, 2, 2, 0)
    plain = Lanes(GEOMETRY, BLOCKS, 5, 11, 70, 1, 4)
    assert plain.mass is None and plain.store.mass is None and plain.store.Ng == 1
    assert store_of().lanes.store.W == 11 and store_of().lanes.store.F == 12 * L * H
    assert store_of().lanes.mass is None
    assert store_of(dtype=torch.bfloat16).lanes.store.elem == 2 and store_of(received=True).lanes.mass is not None


def test_pointers_of_tokens():
    key, value, f = torch.zeros(4, H, D), torch.zeros(4, 2 * H, D)[:, :H], torch.zeros(4, 9)[:, :5]
    positions = np.zeros(4, np.int32)
    tokens = Tokens().point(key, value, f, positions)
    assert (tokens.key, tokens.value, tokens.features) == (key.data_ptr(), value.data_ptr(), f.data_ptr())
    assert (tokens.key_stride, tokens.value_stride, tokens.feature_stride) == (H * D, 2 * H * D, 9)
    assert tokens.num_features == 5 and tokens.positions == positions.ctypes.data
    assert tokens.point(key, key, None).positions is None
    query = torch.zeros(4, 6, D)[1:]
    assert Boundary().point(query).query == query.data_ptr() and Boundary().point(query).query_stride == 6 * D


@pytest.mark.parametrize(
    ("code", "words"), [(-1, "ran out of granted pages"), (-2, "overflowed"), (-3, "memory"), (-9, ": -9 ")]
)
def test_codes_of_the_loops(code, words):
    with pytest.raises(RuntimeError, match=words):
        check(code)
    assert check(0) == 0 and check(4) == 4


def test_a_missing_compiled_part_says_so(monkeypatch):
    monkeypatch.setattr(lane_ops, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="compiled part is missing"):
        lane_ops._load()
    monkeypatch.setattr(lane_ops, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(ImportError, match="compiled part is missing"):
        lane_ops._load()
