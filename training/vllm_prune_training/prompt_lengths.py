"""Where the prompts of a batch end, for passes under gates that decide about whole prompts. Letters: B batch, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_prune.errors import PruneError


def prompt_lengths(prompt: int | Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """int64 [B], P of each row.

    Raises:
        PruneError: there is none.
        ValueError: one is not between 1 and T.
    """
    if prompt is None:
        raise PruneError("gates that decide about whole prompts must be told where each prompt ends.",
                         "Evaluate such a checkpoint through the server, or give prompt.")  # fmt: skip
    lengths = torch.as_tensor(prompt, device=device).long().expand(batch)
    if int(lengths.min()) < 1 or int(lengths.max()) > tokens:
        raise ValueError(f"prompt lengths must be between 1 and {tokens}, got {lengths.tolist()}")
    return lengths
