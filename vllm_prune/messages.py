"""What the two sides of the connector say to each other: the engine core of each step, the worker of what it left.

Sent between processes; nothing here acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from vllm_prune.cache.grants import LaneReport
from vllm_prune.cache.snapshots import SnapshotOrder

LATE = 2
"""Steps after which a worker on a GPU hands a report over at the latest: it is copied without waiting for it."""


@dataclass
class StepGrant:
    """One scheduled request of a step: the grants the worker has not seen, and how far the step takes it.

    Attributes:
        epoch: of its grant log.
        new_blocks: block ids, in log order.
        tokens: of the step.
        covered: tokens computed once the step is done.
        remaining: tokens known to follow (the rest of a prompt, or of what a preempted request had generated).
        last: the request ends with this step (its token limit), so it needs no room beyond.
        in_flight: tokens that may be scheduled before this step's report is read (0 without asynchronous scheduling).
        prompt: P, tokens of the request's own prompt, whatever was generated and is computed again.
        strength: of the gates for this request in this step.
        spared: positions [begin, end) whose keys no gate may drop, with the first step of each life of the request.
        map: the request asked for its map.
        start: snapshot whose lanes the request starts from; snapshots: to make of it in this step, by position.
    """

    epoch: int
    new_blocks: list[int]
    tokens: int
    covered: int
    remaining: int
    last: bool
    in_flight: int
    prompt: int
    strength: float
    spared: Sequence[tuple[int, int]] = ()
    map: bool = False
    start: str | None = None
    snapshots: Sequence[SnapshotOrder] = ()


@dataclass
class PruneMetadata(KVConnectorMetadata):
    """Scheduler to worker, one a step. ``ended``: ids whose life is over (finished, aborted or preempted); ``gone``:
    snapshots of which this is so."""

    ended: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    grants: dict[str, StepGrant] = field(default_factory=dict)


@dataclass
class PruneReports(KVConnectorWorkerMetadata):
    """Worker to scheduler, one a step, by the first rank for all. Each request's reports in the order of steps: a GPU's come
    when they are ready, and what one gives back the next does not repeat."""

    reports: dict[str, list[LaneReport]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> PruneReports:
        """Never called by vLLM: ranks have agreed before the first one speaks for all (``cache/ranks.py``)."""
        raise ValueError("vllm-prune: a second rank reports")
