"""The prompts of a step, for routers that decide about whole ones: which tokens of a call are theirs.

A prompt's own length comes with the step's grants: what a preempted request had generated is computed again in the same
step, but is no part of the prompt. Letters: N tokens of a prompt in a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_prune.attention.subset import token_places

if TYPE_CHECKING:
    from vllm_prune.attention.state import PruneAttentionMetadata


@dataclass(frozen=True, eq=False)
class PromptRow:
    """What of a prompt a call runs on, two tokens at least.

    Attributes:
        slot: of the request.
        prompt: P, tokens of the whole prompt.
        first: its first token in the call.
        places: int64 [N], its tokens in the step.
        positions: int64 [N], where they stand in the prompt, rising.
        strength: of the request's gates.
    """

    slot: int
    prompt: int
    first: int
    places: np.ndarray
    positions: np.ndarray
    strength: float


def prompt_lengths(step: PruneAttentionMetadata) -> np.ndarray:
    """int32 by slot: tokens of each request's prompt."""
    assert step.state.store is not None
    return step.state.store.lanes.prompt


def has_prompt(step: PruneAttentionMetadata) -> bool:
    """Whether a step computes any prompt of more than one token.

    Raises:
        RuntimeError: one came in pieces, which the configuration rules out (``whole_prompt.py``).
    """
    prompts, found = prompt_lengths(step), False
    for rows in (step.decodes, step.chunks):
        for slot, start, count in zip(rows.slots, rows.positions, rows.tokens, strict=True):
            prompt = int(prompts[slot])
            if start < prompt and (start > 0 or count < prompt):
                raise RuntimeError(f"vllm-prune: tokens {start} to {start + count} of {prompt} came as a chunk")
            found = found or (prompt > 1 and bool(start < prompt))
    return found


def prompt_rows(call: PruneAttentionMetadata) -> Iterator[PromptRow]:
    """Prompts of which a call, the whole step's or a routed one, runs on two tokens at least: of fewer none has a score."""
    step = call.parent or call
    _, positions = token_places(step)
    for i in range(call.chunks.count):
        slot, first, count = (int(x[i]) for x in (call.chunks.slots, call.chunks.first, call.chunks.tokens))
        places = np.arange(first, first + count) if call.kept is None else call.kept[first : first + count]
        at = positions[places].astype(np.int64)
        prompt = int(prompt_lengths(step)[slot])
        n = int((at < prompt).sum())
        if n > 1:
            yield PromptRow(slot, prompt, first, places[:n], at[:n], float(call.chunks.strengths[i]))
