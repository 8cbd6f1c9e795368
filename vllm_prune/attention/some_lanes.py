"""Tables of one call of vLLM's kernel over lanes, and of one over some of them: the others' queries get no output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


class LanePlan:
    """Tables of one kernel call over lanes, shared by the layers of a step that attend to the same rows.

    Args:
        rows: (slot, first token, count) of each request.
        heads: H.
        width: W', columns of the block table.
    """

    def __init__(self, rows: list[tuple[int, int, int]], heads: int, width: int) -> None:
        self.rows = rows
        counts = np.asarray([count for _, _, count in rows], np.int32)
        self.direct = bool(counts.max() == 1) and rows[-1][1] - rows[0][1] == len(rows) - 1
        starts = np.zeros(len(rows) * heads + 1, np.int32)
        np.cumsum(np.repeat(counts, heads), out=starts[1:])
        self.slots = np.asarray([slot for slot, _, _ in rows], np.int32)
        self.starts = torch.from_numpy(starts)
        self.tables = torch.zeros((len(rows) * heads, width), dtype=torch.int32)
        self.lengths = torch.zeros(len(rows) * heads, dtype=torch.int32)
        self.schedule: torch.Tensor | None = None
        self.pointers = (self.slots.ctypes.data, self.tables.data_ptr(), width, self.lengths.data_ptr())


@dataclass(frozen=True)
class SomeLanes:
    """A kernel call over part of a plan's lanes.

    Attributes:
        tokens: int64 [tokens of these lanes], their places among the tokens of all lanes.
        starts: int32 [lanes + 1] of these tokens.
        lengths, tables: rows of the plan's.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor


def pick_lanes(plan: LanePlan, chosen: torch.Tensor) -> SomeLanes:
    """Part of a plan.

    Args:
        plan: whose tables are filled.
        chosen: bool [lanes].
    """
    counts = plan.starts.diff()
    tokens = chosen.repeat_interleave(counts).nonzero()[:, 0]
    starts = torch.zeros(int(chosen.sum()) + 1, dtype=torch.int32)
    starts[1:] = counts[chosen].cumsum(0)
    return SomeLanes(tokens, starts, plan.lengths[chosen], plan.tables[chosen])
