"""Blocks come to a request, and a request ends: what happens to pages then, on the device.

``forget`` and ``grant`` launch kernels; ``forget_naive`` and ``grant_naive`` are their twins. Letters as in ``lanes``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import NEVER, Lanes


@triton.jit
def _forget(
    rows, held, shared, settled, length, n_live, slot_of_block, dropped, recorded, lanes, counts, numbers,
    NEVER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    slot = tl.load(rows + 2 * tl.program_id(0)).to(tl.int64)
    block = tl.load(rows + 2 * tl.program_id(0) + 1)
    o = tl.arange(0, TILE)
    for at in range(0, lanes, TILE):
        tl.store(held + slot * lanes + at + o, 0, mask=at + o < lanes)
        tl.store(shared + slot * lanes + at + o, 0, mask=at + o < lanes)
        tl.store(settled + slot * lanes + at + o, 0, mask=at + o < lanes)
        tl.store(length + slot * lanes + at + o, 0, mask=at + o < lanes)
    for at in range(0, counts, TILE):
        tl.store(dropped + slot * counts + at + o, 0, mask=at + o < counts)
    for at in range(0, numbers, TILE):
        tl.store(recorded + slot * numbers + at + o, NEVER, mask=at + o < numbers)
    tl.store(n_live + slot, 0)
    tl.store(slot_of_block + block, -1)


@triton.jit
def _grant(
    news, live_block, live_index, n_live, block_free, n_free, page_lane, slot_of_block, B, G,
    H: tl.constexpr, Q: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = news + 4 * tl.program_id(0)
    slot, block, index, rank = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    at = tl.load(n_live + slot) + rank
    tl.store(live_block + slot * G + at, block)
    tl.store(live_index + slot * G + at, index)
    if index == 0:
        tl.store(slot_of_block + block, slot.to(tl.int32))
    o = tl.arange(0, WIDE)
    page = ((o // H) * B + block) * H + o % H
    tl.store(block_free + block.to(tl.int64) * Q + o, page, mask=o < Q)
    tl.store(page_lane + page, -1, mask=o < Q)
    tl.store(n_free + block, Q)


def forget(lanes: Lanes, rows: torch.Tensor) -> None:
    """End lives of requests.

    Args:
        rows: int32 [n, 2], slot and first block of each.
    """
    if len(rows) == 0:
        return
    s = lanes.sizes
    counts = s.layers * s.units
    _forget[(len(rows),)](
        rows, lanes.held, lanes.shared, lanes.settled, lanes.length, lanes.n_live, lanes.slot_of_block, lanes.dropped,
        lanes.recorded, s.lanes, counts, counts * lanes.record_tokens, NEVER=NEVER, TILE=256,
    )  # fmt: skip


def grant(lanes: Lanes, news: torch.Tensor) -> None:
    """Put blocks at the end of their requests' live grants, all pages free. The counts follow in ``plan``.

    Args:
        news: int32 [n, 4], slot, block, log index, and rank among this call's blocks of the slot.
    """
    if len(news) == 0:
        return
    s = lanes.sizes
    _grant[(len(news),)](
        news, lanes.live_block, lanes.live_index, lanes.n_live, lanes.block_free, lanes.n_free, lanes.page_lane,
        lanes.slot_of_block, s.blocks, s.grants, H=s.heads, Q=s.block_pages, WIDE=triton.next_power_of_2(s.block_pages),
    )  # fmt: skip


def forget_naive(lanes: Lanes, rows: torch.Tensor) -> None:
    """``forget``, slot by slot."""
    for slot, block in rows.tolist():
        for x in (lanes.held, lanes.shared, lanes.settled, lanes.length, lanes.n_live, lanes.dropped):
            x[slot] = 0
        lanes.slot_of_block[block] = -1
        if lanes.record_tokens:
            lanes.recorded[slot] = NEVER


def pages_of(lanes: Lanes, block: int) -> list[int]:
    """Head-pages of a block, layer by layer."""
    s = lanes.sizes
    return [(layer * s.blocks + block) * s.heads + head for layer in range(s.layers) for head in range(s.heads)]


def grant_naive(lanes: Lanes, news: torch.Tensor) -> None:
    """``grant``, block by block."""
    for slot, block, index, rank in news.tolist():
        at = int(lanes.n_live[slot]) + rank
        lanes.live_block[slot, at], lanes.live_index[slot, at] = block, index
        if index == 0:
            lanes.slot_of_block[block] = slot
        pages = torch.tensor(pages_of(lanes, block), dtype=torch.int32)
        lanes.block_free[block] = pages
        lanes.page_lane[pages.long()] = -1
        lanes.n_free[block] = len(pages)
