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


def parts_of(rows: Rows, cuts: torch.Tensor) -> list[Rows]:
    """Rows cut at positions: the first parts of all rows, then their second parts, and so on; nothing is read back.

    Each has the tokens of all parts, in 2 R + 1 rows: those between the parts that are its own have the slot -1.

    Args:
        cuts: int32 [S, C], ascending, by slot: where its row is cut, NEVER where it is not.
    """
    return _parts_at(rows, cuts[rows.slot.clamp_min(0).long()])


def segments_of(rows: Rows, grid: int, most_tokens: int) -> list[Rows]:
    """Rows cut at the multiples of ``grid``, as ``parts_of`` does it.

    Args:
        most_tokens: the most tokens that a row has.
    """
    borders = max(0, most_tokens - 2) // grid + 1  # as many as can lie inside a row
    later = torch.arange(1, borders + 1, dtype=torch.int32, device=rows.start.device)
    return _parts_at(rows, (rows.start[:, None] // grid + later) * grid)


def _parts_at(rows: Rows, cuts: torch.Tensor) -> list[Rows]:
    """``parts_of`` with cuts int32 [R, C] by row."""
    units, count = rows.settled.shape[1], rows.count
    tokens = rows.first.diff()
    at = (cuts - rows.start[:, None]).clamp_min(0).minimum(tokens[:, None])
    edges = torch.cat([torch.zeros_like(tokens)[:, None], at, tokens[:, None]], dim=1)
    found = []
    for part in range(cuts.shape[1] + 1):
        mine = rows.first[:-1, None] + edges[:, part : part + 2]
        first = torch.cat([rows.first[:1], mine.reshape(-1), rows.first[-1:]])
        slot = torch.full((2 * count + 1,), -1, dtype=torch.int32, device=first.device)
        slot[1::2] = torch.where(edges[:, part] < edges[:, part + 1], rows.slot, -1)
        start = torch.zeros_like(slot)
        start[1::2] = rows.start + edges[:, part]
        settled = torch.zeros(len(slot), units, 2, dtype=torch.int32, device=first.device)
        found.append(Rows(slot, first, start, settled))
    return found
