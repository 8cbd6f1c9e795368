"""The borrowed neuron of DMS: a number of the query that decides about keys instead of attending to them.

As NVIDIA's code has it (``experimental/dms/dms/core.py``, ``prepare_attention_input``), field by field:

- which number: the last of the first query head of each KV head's group (``query_states[:, ::gqa_factor, :, -1]``);
- read after the projection with its bias, after q_norm where there is one, and before RoPE;
- logit = 100 g - 5 (``dms_alpha_scale``, ``dms_initial_alpha_offset``);
- set to 0 before RoPE, and again after it, as RoPE mixes its partner into it; also when eviction is switched off.

FastDMS (``training/dms_train.py``) first scales the number down to 0 over 2 000 steps, so that no key is evicted when the
gates begin to learn and the model has learned to do without.

Here the gate owns the H rows of the query projection (``borrow`` moves them), and the base's rows are 0: that is reading
before RoPE and setting to 0, exactly, with bias and without. What is set to 0 after RoPE is ``without_borrowed``, in the
server and its twin alike. With a q_norm it would not be exact (the mean square runs over the moved number too, and
over a whole head that only the base has), so ``borrow`` refuses such bases.

Letters: B batch, T tokens, H KV heads, G query heads per KV head, D head size, D_model hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from vllm_prune.errors import PruneError
from vllm_prune.gates.base import Gate


def borrowed_numbers(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The borrowed numbers [..., H] of query [..., H * G, D], a view."""
    return query[..., :: query.shape[-2] // num_kv_heads, -1]


def without_borrowed(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """query [..., H * G, D] with the borrowed numbers 0."""
    heads, size = query.shape[-2:]
    head = torch.arange(heads, device=query.device)[:, None] % (heads // num_kv_heads) == 0
    last = torch.arange(size, device=query.device) == size - 1
    return query.masked_fill(head & last, 0.0)


@torch.no_grad()
def borrow(attentions: Iterable[Any], gates: Sequence[Gate], keep: float = 0.0) -> None:
    """Move the borrowed rows of every layer's query projection into its gate, in place, when gates are made.

    Args:
        attentions: Hugging Face attention modules, L of them.
        gates: DMS gates of the borrowed form, L of them.
        keep: what the moved rows are multiplied with: 0 (FastDMS after its first phase) evicts nothing at first, 1
            (NVIDIA) decides by the numbers as they are.

    Raises:
        PruneError: a module has no query projection of its own (``q_proj``), or a q_norm.
        ValueError: the lists do not fit together.
    """
    pairs = list(zip(attentions, gates, strict=True))
    for attention, gate in pairs:
        if not gate.borrows:
            raise ValueError("gates of the borrowed form only")
        if not isinstance(getattr(attention, "q_proj", None), nn.Linear):
            raise PruneError(
                f"{type(attention).__name__} has no q_proj of its own to borrow from.", "Use form: separate."
            )
        if isinstance(getattr(attention, "q_norm", None), nn.Module):
            raise PruneError(
                f"{type(attention).__name__} norms its queries, so that a borrowed number cannot be taken out exactly.",
                "Use form: separate.",
            )
    for attention, gate in pairs:
        projection, h = attention.q_proj, gate.shape.num_kv_heads
        group, size = attention.num_key_value_groups, attention.head_dim
        rows = torch.arange(h, device=projection.weight.device) * group * size + size - 1
        linear: Any = gate.gate
        linear.weight.copy_(keep * projection.weight[rows])
        projection.weight[rows] = 0.0
        linear.bias.zero_()
        if projection.bias is not None:
            linear.bias.copy_(keep * projection.bias[rows])
            projection.bias[rows] = 0.0
