"""The configuration hook of architectures that public DMS checkpoints share with their bases.

vLLM asks it twice: when a model's configuration is made, where such a checkpoint is given the section and the architecture of a
gated one, and when the engine's is, where it is served as one. For every other checkpoint it does nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_prune.checkpoint import GATED_ARCHITECTURES
from vllm_prune.config import SECTION
from vllm_prune.models.hook import GatedModelConfig
from vllm_prune.public_dms import BASES, recognise
from vllm_prune.refusals import refused

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's logger: only that one has a handler


class PublicDMSConfig(VerifyAndUpdateConfig):
    """See the module."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        config = model_config.hf_config
        if not recognise(config, model_config.model, model_config.revision):
            return
        if model_config.model_impl not in ("auto", "vllm"):
            raise refused("public-dms-model-impl", model_impl=model_config.model_impl)
        section = getattr(config, SECTION)
        logger.info("vllm-prune: a public DMS checkpoint (%s), served with its gates: %s",
                    section["provenance"]["format"], section["params"])  # fmt: skip
        if model_config.runner == "auto" and model_config.convert == "auto" and model_config.runner_type == "pooling":
            # ModelOpt leaves the architecture out: vLLM takes such a folder for an embedding model.
            model_config.runner_type, model_config.convert_type, model_config.pooler_config = "generate", "none", None
        config.architectures = [GATED_ARCHITECTURES[BASES[config.model_type]]]
        model_config.model_arch_config = model_config.get_model_arch_config()

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        config = vllm_config.model_config.hf_config
        if (config.architectures or [""])[0] in GATED_ARCHITECTURES.values():  # made so above
            GatedModelConfig.verify_and_update_config(vllm_config)
