"""How a gate is served: the numbers that the compiled loops need, taken once from the gate and the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_prune.config import DropGateConfig
from vllm_prune.errors import PruneError
from vllm_prune.gates import BoundaryGate, BoundaryRule, Gate, Reveal, Scope, by_token, decision_shift, on_gpu
from vllm_prune.gates.dcp import DCPGate
from vllm_prune.gates.dms import DMSGate
from vllm_prune.gates.random_drop import RandomGate
from vllm_prune.gates.shadow import ShadowGate
from vllm_prune.gates.window import WindowGate


@dataclass(frozen=True)
class ServedGate:
    """Model-wide facts of the served gates.

    Attributes:
        reveal: None when every gate is open (strength 0): then nothing is computed, remembered or dropped.
        rank: r, numbers remembered a token and gate lane.
        num_units: E, eviction units a layer.
        gate_lanes: of a layer: E if the gate remembers anything, else 0.
        sinks, window: protected keys, in tokens.
        routes: whether layers run on a subset of the tokens.
        whole_prompt: whether every prompt must come in one step.
        split: whether each KV head decides for itself, so that ranks of a tensor parallel group decide about their own alone.
        mass: what is remembered is the attention that a key received, a float64 that kernels add to; else features.
    """

    reveal: Reveal | None
    rank: int
    num_units: int
    gate_lanes: int
    sinks: int
    window: int
    routes: bool = False
    whole_prompt: bool = False
    split: bool = False
    mass: bool = False

    def dtype(self, features: torch.dtype) -> torch.dtype:
        """Of the numbers that are remembered, given that of ``features``."""
        return torch.float64 if self.mass else features

    @property
    def ruled(self) -> bool:
        """Whether attention itself has something to drop; the other methods skip computation around it."""
        return not self.routes and self.reveal not in (None, Reveal.NONE)

    @property
    def planned_dense(self) -> bool:
        """Whether admission plans with every key kept, whatever the strength."""
        return self.reveal in (None, Reveal.NONE, Reveal.PER_REQUEST)  # the last until its prompt ends

    @property
    def leaves_prefixes(self) -> bool:
        """Whether what is left of a prompt's beginning hangs on nothing that follows it."""
        return not self.whole_prompt and self.reveal is not Reveal.PER_REQUEST

    @property
    def appends(self) -> bool:
        """Whether what a layer has stored stays, so that lanes grow at their ends alone."""
        return self.routes or self.reveal is Reveal.NONE

    @property
    def undecided(self) -> int | None:
        """How many of the newest keys may still get an expiry if they have none, or more; None: any key may, at any time."""
        if self.reveal is None:
            return 0
        return 1 if not self.routes and self.reveal in (Reveal.DELAYED, Reveal.AT_WRITE) else None

    @property
    def by_token(self) -> bool:
        """See ``gates.by_token``; False where gates are open."""
        return by_token(self.reveal, self.routes)

    @property
    def on_gpu(self) -> bool:
        """See ``gates.on_gpu``; False where gates are open."""
        return on_gpu(self.reveal, self.routes)

    @classmethod
    def of(cls, section: DropGateConfig, ranks: int = 1, device_lanes: bool = False) -> ServedGate:
        """Of a checkpoint, on one of ``ranks`` tensor parallel ranks, which are all alike. ``device_lanes``: lanes are a GPU's,
        where what keys received lies in one of them."""
        if section.strength == 0.0:
            return cls(None, 0, 1, 0, 0, 0)
        gate = section.build_gate()
        if gate.routes and not gate.whole_prompt and section.protect.window:
            raise PruneError(
                f"drop_gate.protect.window is {section.protect.window}, but {section.method} decides when a token is "
                "written and never again.", "Set it to 0; protect.sinks is honoured.",
            )  # fmt: skip
        split, protect = gate.scope is Scope.KV_HEAD, section.protect
        mass = device_lanes and gate.reveal is Reveal.AT_BOUNDARY
        remembered = 1 if mass else gate.num_remembered // gate.num_units
        units = gate.num_units // ranks if split else 1
        lanes = units if remembered else 0
        return cls(gate.reveal, remembered, units, lanes, protect.sinks, protect.window, gate.routes, gate.whole_prompt,
                   split, mass)  # fmt: skip


@dataclass(frozen=True, eq=False)
class QueryRule:
    """DCP in one layer: key dropped iff dot * scale + bias <= 0.

    Attributes:
        scale: of the dot products.
        biases: float32 [E], one a unit.
    """

    scale: float
    biases: np.ndarray


@dataclass(frozen=True)
class DelayRule:
    """DMS in one layer: key j gets expiry j + 1 + delay iff logit of token j + 1 > threshold, or that of token j where keys are
    decided about by their ``own`` tokens.

    ``delay`` already includes a protected window wider than the gate's own."""

    threshold: float
    delay: int
    own: bool = False


@dataclass(frozen=True, eq=False)
class WriteRule:
    """Window and random in one layer: key j gets expiry j + 1 + delay when written, unless its hash lies below ``limit``.

    Attributes:
        salts: uint32 [E], hashed with the position (see ``gates/random_drop.py``).
        limit: 0 lets every key expire, 2^32 none.
        delay: already includes a protected window wider than the gate's own.
    """

    salts: np.ndarray
    limit: int
    delay: int


@dataclass(frozen=True)
class RequestRule:
    """ShadowLLM's request form in one layer: keys of lanes that are closed for a request expire at its prompt's end.

    Attributes:
        gate: layer 0's, which decides for all layers; None in the others.
        strength: of its decision.
    """

    gate: ShadowGate | None
    strength: float


@dataclass(frozen=True)
class Knobs:
    """What a strength changes in the rules above, for all layers alike.

    Attributes:
        shift: added to the biases of a ``QueryRule``, or the threshold of a ``DelayRule``; infinite where gates are open.
        limit: of a ``WriteRule``.
        delay: of a ``DelayRule`` or ``WriteRule``.
        levels: of a ``BoundaryRule``, by layer: its threshold, or the share it keeps. Empty of the others.
    """

    shift: float
    limit: int
    delay: int
    levels: tuple[float, ...] = ()


def knobs_of(gate: Gate, section: DropGateConfig, strength: float) -> Knobs:
    """Of DCP, DMS, window and random gates at a strength; 0 opens them."""
    window, is_open = section.protect.window, strength == 0.0
    if isinstance(gate, WindowGate):
        return Knobs(0.0, 2**32 if is_open else 0, max(0 if is_open else gate.window_at(strength), window))
    if isinstance(gate, RandomGate):
        return Knobs(0.0, 2**32 if is_open else gate.limit(strength), max(gate.delay, window))
    delay = max(gate.delay, window) if isinstance(gate, DMSGate) else 0
    return Knobs(decision_shift(strength) * gate.unit, 0, delay)


def levels_of(gates: Sequence[BoundaryGate], section: DropGateConfig, strength: float) -> Knobs:
    """Of gates that decide at boundaries, at a strength: one a layer. 0 opens them."""
    rules = [gate.rule(strength, section.protection) for gate in gates]
    return Knobs(0.0, 0, 0, tuple(rule.level for rule in rules))


Rule = QueryRule | DelayRule | WriteRule | RequestRule | BoundaryRule


def rule_of(gate: Gate, section: DropGateConfig, strength: float) -> Rule | None:
    """The rule of one layer's loaded gate at a strength; None where it drops nothing, nor ever has in this request."""
    # At strength 0 these still carry out what was decided at another.
    if strength == 0.0 and not isinstance(gate, DMSGate | WindowGate | RandomGate):
        return None
    if isinstance(gate, ShadowGate):
        return RequestRule(None if gate.predictor is None else gate, strength)
    if isinstance(gate, BoundaryGate):
        rule = gate.rule(strength, section.protection)
        return rule if rule.drops else None
    knobs = knobs_of(gate, section, strength)
    if isinstance(gate, DCPGate):
        biases = gate.beta.float().cpu().reshape(-1).numpy() + np.float32(knobs.shift)
        return QueryRule(1.0 / math.sqrt(gate.unit_rank), biases.astype(np.float32))
    if isinstance(gate, DMSGate):
        return DelayRule(knobs.shift, knobs.delay, gate.own)
    if isinstance(gate, WindowGate):
        return WriteRule(np.zeros(1, np.uint32), knobs.limit, knobs.delay)
    if isinstance(gate, RandomGate):
        return WriteRule(gate.salts().cpu().numpy().astype(np.uint32), knobs.limit, knobs.delay)
    raise NotImplementedError(f"gate method {gate.method} cannot be served yet")
