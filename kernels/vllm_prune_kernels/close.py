"""The end of a step: spare pages go back to their blocks, pages are packed into the lowest grants, and each request reports.

A report is [pages in use now, after 1, 2, 3, 4 more tokens kept in every lane; keep: log index from which no grant is needed any
more; keys held; keys dropped; grants left; grants before; error; most keys dropped in a layer, and those of the first, middle
and last third of the layers; pages settled; pages shared]. Packing moves every page in use out of the grants that are
given up, so that what the report says is true when it is read, however late. Pages are those of its own; a snapshot also says how
many of them are settled, a request how many it shares besides. ``close_naive`` is the twin. Letters: ``lanes``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .grants import pages_of
from .lanes import REPORT, Lanes
from .plan import free_page, page_tokens_of, take_page

TILE = 64
PACKERS = 16
"""Programs a request that move pages."""


@triton.jit
def _release(
    rows, table, held, length, block_free, n_free, page_lane, lanes, W, B,
    PER_LAYER: tl.constexpr, H: tl.constexpr, N: tl.constexpr, NG: tl.constexpr, Q: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    slot = tl.load(rows + 4 * tl.program_id(0)).to(tl.int64)
    lane = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ok = lane < lanes
    page_tokens = tl.where(lane % PER_LAYER < H, N, NG)
    needs = (tl.load(length + slot * lanes + lane, mask=ok, other=0) + page_tokens - 1) // page_tokens
    spare = tl.where(ok, tl.load(held + slot * lanes + lane, mask=ok, other=0) - needs, 0)
    for j in range(tl.program_id(2), tl.max(spare, 0), tl.num_programs(2)):
        gives = j < spare
        page = tl.load(table + (slot * lanes + lane) * W + needs + j, mask=gives, other=0)
        block = (page // H) % B
        at = tl.atomic_add(n_free + block, 1, mask=gives)
        tl.store(block_free + block.to(tl.int64) * Q + at, page, mask=gives)
        tl.store(page_lane + page, -1, mask=gives)


@triton.jit
def _report(
    rows, held, shared, settled, length, n_live, live_block, live_index, n_free, live_start, gone_start, dropped, error, out,
    lanes, G, counts,
    PER_LAYER: tl.constexpr, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr, NG: tl.constexpr, Q: tl.constexpr,
    OUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """rows: slot, tokens ahead (-1: ``more`` pages instead), more, grants seen (0: nothing is given up)."""
    row = rows + 4 * tl.program_id(0)
    slot, ahead, more, seen = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    o = tl.arange(0, TILE)
    p0, p1, p2, p3, p4, keys, need, theirs, sure = 0, 0, 0, 0, 0, 0, 0, 0, 0
    for at in range(0, lanes, TILE):
        lane = at + o
        ok = lane < lanes
        h = lane % PER_LAYER
        size = tl.where(h < H, N, NG)
        tokens = tl.load(length + slot * lanes + lane, mask=ok, other=0)
        pages = tl.where(ok, (tokens + size - 1) // size, 0)
        tl.store(held + slot * lanes + lane, pages, mask=ok)
        p0 += tl.sum(pages, 0)
        p1 += tl.sum(tl.where(ok, (tokens + size) // size, 0), 0)
        p2 += tl.sum(tl.where(ok, (tokens + 1 + size) // size, 0), 0)
        p3 += tl.sum(tl.where(ok, (tokens + 2 + size) // size, 0), 0)
        p4 += tl.sum(tl.where(ok, (tokens + 3 + size) // size, 0), 0)
        need += tl.sum(tl.where(ok, (tokens + tl.maximum(ahead, 0) + size - 1) // size, 0), 0)
        keys += tl.sum(tl.where(ok & (h < E), tokens, 0), 0)
        theirs += tl.sum(tl.load(shared + slot * lanes + lane, mask=ok, other=0), 0)
        sure += tl.sum(tl.load(settled + slot * lanes + lane, mask=ok, other=0), 0)
    need += more - theirs
    gone, most, gone0, gone1, gone2 = 0, 0, 0, 0, 0
    layers = counts // E
    for at in range(0, layers, TILE):
        layer = at + o
        mine = tl.zeros_like(layer)
        for unit in range(E):
            mine += tl.load(dropped + slot * counts + layer * E + unit, mask=layer < layers, other=0)
        third = 3 * layer // layers
        most = tl.maximum(most, tl.max(mine, 0))
        gone += tl.sum(mine, 0)
        gone0 += tl.sum(tl.where(third == 0, mine, 0), 0)
        gone1 += tl.sum(tl.where(third == 1, mine, 0), 0)
        gone2 += tl.sum(tl.where(third == 2, mine, 0), 0)
    grants = tl.load(n_live + slot)
    stay = tl.maximum((need + Q - 1) // Q, 1)
    stay = tl.where((seen > 0) & (stay < grants), stay, grants)
    used = 0
    for at in range(stay, grants, TILE):
        i = at + o
        block = tl.load(live_block + slot * G + i, mask=i < grants, other=0)
        busy = tl.where(i < grants, Q - tl.load(n_free + block, mask=i < grants, other=Q), 0)
        tl.store(gone_start + slot * (G + 1) + i, used + tl.cumsum(busy, 0) - busy, mask=i < grants)
        used += tl.sum(busy, 0)
    free = 0
    for at in range(0, tl.where(used > 0, stay, 0), TILE):
        i = at + o
        block = tl.load(live_block + slot * G + i, mask=i < stay, other=0)
        pages = tl.load(n_free + block, mask=i < stay, other=0)
        before = free + tl.cumsum(pages, 0) - pages
        tl.store(live_start + slot * (G + 1) + i, before, mask=i < stay)
        taken = tl.minimum(tl.maximum(used - before, 0), pages)
        tl.store(n_free + block, pages - taken, mask=i < stay)
        free += tl.sum(pages, 0)
    tl.store(live_start + slot * (G + 1) + stay, free, mask=used > 0)
    if free < used:
        tl.store(error, 1)
    tl.store(n_live + slot, stay)
    last = tl.load(live_index + slot * G + stay - 1) + 1
    say = out + tl.program_id(0) * OUT
    tl.store(say, p0 - theirs)
    tl.store(say + 1, p1 - theirs)
    tl.store(say + 2, p2 - theirs)
    tl.store(say + 3, p3 - theirs)
    tl.store(say + 4, p4 - theirs)
    tl.store(say + 5, tl.where(stay < grants, last, seen))
    tl.store(say + 6, keys)
    tl.store(say + 7, gone)
    tl.store(say + 8, stay)
    tl.store(say + 9, grants)
    tl.store(say + 10, tl.load(error))
    tl.store(say + 11, most)
    tl.store(say + 12, gone0)
    tl.store(say + 13, gone1)
    tl.store(say + 14, gone2)
    tl.store(say + 15, sure)
    tl.store(say + 16, theirs)


@triton.jit
def _pack(
    rows, out, table, live_block, block_free, live_start, gone_start, page_lane, page_index, position, expiry, kv, lanes, W, B, G,
    H: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, OUT: tl.constexpr, PAGE: tl.constexpr, SEARCH: tl.constexpr,
    WIDE: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    slot = tl.load(rows + 4 * tl.program_id(0)).to(tl.int64)
    stay = tl.load(out + tl.program_id(0) * OUT + 8)
    grants = tl.load(out + tl.program_id(0) * OUT + 9)
    begins = live_start + slot * (G + 1)
    q, n, c = tl.arange(0, WIDE), tl.arange(0, N), tl.arange(0, COPY)
    for k in range(tl.program_id(1), (grants - stay) * Q, tl.num_programs(1)):
        i, mine = stay + k // Q, k % Q
        block = tl.load(live_block + slot * G + i)
        owner = tl.load(page_lane + ((q // H) * B + block) * H + q % H, mask=q < Q, other=-1)
        lane = tl.max(tl.where(q == mine, owner, -1), 0)
        if lane >= 0:
            rank = tl.load(gone_start + slot * (G + 1) + i) + tl.sum(((owner >= 0) & (q < mine)).to(tl.int32), 0)
            many = rank + tl.zeros([1], dtype=tl.int32)
            to = tl.max(free_page(begins, live_block + slot * G, block_free, many, many >= 0, 0, stay, G, Q, SEARCH), 0)
            page = ((mine // H) * B + block) * H + mine % H
            index = tl.load(page_index + page)
            tl.store(table + (slot * lanes + lane) * W + index, to)
            tl.store(page_lane + to, lane)
            tl.store(page_index + to, index)
            source, target = page.to(tl.int64), to.to(tl.int64)
            tl.store(position + target * N + n, tl.load(position + source * N + n))
            tl.store(expiry + target * N + n, tl.load(expiry + source * N + n))
            for at in range(0, PAGE, COPY):
                tl.store(
                    kv + target * PAGE + at + c,
                    tl.load(kv + source * PAGE + at + c, mask=at + c < PAGE),
                    mask=at + c < PAGE,
                )


def close(lanes: Lanes, kv: torch.Tensor, rows: torch.Tensor, most_tokens: int) -> torch.Tensor:
    """Close a step.

    Args:
        kv: [P, 2 N D], the cache.
        rows: int32 [n, 4]: slot; tokens that may already be scheduled beyond this step, whose pages are kept; further pages to
            keep (where more tokens than that are ahead: the bound for all of them, and 0 tokens); length of the request's grant
            log, 0 when it must give nothing up.
        most_tokens: the most tokens of a request in this step.

    Returns:
        int32 [n, ``REPORT``]: see the module.
    """
    s = lanes.sizes
    out = torch.empty(len(rows), REPORT, dtype=torch.int32, device=rows.device)
    if len(rows) == 0:
        return out
    shape = {"H": s.heads, "N": s.page_tokens, "Q": s.block_pages}
    tiles = (triton.cdiv(s.lanes, TILE), max(1, triton.cdiv(most_tokens, 8 * s.page_tokens)))
    _release[(len(rows), *tiles)](
        rows, lanes.table, lanes.held, lanes.length, lanes.block_free, lanes.n_free, lanes.page_lane, s.lanes, s.width, s.blocks,
        PER_LAYER=s.per_layer, NG=s.gate_page_tokens, TILE=TILE, **shape,
    )  # fmt: skip
    _report[(len(rows),)](
        rows, lanes.held, lanes.shared, lanes.settled, lanes.length, lanes.n_live, lanes.live_block, lanes.live_index,
        lanes.n_free, lanes.live_start, lanes.gone_start, lanes.dropped, lanes.error, out, s.lanes, s.grants, s.layers * s.units,
        PER_LAYER=s.per_layer, E=s.units, NG=s.gate_page_tokens, OUT=REPORT, TILE=TILE, **shape,
    )  # fmt: skip
    _pack[(len(rows), PACKERS)](
        rows, out, lanes.table, lanes.live_block, lanes.block_free, lanes.live_start, lanes.gone_start, lanes.page_lane,
        lanes.page_index, lanes.position, lanes.expiry, kv, s.lanes, s.width, s.blocks, s.grants, OUT=REPORT,
        PAGE=s.page_numbers, SEARCH=s.grants.bit_length() + 1, WIDE=triton.next_power_of_2(s.block_pages),
        COPY=min(1024, triton.next_power_of_2(s.page_numbers)), **shape,
    )  # fmt: skip
    return out


def close_naive(lanes: Lanes, kv: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``close``, page by page."""
    s = lanes.sizes
    out = torch.zeros(len(rows), REPORT, dtype=torch.int32)
    for r, (slot, ahead, more, seen) in enumerate(rows.tolist()):
        theirs = int(lanes.shared[slot].sum())
        pages = [-theirs] * 5
        need = more - theirs
        for lane in range(s.lanes):
            size, tokens = page_tokens_of(lanes, lane), int(lanes.length[slot, lane])
            use = -(-tokens // size)
            for index in range(use, int(lanes.held[slot, lane])):
                page = int(lanes.table[slot, lane, index])
                block = page // s.heads % s.blocks
                lanes.block_free[block, int(lanes.n_free[block])] = page
                lanes.n_free[block] += 1
                lanes.page_lane[page] = -1
            lanes.held[slot, lane] = use
            for extra in range(5):
                pages[extra] += -(-(tokens + extra) // size)
            need += -(-(tokens + max(ahead, 0)) // size)
        grants = int(lanes.n_live[slot])
        stay = max(-(-need // s.block_pages), 1)
        stay = stay if seen > 0 and stay < grants else grants
        for i in range(stay, grants):
            for page in pages_of(lanes, int(lanes.live_block[slot, i])):
                lane = int(lanes.page_lane[page])
                if lane < 0:
                    continue
                to, index = take_page(lanes, slot, stay), int(lanes.page_index[page])
                lanes.table[slot, lane, index] = to
                lanes.page_lane[to], lanes.page_index[to] = lane, index
                lanes.position[to], lanes.expiry[to] = lanes.position[page], lanes.expiry[page]
                kv[to] = kv[page]
        lanes.n_live[slot] = stay
        keep = int(lanes.live_index[slot, stay - 1]) + 1 if stay < grants else seen
        held = sum(
            int(lanes.length[slot, layer * s.per_layer + unit]) for layer in range(s.layers) for unit in range(s.units)
        )
        gone = lanes.dropped[slot].sum(-1).tolist()
        thirds = [sum(gone[i] for i in range(s.layers) if 3 * i // s.layers == third) for third in range(3)]
        said = [*pages, keep, held, sum(gone), stay, grants, int(lanes.error), max(gone), *thirds, int(lanes.settled[slot].sum()),
                theirs]  # fmt: skip
        out[r, : len(said)] = torch.tensor(said, dtype=torch.int32)
    return out
