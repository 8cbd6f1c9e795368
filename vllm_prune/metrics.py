"""What the plugin tells Prometheus, on vLLM's own ``/metrics``, through vLLM's way for KV connectors.

Counted in the engine core, step by step (``Tally``), sent with vLLM's scheduler statistics, added to series in the front end
(``PruneMetrics``). Switched off by ``disable_log_stats``, as all of vLLM's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vllm_prune.cache.geometry import LaneGeometry
from vllm_prune.cache.grants import GrantLog, LaneReport

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EVERY_SECONDS = 0.2
"""Gauges are summed up so often, and when a request ends."""
LAYERS = ("all", "first", "middle", "last", "least")
"""Of the kept fraction: over all layers, over each third of them, of the layer that kept least."""
COUNTERS = {
    "keys_dropped": "Keys dropped, over all layers and eviction units.",
    "keys_computed": "Keys computed, over all layers and eviction units.",
    "blocks_returned": "KV cache blocks that running requests gave back.",
    "bad_plan_preemptions": "Preemptions while a request held more than admission had planned for it.",
}
GAUGES = {
    "logical_tokens": "Tokens of running requests.",
    "resident_tokens": "Of these, tokens whose keys are held, as a mean over layers and heads.",
    "held_blocks": "KV cache blocks that running requests hold.",
    "dense_blocks": "KV cache blocks that stock vLLM would hold for them.",
    "stranded_slots": "Places for a token of one head that are empty in head-pages in use.",
    "snapshots": "Beginnings of prompts whose compressed state is held for other requests.",
    "snapshot_bytes": "Bytes of the blocks that these are in, of all ranks.",
    "strength_share": "Share of their full strength that gates are given now (below 1 with the option pressure only).",
}
SECONDS = {
    "decide": "Time of the worker in deciding which keys go; for single tokens in dropping and writing too (CPU workers).",
    "compaction": "Time of the worker in closing steps: packing pages, giving up blocks (CPU workers).",
}
KEPT_BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class PruneStats(KVConnectorStats):
    """Of some steps. ``data``: counts by name of ``COUNTERS`` and ``GAUGES``, ``seconds_*``, and ``kept``: fractions of requests
    that ended, by name of ``LAYERS``."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> PruneStats:
        for name, value in other.data.items():
            if name == "kept":
                mine = self.data.setdefault("kept", {})
                for layers, fractions in value.items():
                    mine[layers] = [*mine.get(layers, ()), *fractions]
            elif name in GAUGES:
                self.data[name] = value
            else:
                self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        kept = self.data.get("kept", {}).get("all", [])
        found: dict[str, int | float] = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in self.data.items() if name != "kept"
        }  # fmt: skip
        return {**found, "kept_fraction": round(sum(kept) / len(kept), 4)} if kept else found

    def is_empty(self) -> bool:
        return not self.data


def kept_fractions(report: LaneReport, layers: int) -> dict[str, float]:
    """By name of ``LAYERS``, of one request.

    Args:
        report: the last one.
        layers: L.
    """
    total = report.held + report.dropped
    if not total:
        return dict.fromkeys(LAYERS, 1.0)
    layer = total / layers
    counts = [sum(3 * i // layers == third for i in range(layers)) for third in range(3)]
    most, *gone = report.by_layer
    thirds = [1.0 - dropped / (layer * count) if count else 1.0 for dropped, count in zip(gone, counts, strict=True)]
    return dict(zip(LAYERS, [report.held / total, *thirds, 1.0 - most / layer], strict=True))


@dataclass
class Tally:
    """Counts in the engine core since they were last taken.

    Args:
        geometry: of the model on one rank.
        units: E, of all ranks.
        ranks: how many there are.

    ``level``: share of their full strength that gates are given. ``snapshots``, ``snapshot_bytes``: held now.
    """

    geometry: LaneGeometry
    units: int
    ranks: int = 1
    counts: dict[str, int] = field(default_factory=dict)
    kept: dict[str, list[float]] = field(default_factory=dict)
    summed_up: float = 0.0
    level: float = 1.0
    snapshots: int = 0
    snapshot_bytes: int = 0

    def add(self, name: str, count: int) -> None:
        if count:
            self.counts[name] = self.counts.get(name, 0) + count

    def report(self, before: LaneReport | None, now: LaneReport) -> None:
        """A request's report was taken in. ``before``: its last one."""
        old = before or LaneReport(now.epoch, 0, (), 0, 0)
        self.add("keys_dropped", now.dropped - old.dropped)
        self.add("keys_computed", now.dropped + now.held - old.dropped - old.held)

    def ended(self, report: LaneReport) -> None:
        """A request ended with this."""
        for layers, fraction in kept_fractions(report, self.geometry.num_layers).items():
            self.kept.setdefault(layers, []).append(fraction)

    def gauges(self, running: Iterable[GrantLog]) -> dict[str, float]:
        """Of the requests that run now."""
        g, found = self.geometry, dict.fromkeys(GAUGES, 0.0)
        found.update(strength_share=self.level, snapshots=self.snapshots, snapshot_bytes=self.snapshot_bytes)
        # A K/V page has a place for N tokens of one head; a gate key fills r / 2 D of one.
        places = (g.num_kv_heads + g.gate_lanes * g.gate_rank / (2 * g.head_size)) * self.ranks / self.units
        for log in running:
            report = log.report
            if report is None:
                continue
            found["logical_tokens"] += report.covered
            found["resident_tokens"] += round(report.held / (g.num_layers * self.units))
            found["held_blocks"] += log.live
            found["dense_blocks"] += g.dense_blocks(report.covered)
            found["stranded_slots"] += max(0, round(report.in_use * g.block_tokens - report.held * places))
        return found

    def take(self, running: Iterable[GrantLog]) -> PruneStats:
        """Everything since the last call."""
        data: dict[str, Any] = dict(self.counts)
        now = time.monotonic()
        if self.kept or now - self.summed_up >= EVERY_SECONDS:
            self.summed_up = now
            data |= self.gauges(running)
        if self.kept:
            data["kept"] = self.kept
        self.counts, self.kept = {}, {}
        return PruneStats(data)


class PruneMetrics(KVConnectorPromMetrics):
    """The series. Arguments as vLLM gives them."""

    def __init__(self, vllm_config: VllmConfig, metric_types: dict[Any, Any], labelnames: list[str],
                 per_engine_labelvalues: dict[int, list[object]]) -> None:  # fmt: skip
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, gauge, histogram = (metric_types[kind] for kind in (Counter, Gauge, Histogram))
        self._counters = {
            name: counter(name=f"vllm_prune:{name}", documentation=told, labelnames=labelnames)
            for name, told in COUNTERS.items()
        }
        self._gauges = {
            name: gauge(name=f"vllm_prune:{name}", documentation=told, labelnames=labelnames, multiprocess_mode="mostrecent")
            for name, told in GAUGES.items()
        }  # fmt: skip
        self._seconds = {
            name: counter(name=f"vllm_prune:{name}_seconds", documentation=told, labelnames=labelnames)
            for name, told in SECONDS.items()
        }
        self._kept = histogram(
            name="vllm_prune:kept_fraction",
            documentation="Kept fraction of a request's keys when it ended: over all layers, by third, of the least layer.",
            labelnames=[*labelnames, "layers"], buckets=KEPT_BUCKETS,
        )  # fmt: skip
        for values in per_engine_labelvalues.values():  # from the first scrape on
            for metric in (*self._counters.values(), *self._gauges.values(), *self._seconds.values()):
                metric.labels(*values)
            for layers in LAYERS:
                self._kept.labels(*values, layers)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name].labels(*values).inc(value)
            elif name in self._gauges:
                self._gauges[name].labels(*values).set(value)
            elif name.startswith("seconds_"):
                self._seconds[name.removeprefix("seconds_")].labels(*values).inc(value)
        for layers, fractions in transfer_stats_data.get("kept", {}).items():
            for fraction in fractions:
                self._kept.labels(*values, layers).observe(fraction)
