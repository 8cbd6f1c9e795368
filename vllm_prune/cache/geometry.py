"""The shape of lanes and head-pages, shared by the scheduler's accounting and the worker's page table.

A *lane* is the KV sequence of one request at one (layer, KV head), survivors packed densely. A *head-page* holds the
N tokens of one head of one block; one granted block is L x H head-pages, usable by any lane of its request. A gate that
remembers something per token has more lanes in each layer, one an eviction unit, of r numbers a token and 2 N D / r tokens
a page.
"""

from __future__ import annotations

from dataclasses import dataclass


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class LaneGeometry:
    """Sizes of one model's lanes on one rank. Units: layers, heads, tokens, numbers, lanes a layer.

    ``gate_rank`` is r of one gate lane, in numbers of the cache; ``gate_lanes`` 1, or H where each KV head decides for itself;
    unused if r is 0.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_tokens: int
    gate_rank: int = 0
    gate_lanes: int = 1

    def __post_init__(self) -> None:
        page = 2 * self.block_tokens * self.head_size
        if self.gate_rank and (self.gate_rank > page or page % self.gate_rank):
            raise ValueError(f"a head-page of {page} numbers cannot be divided into gate keys of {self.gate_rank}")

    @property
    def pages_per_block(self) -> int:
        return self.num_layers * self.num_kv_heads

    @property
    def lanes_per_layer(self) -> int:
        return self.num_kv_heads + (self.gate_lanes if self.gate_rank else 0)

    @property
    def num_lanes(self) -> int:
        return self.num_layers * self.lanes_per_layer

    @property
    def gate_page_tokens(self) -> int:
        """Tokens of a gate lane's page; 0 when the gate remembers nothing."""
        return 2 * self.block_tokens * self.head_size // self.gate_rank if self.gate_rank else 0

    def pages_for(self, tokens: int) -> int:
        """Head-pages of a request that keeps ``tokens`` tokens in every lane. Also the most that n more tokens can
        add to any request, since each lane needs at most ceil(n / page tokens) more pages."""
        pages = self.num_layers * self.num_kv_heads * cdiv(tokens, self.block_tokens)
        if self.gate_rank:
            pages += self.num_layers * self.gate_lanes * cdiv(tokens, self.gate_page_tokens)
        return pages

    def blocks_for_pages(self, pages: int) -> int:
        return cdiv(pages, self.pages_per_block)

    def blocks_for(self, tokens: int) -> int:
        """Blocks of a request that keeps everything: the dense bound (gate keys included)."""
        return self.blocks_for_pages(self.pages_for(tokens))

    def dense_blocks(self, tokens: int) -> int:
        """Blocks stock vLLM holds for ``tokens`` tokens: what eviction is compared with."""
        return cdiv(tokens, self.block_tokens)

    def peak_blocks(self, tokens: int, chunk_tokens: int, keep: float) -> int:
        """Planned peak of a request of ``tokens`` tokens of which a fraction ``keep`` stays: all but the newest chunk
        thinned out, the chunk itself whole."""
        chunk = min(tokens, chunk_tokens)
        thinned = keep * self.pages_for(tokens - chunk) if tokens > chunk else 0.0
        return min(
            self.blocks_for(tokens), self.blocks_for_pages(int(thinned) + self.pages_for(chunk) + self.num_lanes)
        )
