"""What admission makes of the kept fraction that a checkpoint promises: it is corrected by what requests really keep.

A checkpoint's ``expected_keep`` was measured on other texts. Where requests keep more, admission that goes on believing it lets
in more of them than the pool can hold, and most of what is computed is thrown away by preemptions. So the scheduler's manager
compares, report by report, and plans with the promise times the factor that it was wrong by; never with less than promised.
Runs in the engine core.
"""

from __future__ import annotations

from vllm_prune.cache.grants import LaneReport

FADE = 0.999
"""Weight of what was learned before, at each report: some tens of steps of a full batch, or a thousand of one request."""


class Promise:
    """Held and promised keys of running requests of late.

    Args:
        chunk_tokens: most tokens of one request in one step. Requests up to that long are planned whole, and teach nothing.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._held = self._promised = 0.0

    def learn(self, report: LaneReport, keep: float) -> None:
        """Take in a report of a request that was promised to keep a fraction ``keep`` of its keys."""
        total = report.held + report.dropped
        if report.covered <= self.chunk_tokens or not total:
            return
        self._held = FADE * self._held + report.covered * report.held / total
        self._promised = FADE * self._promised + report.covered * keep

    @property
    def factor(self) -> float:
        """How many times as much is kept as was promised; 1 if less."""
        return max(self._held / self._promised, 1.0) if self._promised else 1.0

    def planned(self, keep: float) -> float:
        """Kept fraction to plan with where ``keep`` is promised."""
        return min(keep * self.factor, 1.0)
