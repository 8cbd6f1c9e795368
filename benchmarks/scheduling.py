"""vLLM's scheduler without an engine: a real configuration of a tiny model, its scheduler and a pool of a given size.

For what is about scheduling alone: no weights are made and no worker is started. Import it after the environment is set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_prune.checkpoint import add_gates
from vllm_prune.gates import Gate


def write_model(folder: Path, layers: int, heads: int, kv_heads: int, head_dim: int, gates: Sequence[Gate] = (),
                section: dict[str, Any] | None = None) -> Path:  # fmt: skip
    """A checkpoint without base weights, gated if there are gates."""
    config = AutoConfig.for_model(
        "qwen3", vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=1 << 17,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    data = {**config.to_dict(), "architectures": ["Qwen3ForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(data))
    if gates:
        add_gates(folder, list(gates), section or {})
    return folder


def configuration(model: Path, max_model_len: int, **options: Any) -> VllmConfig:
    """As an engine would make it, the plugin's hook included."""
    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True, "block_size": 32, "enforce_eager": True, "dtype": "float32",
        "enable_prefix_caching": False, "seed": 0, "kv_cache_memory_bytes": 1 << 20,
    }  # fmt: skip
    return EngineArgs(model=str(model), max_model_len=max_model_len, **{**defaults, **options}).create_engine_config()


def cache_of(names: Sequence[str], spec: KVCacheSpec, blocks: int) -> KVCacheConfig:
    """A pool of ``blocks`` blocks (the null block among them) for layers of these names, all of one spec."""
    return KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(list(names), spec)])


def scheduler(config: VllmConfig, cache: KVCacheConfig) -> Scheduler:
    """The one that an engine of this configuration would have; its connector included, if there is one."""
    config.cache_config.num_gpu_blocks = cache.num_blocks
    kind = config.scheduler_config.get_scheduler_cls()
    return kind(config, cache, StructuredOutputManager(config), block_size=config.cache_config.block_size)  # type: ignore


def block_hasher(config: VllmConfig) -> Callable[[Request], list[Any]]:
    """What an engine of this configuration hashes its requests' blocks with, for prefix caching."""
    function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(function)
    return get_request_block_hasher(config.cache_config.block_size, function)


def request(name: str, prompt: Sequence[int], max_tokens: int, stop: Sequence[int] = (),
            hasher: Callable[[Request], list[Any]] | None = None, **asked: Any) -> Request:  # fmt: skip
    """Of the prompt's token ids. ``asked``: its fields ``prune.*``; ``stop``: token ids that end it; ``hasher``: see above."""
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, stop_token_ids=list(stop), detokenize=False,
        extra_args={f"prune.{field}": value for field, value in asked.items()} or None,
    )  # fmt: skip
    return Request(name, list(prompt), params, None, block_hasher=hasher)
