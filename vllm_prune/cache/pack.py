"""Packing: the pages in use of grants that are to be given up move into free pages of the grants that stay (numba).

Freed head-pages are reused by the request's other lanes first, so pages scatter; a block can only go back whole. Each
move copies one head-page. The naive twin is the brute-force model of ``cache.reference``.
"""

from __future__ import annotations

import numba


@numba.njit(cache=True, nogil=True)
def pack_slot(a, d, s, keep_blocks, gone_blocks, num_blocks, num_layers):
    """Rebuild the free stack of slot s from the kept blocks, filling it with the pages of the blocks given up.

    keep_blocks, gone_blocks: int32 block ids, in log order. Kept grants must have room for what moves (they do: the
    caller keeps as many blocks as there are pages in use).
    """
    n = 0
    for b in range(keep_blocks.shape[0] - 1, -1, -1):  # highest grant at the bottom: the lowest fill first
        for layer in range(num_layers):
            base = (layer * num_blocks + keep_blocks[b]) * d.H
            for h in range(d.H):
                if a.page_lane[base + h] < 0:
                    a.free[s, n] = base + h
                    n += 1
    moved = 0
    for b in range(gone_blocks.shape[0]):
        for layer in range(num_layers):
            base = (layer * num_blocks + gone_blocks[b]) * d.H
            for h in range(d.H):
                page = base + h
                lane = a.page_lane[page]
                if lane < 0:
                    continue
                if n == 0:
                    raise RuntimeError("vllm-prune: no room to pack into (a bug in page accounting)")
                n -= 1
                to = a.free[s, n]
                a.kv[to, :] = a.kv[page, :]
                a.pos[to, :] = a.pos[page, :]
                a.exp[to, :] = a.exp[page, :]
                index = a.page_index[page]
                a.table[s, lane, index] = to
                a.page_lane[to] = lane
                a.page_index[to] = index
                a.page_lane[page] = -1
                moved += 1
    a.n_free[s] = n
    return moved
