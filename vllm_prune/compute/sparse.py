"""Projections and gated MLPs that read only the rows of their weights that somebody chose. CPU, bfloat16 or float32.

For a batch the rows that any token chose are read once, each token masked by its own choice: sums run in a fixed order and a
masked term is an exact 0, so that a token's result does not depend on the others. ``*_naive`` are the twins: dense products.
Letters: R tokens, K inputs, N outputs, M neurons, D_model hidden size.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.nn import functional as F


def _load() -> ctypes.CDLL:
    spec = find_spec("vllm_prune.compute._sparse")
    if spec is None or spec.origin is None:
        raise ImportError(
            "vllm-prune: the compiled part is missing. Install the package with pip (a C compiler is needed from source)."
        )
    lib = ctypes.CDLL(spec.origin)
    p, n = c_void_p, c_int64
    for name in ("sparse_dot16", "sparse_dot32", "sparse_add16", "sparse_add32"):
        function = getattr(lib, name)
        function.restype, function.argtypes = None, [p, n, p, n, p, n, p]
    return lib


_lib = _load()
_DOT = {torch.bfloat16: _lib.sparse_dot16, torch.float32: _lib.sparse_dot32}
_ADD = {torch.bfloat16: _lib.sparse_add16, torch.float32: _lib.sparse_add32}


def _check(weight: torch.Tensor, index: torch.Tensor) -> None:
    if weight.dtype not in _DOT or not weight.is_contiguous() or weight.device.type != "cpu":
        raise ValueError(f"need a contiguous bfloat16 or float32 matrix on the CPU, got {weight.dtype}")
    if index.dtype != torch.int32 or not index.is_contiguous():
        raise ValueError("need contiguous int32 row numbers")


def dot_rows(weight: torch.Tensor, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x times some rows of a matrix, transposed.

    Args:
        weight: [N, K]; index: int32 [n], rows of it, unchecked; x: [R, K].

    Returns:
        float32 [R, n].
    """
    _check(weight, index)
    x = x.float().contiguous()
    out = torch.empty(x.shape[0], len(index))
    _DOT[weight.dtype](weight.data_ptr(), weight.shape[1], index.data_ptr(), len(index), x.data_ptr(), x.shape[0],
                       out.data_ptr())  # fmt: skip
    return out


def add_rows(weight: torch.Tensor, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sums of some rows of a matrix, weighted by x [R, n]. Arguments as ``dot_rows``; returns float32 [R, K]."""
    _check(weight, index)
    x = x.float().contiguous()
    out = torch.empty(x.shape[0], weight.shape[1])
    _ADD[weight.dtype](weight.data_ptr(), weight.shape[1], index.data_ptr(), len(index), x.data_ptr(), x.shape[0],
                       out.data_ptr())  # fmt: skip
    return out


@dataclass(frozen=True)
class MLPWeights:
    """A gated MLP (SiLU) with its rows where they can be chosen.

    Attributes:
        gate_up: [2 M, D_model], gate rows then up rows; the base's own tensor.
        down: [M, D_model], the down projection transposed; a copy.
    """

    gate_up: torch.Tensor
    down: torch.Tensor


def sparse_mlp(weights: MLPWeights, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """A gated MLP of each token's chosen neurons.

    Args:
        x: [R, D_model].
        chosen: bool [R, M].

    Returns:
        [R, D_model] in the dtype of x.
    """
    neurons = weights.down.shape[0]
    one = chosen.any(0).nonzero()[:, 0]
    index = torch.cat([one, one + neurons]).to(torch.int32)
    gate, up = dot_rows(weights.gate_up, index, x).to(x.dtype).float().chunk(2, dim=1)
    hidden = (F.silu(gate) * up).to(x.dtype)
    hidden = hidden.masked_fill(~chosen[:, one], 0.0)
    return add_rows(weights.down, index[: len(one)], hidden).to(x.dtype)


def sparse_mlp_naive(weights: MLPWeights, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``sparse_mlp`` by dense products."""
    gate, up = F.linear(x.float(), weights.gate_up.float()).to(x.dtype).float().chunk(2, dim=1)
    hidden = (F.silu(gate) * up).to(x.dtype).masked_fill(~chosen, 0.0)
    return (hidden.float() @ weights.down.float()).to(x.dtype)
