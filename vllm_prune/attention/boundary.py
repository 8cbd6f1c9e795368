"""Serving of gates that decide at boundaries (LTP, ACC-style), CPU: chunks are walked from boundary to boundary.

Within a segment nothing expires, so vLLM's own kernel attends; segments between which nothing was dropped attend together.
What keys received is a second pass of ours (``cache/boundary.c``): the kernel hands out no log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vllm_prune.cache.lane_ops import Boundary, Tokens, check, lib

if TYPE_CHECKING:
    import torch

    from vllm_prune.attention.state import Rows
    from vllm_prune.cache.lanes import LaneStore
    from vllm_prune.gates import BoundaryRule

Row = tuple[int, int, int]
"""Slot, first token in the batch, tokens."""


class BoundarySteps:
    """One layer's rule, with what the compiled loops need of the layer.

    Args:
        rule: of the layer's gate.
        index: of the layer.
        group: G, query heads per KV head.
        scale: of the logits.
    """

    def __init__(self, rule: BoundaryRule, index: int, group: int, scale: float) -> None:
        self.index, self.grid = index, rule.grid
        self.given = Boundary(
            group=group, grid=rule.grid, span=rule.span, after=rule.after, sinks=rule.sinks, scale=scale,
            threshold=0.0 if rule.threshold is None else rule.threshold, keep=-1.0 if rule.keep is None else rule.keep,
        )  # fmt: skip

    def decode(self, store: LaneStore, rows: Rows, tokens: Tokens, query: torch.Tensor) -> None:
        """Drop, write and add up for rows of one token. query: [T, H * G, D], of the step."""
        given = self.given.point(query)
        check(lib.boundary_decode(store.lanes.ref, self.index, rows.count, *rows.pointers, tokens, given))

    def chunk(self, store: LaneStore, rows: Rows, i: int, tokens: Tokens, query: torch.Tensor,
              attend: Callable[[list[Row]], None]) -> Row:  # fmt: skip
        """The same for one chunk.

        Args:
            attend: attention of these rows over the lanes as they are, called before lanes lose keys.

        Returns:
            The last segments, written but not attended to yet.
        """
        slot, first, count, start = (int(x[i]) for x in (rows.slots, rows.first, rows.tokens, rows.positions))
        ref, given, lane = store.lanes.ref, self.given.point(query), self.index * store.geometry.lanes_per_layer
        victims = np.empty(int(store.lanes.length[slot, lane]) + count, np.int32)
        waiting, at, end = start, start, start + count
        while at < end:
            if at % self.grid == 0:
                gone = check(lib.boundary_decide(ref, slot, self.index, given, at, victims.ctypes.data))
                if gone:
                    if at > waiting:
                        attend([(slot, first + waiting - start, at - waiting)])
                        waiting = at
                    check(lib.boundary_drop(ref, slot, self.index, at, victims.ctypes.data, gone))
            stop = min(end, at - at % self.grid + self.grid)
            check(lib.boundary_write(ref, slot, self.index, given, at, first + at - start, stop - at, tokens))
            at = stop
        return slot, first + waiting - start, end - waiting
