"""Brute force for law 3: every token that a request has computed, and what follows for each key, straight from definitions.

Gate features are small integers, so that scores are exact. Letters: L layers, H KV heads, G query heads a KV head, D head size,
N tokens a page, E eviction units.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from support import random_gates
from vllm_prune_training.routed import Routes

from vllm_prune.gates import NEVER, BoundaryRule, Gate, Protection
from vllm_prune.gates.boundary import hard_walk
from vllm_prune.gates.prompt import received_naive

L, H, G, D, N, RANK = 2, 2, 2, 32, 32, 8
BLOCKS, CHUNK, LONGEST, SINKS, DELAY, WINDOW = 24, 70, 320, 2, 5, 40
BIASES = np.asarray([2.5, 3.5], np.float32)
PER_HEAD = ("dcp_kv_head", "dms", "dms_own", "random", "shadow")
SALTS, LIMIT = np.asarray([7, 2**31 + 5], np.uint32), 2**31
"""Of random eviction: half of the keys survive."""
BOUNDARY = {
    "ltp": BoundaryRule(grid=16, span=10, after=10, sinks=SINKS, threshold=0.9),
    "acc": BoundaryRule(grid=16, span=0, after=8, sinks=SINKS, keep=0.3),
}
"""Decided from real-valued attention: here only chance keeps a score away from its limit by more than rounding."""
WHOLE = ("ftp_of_prompts", "ltp_prompt", "acc_prompt")
ROUTED = ("ftp", *WHOLE)
"""Methods whose layer 1 skips tokens by the attention of layer 0, real-valued too; with ``WHOLE`` prompts come in one step."""
METHODS = (
    "open",
    "dcp",
    "dcp_kv_head",
    "dms",
    "dms_own",
    "window",
    "random",
    *BOUNDARY,
    *ROUTED,
    "shadow",
    "shadow_token",
)
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


def gates_of(method: str, seed: int) -> list[Gate]:
    """Random ones that skip tokens or close lanes, of methods whose gates decide for themselves."""
    config = SimpleNamespace(hidden_size=16, num_key_value_heads=H, num_hidden_layers=L)
    if method.startswith("ftp"):
        return random_gates(config, "ftp", seed, form="prompt" if method in WHOLE else "causal")
    sizes = {"query_heads": H * G, "width": H * G * D, "hidden": 16, "closed": 0.5} if method == "shadow" else {}
    gates = random_gates(config, method, seed, **sizes)
    if method == "ltp_prompt":
        gates[0].theta.data.fill_(1.0)  # type: ignore[operator,union-attr]
    elif method == "acc_prompt":
        gates[0].tune(0.5, 1.0)  # type: ignore[operator]
    return gates


@dataclass
class Model:
    """Brute force: every token a request has computed, and the expiry of each key. ``prompt``: P, what it came with."""

    seed: int
    total: int
    prompt: int
    covered: int = 0
    query: list = field(default_factory=list)
    key: list = field(default_factory=list)
    value: list = field(default_factory=list)
    features: list = field(default_factory=list)
    expiry: np.ndarray | None = None  # [L, E, covered]

    @property
    def strength(self) -> float:
        """Of the gates for this request: a third has them open."""
        return 0.0 if self.seed % 3 == 0 else 1.0


class BruteForce:
    """What a request's keys and output must be under a method.

    Attributes:
        method: of ``METHODS``; units: E.
        gates: of methods whose gates decide for themselves; protection: of these.
    """

    method: str
    units: int
    gates: list[Gate]
    protection: Protection

    def tokens(self, model: Model, n: int):
        """Deterministic content of a request's next n tokens: query, key, value [L, n, heads, D], features [L, n, F]."""
        parts = []
        for position in range(model.covered, model.covered + n):
            rng = np.random.default_rng((model.seed, position))
            q, k, v = (rng.standard_normal((L, heads, D), np.float32) for heads in (H * G, H, H))
            if self.method.startswith("dcp"):
                f = rng.integers(-1, 2, (L, 2 * RANK * self.units)).astype(np.float32)
            elif self.method.startswith("dms"):
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
        elif self.method in (*ROUTED, "shadow"):
            model.expiry = np.full((L, self.units, model.covered), NEVER)
            self.decide(model)
        else:
            model.expiry = np.stack([self.expiries(np.stack(model.features)[:, layer]) for layer in range(L)])
        if model.strength == 0.0:
            model.expiry = np.full_like(model.expiry, NEVER)
        return tuple(np.stack(x, axis=1) for x in zip(*parts, strict=True))

    def decide(self, model: Model) -> None:
        """Write into the model's expiries what follows from layer 0's attention, every key of which is there."""
        q, k = (torch.from_numpy(np.stack(x)[:, 0]) for x in (model.query, model.key))  # [T, heads, D]
        t, p = model.covered, model.prompt
        if self.method == "shadow":
            if t >= p:
                attended = torch.from_numpy(self.rows(model, 0, np.asarray([p - 1]), q[p - 1 : p].numpy()))
                closed = self.gates[0].close(attended.flatten(), 1.0).numpy()  # type: ignore[operator]
                model.expiry[closed] = np.maximum(np.arange(t), p)
            return
        runs = torch.ones(t, dtype=torch.bool)
        if self.method.startswith("ftp"):
            logits = torch.einsum("nhd,shd->hns", q, k.repeat_interleave(G, 1)) * D**-0.5
            weights = logits.masked_fill(torch.ones(t, t).triu(1) > 0, float("-inf")).softmax(-1)
            told = torch.tensor([p]) if self.method in WHOLE else None
            routes = Routes.start(1, t, q.device, told)
            routes.update(weights[None], torch.arange(1, t + 1.0)[None], torch.ones(1, t, dtype=torch.bool))
            runs = self.gates[1].runs_on(routes.facts[0], 1.0, self.protection, p)  # type: ignore[operator]
        elif p > 1:
            scores = received_naive(q[:p], k[:p], D**-0.5)
            runs[:p] = self.gates[0].survives(scores, torch.arange(p), p, 1.0, self.protection)  # type: ignore[operator]
        model.expiry[1, 0] = np.where(runs.numpy(), NEVER, np.arange(t))

    def chosen(self, model: Model, n: int) -> np.ndarray:
        """Groups that the latest n tokens run on, bool [n, L, H]: all of the prompt's and of layer 0's."""
        at = np.arange(model.covered - n, model.covered)
        drawn = [
            [[mix(mix(j) ^ (model.seed + 7 * h)) % 2 == 0 for h in range(H)] for _ in range(L)] for j in at.tolist()
        ]
        groups = np.asarray(drawn) | (at < model.prompt)[:, None, None]
        groups[:, 0] = True
        SEEN["groups not chosen"] += int((~groups).sum())
        return groups

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
            elif self.method == "dms_own":
                out[:, j] = np.where(f[j] > 0, j + 1 + DELAY, NEVER)
            elif self.method == "window":
                out[0, j] = j + 1 + WINDOW
            elif self.method == "random":
                out[:, j] = [NEVER if mix(mix(j) ^ int(salt)) < LIMIT else j + 1 + DELAY for salt in SALTS]
        return out

    def attend(self, model: Model, layer: int, query: np.ndarray) -> np.ndarray:
        """Attention output of the latest tokens, like their query [n, H * G, D]."""
        n = len(query)
        out = self.rows(model, layer, np.arange(model.covered - n, model.covered), query)
        if self.method == "shadow_token" and n == 1:  # what chunks say is masked behind attention
            out *= self.chosen(model, 1)[:, layer].repeat(G, axis=1)[..., None]
        return out

    def rows(self, model: Model, layer: int, now: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Of queries [n, H * G, D] at positions ``now`` [n]."""
        key, value = (np.stack(x)[:, layer] for x in (model.key, model.value))
        out, place, now = np.zeros_like(query), np.arange(model.covered), now[:, None]
        for head in range(H * G):
            unit = (head // G) if self.units > 1 else 0
            see = (place <= now) & (now < model.expiry[layer, unit])
            logits = np.where(see, query[:, head] @ key[:, head // G].T * D**-0.5, -np.inf)
            weights = np.exp(logits - np.max(logits, axis=1, keepdims=True, initial=-1e9))
            out[:, head] = weights @ value[:, head // G] / np.maximum(weights.sum(1, keepdims=True), 1e-30)
        return out  # 0 of a head that sees no key
