"""Attention on lanes against its twins: by flash-attention's rule, our error is at most that of the same precision, twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import DEVICE, sizes
from vllm_prune_kernels.decode import decode, decode_naive, scratch_for, splits_for
from vllm_prune_kernels.lanes import NEVER, Lanes, Sizes
from vllm_prune_kernels.narrow import FP8, narrow_naive
from vllm_prune_kernels.prefill import QUERIES, list_width, prefill, prefill_naive, share
from vllm_prune_kernels.rows import Rows

LAYER, SCALE = 1, 0.2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Batch:
    """Lanes of random lengths and pages, NaN wherever no token lies, and a step's rows over them.

    Args:
        s: of the lanes.
        group: G.
        rows: (tokens in the lanes before or, for single ones, after the step; tokens of the step); 0 tokens: padding.
        drop: share of keys with an expiry within a few steps of the row's.
        cache: dtype of the lanes, if it is not ``dtype``.
    """

    def __init__(
        self,
        s: Sizes,
        group: int,
        rows: list[tuple[int, int]],
        dtype: torch.dtype,
        drop: float = 0.0,
        cache: torch.dtype | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(sum(a * 7 + b for a, b in rows) + group)
        self.sizes, self.group, self.dtype, self.g = s, group, dtype, g
        lanes = Lanes.make(s, "cpu")
        kv = torch.full((s.pages, s.page_numbers), float("nan"), dtype=cache or dtype)
        self.scales = (0.5, 3.0) if cache == FP8 else (1.0, 1.0)
        free = iter(torch.randperm(s.pages, generator=g).tolist())
        starts = []
        for slot, (past, count) in enumerate(rows):
            starts.append(past + 3 if count > 1 else past - 1)
            for h in range(s.heads):
                lane = LAYER * s.per_layer + h
                length = past if s.units == 1 else max(past - 5 * h, 1 if count == 1 else 0)
                lanes.length[slot, lane] = length
                for j in range(length):
                    if j % s.page_tokens == 0:
                        lanes.table[slot, lane, j // s.page_tokens] = next(free)
                    page = int(lanes.table[slot, lane, j // s.page_tokens])
                    at = kv[page].view(s.page_tokens, -1)[j % s.page_tokens]
                    at.copy_(narrow_naive(torch.randn(at.shape, generator=g), at.dtype, 1.0))
                    if h < s.units:
                        lanes.expiry[page, j % s.page_tokens] = self.expiry(starts[-1], count, drop)
        first = torch.tensor([0, *(count for _, count in rows)]).cumsum(0).int()
        total = int(first[-1])
        self.rows = Rows.make(len(rows), s.units, first.to(DEVICE), DEVICE)
        self.rows.slot.copy_(torch.tensor([i if count else -1 for i, (_, count) in enumerate(rows)]))
        self.rows.start.copy_(torch.tensor(starts))
        self.chunk = torch.full((s.units, total + 3), NEVER, dtype=torch.int32)
        for r, (_, count) in enumerate(rows):
            for unit in range(s.units):
                for i in range(count):
                    n = starts[r] + i
                    self.chunk[unit, int(first[r]) + i] = max(n + 1, self.expiry(n + 1, count - i, drop))
        fused = torch.randn(total, (group + 2) * s.heads, s.head_size, generator=g).to(dtype).to(DEVICE)
        self.query, self.key, self.value = fused.split(
            [group * s.heads, s.heads, s.heads], dim=1
        )  # strided, as vLLM's are
        self.lanes = Lanes(s, *(x.to(DEVICE) for x in list(vars(lanes).values())[1:]))
        self.kv, self.chunk = kv.to(DEVICE), self.chunk.to(DEVICE)

    def expiry(self, start: int, count: int, drop: float) -> int:
        if float(torch.rand((), generator=self.g)) >= drop:
            return NEVER
        return start + 1 + int(torch.randint(0, max(count, 1), (), generator=self.g))

    def outputs(self) -> torch.Tensor:
        return torch.full_like(self.query, 7.0).contiguous()

    def prefill(self) -> torch.Tensor:
        s, out = self.sizes, self.outputs()
        total = self.chunk.shape[1]
        lists = torch.full((s.units, list_width(total)), -9, dtype=torch.int32, device=DEVICE)
        counts = torch.full((s.units, total), -9, dtype=torch.int32, device=DEVICE)
        most = int(self.rows.first.diff().max())
        prefill(self.lanes, self.kv, self.rows, LAYER, self.query, self.key, self.value, self.chunk, lists, counts, out, SCALE,
                most, *self.scales)  # fmt: skip
        return out

    def decode(self, splits: int) -> torch.Tensor:
        s, out = self.sizes, self.outputs()
        shapes = scratch_for(self.rows.count, s.heads, self.group, s.head_size, splits)
        partial, sums = (torch.full(shape, float("nan"), device=DEVICE) for shape in shapes)
        arrivals = torch.zeros(self.rows.count, s.heads, dtype=torch.int32, device=DEVICE)
        decode(self.lanes, self.kv, self.rows, LAYER, self.query, out, SCALE, partial, sums, arrivals, splits,
               *self.scales)  # fmt: skip
        assert not arrivals.any(), "programs that met must leave no trace"
        return out

    def naive(self, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """The twin's result, computed in this precision."""
        out = self.outputs().to(dtype)
        if kind == "decode":
            decode_naive(self.lanes, self.kv, self.rows, LAYER, self.query, out, SCALE, dtype, *self.scales)
        else:
            prefill_naive(self.lanes, self.kv, self.rows, LAYER, self.query, self.key, self.value, self.chunk, out, SCALE,
                          dtype, *self.scales)  # fmt: skip
        return out


def near(found: torch.Tensor, batch: Batch, kind: str) -> None:
    exact = batch.naive(kind, torch.float64)
    assert not found.isnan().any()
    mine, theirs = (found.double() - exact).abs(), (batch.naive(kind, batch.dtype).double() - exact).abs()
    # The last rounding alone may cost as much as this.
    step = torch.finfo(batch.dtype).eps * exact.abs().max()
    # A GPU's exp2 is good to some units of float32 in the last place, torch's exp to half of one.
    most = 4 if batch.dtype == torch.float32 else 2
    assert mine.max() <= most * theirs.max() + step, f"{mine.max():.2e} against {theirs.max():.2e}"
    assert mine.mean() <= most * theirs.mean() + step / 100


DECODE = {
    "one token": ([(1, 1)], {}, 2, 1),
    "to the page": ([(32, 1), (64, 1)], {}, 1, 1),
    "odd": ([(77, 1), (3, 1), (200, 1)], {"units": 2, "page_tokens": 32}, 3, 1),
    "split": ([(700, 1), (9, 1), (257, 1)], {"page_tokens": 64, "blocks": 60, "width": 14}, 4, 4),
    "group 5": ([(65, 1)], {"head_size": 64}, 5, 2),
    "group 16": ([(40, 1)], {"head_size": 128, "page_tokens": 128}, 16, 1),
    "size 80": ([(50, 1)], {"head_size": 80}, 7, 1),
    "size 96": ([(300, 1)], {"head_size": 96, "page_tokens": 64}, 2, 2),
    "size 256": ([(70, 1)], {"head_size": 256}, 8, 1),
    "mixed": ([(20, 4), (33, 1), (0, 0), (31, 1)], {}, 2, 2),
    "empty": ([(0, 1), (40, 1)], {"heads": 1}, 2, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", DECODE)
def test_decode(case, dtype):
    rows, given, group, splits = DECODE[case]
    batch = Batch(sizes(**{"width": 20, "page_tokens": 16, "blocks": 60, **given}), group, rows, dtype)
    near(batch.decode(splits), batch, "decode")


PREFILL: dict[str, Any] = {
    "whole prompt": ([(0, 37)], {}, 2, 0.0),
    "two tokens": ([(0, 2), (17, 2)], {}, 1, 0.5),
    "tiles": ([(0, 2 * QUERIES + 9)], {"heads": 1}, 1, 0.7),
    "all gone": ([(0, QUERIES + 40)], {"heads": 1}, 2, 1.0),
    "past": ([(100, 20), (33, 16)], {"page_tokens": 32}, 4, 0.6),
    "own heads": ([(40, QUERIES + 5), (0, 7)], {"units": 2, "page_tokens": 64}, 3, 0.8),
    "size 80": ([(20, 19)], {"head_size": 80}, 2, 0.5),
    "size 64": ([(16, 33)], {"head_size": 64, "page_tokens": 128}, 5, 0.5),
    "size 128": ([(30, 40)], {"head_size": 128, "heads": 1}, 16, 0.5),
    "size 96": ([(20, 19)], {"head_size": 96, "page_tokens": 128}, 3, 0.5),
    "size 256": ([(18, 30)], {"head_size": 256, "heads": 1}, 2, 0.5),
    "mixed": ([(20, 9), (33, 1), (0, 0), (31, 30)], {}, 2, 0.5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", PREFILL)
def test_prefill(case, dtype):
    rows, given, group, drop = PREFILL[case]
    batch = Batch(sizes(**{"width": 20, **given}), group, rows, dtype, drop)
    near(batch.prefill(), batch, "prefill")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ["split", "size 80", "mixed"])
def test_decode_of_fp8(case, dtype):
    rows, given, group, splits = DECODE[case]
    batch = Batch(sizes(**{"width": 20, "page_tokens": 16, "blocks": 60, **given}), group, rows, dtype, cache=FP8)
    near(batch.decode(splits), batch, "decode")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ["past", "own heads", "mixed"])
def test_prefill_over_fp8(case, dtype):
    rows, given, group, drop = PREFILL[case]
    batch = Batch(sizes(**{"width": 20, **given}), group, rows, dtype, drop, FP8)
    found = batch.prefill()
    near(found, batch, "prefill")
    batch.scales = (0.5, 1.0)
    assert (batch.prefill() - found).abs().max() > 0.1, "scales must matter"


def test_expiry_matters():
    """The same step with no key expiring says something else: the cases above do test expiries."""
    rows, given, group, drop = PREFILL["own heads"]
    batch = Batch(sizes(**{"width": 20, **given}), group, rows, torch.float32, drop)
    before = batch.prefill()
    batch.chunk.fill_(NEVER)
    assert (batch.prefill() - before).abs().max() > 0.1


@pytest.mark.parametrize("drop", [0.7, 1.0])
def test_the_dead_are_not_read(drop):
    """Listed for a tile are the earlier keys that live at its first query, in order, and no others."""
    batch = Batch(sizes(heads=1, width=20), 1, [(20, 9), (0, 2 * QUERIES + 9)], torch.float32, drop)
    total = batch.chunk.shape[1]
    begin, start = (int(x[1]) for x in (batch.rows.first, batch.rows.start))
    for tile in (1, 2):  # the last query that sees each is the one before the tile, and the tile's first
        batch.chunk[0, begin + 5 * tile] = start + tile * QUERIES
        batch.chunk[0, begin + 5 * tile + 1] = start + tile * QUERIES + 1
    lists = torch.full((1, list_width(total)), -9, dtype=torch.int32, device=DEVICE)
    counts = torch.full((1, total), -9, dtype=torch.int32, device=DEVICE)
    prefill(batch.lanes, batch.kv, batch.rows, LAYER, batch.query, batch.key, batch.value, batch.chunk, lists, counts,
            batch.outputs(), SCALE, 2 * QUERIES + 9)  # fmt: skip
    for tile in range(3):
        before = tile * QUERIES
        alive = (batch.chunk[0, begin : begin + before] > start + before).nonzero().flatten().tolist()
        at = begin * share(total) + (tile - 1) * tile // 2 * QUERIES
        assert int(counts[0, begin + before]) == len(alive)
        assert lists[0, at : at + len(alive)].tolist() == alive and len(alive) < max(before, 1)


def test_splits():
    """A power of two, and fewer the more rows there are."""
    found = [splits_for(n, 8) for n in (1, 4, 16, 100, 500)]
    assert found == sorted(found, reverse=True) and found[0] > 8 and found[-1] == 1
    assert all(n & (n - 1) == 0 for n in found)
