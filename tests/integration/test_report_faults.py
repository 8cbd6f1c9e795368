"""Reports from the worker to the scheduler that come late, in another order, twice, or never, in a real engine.

Within what the worker was told to expect (``StepGrant.in_flight``) nothing changes but how early blocks come back. Beyond it the
engine ends with a clear error rather than give two requests one page: what had been answered until then was right.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    count_preemptions,
    engine,
    generate,
    pool_is_whole,
    prompts,
    save_gated,
    scheduler_of,
    tiny_config,
    token_ids,
)

ALLOWED = 3
"""Steps that a report may be late, as with asynchronous scheduling or on a GPU."""
BATCH = prompts([400, 250, 100, 33, 5], seed=2)
TOKENS = 70
POOL = {"max_num_batched_tokens": 256, "max_model_len": 480, "kv_cache_memory_bytes": 3 << 19}


class Line:
    """Between worker and scheduler. ``now``: of the waiting reports, those that are handed over after a step, in order."""

    def __init__(self, llm: Any) -> None:
        self.connector = scheduler_of(llm).connector
        self.real = self.connector.update_connector_output
        self.connector.update_connector_output = self.came
        self.waiting: list[Any] = []
        self.rng = random.Random(0)
        self.astray = self.steps = 0
        self.now: Callable[[], list[Any]] = self.at_once

    def came(self, output: Any) -> None:
        self.steps += 1
        self.waiting.append(output)
        for one in self.now():
            self.real(one)

    def take(self, most: int) -> list[Any]:
        taken, self.waiting = self.waiting[:most], self.waiting[most:]
        return taken

    def at_once(self) -> list[Any]:
        return self.take(len(self.waiting))

    def late(self) -> list[Any]:
        """As late as allowed, always."""
        self.astray += 1
        return self.take(len(self.waiting) - ALLOWED)

    def shuffled(self) -> list[Any]:
        """Some at a time, in any order, some of them twice."""
        if len(self.waiting) <= self.rng.randrange(ALLOWED):
            return []
        taken = self.at_once()
        self.rng.shuffle(taken)
        self.astray += len(taken) > 1
        return taken + taken[: self.rng.randrange(2)]

    def lost(self) -> list[Any]:
        """Those that give blocks back do not come."""
        taken = [one for one in self.at_once() if one.kv_connector_worker_meta is not None]
        gives = [
            any(r.keep < r.seen for told in x.kv_connector_worker_meta.reports.values() for r in told) for x in taken
        ]
        self.astray += sum(gives)
        return [one for one, gone in zip(taken, gives, strict=True) if not gone]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gated(
        tmp_path_factory.mktemp("reports"), tiny_config("qwen3", layers=2), "dcp", torch.float32, beta=3.6
    )


def dropped(outputs: list[Any]) -> list[float]:
    """Of what each says of its keys; how many steps it is of depends on when reports came."""
    return [(output.kv_transfer_params or {}).get("vllm_prune", {}).get("keys_dropped", 0) for output in outputs]


def test_as_late_and_as_disordered_as_allowed(folder):
    with engine(folder, **POOL) as llm:
        usual = generate(llm, BATCH, TOKENS)
        line = Line(llm)
        line.connector._ahead = ALLOWED
        preempted = count_preemptions(llm)
        for how in (line.late, line.shuffled):
            line.now, line.astray = how, 0
            found = generate(llm, BATCH, TOKENS)
            assert line.astray > 10
            assert token_ids(found) == token_ids(usual)
            assert min(dropped(found)) > 0
            line.now = line.at_once
            generate(llm, prompts([3]), tokens=2)
            assert pool_is_whole(llm) and not line.waiting
        assert preempted(), "in so small a pool"


def test_what_is_lost_ends_the_engine_with_its_reason(folder):
    """The scheduler thinks that a request has room which its worker gave up."""
    with engine(folder, **POOL) as llm:
        usual = [generate(llm, [prompt], TOKENS)[0] for prompt in BATCH[:2]]
        line = Line(llm)
        line.now = line.lost
        with pytest.raises(RuntimeError, match="ran out of granted pages: a report to the scheduler was lost"):
            generate(llm, BATCH[:2], TOKENS)
        assert line.astray > 0
        for request in scheduler_of(llm).requests.values():
            (alone,) = [x for x in usual if x.prompt_token_ids == list(request.prompt_token_ids)]
            said = list(request.output_token_ids)
            assert said == token_ids([alone])[0][: len(said)]
