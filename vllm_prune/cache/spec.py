"""The KV cache spec of a gated layer: what vLLM plans with. Runs in the worker (made there), engine core (read there)."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_prune.cache.geometry import LaneGeometry


@dataclass(frozen=True, kw_only=True)
class PruneSpec(FullAttentionSpec):
    """A layer whose keys may expire. Blocks are granted to requests, not to token ranges.

    Attributes:
        num_layers: L, gated layers on this rank (all of them share one group and one kind of block).
        gate_rank: r, numbers of the cache that what the gate remembers of a token takes; gate_lanes: lanes of it in a layer.
        chunk_tokens: most tokens of one request in one step.
        expected_keep: planned mean kept fraction, from the checkpoint.
        eviction_units: independent decisions about a key in a layer, of all ranks.
        ranks: tensor parallel ranks; KV heads, lanes and pages are those of one of them, which are all alike.
    """

    num_layers: int
    gate_rank: int = 0
    gate_lanes: int = 1
    chunk_tokens: int
    expected_keep: float = 1.0
    eviction_units: int = 1
    ranks: int = 1

    @property
    def geometry(self) -> LaneGeometry:
        return LaneGeometry(
            self.num_layers, self.num_kv_heads, self.head_size, self.block_size, self.gate_rank, self.gate_lanes
        )

    @property
    def block_bytes(self) -> int:
        """Of a block, over all layers and ranks."""
        return self.ranks * self.num_layers * self.page_size_bytes

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def peak_blocks(self, tokens: int, keep: float | None = None) -> int:
        """Planned most blocks of a request of ``tokens`` tokens. ``keep``: of what it keeps, if not ``expected_keep``."""
        return self.geometry.peak_blocks(tokens, self.chunk_tokens, self.expected_keep if keep is None else keep)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.peak_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # The row is the grant log, which outgrows what is held: every chunk is granted whole before it is thinned out.
        return self.max_grants(max_len)

    def max_grants(self, max_len: int) -> int:
        return 3 * self.geometry.blocks_for(max_len) + 64

    @classmethod
    def merge(cls, specs: list[PruneSpec]) -> PruneSpec:  # type: ignore[override]
        return KVCacheSpec.merge.__func__(cls, specs)  # type: ignore[attr-defined]
