"""What gates that decide about whole prompts need of vLLM's configuration: every prompt computed in one step.

Their scores read later queries of the prompt (``gates/prompt.py``), so that a prompt in chunks would be another prompt. Runs
in the front end, from the configuration hook.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm_prune.refusals import refused

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's logger: only that one has a handler


def need_whole_prompts(vllm_config: VllmConfig, method: str) -> None:
    """Switch chunked prefill off. ``method`` is its name in messages.

    ``max_num_batched_tokens`` is raised to the longest request (and a decode of every other) where it is one of vLLM's
    defaults, which nobody asked for; vLLM does not tell what was given.

    Raises:
        PruneError: options that were given want prompts in chunks.
    """
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    if scheduler.long_prefill_token_threshold > 0:
        raise refused("whole-prompts-cut", method=method, tokens=scheduler.long_prefill_token_threshold)
    least = model.max_model_len
    if scheduler.max_num_batched_tokens < least:
        if scheduler.max_num_batched_tokens not in _defaults(vllm_config):
            raise refused("whole-prompts", method=method, tokens=scheduler.max_num_batched_tokens, least=least)
        scheduler.max_num_batched_tokens = least + scheduler.max_num_seqs
        scheduler.max_num_encoder_input_tokens = scheduler.max_num_batched_tokens
        scheduler.encoder_cache_size = scheduler.max_num_batched_tokens
    scheduler.enable_chunked_prefill = False
    logger.info(
        "vllm-prune: chunked prefill is switched off (%s gates decide about whole prompts), max_num_batched_tokens is %d; "
        "requests for prompt_logprobs will be refused", method, scheduler.max_num_batched_tokens,
    )  # fmt: skip


def _defaults(vllm_config: VllmConfig) -> set[int]:
    """What vLLM sets max_num_batched_tokens to by itself."""
    from vllm.config import SchedulerConfig
    from vllm.engine.arg_utils import EngineArgs

    found, _ = EngineArgs.get_batch_defaults(vllm_config.parallel_config.world_size)
    single = {*found.values(), SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS}
    # Doubled for throughput; no default exceeds what all requests together can have, nor falls below their number.
    most = vllm_config.scheduler_config.max_num_seqs * vllm_config.model_config.max_model_len
    every = single | {2 * value for value in single}
    return every | {min(value, most) for value in every} | {vllm_config.scheduler_config.max_num_seqs}
