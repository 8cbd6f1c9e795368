"""What ranks of a tensor parallel group agree on: each holds the lanes of its own KV heads, all hold the same blocks.

Once a step, before anything is given back, ranks tell each other what their lanes need and hold: one collective of a few
numbers a request. Then each knows the need of the rank that holds most, gives back no more than that one can, and so every
rank's grant log reads alike; and each could report for all, so that only the first one does. Runs in the worker.

Letters: R requests, A numbers of pages (now and after 1, 2, ... more tokens), L layers, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Counts:
    """Of the requests of a step: on one rank, or joined over all. int64.

    Attributes:
        need: [R], head-pages that the request may need before the scheduler hears of it; joined: the most of any rank.
        pages: [R, A], in use now, and others, such as after more tokens; joined: the most of any rank.
        held, ends: [R], keys held; sum over dropped keys of the first query that did not see them (0 where not counted).
        dropped: [R, L], keys dropped in each layer.
        in_use: [R], head-pages in use on all ranks; None before they are joined.
    """

    need: torch.Tensor
    pages: torch.Tensor
    held: torch.Tensor
    ends: torch.Tensor
    dropped: torch.Tensor
    in_use: torch.Tensor | None = None

    def columns(self) -> torch.Tensor:
        """[R, C]: what a rank tells of its own, as ``joined`` takes it."""
        parts = [self.need[:, None], self.pages, self.held[:, None], self.ends[:, None], self.dropped]
        return torch.cat(parts, dim=1)

    def by_layer(self) -> torch.Tensor:
        """[R, 4]: keys dropped in the layer that dropped most, and in the first, middle and last third of the layers."""
        layers = self.dropped.shape[1]
        third = torch.tensor([3 * i // layers for i in range(layers)], device=self.dropped.device)
        parts = self.dropped.new_zeros(len(self.dropped), 3).index_add_(1, third, self.dropped)
        return torch.cat([self.dropped.amax(1, keepdim=True), parts], dim=1)


@dataclass(frozen=True)
class Ranks:
    """One rank's view of its tensor parallel group.

    Attributes:
        rank, count: 0-based, and how many there are.
        split: whether each KV head decides for itself, so that the ranks' counts of keys add up. Otherwise all ranks take the
            same decisions, and count the same.
        group: vLLM's coordinator of the group; None for one rank.
    """

    rank: int = 0
    count: int = 1
    split: bool = False
    group: Any = None

    @classmethod
    def of_this_worker(cls, split: bool) -> Ranks:
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        return cls(group.rank_in_group, group.world_size, split, group)

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def speaks(self) -> bool:
        """Whether this rank reports to the scheduler."""
        return self.rank == 0

    def join(self, mine: Counts) -> Counts:
        """Tell the other ranks, and hear of them. All ranks must call it for the same requests, in one order."""
        flat = mine.columns()
        # As float32, two a number: bits are copied, and integers are not in vLLM's CPU loops.
        told = self.group.all_gather(flat.view(torch.float32), dim=0).view(torch.int64)
        return joined(told.view(self.count, *flat.shape), mine.pages.shape[1], self.split)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """The first rank's x, on all of them: the others add 0 to it, which is exact."""
        return self.group.all_reduce(x.clone() if self.rank == 0 else torch.zeros_like(x))  # type: ignore[no-any-return]


def joined(told: torch.Tensor, pages: int, split: bool) -> Counts:
    """Of what all ranks told.

    Args:
        told: int64 [ranks, R, C], columns as ``Counts`` has them.
        pages: A.
        split: whether counts of keys add up.

    Raises:
        RuntimeError: ranks should have taken the same decisions and did not (CPU; elsewhere nothing is read back).
    """
    most, keys = told[..., : 1 + pages].amax(0), told[..., 1 + pages :]
    if not split and keys.device.type == "cpu" and bool((keys != keys[0]).any()):
        raise RuntimeError("vllm-prune: ranks dropped different keys by a decision that all heads share; this is a bug")
    counted = keys.sum(0) if split else keys[0]
    return Counts(most[:, 0], most[:, 1:], counted[:, 0], counted[:, 1], counted[:, 2:], told[..., 1].sum(0))
