"""Rows of a step: which request slot each row of vLLM's batch belongs to, found on the device.

The first block of a row's block table names its request (``Lanes.slot_of_block``). Done once a step by the first layer, so that
a captured graph reads what the step's grants wrote. ``rows_naive`` is the twin. Letters as in ``lanes``; R rows, C cuts a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .lanes import Lanes


@dataclass
class Rows:
    """Of a step; all int32, at fixed addresses where a graph is captured.

    Attributes:
        slot: [R], -1 for rows that are padding.
        first: [R + 1], first token of each row in the batch.
        start: [R], position of that token.
        settled: [R, E, 2], scratch between ``retire`` and ``settle``: tokens of the unit's lanes before, and survivors.
    """

    slot: torch.Tensor
    first: torch.Tensor
    start: torch.Tensor
    settled: torch.Tensor

    @classmethod
    def make(cls, count: int, units: int, first: torch.Tensor, device: torch.device | str) -> Rows:
        """Of ``count`` rows whose first tokens are given."""
        empty = torch.zeros(2, count, dtype=torch.int32, device=device)
        settled = torch.zeros(count, units, 2, dtype=torch.int32, device=device)
        return cls(empty[0], first, empty[1], settled)

    @property
    def count(self) -> int:
        return len(self.slot)


@triton.jit
def _rows(block_table, stride, seq_lens, first, slot_of_block, slot, start):
    r = tl.program_id(0)
    tokens = tl.load(first + r + 1) - tl.load(first + r)
    found = tl.load(slot_of_block + tl.load(block_table + r.to(tl.int64) * stride))
    tl.store(slot + r, tl.where(tokens > 0, found, -1))
    tl.store(start + r, tl.load(seq_lens + r) - tokens)


def find_rows(lanes: Lanes, rows: Rows, block_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Fill ``slot`` and ``start``.

    Args:
        block_table: int32 [R, W'], of which the first column is read.
        seq_lens: int32 [R], tokens of each request including the step's.
    """
    if rows.count:
        _rows[(rows.count,)](
            block_table, block_table.stride(0), seq_lens, rows.first, lanes.slot_of_block, rows.slot, rows.start
        )


def rows_naive(lanes: Lanes, rows: Rows, block_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """``find_rows``, all rows at once."""
    tokens = rows.first.diff()
    slot = lanes.slot_of_block[block_table[:, 0].long()]
    rows.slot.copy_(torch.where(tokens > 0, slot, -1))
    rows.start.copy_(seq_lens - tokens)


def parts_of(rows: Rows, cuts: torch.Tensor | None, grid: int = 0, most_tokens: int = 0) -> list[Rows]:
    """Rows cut at positions: the first parts of all rows, then their second parts, and so on; nothing is read back.

    Each has the tokens of all parts, in 2 R + 1 rows: those between the parts that are its own have the slot -1. A row's parts
    end at its cuts, in order; a cut that is twice there ends an empty part too (``part_before``).

    Args:
        cuts: int32 [S, C], by slot: where its row is cut, NEVER where it is not; or None.
        grid: rows are cut at its multiples too, unless it is 0.
        most_tokens: the most tokens that a row has.
    """
    units, count, device = rows.settled.shape[1], rows.count, rows.start.device
    found = [] if cuts is None else [cuts[rows.slot.clamp_min(0).long()]]
    if grid:
        borders = max(0, most_tokens - 2) // grid + 1  # as many as can lie inside a row
        later = torch.arange(1, borders + 1, dtype=torch.int32, device=device)
        found.append((rows.start[:, None] // grid + later) * grid)
    at = torch.cat(found, dim=1).sort(dim=1).values if len(found) > 1 else found[0]
    tokens = rows.first.diff()[:, None]
    edges = torch.cat(
        [torch.zeros_like(tokens), (at - rows.start[:, None]).clamp_min(0).minimum(tokens), tokens], dim=1
    )
    parts = edges.shape[1] - 1
    # By part, and for each row twice: where its tokens before the part begin, and the part itself. A part's numbers begin at a
    # multiple of 16 bytes: a kernel is compiled anew for pointers that do not.
    count, wide = 2 * count + 1, -(2 * count + 2) // 4 * -4
    first, slot, start = (torch.full((parts, wide), x, dtype=torch.int32, device=device) for x in (0, -1, 0))
    ends = (rows.first[:-1, None] + edges).T
    first[:, 0], first[:, count] = rows.first[0], rows.first[-1]
    first[:, 1:count:2], first[:, 2:count:2] = ends[:-1], ends[1:]
    slot[:, 1:count:2] = torch.where((edges.diff(dim=1) > 0).T, rows.slot, -1)
    start[:, 1:count:2] = (rows.start[:, None] + edges[:, :-1]).T
    settled = torch.zeros(parts, wide, units, 2, dtype=torch.int32, device=device)
    return [
        Rows(slot[part, :count], first[part, : count + 1], start[part, :count], settled[part, :count])
        for part in range(parts)
    ]


def part_before(cut: int, number: int, start: int, grid: int = 0) -> int:
    """Which of a row's parts ends at its cut ``number``, at position ``cut``. start: of the row; grid: as for ``parts_of``."""
    return number + ((cut - 1) // grid - start // grid if grid else 0)
