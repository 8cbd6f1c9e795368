"""Law 3: blocks free + owned = pool after every step, and every lane holds exactly what a brute-force model says.

vLLM's own scheduler (and, in half of the histories, its asynchronous one, which hears of a step only after it has scheduled the
next), with the plugin's manager, both sides of its connector, its lane store and attention, in one process. Histories are
random: arrivals that ask for strengths, protection and maps, budgets of tokens from step to step, aborts, a cache reset that
throws everybody out, and pools so small that the scheduler preempts by itself; in some, strength follows the pool, in some
requests start from snapshots of others' prompts, and share those pages in which nothing changes any more. At the end
all that is left must come to an end within a number of steps that no preemption may stretch, and the pool be whole.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bare_worker import STOP, BareWorker, token_at
from brute_force import BY_TOKEN, CHUNK, LONGEST, METHODS, SEEN, SINKS, WHOLE, D, G, H, L, gates_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scheduling import block_hasher, cache_of, configuration, request, scheduler, write_model
from support import FULL
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_prune.gates import GATES, NEVER
from vllm_prune.lifetimes import unpack
from vllm_prune.pressure import LEVELS, PressureOptions

SEQS = 4
STRENGTHS = (None, 0.0, 0.5, 2.0)
"""That requests ask for; None: the server's, 1."""


class Machine(RuleBasedStateMachine):
    """One engine's life. ``folder``: where its checkpoint may be written."""

    def __init__(self, method: str, folder: Path) -> None:
        super().__init__()
        self.method, self.folder = method, folder

    @initialize(late=st.booleans(), pressure=st.booleans(), spare=st.sampled_from([0, 1, 4, 12]),
                keep=st.sampled_from([1.0, 0.2]), prefixes=st.booleans(), seed=st.integers(0, 2**16))  # fmt: skip
    def start(self, late, pressure, spare, keep, prefixes, seed):
        method = self.method
        gates, params = gates_of(method, seed)
        protects = GATES[gates[0].method].protects
        window = 3 if method in WHOLE else 0
        section = {
            "params": params,
            "expected_keep": keep,
            "protect": {"sinks": SINKS, "window": window} if protects else {},
        }
        write_model(self.folder, L, H * G, H, D, gates, section)
        options: dict[str, Any] = {"maps": True}
        if method == "open":
            options["strength"] = 0.0
        self.pressure = PressureOptions(start=0.1, full=0.6) if pressure and method in BY_TOKEN else None
        if self.pressure:
            options["pressure"] = self.pressure.model_dump()
        chunk = LONGEST + SEQS if method in WHOLE else CHUNK
        config = configuration(
            self.folder, LONGEST, max_num_seqs=SEQS, max_num_batched_tokens=chunk, enable_prefix_caching=prefixes,
            additional_config={"vllm_prune": options},
        )  # fmt: skip
        config.scheduler_config.async_scheduling = late  # as a GPU has it: on CPU vLLM switches it off
        assert config.max_concurrent_batches == 1 + late
        self.hasher = block_hasher(config) if config.cache_config.enable_prefix_caching else None
        self.worker = BareWorker(method, config, gates, 0)
        spec = self.worker.spec
        self.blocks = spec.peak_blocks(LONGEST) + spare + 1  # the least that vLLM starts with, and some
        self.worker.pool = self.blocks
        cache = cache_of(self.worker.names, spec, self.blocks)
        with set_current_vllm_config(config):
            self.scheduler: Scheduler = scheduler(config, cache)
        self.worker.start(cache)
        (self.manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.late, self.chunk = late, chunk
        self.flying: list[tuple[Any, ModelRunnerOutput]] = []
        self.asked: dict[str, float] = {}
        self.requests: dict[str, Request] = {}
        self.past: list[tuple[int, Any, Any]] = []
        self.names = 0
        self.level = 0

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    # Histories -----------------------------------------------------------------------------------------------------

    @rule(prompt=st.integers(1, LONGEST - 20), more=st.integers(1, 40), strength=st.sampled_from(STRENGTHS),
          spared=st.none() | st.tuples(st.integers(0, 200), st.integers(0, 60)), mapped=st.booleans(),
          seed=st.integers(0, 2**16), again=st.integers(0, 2))  # fmt: skip
    def arrive(self, prompt, more, strength, spared, mapped, seed, again):
        if len(self.requests) >= 7:
            return
        if again and self.past and self.hasher:  # as somebody before, of another length
            seed, strength, spared, mapped = *self.past[seed % len(self.past)], False
        self.past.append((seed, strength, spared))
        asked: dict[str, Any] = {"map": True} if mapped else {}
        if strength is not None and self.method != "open":
            asked["strength"] = strength
        if spared is not None and self.method in BY_TOKEN:
            asked["protect"] = f"{spared[0]}:{spared[0] + spared[1]}"
        self.names += 1
        name = f"r{self.names}"
        ids = [token_at(seed, position) for position in range(prompt)]
        new = request(name, ids, min(more, LONGEST - prompt), [STOP], self.hasher, **asked)
        self.worker.seeds[name], self.requests[name] = seed, new
        self.asked[name] = 0.0 if self.method == "open" else 1.0 if strength is None else strength
        self.scheduler.add_request(new)

    @precondition(lambda self: self.requests)
    @rule(budget=st.sampled_from([1, 3, 16, 32, 33, CHUNK, CHUNK, CHUNK]), times=st.integers(1, 4))
    def step(self, budget, times):
        for _ in range(times):
            self.one_step(self.chunk if self.method in WHOLE else budget)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 6))
    def abort(self, which):
        """A client has gone: in the queue, in a prefill, while decoding, or with a step in flight."""
        name = list(self.requests)[which % len(self.requests)]
        SEEN["aborts with a step in flight"] += any(name in out.num_scheduled_tokens for out, _ in self.flying)
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        del self.requests[name]

    @precondition(lambda self: self.scheduler.running)
    @rule(dice=st.integers(0, 2))
    def throw_out(self, dice):
        if dice == 0:
            self.scheduler.reset_prefix_cache(reset_running_requests=True)
            SEEN["resets"] += 1

    # One step of the engine ------------------------------------------------------------------------------------------

    def one_step(self, budget: int) -> None:
        self.scheduler.max_num_scheduled_tokens = budget
        running = {name: r.num_computed_tokens for name, r in self.requests.items() if r.num_computed_tokens}
        out = self.scheduler.schedule()
        self.check_meta(out.kv_connector_metadata)
        for name in out.preempted_req_ids or ():
            SEEN["preemptions"] += 1
            prefill = running.get(name, 0) < self.requests[name].num_tokens - 1 if name in self.requests else False
            SEEN["preemptions in a prefill"] += prefill
        SEEN["steps"] += bool(out.num_scheduled_tokens)
        SEEN["late steps"] += bool(self.flying)
        self.flying.append((out, self.worker.execute(out)))
        self.check_blocks()
        while len(self.flying) > int(self.late):
            self.hear()

    def hear(self) -> None:
        """The scheduler takes in the oldest step's output."""
        before = self.pool.get_num_free_blocks()
        out, told = self.flying.pop(0)
        meta = told.kv_connector_output and told.kv_connector_output.kv_connector_worker_meta
        for name, reports in (meta.reports if meta else {}).items():
            grants = self.manager.grants.get(name)
            SEEN["stale reports"] += grants is None or grants.epoch != reports[0].epoch
        ended = self.scheduler.update_from_output(out, told)
        SEEN["blocks returned"] += self.pool.get_num_free_blocks() > before
        for output in ended[0].outputs if 0 in ended else ():
            if output.finish_reason is not None:
                self.check_end(self.requests.pop(output.request_id), output)
        self.check_blocks()

    # What must always hold ---------------------------------------------------------------------------------------------

    def check_meta(self, meta: Any) -> None:
        """Strengths are what requests asked for, or follow the pool's use under that; spared is what was asked for."""
        use = self.pool.get_usage()
        if self.pressure:
            least, most = (self.level_at(min(use + more, 1.0)) for more in (0.0, self.pressure.slack))
            assert least <= self.manager.tally.level * LEVELS <= max(most, least)
            self.level = round(self.manager.tally.level * LEVELS)
        for name, grant in meta.grants.items():
            asked = self.asked[name]
            if self.pressure is None:
                assert grant.strength == asked
            else:
                assert grant.strength in (asked, asked * self.level / LEVELS)
            if (grant.covered == grant.tokens or grant.start) and self.method in BY_TOKEN:
                said = (self.requests[name].sampling_params.extra_args or {}).get("prune.protect")
                begin, end = map(int, said.split(":")) if said else (0, 0)
                end = min(end, grant.prompt)
                assert list(grant.spared) == ([(begin, end)] if begin < end else [])

    def level_at(self, use: float) -> int:
        share = (use - self.pressure.start) / (self.pressure.full - self.pressure.start)
        return min(max(int(np.ceil(LEVELS * share)), 0), LEVELS)

    def check_blocks(self) -> None:
        owned = [block.block_id for grants in self.manager.grants.values() for block in grants.log if block is not None]
        assert len(owned) == len(set(owned)) and 0 not in owned
        sharing = self.manager.snapshots._sharers if self.manager.snapshots else {}
        shared = {block.block_id for snapshot in sharing.values() for block in snapshot.blocks}
        assert not shared & set(owned) and set(sharing) <= set(self.manager.grants)
        assert len(owned) + len(shared) + self.pool.get_num_free_blocks() == self.blocks - 1
        assert set(self.manager.grants) == {
            name for name, r in self.requests.items() if r.status == RequestStatus.RUNNING
        }
        for name, grants in self.manager.grants.items():
            assert grants.live == sum(block is not None for block in grants.log)
            row = self.manager.req_to_blocks[name]
            assert [None if block.is_null else block for block in row] == grants.log

    @invariant()
    def worker_owns_what_the_manager_granted(self):
        """Of those who are alive on both sides; the worker hears of ends with the next step."""
        if not hasattr(self, "manager"):
            return
        for name, slot in self.worker.store.slots.items():
            grants = self.manager.grants.get(name)
            if grants is not None and grants.epoch == slot.epoch:
                granted = {block.block_id for block in grants.log if block is not None}
                assert {block for block in slot.grants if block >= 0} <= granted

    def check_end(self, ended: Request, output: Any) -> None:
        """A request is answered once, for a reason that it gave, with an account that brute force agrees with."""
        ids, reason = ended.output_token_ids, str(output.finish_reason)
        SEEN[f"ended: {reason}"] += 1
        if reason == "error":
            dense = self.worker.spec.geometry.blocks_for(min(ended.num_tokens + self.chunk, LONGEST))
            assert dense > self.blocks - 1, "only what could not be held whole may end so"
            amid = not ids and ended.num_prompt_tokens > self.chunk  # of its prompt
            assert amid or len(ids) + 1 < ended.max_tokens, "nor what had all that it wanted"
            return
        seed, prompt = self.worker.seeds[ended.request_id], ended.num_prompt_tokens
        assert list(ids) == [token_at(seed, prompt + i) for i in range(len(ids))]
        assert (ids[-1] == STOP) if reason == "stop" else len(ids) == ended.max_tokens
        told = output.kv_transfer_params
        if told is None:
            return
        told = told["vllm_prune"]
        life, tokens = self.worker.lives[ended.request_id], told["tokens"]
        expiry = life.expiry[..., :tokens]
        seen, gone = (expiry < tokens).sum(), (expiry <= tokens).sum()
        assert told["keys_held"] + told["keys_dropped"] == expiry.size
        assert seen <= told["keys_dropped"] <= gone
        if "map" in told:
            SEEN["maps"] += 1
            np.testing.assert_array_equal(unpack(told["map"]), np.where(expiry < tokens, expiry, NEVER))

    def teardown(self):
        if not hasattr(self, "manager"):
            return
        # The one that came first is never thrown out for another: it ends within its own tokens' steps, then the next does.
        most = sum(-(-LONGEST // self.chunk) + r.max_tokens + 4 for r in self.requests.values())
        while self.requests:
            assert most > 0, (
                f"no progress: {[(r.request_id, r.status, r.num_computed_tokens) for r in self.requests.values()]}"
            )
            most -= 1
            self.one_step(self.chunk)
        while self.flying:
            self.hear()
        self.one_step(self.chunk)  # a last one, for the worker to hear of the ends
        while self.flying:
            self.hear()
        assert self.pool.get_num_free_blocks() == self.blocks - 1
        assert all(name.startswith("\0snapshot") for name in self.worker.store.slots)
        assert not self.manager.grants and not self.manager.req_to_blocks
        connector = self.scheduler.connector
        known = (connector._requests, connector._prompts, connector._gates, connector._applied, connector._spared,
                 connector._lifetimes, self.manager.expected_keep, self.manager.starting)  # fmt: skip
        assert not any(known) and not (self.hasher and len(connector._partings)), "nothing of a request is kept"
        SEEN["histories"] += 1


HISTORIES = settings(
    max_examples=int(os.environ.get("VLLM_PRUNE_HISTORIES", 200 if FULL else 10)),
    stateful_step_count=40,
    deadline=None,
    derandomize=not FULL,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@pytest.fixture(scope="module")
def one_rank():
    """vLLM's process groups, of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        with set_current_vllm_config(VllmConfig()):
            ensure_model_parallel_initialized(1, 1)
        yield
        kv_transfer_state._KV_CONNECTOR_AGENT = None
        cleanup_dist_env_and_memory()


@pytest.mark.parametrize("method", METHODS)
def test_pool_and_lanes(method, one_rank, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_state_machine_as_test(lambda: Machine(method, tmp_path), settings=HISTORIES)
    torch.set_num_threads(threads)


def test_histories_were_worth_it():
    for event in (
        "blocks returned", "stale reports", "preemptions", "preemptions in a prefill", "mixed steps", "keys dropped",
        "tokens skipped", "requests with closed lanes", "groups not chosen", "mixed strengths", "strength changes",
        "spared keys", "maps", "resets", "late steps", "starts from snapshots", "pages shared",
        "aborts with a step in flight", "requests doomed",
    ):  # fmt: skip
        assert SEEN[event] > 2, f"{event}: {SEEN}"
    assert SEEN["steps"] > 4000, SEEN
    print(dict(SEEN))
