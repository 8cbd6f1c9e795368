"""Law 3: blocks free + owned = pool after every step, and every lane holds exactly what a brute-force model says.

The real manager, block pool, lane store and attention implementation in one process, driven by random histories: admit,
prefill in chunks, decode, drop (by query, delayed, known at write, at boundaries, none), preempt, abort, finish, with
reports on time or a step late (as under asynchronous scheduling). Gate features are small integers, so that scores are
exact and the model cannot disagree by rounding. Free pages are poisoned with NaN: any read of them shows.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.core.block_pool import BlockPool

from vllm_prune.attention.cpu import PruneCPUImpl
from vllm_prune.attention.serving import DelayRule, QueryRule, ServedGate, WriteRule
from vllm_prune.attention.state import PruneAttentionMetadata, Rows
from vllm_prune.cache.lanes import LaneStore
from vllm_prune.cache.manager import PruneManager
from vllm_prune.cache.spec import PruneSpec
from vllm_prune.gates import NEVER, BoundaryRule, Reveal
from vllm_prune.gates.boundary import hard_walk

L, H, G, D, N, RANK = 2, 2, 2, 32, 32, 8
BLOCKS, CHUNK, LONGEST, SINKS, DELAY, WINDOW = 24, 70, 320, 2, 5, 40
BIASES = np.asarray([2.5, 3.5], np.float32)
PER_HEAD = ("dcp_kv_head", "dms", "random")
SALTS, LIMIT = np.asarray([7, 2**31 + 5], np.uint32), 2**31
"""Of random eviction: half of the keys survive."""
BOUNDARY = {
    "ltp": BoundaryRule(grid=16, span=10, after=10, sinks=SINKS, threshold=0.9),
    "acc": BoundaryRule(grid=16, span=0, after=8, sinks=SINKS, keep=0.3),
}
"""Decided from real-valued attention: here only chance keeps a score away from its limit by more than rounding."""
SEEN: Counter = Counter()
"""What the histories of this run went through; checked at the end, so that the machine cannot pass by idling."""


@cache
def mix(x: int) -> int:
    """The hash of random eviction in unbounded integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


@dataclass
class Model:
    """Brute force: every token a request has computed, and the expiry of each key."""

    seed: int
    total: int
    covered: int = 0
    query: list = field(default_factory=list)
    key: list = field(default_factory=list)
    value: list = field(default_factory=list)
    features: list = field(default_factory=list)
    expiry: np.ndarray | None = None  # [L, E, covered]


class PoolMachine(RuleBasedStateMachine):
    @initialize(
        method=st.sampled_from(["open", "dcp", "dcp_kv_head", "dms", "window", "random", *BOUNDARY]),
        late=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def start(self, method, late, seed):
        self.rng = np.random.default_rng(seed)
        self.method, self.late, self.units = method, late, H if method in PER_HEAD else 1
        rank, lanes = (RANK, self.units) if method.startswith("dcp") else (0, 0)
        self.spec = PruneSpec(block_size=N, num_kv_heads=H, head_size=D, dtype=torch.float32, num_layers=L, gate_rank=rank,
                              gate_lanes=lanes, chunk_tokens=CHUNK)  # fmt: skip
        self.pool = BlockPool(BLOCKS, enable_caching=False, hash_block_size=N)
        self.manager = PruneManager(
            self.spec, self.pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=N
        )
        self.store = LaneStore(self.spec.geometry, 8, LONGEST, BLOCKS, torch.float32, self.units,
                               self.spec.max_grants(LONGEST), received=method in BOUNDARY)  # fmt: skip
        cache = torch.full((L, BLOCKS, H, N, 2 * D), float("nan"))
        self.store.bind(list(cache))
        reveal = {"open": None, "dcp": Reveal.BY_QUERY, "dcp_kv_head": Reveal.BY_QUERY, "dms": Reveal.DELAYED}.get(
            method, Reveal.AT_BOUNDARY if method in BOUNDARY else Reveal.AT_WRITE
        )
        rule = {
            **BOUNDARY,
            "dcp": QueryRule(1.0, BIASES[:1]),
            "dcp_kv_head": QueryRule(1.0, BIASES),
            "dms": DelayRule(0.0, DELAY),
            "window": WriteRule(SALTS[:1], 0, WINDOW),
            "random": WriteRule(SALTS, LIMIT, DELAY),
        }.get(method)
        serving = ServedGate(reveal, rank, self.units, lanes, SINKS if reveal else 0, 0)
        self.impls = []
        for layer in range(L):
            impl = PruneCPUImpl(H * G, D, D**-0.5, H)
            state = SimpleNamespace(store=self.store, serving=serving)
            impl.rule = rule
            impl.attach(state, layer)
            self.impls.append(impl)
        self.state = state
        self.running: dict[str, Model] = {}
        self.waiting: list[tuple[str, Model]] = []
        self.pending: list[dict] = []
        self.names = 0

    # Histories -----------------------------------------------------------------------------------------------------

    @rule(total=st.integers(1, LONGEST - 40), seed=st.integers(0, 2**16))
    def arrive(self, total, seed):
        if len(self.running) + len(self.waiting) < 6:
            self.names += 1
            self.waiting.append((f"r{self.names}", Model(seed, total)))

    @precondition(lambda self: self.running or self.waiting)
    @rule(chunk=st.sampled_from([1, 3, 16, 32, 33, CHUNK]), pick=st.integers(0, 2**16))
    def step(self, chunk, pick):
        """One step of the engine: admit who fits, give everyone a chunk or a token, run all layers, report."""
        order = np.random.default_rng(pick)
        scheduled: dict[str, int] = {}
        for name in list(self.running):
            if name not in self.running or order.random() < 0.2:
                continue
            model = self.running[name]
            left = model.total - model.covered
            tokens = min(chunk if left > 1 else 1, max(left, 1), CHUNK)
            if model.covered + tokens > LONGEST:
                continue
            while name in self.running and not self.allocate(name, model.covered + tokens):
                self.preempt(list(self.running)[-1], scheduled)
            if name in self.running:
                scheduled[name] = tokens
        while self.waiting and len(self.running) < 4:
            name, model = self.waiting[0]
            tokens = min(chunk, model.total, CHUNK)
            if not self.allocate(name, tokens):
                break
            self.waiting.pop(0)
            self.running[name] = model
            scheduled[name] = tokens
        if scheduled:
            self.run(scheduled)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 5))
    def end(self, which):
        """Finish or abort (also in the middle of a prefill): the worker hears of it before the next step."""
        name = list(self.running)[which % len(self.running)]
        self.drop_request(name)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 5))
    def throw_out(self, which):
        self.preempt(list(self.running)[which % len(self.running)], {})

    # The parts that vLLM plays ---------------------------------------------------------------------------------------

    def allocate(self, name: str, tokens: int) -> bool:
        need = self.manager.get_num_blocks_to_allocate(name, tokens, [], 0, 0, tokens)
        if need > self.pool.get_num_free_blocks():
            return False
        if name not in self.manager.num_cached_block:
            self.manager.add_local_computed_blocks(name, [], 0, 0)
        assert len(self.manager.allocate_new_blocks(name, tokens, tokens)) == need
        return True

    def drop_request(self, name: str) -> None:
        self.manager.free(name)
        self.store.forget(name)
        del self.running[name]

    def preempt(self, name: str, scheduled: dict[str, int]) -> None:
        model = self.running[name]
        SEEN["preemptions in a prefill"] += model.covered < model.total
        self.drop_request(name)
        scheduled.pop(name, None)
        self.waiting.insert(0, (name, Model(model.seed, max(model.total, model.covered))))

    def run(self, scheduled: dict[str, int]) -> None:
        rows, pieces = [], []
        for name, tokens in scheduled.items():
            grants = self.manager.grants[name]
            self.store.update(name, grants.epoch, [block.block_id for block in grants.take_unsent()])
            model = self.running[name]
            rows.append((self.store.slots[name].slot, sum(p[0].shape[1] for p in pieces), tokens, model.covered))
            pieces.append(self.tokens(model, tokens))
        slots, first, count, positions = (np.asarray(x, np.int32) for x in zip(*rows, strict=True))
        everyone = Rows(slots, first, count, positions)
        single = count == 1
        query, key, value, features = (torch.from_numpy(np.concatenate(x, axis=1)) for x in zip(*pieces, strict=True))
        metadata = PruneAttentionMetadata(int(count.sum()), self.state, everyone.pick(single), everyone.pick(~single))
        SEEN["mixed steps"] += 0 < single.sum() < len(single)
        SEEN["keys dropped"] += sum(int((m.expiry < NEVER).sum()) for m in self.running.values())
        for layer, impl in enumerate(self.impls):
            out = torch.full_like(query[layer], float("nan"))
            impl.forward(None, query[layer], key[layer], value[layer], None, metadata, out,
                         features[layer] if features.shape[-1] else None)  # fmt: skip
            for (name, tokens), at in zip(scheduled.items(), first, strict=True):
                want = self.attend(self.running[name], layer, query[layer, at : at + tokens].numpy())
                np.testing.assert_allclose(out[at : at + tokens].numpy(), want, rtol=2e-4, atol=2e-5)
        ahead = {name: CHUNK for name in scheduled} if self.late else None
        self.pending.append(self.store.report({name: self.running[name].covered for name in scheduled}, ahead))
        while len(self.pending) > (1 if self.late else 0):
            for name, report in self.pending.pop(0).items():
                SEEN["blocks returned"] += self.manager.accept(name, report)
                SEEN["stale reports"] += name not in self.manager.grants

    # Brute force -----------------------------------------------------------------------------------------------------

    def tokens(self, model: Model, n: int):
        """Deterministic content of a request's next n tokens: query, key, value [L, n, heads, D], features [L, n, F]."""
        parts = []
        for position in range(model.covered, model.covered + n):
            rng = np.random.default_rng((model.seed, position))
            q, k, v = (rng.standard_normal((L, heads, D), np.float32) for heads in (H * G, H, H))
            if self.method.startswith("dcp"):
                f = rng.integers(-1, 2, (L, 2 * RANK * self.units)).astype(np.float32)
            elif self.method == "dms":
                f = rng.choice(np.asarray([-1.0, 1.0], np.float32), (L, H))
            else:
                f = np.zeros((L, 0), np.float32)
            parts.append((q, k, v, f))
            model.query.append(q)
            model.key.append(k)
            model.value.append(v)
            model.features.append(f)
        model.covered += n
        if self.method in BOUNDARY:  # [layers as a batch, heads, tokens, D]
            q, k = (torch.from_numpy(np.stack(x)).permute(1, 2, 0, 3) for x in (model.query, model.key))
            model.expiry = hard_walk(BOUNDARY[self.method], q, k, D**-0.5).numpy()
        else:
            model.expiry = np.stack([self.expiries(np.stack(model.features)[:, layer]) for layer in range(L)])
        return tuple(np.stack(x, axis=1) for x in zip(*parts, strict=True))

    def expiries(self, f: np.ndarray) -> np.ndarray:
        """[E, T] straight from the definitions."""
        t = len(f)
        out = np.full((self.units, t), NEVER)
        for j in range(SINKS, t):
            if self.method.startswith("dcp"):
                for unit, bias in enumerate(BIASES[: self.units]):
                    q, k = f[:, RANK * unit :][:, :RANK], f[j, RANK * (self.units + unit) :][:RANK]
                    hits = [n for n in range(j + 1, t) if q[n] @ k + bias <= 0]
                    out[unit, j] = hits[0] if hits else NEVER
            elif self.method == "dms" and j + 1 < t:
                out[:, j] = np.where(f[j + 1] > 0, j + 1 + DELAY, NEVER)
            elif self.method == "window":
                out[0, j] = j + 1 + WINDOW
            elif self.method == "random":
                out[:, j] = [NEVER if mix(mix(j) ^ int(salt)) < LIMIT else j + 1 + DELAY for salt in SALTS]
        return out

    def attend(self, model: Model, layer: int, query: np.ndarray) -> np.ndarray:
        t, n = model.covered, len(query)
        key, value = np.stack(model.key)[:, layer], np.stack(model.value)[:, layer]
        out = np.empty_like(query)
        for i in range(n):
            now = t - n + i
            for head in range(H * G):
                unit = (head // G) if self.units > 1 else 0
                see = (np.arange(t) <= now) & (now < model.expiry[layer, unit])
                logits = key[see, head // G] @ query[i, head] * D**-0.5
                weights = np.exp(logits - logits.max())
                out[i, head] = weights @ value[see, head // G] / weights.sum()
        return out

    # What must always hold ---------------------------------------------------------------------------------------------

    @invariant()
    def blocks_are_conserved(self):
        if not hasattr(self, "pool"):
            return
        owned = [block.block_id for grants in self.manager.grants.values() for block in grants.log if block is not None]
        assert len(owned) == len(set(owned)) and 0 not in owned
        assert len(owned) + self.pool.get_num_free_blocks() == BLOCKS - 1
        for name, grants in self.manager.grants.items():
            assert grants.live == sum(block is not None for block in grants.log)
            row = self.manager.req_to_blocks[name]
            assert [None if block.is_null else block for block in row] == grants.log

    @invariant()
    def lanes_hold_what_brute_force_says(self):
        if not hasattr(self, "store"):
            return
        store, a, g = self.store, self.store.lanes, self.spec.geometry
        assert set(store.slots) <= set(self.running)
        used = set()
        for name, slot_state in store.slots.items():
            model, s = self.running[name], slot_state.slot
            grants = self.manager.grants[name]
            mine = {block for block in slot_state.grants if block >= 0}
            assert mine <= {block.block_id for block in grants.log if block is not None}
            pages = 0
            for layer in range(L):
                for h in range(g.lanes_per_layer):
                    lane = layer * g.lanes_per_layer + h
                    length = int(a.length[s, lane])
                    size = g.gate_page_tokens if h >= H else N
                    unit = h % H if self.units > 1 else 0
                    alive = self.alive(model, layer, unit)
                    assert length == len(alive)
                    for index in range(-(-length // size)):
                        page = int(a.table[s, lane, index])
                        assert page not in used and a.page_lane[page] == lane and a.page_index[page] == index
                        assert (page // H) % BLOCKS in mine
                        used.add(page)
                        pages += 1
                    self.check_lane(model, layer, h, s, lane, length, alive)
            assert pages + int(a.n_free[s]) == len(mine) * g.pages_per_block
        free = [page for page in range(store.num_pages) if page not in used]
        assert (a.page_lane[free] == -1).all()
        store.kv_tensor[free] = float("nan")

    def alive(self, model: Model, layer: int, unit: int) -> list[int]:
        if model.expiry is None:
            return []
        # A delayed drop may be carried out at the end of the chunk before the query that would miss the key.
        last = model.covered - 1
        e = model.expiry[layer, unit]
        done = self.method in ("dms", "window", "random") and self.last_was_masked(model, layer, unit)
        return [j for j in range(model.covered) if e[j] > last + (1 if done else 0)]

    def last_was_masked(self, model: Model, layer: int, unit: int) -> bool:
        name = next(name for name, other in self.running.items() if other is model)
        s = self.store.slots[name].slot
        length = int(self.store.lanes.length[s, layer * self.spec.geometry.lanes_per_layer + unit])
        return length == int((model.expiry[layer, unit] > model.covered).sum())

    def check_lane(self, model: Model, layer: int, h: int, s: int, lane: int, length: int, alive: list[int]) -> None:
        a, kv = self.store.lanes, self.store.kv_tensor.numpy()
        first = layer * self.spec.geometry.lanes_per_layer + (h % H if self.units > 1 else 0)
        seen = []
        for i in range(length):
            position = int(a.pos[a.table[s, first, i // N], i % N])
            seen.append(position)
            if h >= H:
                size = self.spec.geometry.gate_page_tokens
                page = kv[a.table[s, lane, i // size]].reshape(RANK, size)
                np.testing.assert_array_equal(
                    page[:, i % size], model.features[position][layer, RANK * (self.units + h - H) :][:RANK]
                )
            else:
                page = kv[a.table[s, lane, i // N]]
                np.testing.assert_array_equal(page[: N * D].reshape(D, N)[:, i % N], model.key[position][layer, h])
                np.testing.assert_array_equal(page[N * D :].reshape(N, D)[i % N], model.value[position][layer, h])
        assert sorted(seen) == alive
        assert not seen or seen[-1] == model.covered - 1, "the newest token must be the last of its lane"

    def teardown(self):
        if hasattr(self, "pool"):
            for name in list(self.running):
                self.drop_request(name)
            assert self.pool.get_num_free_blocks() == BLOCKS - 1
            assert not self.store.slots and not self.manager.grants and not self.manager.req_to_blocks


NIGHTLY = os.environ.get("VLLM_PRUNE_FULL") == "1"
PoolMachine.TestCase.settings = settings(
    max_examples=400 if NIGHTLY else 24,
    stateful_step_count=40,
    deadline=None,
    derandomize=not NIGHTLY,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
TestPool = PoolMachine.TestCase


def test_histories_were_worth_it():
    for event in ("blocks returned", "stale reports", "preemptions in a prefill", "mixed steps", "keys dropped"):
        assert SEEN[event] > 2, f"{event}: {SEEN}"
