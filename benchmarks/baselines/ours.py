"""What drop gates, the gates that need no training, the dense model and an oracle do on the benchmark's cases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from baselines.branches import BranchRunner, Dense, GatePolicy, Policy, Watcher
from baselines.case_file import Case, Row, judge
from transformers import AutoModelForCausalLM
from vllm_prune_training.masked import load_gated

from vllm_prune.config import MAX_STRENGTH, DropGateConfig

SINKS = 4
DELAY = 64
SEED = 1
TOLERANCE = 0.02
"""Relative miss of a budget that bisection accepts."""


@dataclass
class Model:
    """A base model, the runner on it, and its gates if it has any."""

    runner: BranchRunner
    gates: list = field(default_factory=list)
    section: DropGateConfig | None = None


def load_base(folder: Path) -> Model:
    """Base weights of a folder in float32; gates in it are not looked at."""
    return Model(BranchRunner(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()))


def load_with_gates(folder: Path) -> Model:
    """A gated checkpoint in float32."""
    gated = load_gated(folder, dtype=torch.float32)
    return Model(BranchRunner(gated.model), list(gated.gates), gated.section)


def run_case(model: Model, case: Case, method: str, budget: float, policy: Policy) -> Row:
    """One context and its branches."""
    runner = model.runner
    cache = runner.context(case.context, policy)
    tokens, padded = len(case.context), case.padded()
    logits = runner.branches(cache, tokens, padded, policy)
    return Row(method, budget, case.name, case.task, policy.kept(), past_kept=policy.past_kept(), **judge(case, logits))


def dense_rows(model: Model, cases: Sequence[Case], method: str = "dense") -> Iterator[Row]:
    for case in cases:
        yield run_case(model, case, method, 1.0, Dense())


def oracle_rows(model: Model, cases: Sequence[Case], budgets: Sequence[float]) -> Iterator[Row]:
    """Query-aware: for each branch the context keys that receive most attention from it. Not for sale at any price."""
    for case in cases:
        cache = model.runner.context(case.context, Dense())
        watcher = Watcher([len(ids) for ids, _ in case.branches()], len(case.context))
        model.runner.branches(cache, len(case.context), case.padded(), watcher)
        for budget in budgets:
            policy = watcher.best(budget)
            logits = model.runner.branches(cache, len(case.context), case.padded(), policy)
            yield Row("oracle (query-aware)", budget, case.name, case.task, policy.kept(), **judge(case, logits))


def untrained(model: Model, name: str, budget: float, tokens: int) -> GatePolicy:
    """Window, sinks + window or random that keep ``budget`` of a context of ``tokens`` tokens when it ends."""
    config = model.runner.model.config
    if name == "random":
        delay = min(DELAY, int(budget * tokens / 2))
        keep = (budget * tokens - delay) / (tokens - delay)
        fields = {"params": {"keep": keep, "delay": delay, "seed": SEED}}
    else:
        sinks = SINKS if name == "sinks+window" else 0
        fields = {"params": {"window": max(0, round(budget * tokens) - sinks)}, "protect": {"sinks": sinks}}
    section = DropGateConfig.model_validate({
        "method": "random" if name == "random" else "window", **fields, "num_layers": config.num_hidden_layers,
        "num_kv_heads": config.num_key_value_heads, "hidden_size": config.hidden_size,
    })  # fmt: skip
    return GatePolicy(section.build_gates(), section)


UNTRAINED = ("window", "sinks+window", "random")


def untrained_rows(model: Model, cases: Sequence[Case], budgets: Sequence[float]) -> Iterator[Row]:
    for name in UNTRAINED:
        for budget in budgets:
            for case in cases:
                policy = untrained(model, name, budget, len(case.context))
                yield run_case(model, case, f"{name} (gate)", budget, policy)


class Knob:
    """Kept fraction of a gated checkpoint against strength, measured on calibration cases, each strength once.

    Args:
        model: with gates.
        cases: contexts to measure on.
        shares: weight of each task, as in the test; None weighs cases alike.
    """

    def __init__(self, model: Model, cases: Sequence[Case], shares: Mapping[str, float] | None = None) -> None:
        self.model, self.cases = model, cases
        tasks = [case.task for case in cases]
        self.weights = [1.0 if shares is None else shares[task] / tasks.count(task) for task in tasks]
        self.known: dict[float, float] = {}

    def kept(self, strength: float) -> float:
        """Weighted mean over the cases of the fraction of context keys held at the end of the context."""
        if strength not in self.known:
            found = []
            for case in self.cases:
                policy = GatePolicy(self.model.gates, self.model.section, strength)  # type: ignore[arg-type]
                self.model.runner.context(case.context, policy)
                found.append(policy.kept())
            total = sum(weight * kept for weight, kept in zip(self.weights, found, strict=True))
            self.known[strength] = total / sum(self.weights)
        return self.known[strength]

    def strength_for(self, budget: float, steps: int = 8) -> float | None:
        """A strength that keeps ``budget`` within ``TOLERANCE``, or the nearest that ``steps`` halvings find; None when
        even the strongest keeps more than a tenth too much."""
        low, high = 1 / 64, MAX_STRENGTH
        if self.kept(1.0) <= budget:
            high = 1.0
        else:
            low = 1.0
        if high == MAX_STRENGTH and self.kept(high) > budget * 1.1:
            return None
        for known, kept in self.known.items():  # what other budgets have learned narrows the bracket
            if kept > budget:
                low = max(low, known)
            else:
                high = min(high, known)
        for _ in range(steps):
            best = min(self.known, key=lambda s: abs(self.known[s] - budget))
            if abs(self.known[best] - budget) <= TOLERANCE * budget or high / low < 1.001:
                break
            middle = math.sqrt(low * high)
            if self.kept(middle) > budget:
                low = middle
            else:
                high = middle
        return min(self.known, key=lambda s: abs(self.known[s] - budget))


def gated_rows(
    model: Model, name: str, cases: Sequence[Case], calibration: Sequence[Case], budgets: Sequence[float],
    strengths: dict[str, float], notes: list[str], label: str = "",
) -> Iterator[Row]:  # fmt: skip
    """A gated checkpoint with open gates (under ``label``, by default its name), then at the strengths that reach the
    budgets; these go into ``strengths``, and budgets that none reaches into ``notes``."""
    yield from dense_rows(model, cases, f"{label or name} (open)")
    knob = Knob(model, calibration, Counter(case.task for case in cases))
    for budget in budgets:
        strength = knob.strength_for(budget)
        if strength is None:
            notes.append(
                f"{name} does not reach {budget:g}: strength {MAX_STRENGTH:g} keeps {knob.kept(MAX_STRENGTH):.3f}."
            )
            continue
        strengths[f"{name}@{budget:g}"] = strength
        for case in cases:
            policy = GatePolicy(model.gates, model.section, strength)  # type: ignore[arg-type]
            yield run_case(model, case, name, budget, policy)
