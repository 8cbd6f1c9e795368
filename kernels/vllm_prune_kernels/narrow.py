"""Numbers of a cache narrower than the model's: FP8 (e4m3) keys and values, with one scale each for all of a layer.

What is stored is x / scale, held to the type's range. Gate keys keep the model's precision, since a decision hangs on the sign
of a score: they lie in the same pages, each taking as many of the cache's numbers as it has bytes, which ``Sizes.gate_rank``
counts.
``narrow_naive`` is the twin of ``narrow``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import Sizes

FP8 = torch.float8_e4m3fn
MOST = 448.0
"""Largest finite number of the type."""


@triton.jit
def narrow(x, TYPE: tl.constexpr, by, INTERPRETED: tl.constexpr):
    """x as the cache's TYPE; divided by ``by`` if that is FP8."""
    if TYPE.is_fp8():
        x = tl.clamp(x.to(tl.float32) / by, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        if INTERPRETED:
            # The interpreter (3.7) loses a carry out of the mantissa: what it is given is rounded already, ties to even.
            bits = x.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
            x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, rounded)
    return x.to(TYPE)


def narrow_naive(x: torch.Tensor, dtype: torch.dtype, by: float) -> torch.Tensor:
    """``narrow``."""
    return (x.float() / by).clamp(-MOST, MOST).to(dtype) if dtype == FP8 else x.to(dtype)


def gate_pages(kv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The cache [P, 2 N D] as pages of gate keys of a dtype: [P, 2 N D b / b'], b and b' being bytes of a number."""
    return kv if kv.dtype == dtype else kv.view(dtype)


def gate_view(sizes: Sizes, kv: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """``gate_pages``, and how many numbers of the dtype a gate key has."""
    return gate_pages(kv, dtype), sizes.gate_rank * kv.element_size() // dtype.itemsize
