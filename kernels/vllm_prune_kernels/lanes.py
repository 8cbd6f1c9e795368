"""The worker's lanes as tensors at fixed addresses, which kernels read and change; nothing of them is read back in a step.

Letters: S request slots, L layers, H KV heads, E eviction units a layer (1 or H), N tokens a page, D head size, r numbers
that a gate lane takes per token (of the cache: see ``narrow``), Ng = 2 N D / r tokens a gate page, B blocks, Q = L H pages a
block, P = B Q head-pages, W pages that a lane can have, G grants that a request can hold. A layer's lanes: H of K/V, then E of
gate keys if r > 0; Z lanes in all. A K/V page holds a token's row as K then V, [N, 2 D]; a gate page gate keys, [Ng, r].

The free pages of a block are its own stack, so that all stacks together have P places: page p belongs to block (p // H) % B.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import torch

NEVER = 2**31 - 1
REPORT = 17
"""Numbers of a request's report: see ``close``."""
AHEAD = 5
"""Pages in use now and after 1 to 4 more tokens, at the head of a report."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter (3.9) multiplies bfloat16 wrongly: kernels widen it there. On a GPU such products are exact in float32."""


@dataclass(frozen=True)
class Sizes:
    """Of the lanes; see the module."""

    layers: int
    heads: int
    units: int
    page_tokens: int
    head_size: int
    gate_rank: int
    blocks: int
    slots: int
    width: int
    grants: int

    @property
    def per_layer(self) -> int:
        return self.heads + (self.units if self.gate_rank else 0)

    @property
    def lanes(self) -> int:
        return self.layers * self.per_layer

    @property
    def block_pages(self) -> int:
        return self.layers * self.heads

    @property
    def pages(self) -> int:
        return self.blocks * self.block_pages

    @property
    def page_numbers(self) -> int:
        return 2 * self.page_tokens * self.head_size

    @property
    def words(self) -> int:
        """Of 32 positions each, for the longest request."""
        return -(-self.width * self.page_tokens // 32)

    @property
    def gate_page_tokens(self) -> int:
        return self.page_numbers // self.gate_rank if self.gate_rank else 1


@dataclass
class Lanes:
    """See the module.

    Attributes:
        sizes: of everything.
        table: int32 [S, Z, W], pages of each lane; held: int32 [S, Z], how many there are.
        shared: int32 [S, Z], of a request, how many of these, its first, are a snapshot's; settled: int32 [S, Z], of a snapshot,
            how many of its first ones nothing changes any more.
        length: int32 [S, Z], tokens.
        position, expiry, link: int32 [P, N], of each slot of the first lane of a unit; ``link`` is scratch of ``retire``.
        page_lane, page_index: int32 [P], owner of a page (-1: free) and its place in the owner's table row.
        block_free: int32 [B, Q], stacks of free pages; n_free: int32 [B].
        live_block, live_index: int32 [S, G], grants held, in log order: block and log index; n_live: int32 [S].
        live_start, gone_start: int32 [S, G + 1], lane_start: int32 [S, Z], scratch of planning and packing.
        slot_of_block: int32 [B], -1 unless the block is the first of a request.
        dropped: int32 [S, L, E].
        shift: float32 [S], limit: int64 [S], delay: int32 [S]: how the gates decide for each request: what its strength adds to
            biases (DCP) or the threshold of logits (DMS); the hashes below which keys live; tokens until an expiry.
        spared: int32 [S, words], a bit for each position whose key no gate may drop; n_spared: int32 [S], how many are set.
        level: float64 [S, L], the threshold or share that gates at boundaries decide by, of each request and layer.
        error: int32 [1], set when a request ran out of granted pages.
        recorded: int32 [S, L, E, T], expiries of a request's keys, where drops are recorded; else [0].
    """

    sizes: Sizes
    table: torch.Tensor
    held: torch.Tensor
    shared: torch.Tensor
    settled: torch.Tensor
    length: torch.Tensor
    position: torch.Tensor
    expiry: torch.Tensor
    link: torch.Tensor
    page_lane: torch.Tensor
    page_index: torch.Tensor
    block_free: torch.Tensor
    n_free: torch.Tensor
    live_block: torch.Tensor
    live_index: torch.Tensor
    n_live: torch.Tensor
    live_start: torch.Tensor
    gone_start: torch.Tensor
    lane_start: torch.Tensor
    slot_of_block: torch.Tensor
    dropped: torch.Tensor
    shift: torch.Tensor
    limit: torch.Tensor
    delay: torch.Tensor
    spared: torch.Tensor
    n_spared: torch.Tensor
    level: torch.Tensor
    error: torch.Tensor
    recorded: torch.Tensor

    @classmethod
    def make(cls, sizes: Sizes, device: torch.device | str, record_tokens: int = 0) -> Lanes:
        """Empty lanes. ``record_tokens``: T of ``recorded``, 0 records nothing."""
        s = sizes

        def full(value: int, *shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        slots = (s.pages, s.page_tokens)
        return cls(
            s, full(0, s.slots, s.lanes, s.width), *(full(0, s.slots, s.lanes) for _ in range(4)),
            full(0, *slots), full(0, *slots), full(0, *slots), full(-1, s.pages), full(0, s.pages),
            full(0, s.blocks, s.block_pages), full(0, s.blocks), full(0, s.slots, s.grants), full(0, s.slots, s.grants),
            full(0, s.slots), full(0, s.slots, s.grants + 1), full(0, s.slots, s.grants + 1), full(0, s.slots, s.lanes),
            full(-1, s.blocks), full(0, s.slots, s.layers, s.units),
            torch.zeros(s.slots, device=device), full(0, s.slots).long(), full(0, s.slots),
            full(0, s.slots, s.words), full(0, s.slots),
            torch.zeros(s.slots, s.layers, dtype=torch.float64, device=device), full(0, 1),
            full(NEVER, s.slots, s.layers, s.units, record_tokens) if record_tokens else full(0, 0),
        )  # fmt: skip

    @property
    def record_tokens(self) -> int:
        return self.recorded.shape[-1] if self.recorded.dim() == 4 else 0

    @property
    def bytes(self) -> int:
        """Memory of all of it."""
        tensors = (getattr(self, field.name) for field in fields(self) if field.name != "sizes")
        return sum(x.numel() * x.element_size() for x in tensors)


def bytes_per_page(sizes: Sizes) -> int:
    """Bookkeeping that grows with the pool: bytes beside each head-page."""
    return 4 * (3 * sizes.page_tokens + 3)


def fixed_bytes(sizes: Sizes) -> int:
    """Bookkeeping that does not grow with the pool."""
    s = sizes
    return 4 * s.slots * (s.lanes * (s.width + 5) + 4 * s.grants + s.layers * (s.units + 2) + s.words + 5)


def to_device(rows: list[tuple[int, ...]] | list[int], columns: int, device: torch.device) -> torch.Tensor:
    """int32 [n, columns] from the host, without waiting for anything before it."""
    return send(torch.tensor(rows, dtype=torch.int32).view(-1, columns), device)


def send(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same of a tensor."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
