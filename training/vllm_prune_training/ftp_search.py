"""FTP's sparsity schedule by genetic search (arXiv 2412.11494, step 1 with the static router, step 3 with the trained one).

A plan is a vector of per-block sparsities with a fixed mean. Fitness: KL of the dense model's next-token distribution to
the routed one's on calibration rows, in prompt mode of what follows their prompts. Population, generations, elitism and the
pairwise transfers are ours: the paper's numbers are not known.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deap import algorithms, base, tools

from vllm_prune.errors import PruneError
from vllm_prune.gates.ftp import FTPGate

from .ftp import schedule_of, set_schedule, static_decisions
from .masked import GatedModel, GatedOutput
from .recipe_ftp import FTPSearch

STEP = 0.05
"""Sparsity that a mutation moves from one block to another."""
HIGHEST = 0.9


class _Least(base.Fitness):
    weights = (-1.0,)


class Plan(list[float]):
    """Sparsity of each block, block 0 first (always 0), with the fitness that the library keeps on it."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__(values)
        self.fitness = _Least()


def uniform_plan(blocks: int, sparsity: float) -> list[float]:
    """The same sparsity in all blocks but the first, with the given mean over all.

    Raises:
        PruneError: the blocks after the first cannot carry it.
    """
    share = sparsity * blocks / max(1, blocks - 1)
    if blocks < 2 or share > HIGHEST:
        raise PruneError(
            f"objective.ftp.sparsity {sparsity:g} over {blocks} blocks of which the first always runs is more than "
            f"{HIGHEST:g} in each of the others.", "Lower it.",
        )  # fmt: skip
    return [0.0] + [share] * (blocks - 1)


def transfer(plan: Plan) -> tuple[Plan]:
    """Move ``STEP`` between two blocks, or what fits; the mean stays."""
    give, take = random.sample(range(1, len(plan)), 2)
    amount = min(STEP, plan[give], HIGHEST - plan[take])
    plan[give] -= amount
    plan[take] += amount
    return (plan,)


def blend(one: Plan, other: Plan) -> tuple[Plan, Plan]:
    """Both become mixtures of the two; means stay."""
    share = random.random()
    for i, (a, b) in enumerate(zip(list(one), list(other), strict=True)):
        one[i], other[i] = share * a + (1 - share) * b, share * b + (1 - share) * a
    return one, other


def search(
    start: Sequence[float], cost: Callable[[Sequence[float]], float], options: FTPSearch, generations: int, seed: int
) -> tuple[list[float], list[float]]:
    """Genetic search from a plan.

    Args:
        start: plan that the population is spread around; its mean is kept.
        cost: of a plan, less is better.
        options: of the recipe.
        generations: 0 returns the start.
        seed: of the search.

    Returns:
        The best plan, and the best cost after each generation, the start's first.
    """
    seen: dict[tuple[float, ...], float] = {}

    def evaluate(plan: Sequence[float]) -> tuple[float]:
        key = tuple(round(x, 6) for x in plan)
        if key not in seen:
            seen[key] = cost(key)
        return (seen[key],)

    history = [evaluate(start)[0]]
    if generations == 0 or len(start) < 3:
        return list(start), history
    state = random.getstate()  # the library draws from Python's own generator
    random.seed(seed)
    try:
        toolbox = base.Toolbox()
        toolbox.register("evaluate", evaluate)
        toolbox.register("mutate", transfer)
        toolbox.register("mate", blend)
        population = [Plan(start)]
        while len(population) < options.population:
            plan = Plan(start)
            for _ in range(random.randint(1, 3 * len(start))):
                transfer(plan)
            population.append(plan)
        best = tools.HallOfFame(options.elite)
        for generation in range(generations + 1):
            for plan in population:
                if not plan.fitness.valid:
                    plan.fitness.values = evaluate(plan)
            best.update(population)
            history.append(best[0].fitness.values[0])
            if generation == generations:
                break
            parents = tools.selTournament(population, options.population, tournsize=3)
            children = algorithms.varOr(parents, toolbox, options.population - len(best), cxpb=0.3, mutpb=0.6)
            population = [*(Plan(plan) for plan in best), *children]
    finally:
        random.setstate(state)
    return [round(x, 6) for x in best[0]], history


@dataclass(frozen=True)
class Rows:
    """Texts that a plan is judged on.

    Attributes:
        ids: int64 [B, T].
        prompt: int64 [B], where each row's prompt ends: there plans are about the prompt's tokens, and judged by what follows
            them. None: about all tokens.
    """

    ids: torch.Tensor
    prompt: torch.Tensor | None = None

    def each(self) -> Iterator[tuple[torch.Tensor, int | None]]:
        """Rows [1, T], and P of each."""
        for i, row in enumerate(self.ids):
            yield row[None], None if self.prompt is None else int(self.prompt[i])


def skipped_share(out: GatedOutput, prompt: int | None) -> float:
    """Share of one row's (token, block) pairs that were skipped: of the prompt's P tokens, or of all."""
    return 1.0 - float(torch.stack(out.runs)[..., :prompt].mean())


def kl_cost(
    gated: GatedModel, rows: Rows, trained: bool, achieved: float | None = None
) -> Callable[[Sequence[float]], float]:
    """KL(dense || routed) per predicted token, as a function of the plan.

    Args:
        gated: whose gates' schedule is set for each plan and restored by the caller.
        rows: to judge on.
        trained: decide by the gates' router instead of the static one.
        achieved: mean share of skipped pairs that a plan must reach with the trained router (it may skip less than its
            plan asks for: that must not pay).
    """

    @torch.no_grad()
    def run(row: torch.Tensor, prompt: int | None, **kwargs: Any) -> tuple[torch.Tensor, GatedOutput]:
        out = gated(row, collect=False, prompt=prompt, **kwargs)
        return out.logits[0, (prompt or 1) - 1 : -1].float().log_softmax(-1), out

    dense = [run(row, prompt, mode="open")[0] for row, prompt in rows.each()]

    def cost(plan: Sequence[float]) -> float:
        total = short = 0.0
        decide = None if trained else static_decisions(plan)
        if trained:
            set_schedule(list(gated.gates), plan)
        for (row, prompt), log_p in zip(rows.each(), dense, strict=True):
            log_q, out = run(row, prompt, mode="hard", strength=1.0, decide=decide)
            total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            short += 0.0 if achieved is None else max(achieved - skipped_share(out, prompt), 0.0)
        return (total + 100.0 * short) / len(dense)

    return cost


def plan_schedule(gated: GatedModel, rows: Rows, options: FTPSearch, sparsity: float, seed: int) -> dict[str, Any]:
    """Search a schedule with the static router and write it into the gates. Returns what the record keeps."""
    gates: list[Any] = list(gated.gates)
    start = uniform_plan(len(gates), sparsity)
    plan, history = search(start, kl_cost(gated, rows, trained=False), options, options.generations, seed)
    set_schedule(gates, plan)
    return {"schedule": plan, "static_kl": history, "tokens": rows.ids.numel()}


def tune_schedule(gated: GatedModel, rows: Rows, options: FTPSearch, seed: int) -> dict[str, Any]:
    """Fine-tune the gates' schedule with the trained router, not skipping less than it does now."""
    gates: list[FTPGate] = list(gated.gates)  # type: ignore[arg-type]
    start = schedule_of(gates)
    with torch.no_grad():
        found = [
            skipped_share(gated(row, "hard", strength=1.0, collect=False, prompt=prompt), prompt)
            for row, prompt in rows.each()
        ]
    achieved = sum(found) / len(found)
    plan, history = search(start, kl_cost(gated, rows, True, achieved), options, options.tune_generations, seed)
    set_schedule(gates, plan)
    return {"schedule": plan, "router_kl": history, "skipped_before": achieved}
