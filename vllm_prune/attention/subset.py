"""The rows of a step for a layer that runs on some of its tokens only.

``subset`` is what serves, ``subset_naive`` its twin. Letters: T tokens of the step, K of them kept, R requests.
"""

from __future__ import annotations

import numpy as np

from vllm_prune.attention.state import PruneAttentionMetadata, Rows


def token_places(step: PruneAttentionMetadata) -> tuple[np.ndarray, np.ndarray]:
    """Slot and position of each token of the step: two int32 [T]. Made once a step."""
    if "places" not in step.notes:
        slots, positions = np.zeros((2, step.num_actual_tokens), np.int32)
        for rows in (step.decodes, step.chunks):
            slots[rows.first], positions[rows.first] = rows.slots, rows.positions
        for i in range(step.chunks.count):
            first, end = step.chunks.first[i], step.chunks.first[i] + step.chunks.tokens[i]
            slots[first:end] = step.chunks.slots[i]
            positions[first:end] = np.arange(step.chunks.positions[i], step.chunks.positions[i] + end - first)
        step.notes["places"] = slots, positions
    return step.notes["places"]  # type: ignore[no-any-return]


def token_strengths(step: PruneAttentionMetadata) -> np.ndarray:
    """Strength of the gates of each token's request: float64 [T]."""
    assert step.state.store is not None
    return step.state.store.lanes.strength[token_places(step)[0]]


def subset(step: PruneAttentionMetadata, keep: np.ndarray) -> PruneAttentionMetadata:
    """The step's metadata for its kept tokens, packed in batch order.

    Args:
        step: of whole requests.
        keep: bool [T].

    Returns:
        Rows over K tokens; requests that keep none have no row. Their ``positions`` are each row's first kept one.
    """
    _, positions = token_places(step)
    kept = np.flatnonzero(keep)
    before = np.concatenate([[0], np.cumsum(keep)]).astype(np.int32)
    slots = np.concatenate([step.decodes.slots, step.chunks.slots])
    first = np.concatenate([step.decodes.first, step.chunks.first])
    end = first + np.concatenate([step.decodes.tokens, step.chunks.tokens])
    tokens = before[end] - before[first]
    order = np.argsort(first)
    order = order[tokens[order] > 0]
    at = before[first[order]]
    own = positions[kept]
    strengths = np.concatenate([step.decodes.strengths, step.chunks.strengths])
    rows = Rows(slots[order], at, tokens[order], own[at], strengths[order])
    single = rows.tokens == 1
    return PruneAttentionMetadata(
        len(kept), step.state, rows.pick(single), rows.pick(~single), positions=own, kept=kept, parent=step
    )  # fmt: skip


def subset_naive(step: PruneAttentionMetadata, keep: np.ndarray) -> list[tuple[int, list[int]]]:
    """Slot and kept positions of each request that keeps any, in batch order."""
    found = []
    for rows in (step.decodes, step.chunks):
        for i in range(rows.count):
            first, count, start = int(rows.first[i]), int(rows.tokens[i]), int(rows.positions[i])
            positions = [start + j for j in range(count) if keep[first + j]]
            if positions:
                found.append((first, int(rows.slots[i]), positions))
    return [(slot, positions) for _, slot, positions in sorted(found)]
