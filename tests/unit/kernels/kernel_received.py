"""Gates at boundaries on Triton: attention received and who goes, against their naive twins, and these against the walk that
defines what gates decide by."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from device import DEVICE, Pool, random_inputs, random_steps, sizes
from vllm_prune_kernels import judge as judging
from vllm_prune_kernels.decode import decode, scratch_for
from vllm_prune_kernels.judge import Boundaries, judge, judge_naive
from vllm_prune_kernels.lanes import NEVER, Lanes
from vllm_prune_kernels.narrow import FP8, gate_view, narrow_naive
from vllm_prune_kernels.prefill import list_width, prefill
from vllm_prune_kernels.received import received, received_naive
from vllm_prune_kernels.rows import Rows, part_before, parts_of
from vllm_prune_kernels.settle import settle, settle_naive
from vllm_prune_kernels.single import OPEN, Decision, single

from vllm_prune.gates import BoundaryRule
from vllm_prune.gates.boundary import walk

LTP = Boundaries(grid=8, span=12, after=12, sinks=2, keep=False)
ACC = Boundaries(grid=16, span=0, after=8, sinks=1, keep=True)
SCALE = 0.4
FULL = os.environ.get("VLLM_PRUNE_FULL") == "1" or DEVICE == "cuda"


def cells(dtype: torch.dtype) -> int:
    """Numbers of the cache that a mass takes."""
    return 8 // dtype.itemsize


def masses(lanes: Lanes, kv: torch.Tensor, slot: int, layer: int) -> list[float]:
    """Of a layer's keys, in lane order."""
    s = lanes.sizes
    lane = layer * s.per_layer
    view, _ = gate_view(s, kv, torch.float64)
    size = s.gate_page_tokens
    pages = lanes.table[slot, lane + s.heads]
    return [float(view[pages[j // size], j % size]) for j in range(int(lanes.length[slot, lane]))]


class Layer:
    """One layer's step in a pool, by kernels or twins: decide, attend, drop and write, add up what keys received."""

    def __init__(self, pool: Pool, rule: Boundaries, group: int) -> None:
        self.pool, self.rule, self.group = pool, rule, group
        slots, layers = pool.lanes.level.shape
        spread = torch.linspace(0.9, 0.2, slots * layers, dtype=torch.float64).view(slots, layers)
        pool.lanes.level.copy_(spread)
        pool.lanes.level[-1] = 1.0 if rule.keep else 0.0  # nothing goes

    def step(self, layer: int, rows: Rows, step: dict[int, int], query: torch.Tensor, inputs: dict[str, Any]) -> None:
        pool, rule, s, most = self.pool, self.rule, self.pool.sizes, max(step.values())
        lanes, kv, device = pool.lanes, pool.kv, pool.device
        query, key, value = (x.to(device) for x in (query, inputs["key"], inputs["value"]))
        total = len(query)
        blank = torch.zeros(1, 2, dtype=torch.float64, device=device).expand(total, -1)
        chunk = torch.full((1, total), NEVER, dtype=torch.int32, device=device)
        k_scale, v_scale = pool.scales
        if not pool.fast:
            for part in parts_of(rows, None, rule.grid, most):
                judge_naive(lanes, kv, part, layer, rule)
                settle_naive(lanes, kv, part, layer, key, value, blank, chunk, k_scale, v_scale)
                received_naive(lanes, kv, part, layer, query, SCALE, rule.span, rule.keep, k_scale)
            return
        out, weigh = torch.zeros_like(query), torch.full((total, query.shape[1], 2), float("nan"), device=device)
        lists = torch.zeros(1, list_width(total), dtype=torch.int32, device=device)
        counts, rank = torch.zeros_like(chunk), torch.zeros_like(chunk)
        for part in [rows] if most == 1 else parts_of(rows, None, rule.grid, most):
            shapes = scratch_for(part.count, s.heads, self.group, s.head_size, 2)
            scratch = [torch.empty(shape, device=device) for shape in shapes]
            arrivals = torch.zeros(part.count, s.heads, dtype=torch.int32, device=device)
            judge(lanes, kv, part, layer, rule)
            if most == 1:
                single(lanes, kv, part, layer, Decision(OPEN, chunk[:, 0]), key, value, blank, pool.meeting, 2,
                       *pool.scales)  # fmt: skip
            else:
                prefill(lanes, kv, part, layer, query, key, value, chunk, lists, counts, out, SCALE, most, *pool.scales,
                        weigh)  # fmt: skip
                settle(lanes, kv, part, layer, key, value, blank, chunk, rank, most, 2, *pool.scales)
            decode(lanes, kv, part, layer, query, out, SCALE, *scratch, arrivals, 2, *pool.scales, weigh)
            received(lanes, kv, part, layer, query, weigh, SCALE, rule.span, rule.keep, most, 2, k_scale)


SHAPES = {
    "acc": (ACC, 2, 3, torch.float32),
    "ltp-fp8": (LTP, 2, 2, FP8),
    **({"ltp": (LTP, 2, 1, torch.float32), "acc-bf16": (ACC, 1, 4, torch.bfloat16)} if FULL else {}),
}


@pytest.mark.parametrize(("rule", "heads", "group", "dtype"), SHAPES.values(), ids=list(SHAPES))
def test_lanes_and_masses_are_the_twins(rule, heads, group, dtype):
    """Chunks across boundaries, single tokens, ends, other thresholds and shares in each slot and layer; scores far from ties."""
    s = sizes(heads=heads, gate_rank=cells(dtype), blocks=60)
    pools = [Pool(s, fast, "boundary", dtype) for fast in (True, False)]
    layers = [Layer(pool, rule, group) for pool in pools]
    g = torch.Generator().manual_seed(heads + group)
    plain = torch.bfloat16 if dtype == FP8 else dtype
    gone = 0
    for ended, step in random_steps(s, seed=group, steps=12):
        inputs = random_inputs(s, sum(step.values()), "boundary", g, plain)
        if dtype == FP8:  # of a chunk's own keys attention sees what was given, this pass what was stored
            by = pools[0].scales[0]
            inputs["key"] = narrow_naive(inputs["key"], FP8, by).to(plain) * by
        query = torch.randn(sum(step.values()), heads * group, s.head_size, generator=g).to(plain)
        for pool, its in zip(pools, layers, strict=True):
            pool.begin(ended, step)
            rows = pool.rows(step)
            for layer in range(s.layers):
                its.step(layer, rows, step, query, inputs)
            pool.end(step, ahead=0)
            pool.check()
        mine, twin = (pool.contents() for pool in pools)
        for name in twin:  # masses are compared below
            if not (len(name) == 2 and isinstance(name[1], int) and name[1] % s.per_layer >= heads):
                assert mine[name] == twin[name], (name, step)
        for slot in pools[0].requests:
            for layer in range(s.layers):
                found, want = (torch.tensor(masses(p.lanes, p.kv, slot, layer)) for p in pools)
                torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
            gone += int(pools[1].lanes.dropped[slot].sum())
    assert gone > 60


def test_the_twins_are_what_gates_decide_by():
    """A sequence in pieces: the walk's expiries, exactly, and its masses."""
    for rule, level in ((LTP, 0.9), (ACC, 0.4)):
        s = sizes(layers=1, gate_rank=cells(torch.float32), blocks=60)
        pool = Pool(s, False, "boundary")
        layer = Layer(pool, rule, group=2)
        pool.lanes.level.fill_(level)
        g = torch.Generator().manual_seed(1)
        t = 100
        query, inputs = torch.randn(t, 4, s.head_size, generator=g), random_inputs(s, t, "boundary", g, torch.float32)
        at = 0
        for count in (1, 30, 1, 1, 40, 27):
            piece = {name: inputs[name][at : at + count] for name in ("key", "value")}
            pool.begin([], {0: count})
            layer.step(0, pool.rows({0: count}), {0: count}, query[at : at + count], piece)
            pool.end({0: count}, ahead=0)
            at += count
        given = {"keep": level} if rule.keep else {"threshold": level}
        expiry, mass = walk(
            BoundaryRule(rule.grid, rule.span, rule.after, rule.sinks, **given),
            query.transpose(0, 1)[None], inputs["key"].transpose(0, 1)[None], SCALE,
        )  # fmt: skip
        expiry = expiry[0, 0]
        assert 10 < (expiry < NEVER).sum() < 90
        recorded = pool.lanes.recorded[0, 0, 0, :t].long()
        assert torch.equal(torch.where(recorded == NEVER, torch.tensor(2**31 - 1), recorded),
                           torch.where(expiry >= NEVER, torch.tensor(2**31 - 1), expiry))  # fmt: skip
        live = [born for born, _ in pool.contents()[0, 0, "who"]]
        torch.testing.assert_close(
            torch.tensor(masses(pool.lanes, pool.kv, 0, 0)).double(), mass[0, live], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("seed", range(6))
def test_who_goes_among_many_that_are_equal(monkeypatch, seed):
    """Masses that are equal, zero, tiny or large, in lanes longer than what is looked at together: exactly the twin's choice."""
    monkeypatch.setattr(judging, "SCAN", 32)
    g = torch.Generator().manual_seed(seed)
    s = sizes(layers=1, gate_rank=cells(torch.float32), blocks=60)
    rule = ACC if seed % 3 else LTP
    pools = [Pool(s, fast, "boundary") for fast in (True, False)]
    tokens = 112 if rule is ACC else 104
    wild = torch.tensor([0.0, 1e-300, 1e-12, 0.5, 3.0, 1e9, 1e300], dtype=torch.float64)
    ages = (tokens - torch.arange(tokens) - 1).double()
    drawn = wild[torch.randint(0, len(wild), (tokens,), generator=g)]
    drawn = drawn * ages.clamp_min(1) if seed % 2 else drawn  # equal scores, or equal masses
    shuffled = torch.randperm(tokens, generator=g).int()
    for pool in pools:
        Layer(pool, rule, 1)
        pool.lanes.level.fill_((0.1, 0.55, 0.9)[seed % 3] if rule.keep else 0.2)
        pool.begin([], {0: tokens})
        rows = pool.rows({0: tokens})
        inputs = random_inputs(s, tokens, "boundary", torch.Generator().manual_seed(0), torch.float32)
        blank = torch.zeros(tokens, 2, dtype=torch.float64)
        settle_naive(pool.lanes, pool.kv, rows, 0, inputs["key"], inputs["value"], blank,
                     torch.full((1, tokens), NEVER, dtype=torch.int32))  # fmt: skip
        pool.end({0: tokens}, ahead=0)
        view, _ = gate_view(s, pool.kv, torch.float64)
        for j in range(tokens):
            pool.lanes.position[pool.lanes.table[0, 0, j // s.page_tokens], j % s.page_tokens] = shuffled[j]
            page = pool.lanes.table[0, s.heads, j // s.gate_page_tokens]
            view[page, j % s.gate_page_tokens] = drawn[shuffled[j]].to(view.device)
        pool.begin([], {0: 1})
        (judge if pool.fast else judge_naive)(pool.lanes, pool.kv, pool.rows({0: 1}), 0, rule)
    mine, twin = (pool.contents()[0, 0, "who"] for pool in pools)
    assert mine == twin
    assert 0 < sum(expiry == tokens for _, expiry in twin) < tokens


def test_rows_are_cut_at_multiples():
    """And at positions of their own, one of them a multiple; each part is where ``part_before`` says."""
    rows = Rows.make(3, 1, torch.tensor([0, 5, 30, 30], dtype=torch.int32, device=DEVICE), DEVICE)
    rows.slot.copy_(torch.tensor([4, 2, -1]))
    rows.start.copy_(torch.tensor([7, 8, 0]))
    cuts = torch.full((5, 2), NEVER, dtype=torch.int32)
    cuts[2] = torch.tensor([16, 20])
    found, parts = [], parts_of(rows, cuts.to(DEVICE), 8, most_tokens=25)
    for number, cut in enumerate((16, 20)):
        part = parts[part_before(cut, number, start=8, grid=8)]
        assert int(part.start[3] + part.first[4] - part.first[3]) == cut
    for part in parts:
        assert part.first.data_ptr() % 16 == part.slot.data_ptr() % 16 == part.settled.data_ptr() % 16 == 0
        assert int(part.first[0]) == 0 and int(part.first[-1]) == 30 and bool((part.first.diff() >= 0).all())
        counts = part.first.diff().tolist()
        found += [(slot, start, n) for slot, start, n in zip(part.slot.tolist(), part.start.tolist(), counts, strict=True)
                  if slot >= 0]  # fmt: skip
    assert sorted(found) == [(2, 8, 8), (2, 16, 4), (2, 20, 4), (2, 24, 8), (2, 32, 1), (4, 7, 1), (4, 8, 4)]


def test_heads_that_decide_apart_are_refused():
    s = sizes(units=2, gate_rank=2)
    pool = Pool(s, True, "boundary")
    pool.begin([], {0: 1})
    query = torch.zeros(1, 2, s.head_size, device=pool.device)
    with pytest.raises(ValueError, match="together"):
        received(pool.lanes, pool.kv, pool.rows({0: 1}), 0, query, query, SCALE, 0, True, 1, 1)
