"""The KV connector that carries grants to the worker and reports back to the manager. It transfers no KV.

Scheduler side (engine core): tells the worker of new grants and of requests that ended, hands reports to the manager,
sums up each request. Worker side: applies them to the lane store before a step, closes the step after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from vllm_prune.attention.serving import ServedGate
from vllm_prune.cache.grants import GrantLog, LaneReport
from vllm_prune.cache.partings import Partings
from vllm_prune.cache.snapshots import MOST, MOST_ON_GPU, SnapshotOrder, Snapshots
from vllm_prune.chat import Markers, Span
from vllm_prune.config import served_section, server_options
from vllm_prune.gates import Reveal
from vllm_prune.lifetimes import Lifetimes
from vllm_prune.messages import LATE, PruneMetadata, PruneReports, StepGrant
from vllm_prune.metrics import PruneMetrics, PruneStats, kept_fractions
from vllm_prune.pressure import LEVELS, Applied, Pressure, pressure_options
from vllm_prune.protect import Protect
from vllm_prune.requests import RequestGates, request_gates

if TYPE_CHECKING:
    import torch
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_prune.attention.step_state import StepState
    from vllm_prune.cache.manager import PruneManager


class PruneConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. Set by the config hook; never named on a command line."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._manager: PruneManager | None = None
        self._state: StepState | None = None
        self._requests: dict[str, Request] = {}
        self._prompts: dict[str, int] = {}
        self._section = served_section(vllm_config)
        served = ServedGate.of(self._section)
        self._dense, self._decides_once = served.planned_dense, served.reveal is not Reveal.BY_QUERY
        self._gates: dict[str, RequestGates] = {}
        self._lifetimes: dict[str, Lifetimes] = {}
        self._maps = server_options(vllm_config).get("maps", False)
        pressure = pressure_options(server_options(vllm_config))
        self._pressure = None if pressure is None else Pressure(pressure)
        self._applied: dict[str, Applied] = {}
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._protect: Protect = extra["protect"]
        self._markers: Markers | None = extra["markers"]
        self._spared: dict[str, tuple[Span, ...]] = {}
        self._reports: dict[str, list[LaneReport]] = {}
        self._doomed: set[int] = set()
        self._prefixes = bool(vllm_config.cache_config.enable_prefix_caching)
        self._snapshots: Snapshots | None = None
        self._chunk = vllm_config.scheduler_config.max_num_batched_tokens
        self._on_gpu = vllm_config.device_config.device_type == "cuda"
        late = LATE if self._on_gpu else 0
        self._ahead = vllm_config.max_concurrent_batches - 1 + late

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # Scheduler side ----------------------------------------------------------------------------------------------

    def has_pending_block_frees(self) -> bool:
        # vLLM asks when a running request is short of blocks: then it waits for the next step instead of preempting somebody.
        # Without this a request alone in the pool could be preempted for the bound that holds until its report comes, and that
        # over and over; and one that is doomed would no longer be running when the scheduler hears of it.
        return self._manager is not None and self._manager.waits_for_report()

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        manager: PruneManager
        (manager,) = kv_cache_manager.coordinator.single_type_managers  # type: ignore[assignment]
        self._manager, self._cache = manager, kv_cache_manager
        if self._prefixes:
            pool, most = kv_cache_manager.block_pool, MOST_ON_GPU if self._on_gpu else MOST
            self._snapshots = manager.snapshots = Snapshots(pool, manager.geometry, most)
            spacing = server_options(self._vllm_config).get("snapshot_spacing", 0)
            self._partings = Partings(manager.geometry.block_tokens, spacing)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens of a waiting request whose lanes are held, by a snapshot of ours; None: ask again in the next step."""
        assert self._manager is not None
        self._manager.starting.pop(request.request_id, None)
        if self._snapshots is None or request.skip_reading_prefix_cache:
            return 0, False
        found = self._snapshots.find(request, *self._treatment(request))
        if self._soon(request, 0 if found is None else found.tokens):
            return None, False
        usable = self._manager.block_pool.num_gpu_blocks - 1
        if found is None or self._manager.blocks_to_start(found, request.num_tokens) > usable:
            return 0, False  # there is none, or the pool could never hold both
        self._manager.starting[request.request_id] = found
        return found.tokens, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """A request was admitted, from a snapshot or from its first token. vLLM's figures of its prefix cache count both."""
        if self._snapshots is None:
            return
        self._partings.starts(request.request_id, num_external_tokens)
        stats = self._cache.prefix_cache_stats
        if num_external_tokens and stats is not None and not request.num_preemptions:
            stats.hits += num_external_tokens

    def _soon(self, request: Request, held: int) -> bool:
        """Whether a waiting request should wait for a longer prefix, which spares it half of its tokens at least: somebody who
        runs has still to come by its end, and will before this request could; or the worker is about to report it."""
        behind = self._partings.behind(request.request_id)
        if behind is None or 2 * (behind[1] - held) < request.num_tokens - held:
            return False
        assert self._snapshots is not None and self._manager is not None
        first, at, to_come = behind
        blocks, snapshots = at // self._snapshots.block_tokens, self._snapshots
        prefix = snapshots.prefix(request, blocks, *self._treatment(request))
        if to_come and first in self._manager.grants:
            other = self._requests[first]
            return snapshots.prefix(other, blocks, *self._treatment(other)) == prefix
        return snapshots.being_made(prefix) and self._partings.may_wait(request.request_id)

    def _treatment(self, request: Request) -> tuple[float, Sequence[Span]]:
        """What of a request decides what is left of its tokens: strength, and spared positions."""
        return self._gates[request.request_id].strength, self._spared.get(request.request_id, ())

    def on_new_request(self, request: Request) -> None:
        assert self._manager is not None
        params = request.sampling_params
        # Checked in the front end: what comes here otherwise than through vLLM's input processor ends the engine.
        asked = None if params is None else params.extra_args
        longest = request.num_prompt_tokens + request.max_tokens
        gates = request_gates(asked, self._section, maps=self._maps, tokens=longest)
        self._requests[request.request_id] = request
        self._gates[request.request_id] = gates
        protect = self._protect if gates.protect is None else gates.protect
        if protect:
            self._spared[request.request_id] = protect.spans(request.prompt_token_ids or (), self._markers)
        if gates.map:
            request.skip_reading_prefix_cache = True  # of what was dropped before a snapshot nobody knows when
            self._lifetimes[request.request_id] = Lifetimes.of(
                self._section, self._manager.kv_cache_spec.eviction_units
            )
        if self._snapshots is not None:
            ids, markers = request.prompt_token_ids, self._markers
            self._partings.arrives(request, 0 if markers is None or ids is None else markers.system_end(ids))
        if gates.strength != self._section.strength and not self._dense:
            self._manager.expected_keep[request.request_id] = gates.expected_keep

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> PruneMetadata:
        assert self._manager is not None
        ended = {*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())}
        meta = PruneMetadata(ended=sorted(ended))
        if scheduler_output.preempted_req_ids and self._manager.over_plan():
            self._manager.tally.add("bad_plan_preemptions", len(scheduler_output.preempted_req_ids))
        if self._pressure is not None:
            self._pressure.observe(self._manager.block_pool.get_usage())
            self._manager.tally.level = self._pressure.level / LEVELS
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for req_id, tokens in scheduler_output.num_scheduled_tokens.items():
            grants = self._manager.grants[req_id]
            covered = computed[req_id] + tokens
            request = self._requests[req_id]
            remaining = max(request.num_tokens - covered, 0)
            outputs = request.num_output_tokens + request.num_output_placeholders  # the latter are in flight
            last = remaining == 0 and outputs + 1 >= request.max_tokens
            ahead = self._ahead * max(min(remaining, self._chunk), 1)
            blocks, grants.told = [block.block_id for block in grants.take_unsent()], covered
            # vLLM counts all that came before into the prompt of a session that goes on: what was decided stays decided.
            prompt = self._prompts.setdefault(req_id, request.num_prompt_tokens)
            strength = self._strength(request)
            if self._pressure is not None:
                self._applied.setdefault(req_id, Applied()).add(strength, tokens)
            start = self._manager.starting.pop(req_id, None) if grants.sent == len(blocks) else None
            begins = covered == tokens or start is not None
            meta.grants[req_id] = StepGrant(
                grants.epoch, blocks, tokens, covered, remaining, last, ahead, prompt, strength,
                self._spared.get(req_id, ()) if begins else (), self._gates[req_id].map,
                None if start is None else start.name, self._snapshots_of(request, grants, covered - tokens, covered),
            )  # fmt: skip
        if self._snapshots is not None:
            self._snapshots.settle()
            meta.gone = self._snapshots.take_gone()
        return meta

    def _snapshots_of(self, request: Request, grants: GrantLog, before: int, covered: int) -> Sequence[SnapshotOrder]:
        """Those that a request leaves in a step that takes it from ``before`` tokens to ``covered``."""
        if self._snapshots is None:
            return ()
        due = self._partings.take(request.request_id, before, covered)
        made = [self._snapshots.make(request, grants, at, *self._treatment(request)) for at in due]
        return [order for order in made if order is not None]

    def _strength(self, request: Request) -> float:
        """Of a request's gates in this step."""
        ceiling, pressure = self._gates[request.request_id].strength, self._pressure
        if pressure is None:
            return ceiling
        assert self._manager is not None
        dense = self._manager.geometry.dense_blocks(request.num_prompt_tokens + request.max_tokens)
        if self._decides_once and pressure.too_long(dense, self._manager.block_pool.num_gpu_blocks):
            return ceiling
        return pressure.strength(ceiling)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        reports = connector_output.kv_connector_worker_meta
        if isinstance(reports, PruneReports):
            assert self._manager is not None
            for req_id, told in reports.reports.items():
                for report in told:
                    if self._snapshots is not None and self._snapshots.accept(req_id, report):
                        continue
                    self._manager.accept(req_id, report)
                    if report.drops is not None and req_id in self._lifetimes:
                        self._lifetimes[req_id].add(report)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Called once a step, on either side."""
        if self._state is not None:
            seconds, self._state.seconds = self._state.seconds, {}
            if not self._state.ranks.speaks:
                return None
            return PruneStats({f"seconds_{name}": value for name, value in seconds.items()}) if seconds else None
        if self._manager is None:
            return None
        tally = self._manager.tally
        if self._snapshots is not None:
            tally.snapshots = len(self._snapshots)
            tally.snapshot_bytes = self._snapshots.blocks * self._manager.kv_cache_spec.block_bytes
        return tally.take(self._manager.grants.values())

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return PruneStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: dict[Any, Any], labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:  # fmt: skip
        return PruneMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        summary = self._summary(request)
        assert self._manager is not None
        kept = (self._requests, self._prompts, self._gates, self._applied, self._spared, self._lifetimes,
                self._manager.expected_keep, self._manager.starting)  # fmt: skip
        for known in kept:
            known.pop(request.request_id, None)
        if self._snapshots is not None:
            self._partings.ended(request.request_id)
        return False, summary

    def _summary(self, request: Request) -> dict[str, Any] | None:
        """What rides on the response: keys kept and dropped over all layers and units, and blocks, of this request."""
        assert self._manager is not None
        grants = self._manager.grants.get(request.request_id)
        if grants is None or grants.report is None:
            return None
        report, spec = grants.report, self._manager.kv_cache_spec
        kept = kept_fractions(report, spec.num_layers)
        dense = spec.geometry.dense_blocks(report.covered)
        self._manager.tally.ended(report)
        lifetimes = self._lifetimes.get(request.request_id)
        prompt = self._prompts[request.request_id]
        asked = {} if lifetimes is None else {"map": lifetimes.answer(prompt, report.covered)}
        applied = self._applied.get(request.request_id)
        shared = 0 if self._snapshots is None else self._snapshots.shared_by(request.request_id)
        return {
            "vllm_prune": {
                "strength": self._gates[request.request_id].strength,
                **({} if applied is None else {"strength_applied": applied.told()}),
                "tokens": report.covered,
                "tokens_protected": sum(end - begin for begin, end in self._spared.get(request.request_id, ())),
                "kept_fraction": kept["all"],
                "kept_fraction_least_layer": kept["least"],
                "kept_pairs": report.kept_pairs,
                "keys_held": report.held,
                "keys_dropped": report.dropped,
                "blocks_held": grants.live,
                "blocks_peak": grants.peak,
                "blocks_returned": grants.returned,
                "blocks_shared": shared,
                "blocks_dense": dense,
                "kv_bytes_held": grants.live * spec.block_bytes,
                "kv_bytes_saved": (dense - grants.live - shared) * spec.block_bytes,
                **asked,
            }
        }

    # Worker side -------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm_prune.attention.step_state import find_state

        self._state = find_state(self._vllm_config)
        self._state.bind(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # The first call of a step in vLLM's worker: before the batch is built, and also when nothing is scheduled.
        if self._state is not None and isinstance(kv_connector_metadata, PruneMetadata):
            self._state.begin_step(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        # Once a step, after the forward pass: every layer has dropped and written what it had to.
        if self._state is None:
            return
        told = self._state.end_step()
        if self._state.ranks.speaks:  # said again later by another, a block could be somebody else's by then
            self._reports, self._doomed = told

    def get_block_ids_with_load_errors(self) -> set[int]:
        # vLLM's own way to end single requests with an error: one that has outgrown the whole pool would otherwise be
        # preempted and recomputed for ever.
        doomed, self._doomed = self._doomed, set()
        return doomed

    def build_connector_worker_meta(self) -> PruneReports | None:
        reports, self._reports = self._reports, {}
        return PruneReports(reports) if reports else None
