"""``register()``: the only place that touches vLLM's registries. Called in every vLLM process, any number of times."""

from __future__ import annotations

import logging

from vllm_prune.checkpoint import GATED_ARCHITECTURES, GENERIC_ARCHITECTURE
from vllm_prune.compat import version_problem

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's logger: only that one has a handler

MODELOPT_ARCHITECTURE = "Qwen3ForCausalLMDMS"
PUBLIC_ARCHITECTURES = (
    "Qwen3ForCausalLM", "Qwen3Model", MODELOPT_ARCHITECTURE, "LlamaForCausalLM", "LlamaModel", "TransformersForCausalLM",
    "TransformersEmbeddingModel",
)  # fmt: skip
"""What vLLM makes of public DMS checkpoints, whose architectures are their base's, or NVIDIA's, or missing."""

_MODEL_CLASSES = {
    GATED_ARCHITECTURES["Qwen3ForCausalLM"]: "vllm_prune.models.native:PrunedQwen3ForCausalLM",
    GATED_ARCHITECTURES["LlamaForCausalLM"]: "vllm_prune.models.native:PrunedLlamaForCausalLM",
    MODELOPT_ARCHITECTURE: "vllm_prune.models.native:PrunedQwen3ForCausalLM",
    GENERIC_ARCHITECTURE: "vllm_prune.models.generic:PrunedTransformersForCausalLM",
}


def register() -> None:
    """Entry point ``vllm.general_plugins``: makes gated architectures known. Adds entries, changes nothing."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_prune.models.hook import GatedModelConfig
    from vllm_prune.models.public import PublicDMSConfig

    for architecture in PUBLIC_ARCHITECTURES:
        if MODELS_CONFIG_MAP.setdefault(architecture, PublicDMSConfig) is not PublicDMSConfig:
            logger.warning(
                "vllm-prune: public DMS checkpoints of %s are not recognised: it has another hook", architecture
            )
    for architecture, model_class in _MODEL_CLASSES.items():
        if architecture not in ModelRegistry.models:
            ModelRegistry.register_model(architecture, model_class)
        MODELS_CONFIG_MAP.setdefault(architecture, GatedModelConfig)
    problem = version_problem()
    if problem is not None:
        # The hook above refuses gated checkpoints with this reason; everything else in this vLLM goes on untouched.
        logger.warning("vllm-prune: %s Gated checkpoints will be refused.", problem)
        return

    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_prune.cache.manager import PruneManager
    from vllm_prune.cache.spec import PruneSpec

    # The registry fills itself with vLLM's own specs only while it is empty: let it do so first.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(PruneSpec, PruneManager, PruneSpec)
