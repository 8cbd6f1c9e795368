"""Brute force for law 3: every token that a request has computed, and what follows for each key, straight from definitions.

Gate features are small integers, so that scores are exact. Letters: L layers, H KV heads, G query heads a KV head, D head size,
N tokens a page, E eviction units, T tokens computed.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from support import random_gates
from vllm_prune_training.routed import Routes

from vllm_prune.gates import NEVER, DCPGate, DMSGate, Gate, GateShape, Protection, RandomGate, WindowGate
from vllm_prune.gates.boundary import BoundaryGate, hard_walk
from vllm_prune.gates.prompt import received_naive

L, H, G, D, N, RANK = 2, 2, 2, 32, 32, 16
CHUNK, LONGEST, SINKS, DELAY, WINDOW, KEEP = 70, 320, 2, 5, 40, 0.5
BETAS = np.asarray([3.5, 4.5], np.float32)
PER_HEAD = ("dcp_kv_head", "dms", "dms_own", "random", "shadow")
BY_TOKEN = ("dcp", "dcp_kv_head", "dms", "dms_own", "window", "random")
"""Decided key by key from features: pressure and protection are for these."""
EARLY = ("dms", "dms_own", "window", "random", "shadow")
"""Drops may be carried out at the end of the chunk before the query that would miss the key."""
BOUNDARY = ("ltp", "acc")
"""Decided from real-valued attention: here only chance keeps a score away from its limit by more than rounding."""
WHOLE = ("ftp_of_prompts", "ltp_prompt", "acc_prompt")
ROUTED = ("ftp", *WHOLE)
"""Methods whose layer 1 skips tokens by the attention of layer 0, real-valued too; with ``WHOLE`` prompts come in one step."""
METHODS = ("open", *BY_TOKEN, *BOUNDARY, *ROUTED, "shadow", "shadow_token")
SEEN: Counter = Counter()
"""What the histories of this run went through; checked at the end, so that the machine cannot pass by idling."""


def mix(x: Any) -> Any:
    """The hash of random eviction, of int64 numbers below 2^32 (products wrap, their low half is exact)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D % 2**32
    x = x ^ (x >> 15)
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def gates_of(method: str, seed: int) -> tuple[list[Gate], dict[str, Any]]:
    """Random gates of a method, one a layer, and their section's parameters."""
    config = SimpleNamespace(hidden_size=16, num_key_value_heads=H, num_hidden_layers=L)
    shape = GateShape(16, H, L)
    params: dict[str, Any] = {
        "open": {"rank": RANK},
        "dcp": {"rank": RANK},
        "dcp_kv_head": {"rank": H * RANK, "scope": "kv_head"},
        "dms": {"delay": DELAY},
        "dms_own": {"delay": DELAY, "about": "own"},
        "window": {"window": WINDOW},
        "random": {"keep": KEEP, "delay": DELAY, "seed": 7},
        "ltp": {"grid": 16, "span": 10, "theta": 0.9},
        "acc": {"grid": 16, "window": 8},
        "ftp": {"form": "causal"},
        "ftp_of_prompts": {"form": "prompt"},
        "shadow": {"query_heads": H * G, "width": H * G * D, "hidden": 16, "closed": 0.5},
        "shadow_token": {"query_heads": H * G, "width": H * G * D, "neurons": 16, "hidden": 16},
    }.get(method, {})
    if method in ("open", "dcp", "dcp_kv_head"):
        gates: list[Gate] = [DCPGate(shape, **params) for _ in range(L)]
        for gate in gates:
            gate.beta.data.copy_(torch.from_numpy(BETAS) if gate.num_units > 1 else torch.tensor(BETAS[0]))  # type: ignore
    elif method in BY_TOKEN:
        kind = {"window": WindowGate, "random": RandomGate}.get(method, DMSGate)
        gates = [kind(shape, **params).at_layer(layer) for layer in range(L)]
    else:
        gates = random_gates(config, "ftp" if method in ("ftp", "ftp_of_prompts") else method, seed, **params)
    if method == "ltp_prompt":
        gates[0].theta.data.fill_(1.0)  # type: ignore[operator,union-attr]
    elif method == "acc_prompt":
        for gate in gates:
            gate.tune(0.5, 1.0)  # type: ignore[operator]
    return gates, params


def shift(strengths: np.ndarray) -> np.ndarray:
    return np.where(strengths > 0, 1.0 / np.maximum(strengths, 1e-9) - 1.0, math.inf)


@dataclass
class Content:
    """What a request's tokens are, whatever becomes of them: query [L, LONGEST, H * G, D], key, value, features."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    features: np.ndarray

    @classmethod
    @lru_cache(32)
    def of(cls, seed: int, method: str) -> Content:
        rng = np.random.default_rng(seed)
        tensors = [rng.standard_normal((L, LONGEST, heads, D), np.float32) for heads in (H * G, H, H)]
        units = H if method in PER_HEAD else 1
        if method.startswith("dcp"):
            features = rng.integers(-2, 3, (L, LONGEST, 2 * RANK * units))
        elif method.startswith("dms"):
            features = rng.integers(-12, 13, (L, LONGEST, H))
        else:
            features = np.zeros((L, LONGEST, 0))
        return cls(*tensors, features.astype(np.float32))


@dataclass
class Life:
    """One life of a request on the worker: what it has computed, and the expiry of each key.

    Attributes:
        seed: of its content; prompt: P, what it came with; spared: positions that its gates may not drop.
        strengths: of the gates, at each token computed.
        expiry: int64 [L, E, T].
    """

    epoch: int
    seed: int
    prompt: int
    spared: tuple[tuple[int, int], ...] = ()
    strengths: list[float] = field(default_factory=list)
    expiry: np.ndarray = field(default_factory=lambda: np.zeros((L, 1, 0), np.int64))

    @property
    def covered(self) -> int:
        return len(self.strengths)


class BruteForce:
    """What a request's keys and output must be under a method.

    Attributes:
        method: of ``METHODS``; units: E.
        gates: one a layer; of methods by token only their numbers are read, never a decision.
        protection: as served, without what a request spares.
    """

    method: str
    units: int
    gates: list[Gate]
    protection: Protection

    def content(self, life: Life) -> Content:
        return Content.of(life.seed, self.method)

    def compute(self, life: Life, tokens: int, strength: float) -> list[np.ndarray]:
        """The next tokens of a request at a strength: query, key, value, features [L, tokens, ...]."""
        now = slice(life.covered, life.covered + tokens)
        life.strengths += [strength] * tokens
        life.expiry = np.full((L, self.units, life.covered), NEVER)
        whole = self.content(life)
        if self.method in BY_TOKEN:
            for layer in range(L):
                life.expiry[layer] = self.expiries(life, layer, whole.features[layer, : life.covered])
        elif strength > 0.0 and self.method in BOUNDARY:  # [layers as a batch, heads, tokens, D]
            q, k = (torch.from_numpy(x[:, : life.covered]).transpose(1, 2) for x in (whole.query, whole.key))
            for layer, gate in enumerate(self.gates):
                assert isinstance(gate, BoundaryGate)
                rule, one = gate.rule(strength, self.protection), slice(layer, layer + 1)
                life.expiry[layer] = hard_walk(rule, q[one], k[one], D**-0.5)[0].numpy()
        elif strength > 0.0 and self.method in (*ROUTED, "shadow"):
            self.decide(life, strength)
        return [x[:, now] for x in (whole.query, whole.key, whole.value, whole.features)]

    def expiries(self, life: Life, layer: int, f: np.ndarray) -> np.ndarray:
        """[E, T] straight from the definitions, each query or token deciding at its own strength."""
        t, strengths = len(f), np.asarray(life.strengths)
        j, out = np.arange(t), np.full((self.units, t), NEVER)
        may = j >= SINKS
        for begin, end in life.spared:
            may[begin:end] = False
        if self.method.startswith("dcp"):
            for unit in range(self.units):
                q, k = f[:, RANK * unit :][:, :RANK], f[:, RANK * (self.units + unit) :][:, :RANK]
                hits = (q @ k.T / RANK**0.5 + BETAS[unit] + shift(strengths)[:, None] <= 0) & (j[:, None] > j)
                out[unit] = np.where(hits.any(0), hits.argmax(0), NEVER)
        elif self.method in ("dms", "dms_own"):
            late = int(self.method == "dms")  # the token after the key decides
            decided = (f - 5.0 * shift(strengths)[:, None] > 0)[late:]
            out[:, : t - late] = np.where(decided.T, j[: t - late] + 1 + DELAY, NEVER)
        elif self.method == "window":
            out[0] = [int(at + 1 + WINDOW // s) if s > 0 else NEVER for at, s in enumerate(strengths)]
        elif self.method == "random":
            salts = self.gates[layer].salts().numpy()  # type: ignore[operator]
            limits = np.asarray([round(KEEP**s * 2**32) for s in strengths.tolist()])
            out[:] = np.where(mix(mix(j)[None] ^ salts[:, None]) < limits, NEVER, j + 1 + DELAY)
        return np.where(may, out, NEVER)

    def decide(self, life: Life, strength: float) -> None:
        """Write into the expiries what follows from layer 0's attention, every key of which is there."""
        whole, t, p = self.content(life), life.covered, life.prompt
        q, k = (torch.from_numpy(x[0, :t]) for x in (whole.query, whole.key))  # [T, heads, D]
        if self.method == "shadow":
            if t >= p:
                attended = torch.from_numpy(self.rows(life, 0, np.asarray([p - 1])))
                closed = self.gates[0].close(attended.flatten(), strength).numpy()  # type: ignore[operator]
                life.expiry[closed] = np.maximum(np.arange(t), p)
            return
        runs = torch.ones(t, dtype=torch.bool)
        if self.method.startswith("ftp"):
            logits = torch.einsum("nhd,shd->hns", q, k.repeat_interleave(G, 1)) * D**-0.5
            weights = logits.masked_fill(torch.ones(t, t).triu(1) > 0, float("-inf")).softmax(-1)
            told = torch.tensor([p]) if self.method in WHOLE else None
            routes = Routes.start(1, t, q.device, told)
            routes.update(weights[None], torch.arange(1, t + 1.0)[None], torch.ones(1, t, dtype=torch.bool))
            runs = self.gates[1].runs_on(routes.facts[0], strength, self.protection, p)  # type: ignore[operator]
        elif p > 1:
            scores = received_naive(q[:p], k[:p], D**-0.5)
            runs[:p] = self.gates[0].survives(scores, torch.arange(p), p, strength, self.protection)  # type: ignore
        life.expiry[1, 0] = np.where(runs.numpy(), NEVER, np.arange(t))

    def chosen(self, life: Life, n: int) -> np.ndarray:
        """Groups that the latest n tokens run on, bool [n, L, H]: all of the prompt's and of layer 0's."""
        at = np.arange(life.covered - n, life.covered)
        head = life.seed + 7 * np.arange(H)
        groups = np.broadcast_to((mix(mix(at)[:, None] ^ head) % 2 == 0)[:, None], (n, L, H)).copy()
        groups |= (at < life.prompt)[:, None, None]
        groups[:, 0] = True
        SEEN["groups not chosen"] += int((~groups).sum())
        return groups

    def attend(self, life: Life, layer: int, n: int) -> np.ndarray:
        """Attention output of the latest n tokens, [n, H * G, D]."""
        out = self.rows(life, layer, np.arange(life.covered - n, life.covered))
        if self.method == "shadow_token" and n == 1:  # what chunks say is masked behind attention
            out *= self.chosen(life, 1)[:, layer].repeat(G, axis=1)[..., None]
        return out

    def rows(self, life: Life, layer: int, now: np.ndarray) -> np.ndarray:
        """Of queries at positions ``now`` [n]: [n, H * G, D]; 0 of a head that sees no key."""
        whole, t = self.content(life), life.covered
        query = whole.query[layer, now].reshape(len(now), H, G, D)
        place, at = np.arange(t), now[:, None]
        see = (place <= at) & (at < np.broadcast_to(life.expiry[layer], (H, t))[:, None])  # [H, n, T]
        logits = np.einsum("nhgd,thd->hgnt", query, whole.key[layer, :t], optimize=True) * D**-0.5
        logits = np.where(see[:, None], logits, -np.inf)
        weights = np.exp(logits - np.max(logits, axis=-1, keepdims=True, initial=-1e9))
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
        out = np.einsum("hgnt,thd->nhgd", weights, whole.value[layer, :t], optimize=True)
        return out.reshape(len(now), H * G, D).astype(np.float32)
