"""Random eviction: the floor that any learned or computed choice of keys must beat.

After ``delay`` tokens key j of a KV head survives with probability p = keep ** strength, by a hash of (seed, layer, head,
position): independent of the text, and the same in training, in every chunking and after preemption.

    expiry_j = NEVER if mix(mix(j) ^ salt[layer, head]) < p 2^32 else j + delay + 1          per (layer, KV head)

Known when the key is written (``Reveal.AT_WRITE``). Survivors at a higher strength are a subset of those at a lower one.
``mix`` is a bijection of 32 bits (constants of Wellons' "lowbias32"); ``cache/steps.c`` holds the fast twin.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_prune.gates.base import NEVER, GateShape, Protection, Reveal, Scope, protected_from
from vllm_prune.gates.hard import HardGate

MOST_LAYERS = 256
"""The layer's index lives in a tensor of the gate file, which may be cast to bfloat16: exact up to here."""
_MASK = 0xFFFFFFFF


def mix(x: torch.Tensor) -> torch.Tensor:
    """32 well mixed bits of each 32-bit number. int64 in [0, 2^32), any shape; products wrap, their low half is exact."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


class RandomGate(HardGate):
    """Random eviction for one layer. Needs no training; its only tensor says which layer it is.

    Args:
        shape: of the base model.
        keep: probability that a key survives, at strength 1. In [0, 1].
        delay: tokens that a key stays visible before it may go. >= 0.
        seed: of the hash, in [0, 2^30].

    ``layer``, its index, is -1 until ``at_layer`` or a state dict says it.
    """

    method: ClassVar[str] = "random"
    reveal: ClassVar[Reveal] = Reveal.AT_WRITE
    scope: Scope = Scope.KV_HEAD

    layer: torch.Tensor

    def __init__(self, shape: GateShape, keep: float = 0.5, delay: int = 64, seed: int = 0) -> None:
        super().__init__()
        if not 0.0 <= keep <= 1.0:
            raise ValueError(f"keep must be a probability between 0 and 1, got {keep}")
        if not 0 <= delay <= 2**30:
            raise ValueError(f"delay must be between 0 and 2^30, got {delay}")
        if not 0 <= seed <= 2**30:
            raise ValueError(f"seed must be between 0 and 2^30, got {seed}")
        if shape.num_layers > MOST_LAYERS:
            raise ValueError(f"random gates know {MOST_LAYERS} layers at most, the model has {shape.num_layers}")
        self.shape = shape
        self.keep = float(keep)
        self.delay = delay
        self.seed = seed
        self.first_head = 0  # not 0 on a rank that holds others
        self.register_buffer("layer", torch.tensor(-1.0))

    def at_layer(self, index: int) -> RandomGate:
        self.layer.fill_(float(index))
        return self

    def keep_heads(self, heads: slice) -> None:
        self.first_head = heads.start

    def salts(self) -> torch.Tensor:
        """int64 [H] in [0, 2^32): what tells the KV heads of all layers apart.

        Raises:
            ValueError: the gate was never told its layer.
        """
        layer = float(self.layer.float())
        if not (0 <= layer < self.shape.num_layers and layer.is_integer()):
            raise ValueError(f"this random gate's layer is {layer:g}, of {self.shape.num_layers}: see at_layer()")
        start = mix(torch.tensor(self.seed))
        heads = self.first_head + torch.arange(self.shape.num_kv_heads)
        return mix(mix(start ^ (int(layer) + 1)) ^ (heads + 1))

    def limit(self, strength: float) -> int:
        """Keys whose hash lies below this survive: int in [0, 2^32]; 2^32 at strength 0."""
        return round(self.keep**strength * 2**32)

    def expiry(self, features: torch.Tensor, strength: float, protection: Protection) -> torch.Tensor:
        t = features.shape[0]
        pos = torch.arange(t, device=features.device)
        bits = mix(mix(pos)[None, :] ^ self.salts().to(pos.device)[:, None])  # [H, T]
        at = (pos + self.delay + 1).maximum(protected_from(protection, t, pos.device))
        return torch.where(bits < self.limit(strength), NEVER, at[None, :])
