"""Scheduler-side account of one request's blocks: the grant log and what the worker last said of it.

Every block granted to a request is appended to its log and named by its index there, on both sides. The worker reports
which grants it still needs; the rest go back to the pool. Until a report arrives an upper bound holds: the last report
plus the most that the tokens since can need. Lateness that the worker was told to expect (``StepGrant.in_flight``) is therefore
safe. Runs in the engine core.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_prune.cache.geometry import LaneGeometry


@dataclass
class LaneReport:
    """What workers say of one request after a step: of all ranks together, which have agreed on it (``ranks.py``).

    Attributes:
        epoch: of the grant log it speaks of; a report about an earlier life of the request is ignored.
        covered: tokens of the request computed so far.
        pages: its own head-pages in use now, and after 1, 2, ... more tokens if those are kept in every lane; of the rank with
            most.
        unsettled: the same of a snapshot without those that nothing changes any more, which requests share; settled: how many of
            these there are, of the rank with most of them.
        keep: grants [0, keep) are still needed; the worker will never again use grants [keep, seen).
        seen: length of the grant log when the worker spoke.
        dropped: keys dropped so far, summed over layers and eviction units (of all ranks).
        held: keys held now, summed likewise.
        peak_pages: most head-pages ever in use; of the rank with most.
        by_layer: of ``dropped``, the most of any layer, then those of the first, middle and last third of the layers.
        ends: sum over dropped keys of the first query that did not see them; None where it is not counted (GPU).
        drops: of a request that asked for its map, keys dropped since its last report: int32 [n, 3] of layer * E + unit, key,
            first query that did not see it. None for all others.
        in_use: head-pages in use now on all ranks, shared ones too.
    """

    epoch: int
    covered: int
    pages: tuple[int, ...]
    keep: int
    seen: int
    dropped: int = 0
    held: int = 0
    peak_pages: int = 0
    by_layer: tuple[int, ...] = (0, 0, 0, 0)
    ends: int | None = None
    drops: np.ndarray | None = None
    in_use: int = 0
    unsettled: tuple[int, ...] = ()
    settled: int = 0

    @property
    def kept_pairs(self) -> float | None:
        """Share of past (query, key) pairs that queries saw: what gates are trained and calibrated to keep. None where unknown.

        With T tokens a dropped key j that query e missed first was seen by e - 1 - j queries, a held one by T - 1 - j.
        """
        total = (self.held + self.dropped) * (self.covered - 1) / 2
        if self.ends is None:
            return None
        seen = self.ends - self.dropped + (self.covered - 1) * self.held
        return seen / total - 1.0 if total else 1.0


@dataclass
class GrantLog:
    """Account of one life (admission to finish or preemption) of a request.

    Attributes:
        epoch: tells lives of the same request id apart.
        log: every block granted, in order; ``None`` where given back. Elements are vLLM's KVCacheBlock.
        live: grants not given back.
        sent: length of the log that the worker has been told of.
        told: tokens that it has been told to compute.
        report: the worker's last word, if any.
        returned, peak: totals for statistics, in blocks.
    """

    epoch: int
    log: list[Any] = field(default_factory=list)
    live: int = 0
    sent: int = 0
    told: int = 0
    report: LaneReport | None = None
    returned: int = 0
    peak: int = 0

    @property
    def awaits_report(self) -> bool:
        """Whether the worker has still to say what it needs after all that it was told to compute."""
        return self.told > (self.report.covered if self.report else 0)

    def needed(self, geometry: LaneGeometry, tokens: int, shared: int = 0) -> int:
        """Blocks that suffice for the request's first ``tokens`` tokens, whatever the gates decide from here on; with as many
        pages beside its own as it has ``shared``."""
        dense = geometry.pages_for(tokens)
        if self.report is None:
            return geometry.blocks_for_pages(dense)
        more = max(tokens - self.report.covered, 0)
        if more < len(self.report.pages):
            pages = self.report.pages[more]
        else:
            pages = self.report.pages[0] + geometry.pages_for(more)
        return geometry.blocks_for_pages(min(pages + shared, dense))

    def grant(self, blocks: list[Any]) -> None:
        self.log.extend(blocks)
        self.live += len(blocks)
        self.peak = max(self.peak, self.live)

    def take_unsent(self) -> list[Any]:
        """Grants the worker has not been told of; they are told now."""
        unsent, self.sent = self.log[self.sent :], len(self.log)
        return unsent

    def accept(self, report: LaneReport) -> list[Any]:
        """Take a report in; return the blocks it gives back, tail first.

        One of another life changes nothing. One that a newer has overtaken says nothing of what is needed, but what it gives up
        the newer does not repeat.
        """
        if report.epoch != self.epoch:
            return []
        if self.report is None or report.covered >= self.report.covered:
            self.report = report
        back = []
        for index in range(min(report.seen, len(self.log)) - 1, max(report.keep, 1) - 1, -1):
            block = self.log[index]
            if block is not None:
                back.append(block)
                self.log[index] = None
        self.live -= len(back)
        self.returned += len(back)
        return back
