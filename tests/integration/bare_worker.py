"""A worker without a model, for law 3: all that the plugin does on a worker is real, layers' inputs are brute force's.

vLLM's connector mixin drives the connector's worker side, the metadata builder makes the rows, the attention layers (on their
own, with their gates loaded) decide, drop, write and attend; each output and, after each step, each lane is compared with brute
force. Pages that no lane uses are poisoned with NaN: any read of them shows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from brute_force import EARLY, PER_HEAD, RANK, ROUTED, SEEN, BruteForce, D, G, H, L, Life, N, mix
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin as Mixin

from vllm_prune.attention.backend import PruneMetadataBuilder
from vllm_prune.attention.gated import GatedAttention
from vllm_prune.attention.state import PruneAttentionMetadata
from vllm_prune.attention.subset import subset, token_places
from vllm_prune.gates import NEVER, Gate
from vllm_prune.models.prompt_facts import PromptFactsRouter
from vllm_prune.models.prompt_router import PromptRouter
from vllm_prune.models.routing import GateRouter, Router

STOP = 7
"""Token that ends a request."""


def token_at(seed: int, position: int) -> int:
    """Of a prompt or an answer: a function of the content alone. Computed again it is the same."""
    drawn = mix(seed ^ mix(position + 1))
    return STOP if drawn % 40 == 0 else 8 + drawn % 400


class BareWorker(BruteForce):
    """See the module.

    Args:
        method: of ``brute_force.METHODS``.
        config: of an engine that serves such gates.
        gates: one a layer.
        pool: blocks.

    Attributes:
        lives: requests and snapshots that it knows of, by id; seeds: of their contents, told by whoever makes them.
        state: what the plugin holds on a worker.
    """

    def __init__(self, method: str, config: VllmConfig, gates: list[Gate], pool: int) -> None:
        self.method, self.config, self.gates, self.pool = method, config, gates, pool
        self.units = H if method in PER_HEAD else 1
        self.lives: dict[str, Life] = {}
        self.seeds: dict[str, int] = {}
        self.known: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.names = [f"model.layers.{layer}.self_attn.attn" for layer in range(L)]
        with set_current_vllm_config(config):
            self.layers = [
                GatedAttention(H * G, D, D**-0.5, num_kv_heads=H, cache_config=config.cache_config, prefix=name)
                for name in self.names
            ]
            for layer, gate in zip(self.layers, gates, strict=True):
                if layer.drop_gate is not None:
                    layer.drop_gate.load_state_dict(gate.state_dict())
                layer.process_weights_after_loading(torch.float32)
            self.spec = self.layers[0].get_kv_cache_spec(config)
        self.protection = self.layers[0].section.protection
        self.impls = [layer.impl for layer in self.layers]
        self.router: Router | None = None
        if method in ROUTED:
            kind = {"ftp": GateRouter, "ftp_of_prompts": PromptFactsRouter}.get(method)
            self.router = kind(gates, self.protection) if kind else PromptRouter(gates, self.layers[0].section)
            self.router.impls = self.impls
        for layer, impl in enumerate(self.impls):
            impl.router = self.router
            if method == "shadow_token" and layer:
                impl.chooser = self  # it is asked nothing here: the choice lies in the step's notes

    def start(self, cache: Any) -> None:
        """Allocate the KV cache, all of it poison. ``cache``: vLLM's KV cache configuration."""
        self.state = PruneMetadataBuilder(self.spec, self.names, self.config, torch.device("cpu")).state
        self.connector = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, cache)
        layers = torch.full((L, self.pool, H, N, 2 * D), float("nan"))
        self.connector.register_kv_caches(dict(zip(self.names, layers, strict=True)))
        self.store = self.state.store

    # What vLLM's model runner does ---------------------------------------------------------------------------------

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """One step of the scheduler's. In vLLM's order of calls."""
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
        meta: Any = step.kv_connector_metadata
        self.connector.handle_preemptions(meta)
        for name in (*meta.gone, *meta.ended):
            self.lives.pop(name, None)
        if not step.total_num_scheduled_tokens:
            return Mixin.kv_connector_no_forward(step, self.config)
        self.learn(step)
        with set_forward_context(None, self.config), Mixin.maybe_get_kv_connector_output(step) as told:
            sampled = self.forward(step.num_scheduled_tokens, meta.grants)
        assert isinstance(told, KVConnectorOutput)
        SEEN["requests doomed"] += len(told.invalid_block_ids)
        self.check_lanes()
        names = list(sampled)
        index = {name: i for i, name in enumerate(names)}
        return ModelRunnerOutput(names, index, [sampled[name] for name in names], kv_connector_output=told)

    def learn(self, step: SchedulerOutput) -> None:
        """Tokens and first blocks of the step's requests."""
        for new in step.scheduled_new_reqs:
            self.known[new.req_id], self.first[new.req_id] = len(new.prompt_token_ids), new.block_ids[0][0]
        cached = step.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.all_token_ids:
                self.known[name] = len(cached.all_token_ids[name])
            if name in cached.resumed_req_ids:
                self.first[name] = blocks[0][0]

    def forward(self, scheduled: dict[str, int], grants: dict[str, Any]) -> dict[str, list[int]]:
        """All layers on the step's tokens; what is sampled for each request."""
        pieces, counts = [], list(scheduled.values())
        for name, tokens in scheduled.items():
            grant, life = grants[name], self.lives.get(name)
            if life is None or life.epoch != grant.epoch:
                life = self.lives[name] = Life(grant.epoch, self.seeds[name], grant.prompt, tuple(grant.spared))
                before = grant.covered - tokens
                assert (before > 0) == (grant.start is not None), (
                    "a life begins with its first token, or from a snapshot"
                )
                if before:
                    SEEN["starts from snapshots"] += 1
                    self.compute(life, before, grant.strength)
            assert life.covered + tokens == grant.covered and life.prompt == grant.prompt
            pieces.append(self.compute(life, tokens, grant.strength))
        lives = [self.lives[name] for name in scheduled]
        starts = np.cumsum([0, *counts]).astype(np.int32)
        table = torch.tensor([[self.first[name]] for name in scheduled], dtype=torch.int32)
        metadata = self.state.metadata(table, starts, np.asarray([life.covered for life in lives]))
        self.note(lives, counts, metadata)
        query, key, value, features = (torch.from_numpy(np.concatenate(x, axis=1)) for x in zip(*pieces, strict=True))
        for layer, impl in enumerate(self.impls):
            ran = self.begin_layer(layer, metadata)
            here = torch.from_numpy(np.flatnonzero(ran))
            out = torch.full_like(query[layer], float("nan"))
            if len(here):
                q, k, v, f = (x[layer][here] for x in (query, key, value, features))
                part = torch.full_like(q, float("nan"))
                impl.forward(None, q, k, v, None, metadata, part, f if f.shape[-1] else None)
                out[here] = part
            metadata.call = None
            for life, at, count in zip(lives, starts, counts, strict=False):
                mine = slice(at, at + count)
                want = self.attend(life, layer, count)[ran[mine]]
                np.testing.assert_allclose(out[mine][ran[mine]].numpy(), want, rtol=2e-4, atol=2e-5)
        for name in scheduled:
            for order in grants[name].snapshots:
                self.lives[order.name] = self.as_of(self.lives[name], order.epoch, order.tokens)
        return {name: self.sample(name) for name in scheduled}

    def as_of(self, life: Life, epoch: int, tokens: int) -> Life:
        """A snapshot: what a request was after so many tokens."""
        copy = Life(epoch, life.seed, life.prompt, life.spared)
        self.compute(copy, tokens, life.strengths[0])
        return copy

    def sample(self, name: str) -> list[int]:
        life = self.lives[name]
        if life.covered < self.known[name]:
            return []
        self.known[name] += 1
        return [token_at(life.seed, life.covered)]

    def note(self, lives: list[Life], counts: list[int], step: PruneAttentionMetadata) -> None:
        strengths = {life.strengths[-1] for life in lives}
        SEEN["mixed strengths"] += len(strengths) > 1
        SEEN["mixed steps"] += 0 < counts.count(1) < len(counts)
        SEEN["keys dropped"] += sum(int((life.expiry < NEVER).sum()) for life in lives)
        SEEN["strength changes"] += sum(len(set(life.strengths)) > 2 for life in lives)
        SEEN["spared keys"] += sum(end - begin for life in lives for begin, end in life.spared)
        if self.method == "shadow_token":
            every = [self.chosen(life, count) for life, count in zip(lives, counts, strict=True)]
            step.notes["shadow"] = SimpleNamespace(groups=torch.from_numpy(np.concatenate(every)))

    def begin_layer(self, layer: int, step: PruneAttentionMetadata) -> np.ndarray:
        """What the model's layers do before they run: bool [T], tokens that the layer runs on."""
        keep = None if self.router is None else self.router.keep(layer, step, torch.empty(0), None)
        if keep is None or keep.all():
            return np.ones(step.num_actual_tokens, bool)
        slots, positions = token_places(step)
        self.impls[layer].skip(slots[~keep], positions[~keep])
        step.call = subset(step, keep)
        SEEN["tokens skipped"] += int((~keep).sum())
        return keep

    # What must hold after every step ---------------------------------------------------------------------------------

    def check_lanes(self) -> None:
        """Every lane holds what brute force says, in pages of its own request's blocks, or of a snapshot's, which requests may
        share; all others are poisoned."""
        store, a, g = self.store, self.store.lanes, self.spec.geometry
        assert set(store.slots) == set(self.lives)
        used, shared, kept = (np.zeros(store.num_pages, bool) for _ in range(3))
        for name, state in store.slots.items():
            life, slot = self.lives[name], state.slot
            assert state.epoch == life.epoch
            SEEN["requests with closed lanes"] += bool(a.closed[slot].any())
            mine = [block for block in state.grants if block >= 0]
            pages = 0
            for layer in range(L):
                for h in range(g.lanes_per_layer):
                    lane = layer * g.lanes_per_layer + h
                    length, size = int(a.length[slot, lane]), g.gate_page_tokens if h >= H else N
                    alive = self.alive(life, layer, h % H if self.units > 1 else 0, length)
                    share, every = int(a.shared[slot, lane]), a.table[slot, lane, : -(-length // size)]
                    held = every[share:]
                    assert length >= share * size and len(set(every.tolist())) == len(every)
                    assert not used[held].any() and np.isin((held // H) % self.pool, mine).all()
                    assert (a.page_lane[held] == lane).all() and (
                        a.page_index[held] == np.arange(share, len(every))
                    ).all()
                    used[held], shared[every[:share]] = True, True
                    kept[held] = name.startswith("\0")
                    SEEN["pages shared"] += share
                    pages += len(held)
                    self.check_lane(life, layer, h, slot, length, alive)
            assert pages + int(a.n_free[slot]) == len(mine) * g.pages_per_block
        assert (a.page_lane[~used] == -1).all()
        assert not (shared & used & ~kept).any(), "what is shared is nobody else's"
        SEEN["pages shared of a snapshot that is gone"] += int((shared & ~used).sum())
        store.kv_tensor[torch.from_numpy(~used & ~shared)] = float("nan")

    def alive(self, life: Life, layer: int, unit: int, length: int) -> np.ndarray:
        """Keys that a lane of this length must hold."""
        last, e = life.covered - 1, life.expiry[layer, unit]
        alive = np.flatnonzero(e > last)
        if self.method in EARLY and len(alive) != length:
            alive = np.flatnonzero(e > last + 1)
        assert len(alive) == length
        return alive

    def check_lane(self, life: Life, layer: int, h: int, slot: int, length: int, alive: np.ndarray) -> None:
        a, kv, g, whole = self.store.lanes, self.store.kv_tensor.numpy(), self.spec.geometry, self.content(life)
        first = layer * g.lanes_per_layer + (h % H if self.units > 1 else 0)
        seen = a.pos[a.table[slot, first, : -(-length // N)]].reshape(-1)[:length]
        size = g.gate_page_tokens if h >= H else N
        pages = kv[a.table[slot, layer * g.lanes_per_layer + h, : -(-length // size)]]

        def held(part: np.ndarray, width: int) -> np.ndarray:
            """Columns of the pages' part [pages, width, size], token by token."""
            return part.reshape(-1, width, size).transpose(0, 2, 1).reshape(-1, width)[:length]

        assert (np.sort(seen) == alive).all()
        if h >= H:
            want = whole.features[layer, seen, RANK * (self.units + h - H) :][:, :RANK]
            assert (held(pages, RANK) == want).all()
        else:
            assert (held(pages[:, : N * D], D) == whole.key[layer, seen, h]).all()
            assert (pages[:, N * D :].reshape(-1, D)[:length] == whole.value[layer, seen, h]).all()
        assert not length or seen[-1] == alive[-1], "the newest token must be the last of its lane"
