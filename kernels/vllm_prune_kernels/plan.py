"""The step planner: before a step every lane gets the pages that it needs if all of the step's tokens stay.

So no kernel inside the step asks for a page, and the order of layers does not matter. Two kernels: how many pages each lane
wants and where the free ones of its request begin (prefix sums), then which. ``plan_naive`` is the twin. Letters as in ``lanes``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import Lanes

TILE = 64
SEARCH = 32
"""Most halvings of a binary search: grants and their pages fit int32."""


@triton.jit
def _needs(
    rows, held, length, n_live, live_block, n_free, lane_start, live_start, error, lanes, G,
    PER_LAYER: tl.constexpr, H: tl.constexpr, N: tl.constexpr, NG: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = rows + 4 * tl.program_id(0)
    slot, tokens, more, origin = (
        tl.load(row).to(tl.int64),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3).to(tl.int64),
    )
    grants = tl.load(n_live + slot) + more
    tl.store(n_live + slot, grants)
    o = tl.arange(0, TILE)
    total = 0
    for at in range(0, lanes, TILE):
        lane = at + o
        ok = lane < lanes
        page_tokens = tl.where(lane % PER_LAYER < H, N, NG)
        after = tl.load(length + origin * lanes + lane, mask=ok, other=0) + tokens
        wants = (after + page_tokens - 1) // page_tokens - tl.load(held + slot * lanes + lane, mask=ok, other=0)
        wants = tl.where(ok, tl.maximum(wants, 0), 0)
        tl.store(lane_start + slot * lanes + lane, total + tl.cumsum(wants, 0) - wants, mask=ok)
        total += tl.sum(wants, 0)
    free = 0
    for at in range(0, grants, TILE):
        i = at + o
        block = tl.load(live_block + slot * G + i, mask=i < grants, other=0)
        pages = tl.load(n_free + block, mask=i < grants, other=0)
        before = free + tl.cumsum(pages, 0) - pages
        tl.store(live_start + slot * (G + 1) + i, before, mask=i < grants)
        taken = tl.minimum(tl.maximum(total - before, 0), pages)
        tl.store(n_free + block, pages - taken, mask=i < grants)
        free += tl.sum(pages, 0)
    tl.store(live_start + slot * (G + 1) + grants, free)
    if free < total:
        tl.store(error, 1)


@triton.jit
def free_page(live_start, live_block, block_free, rank, ok, first, end, G, Q: tl.constexpr, SEARCH: tl.constexpr):
    """The rank-th free page of a request's live grants [first, end): the stacks' tops, grant after grant."""
    low = tl.zeros_like(rank) + first
    high = tl.zeros_like(rank) + end  # the last grant whose start is at most the rank
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        right = tl.load(live_start + middle, mask=ok & (middle > low), other=2147483647) <= rank
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    begin = tl.load(live_start + low, mask=ok, other=0)
    height = tl.load(live_start + low + 1, mask=ok, other=0) - begin
    block = tl.load(live_block + low, mask=ok, other=0)
    return tl.load(block_free + block.to(tl.int64) * Q + height - 1 - (rank - begin), mask=ok, other=0)


@triton.jit
def _assign(
    rows, table, held, length, n_live, live_block, block_free, lane_start, live_start, page_lane, page_index, lanes, W, G,
    PER_LAYER: tl.constexpr, H: tl.constexpr, N: tl.constexpr, NG: tl.constexpr, Q: tl.constexpr, TILE: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    row = rows + 4 * tl.program_id(0)
    slot, tokens, origin = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 3).to(tl.int64)
    lane = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ok = lane < lanes
    page_tokens = tl.where(lane % PER_LAYER < H, N, NG)
    after = tl.load(length + origin * lanes + lane, mask=ok, other=0) + tokens
    has = tl.load(held + slot * lanes + lane, mask=ok, other=0)
    wants = tl.where(ok, tl.maximum((after + page_tokens - 1) // page_tokens - has, 0), 0)
    start = tl.load(lane_start + slot * lanes + lane, mask=ok, other=0)
    grants = tl.load(n_live + slot)
    begins = live_start + slot * (G + 1)
    free = tl.load(begins + grants)
    most = tl.max(wants, 0)
    for j in range(tl.program_id(2), most, tl.num_programs(2)):
        takes = (j < wants) & (start + j < free)
        page = free_page(begins, live_block + slot * G, block_free, start + j, takes, 0, grants, G, Q, SEARCH)
        tl.store(table + (slot * lanes + lane) * W + has + j, page, mask=takes)
        tl.store(page_lane + page, lane, mask=takes)
        tl.store(page_index + page, has + j, mask=takes)


@triton.jit
def _hold(
    rows,
    held,
    length,
    lanes,
    PER_LAYER: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    NG: tl.constexpr,
    TILE: tl.constexpr,
):
    row = rows + 4 * tl.program_id(0)
    slot, tokens, origin = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 3).to(tl.int64)
    lane = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ok = lane < lanes
    page_tokens = tl.where(lane % PER_LAYER < H, N, NG)
    after = tl.load(length + origin * lanes + lane, mask=ok, other=0) + tokens
    has = tl.load(held + slot * lanes + lane, mask=ok, other=0)
    tl.store(held + slot * lanes + lane, tl.maximum(has, (after + page_tokens - 1) // page_tokens), mask=ok)


def plan(lanes: Lanes, rows: torch.Tensor, most_tokens: int) -> None:
    """Give every lane of the step's requests pages for the step's tokens.

    Args:
        rows: int32 [n, 4], slot, tokens of the step, blocks granted since the last step (``grant``), and the slot whose lanes
            these tokens come after: its own, or that from which its lanes will be copied.
        most_tokens: the largest of these tokens.
    """
    if len(rows) == 0:
        return
    s = lanes.sizes
    shape = {"PER_LAYER": s.per_layer, "H": s.heads, "N": s.page_tokens, "NG": s.gate_page_tokens, "TILE": TILE}
    _needs[(len(rows),)](
        rows, lanes.held, lanes.length, lanes.n_live, lanes.live_block, lanes.n_free, lanes.lane_start, lanes.live_start,
        lanes.error, s.lanes, s.grants, **shape,
    )  # fmt: skip
    tiles = triton.cdiv(s.lanes, TILE)
    splits = max(1, triton.cdiv(most_tokens, 8 * s.page_tokens))
    _assign[(len(rows), tiles, splits)](
        rows, lanes.table, lanes.held, lanes.length, lanes.n_live, lanes.live_block, lanes.block_free, lanes.lane_start,
        lanes.live_start, lanes.page_lane, lanes.page_index, s.lanes, s.width, s.grants, Q=s.block_pages,
        SEARCH=s.grants.bit_length() + 1, **shape,
    )  # fmt: skip
    _hold[(len(rows), tiles)](rows, lanes.held, lanes.length, s.lanes, **shape)


def page_tokens_of(lanes: Lanes, lane: int) -> int:
    """Tokens of a page of this lane."""
    s = lanes.sizes
    return s.page_tokens if lane % s.per_layer < s.heads else s.gate_page_tokens


def take_page(lanes: Lanes, slot: int, grants: int) -> int:
    """Pop a free page of a request: from the top of the first live grant that has any. -1 when there is none."""
    for block in lanes.live_block[slot, :grants].tolist():
        free = int(lanes.n_free[block])
        if free:
            lanes.n_free[block] = free - 1
            return int(lanes.block_free[block, free - 1])
    return -1


def plan_naive(lanes: Lanes, rows: torch.Tensor) -> None:
    """``plan``, page by page."""
    for slot, tokens, more, origin in rows.tolist():
        lanes.n_live[slot] += more
        grants = int(lanes.n_live[slot])
        for lane in range(lanes.sizes.lanes):
            after = int(lanes.length[origin, lane]) + tokens
            for index in range(int(lanes.held[slot, lane]), -(-after // page_tokens_of(lanes, lane))):
                page = take_page(lanes, slot, grants)
                if page < 0:
                    lanes.error[0] = 1
                else:
                    lanes.table[slot, lane, index] = page
                    lanes.page_lane[page], lanes.page_index[page] = lane, index
                lanes.held[slot, lane] = index + 1
