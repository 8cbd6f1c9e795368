"""What several training processes must agree on, and how one step's batch is divided among them.

A run on W ranks is the same run as on one: every rank draws the same global batch [B, T] and keeps its own B / W rows,
and each mean over the batch is taken over the global batch. A gradient that DDP or FSDP2 averages over ranks is then
the gradient of the single process when each rank's loss is ``W * own sum / global sum of weights``
(``weighted_mean``), whose average over ranks is the global weighted mean.

Without an initialised process group there is one rank, and every function here is the identity.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import distributed as dist

from vllm_prune.errors import PruneError

T = TypeVar("T")


def world_size() -> int:
    """W, the number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in 0 .. W - 1."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes logs, checkpoints and the exported folder."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def global_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, without a gradient; the tensor itself is left alone."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of this rank's values over the global sum of weights, times W: see the module.

    Args:
        values, weights: float, of one shape.

    Returns:
        Scalar with a gradient. With one rank: ``(values * weights).sum() / weights.sum()``.
    """
    total = global_sum(weights.sum())
    return world_size() * (values * weights).sum() / total.clamp_min(torch.finfo(total.dtype).tiny)


def share(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's rows of a global batch: rank r of W has rows r * B / W to (r + 1) * B / W.

    Args:
        batch: tensors of [B, ...].

    Raises:
        PruneError: B is no multiple of W.
    """
    ranks, own = world_size(), rank()
    if ranks == 1:
        return batch
    rows = next(iter(batch.values())).shape[0]
    if rows % ranks:
        raise PruneError(
            f"a batch of {rows} sequences cannot be divided equally among {ranks} processes.",
            "Set training.batch_tokens to a multiple of launch.workers times the longest training.lengths.",
        )
    part = rows // ranks
    return {name: tensor[own * part : (own + 1) * part] for name, tensor in batch.items()}


def from_main(value: T) -> T:
    """Rank 0's value, on every rank. It must pickle."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def everywhere(value: T) -> list[T]:
    """Each rank's value, on every rank. It must pickle."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found
