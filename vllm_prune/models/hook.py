"""The configuration hook of gated architectures: refuses early, then sets what serving a gated checkpoint needs.

Runs in the front end while VllmConfig is made. A user passes no flag; what is set here can be read in the log.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.config import KVTransferConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_prune.attention.serving import ServedGate
from vllm_prune.cache.geometry import LaneGeometry
from vllm_prune.checkpoint import GENERIC_ARCHITECTURE
from vllm_prune.compat import CONNECTOR, CONNECTOR_MODULE, check
from vllm_prune.config import (
    MAX_STRENGTH,
    DropGateConfig,
    check_calibration,
    find_gate_file,
    load_gates,
    served_section,
    server_options,
    serves_stock,
)
from vllm_prune.errors import PruneError
from vllm_prune.gates import Reveal
from vllm_prune.models.request_check import Served, is_check, name_check
from vllm_prune.models.whole_prompt import need_whole_prompts

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's logger: only that one has a handler

BLOCK_TOKENS = {"cpu": 32, "cuda": 64}
"""Tokens a block unless --block-size says otherwise: the least that vLLM's CPU kernel takes at full speed; on a GPU the page
table, in reach of every lane for its longest request, weighs more than half a page a lane."""

OP = "vllm_prune::gated_attention"

OPTIONS = {"strength": float, "record": bool, "keep": float, "floor": float}
"""Server options: ``--additional-config '{"vllm_prune": {...}}'``. ``floor``: kept fraction that no request may go below by its
own wish (``requests.py``)."""


def options_of(vllm_config: VllmConfig) -> dict[str, Any]:
    """The plugin's server options. Raises PruneError for an unknown name or a bad value; ``served_section``, for two that
    exclude each other."""
    options = server_options(vllm_config)
    if not isinstance(options, dict):
        raise PruneError("additional_config.vllm_prune must be an object.", f"Known fields: {', '.join(OPTIONS)}.")
    for name, value in options.items():
        if name not in OPTIONS:
            raise PruneError(f"additional_config.vllm_prune.{name} is unknown.", f"Known fields: {', '.join(OPTIONS)}.")
        if OPTIONS[name] is bool and not isinstance(value, bool):
            raise PruneError(
                f"additional_config.vllm_prune.{name} must be true or false, got {value!r}.", "Correct it."
            )
        if OPTIONS[name] is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise PruneError(f"additional_config.vllm_prune.{name} must be a number, got {value!r}.", "Correct it.")
    strength = options.get("strength")
    if strength is not None and not 0.0 <= strength <= MAX_STRENGTH:
        raise PruneError(
            f"additional_config.vllm_prune.strength must lie in 0..{MAX_STRENGTH:g}, got {strength}.",
            "0 opens every gate, 1 is as trained.",
        )
    for name in ("keep", "floor"):
        share = options.get(name)
        if share is not None and not 0.0 < share <= 1.0:
            raise PruneError(
                f"additional_config.vllm_prune.{name} must lie in 0..1, above 0, got {share}.",
                "It is a share of the keys: 1 is all of them.",
            )
    return options


def warn_if_unsafe(section: DropGateConfig) -> None:
    """Log a warning when the served strength lies beyond the calibrated safe range."""
    table = section.calibration
    if table is not None and section.strength > table.safe_strength:
        logger.warning(
            "vllm-prune: strength %g is beyond the safe range of this checkpoint: up to %g perplexity rises by at most "
            "%g %% (measured at %d tokens, where this strength keeps %.3g)",
            section.strength, table.safe_strength, 100 * table.max_rise, table.length, section.expected_keep,
        )  # fmt: skip


def prepare_skipping(vllm_config: VllmConfig, section: DropGateConfig) -> None:
    """What methods need whose layers run on a subset of the tokens, or tokens on a subset of heads and neurons.

    Raises:
        PruneError: the base is served by the generic class, whose layers cannot be bypassed.
    """
    if GENERIC_ARCHITECTURE in (vllm_config.model_config.hf_config.architectures or ()):
        raise PruneError(
            f"{section.method} skips part of the computation of layers, which the generic class cannot do.",
            "Serve a Qwen3 or Llama base with it, or train another method for this base.",
        )
    if not vllm_config.model_config.enforce_eager:
        logger.info("vllm-prune: torch.compile is switched off: how much a layer computes is known at run time only")
        vllm_config.model_config.enforce_eager = True


def prepare_cuda(vllm_config: VllmConfig, section: DropGateConfig, served: ServedGate) -> None:
    """What a GPU needs: piecewise graphs must leave our attention op out, as they do vLLM's own.

    Raises:
        PruneError: the method is served on CPU only.
    """
    if served.routes or served.reveal not in (Reveal.BY_QUERY, Reveal.DELAYED, Reveal.AT_WRITE):
        raise PruneError(
            f"refused (method-on-gpu): {section.method} is served on CPU only so far.",
            "Serve DCP, DMS, window or random gates on a GPU, or run on the CPU build of vLLM.",
        )
    compilation = vllm_config.compilation_config
    ops = compilation.splitting_ops
    if ops is None:
        compilation.splitting_ops = [*compilation._attention_ops, OP]
    elif ops and OP not in ops:
        compilation.splitting_ops = [*ops, OP]


def prepare_ranks(vllm_config: VllmConfig, section: DropGateConfig, served: ServedGate) -> None:
    """What several tensor parallel ranks need: see ``cache/ranks.py``.

    Raises:
        PruneError: the method decides from more than one rank sees.
    """
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1 and not served.by_rank:
        raise PruneError(
            f"refused (method-on-ranks): {section.method} decides from what all heads do, and a rank of {ranks} has its own.",
            "Serve DCP, DMS, window or random gates with --tensor-parallel-size, or leave that at 1 and use more replicas.",
        )


def check_requests(vllm_config: VllmConfig, section: DropGateConfig, whole_prompt: bool) -> None:
    """Have vLLM ask us about every request's parameters (``request_check``)."""
    model, floor = vllm_config.model_config, server_options(vllm_config).get("floor", 0.0)
    others = [name for name in model.logits_processors or () if not is_check(name)]
    model.logits_processors = [*others, name_check(Served(section, floor, whole_prompt))]


class GatedModelConfig(VerifyAndUpdateConfig):
    """See the module."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        check(vllm_config)
        options_of(vllm_config)
        model = vllm_config.model_config
        section = served_section(vllm_config)
        gate_file = find_gate_file(model.model, model.revision)
        load_gates(gate_file, section)
        check_calibration(gate_file, section)
        device = vllm_config.device_config.device_type
        served = ServedGate.of(section, vllm_config.parallel_config.tensor_parallel_size)
        check_requests(vllm_config, section, served.whole_prompt)
        if serves_stock(vllm_config):
            logger.info("vllm-prune: every gate is open (strength 0): the base is served as it is")
            return
        if device == "cuda":
            prepare_cuda(vllm_config, section, served)
        prepare_ranks(vllm_config, section, served)
        if served.routes or served.reveal is Reveal.NONE:
            prepare_skipping(vllm_config, section)
        if served.whole_prompt:
            form = section.params.get("form")
            need_whole_prompts(vllm_config, section.method if form is None else f"{section.method} (form {form})")
        cache = vllm_config.cache_config
        if not cache.user_specified_block_size:
            # Small pages come free sooner: half a page a lane is idle on average. The CPU platform would choose 128.
            cache.block_size, cache.user_specified_block_size = BLOCK_TOKENS[device], True
        try:
            LaneGeometry(
                section.num_layers,
                section.num_kv_heads,
                model.get_head_size(),
                cache.block_size,
                served.rank,
                served.gate_lanes,
            )
        except ValueError as error:
            raise PruneError(
                f"drop_gate.params.rank does not fit the base: {error}.", "Train with another rank."
            ) from None
        if vllm_config.cache_config.enable_prefix_caching:
            logger.info("vllm-prune: prefix caching is switched off (not supported with drop gates yet)")
        vllm_config.cache_config.enable_prefix_caching = False
        # No consumer: blocks of a request that ended while a step is in flight may go to the next one at once, since all that
        # touches them is in the order of one stream.
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector=CONNECTOR, kv_connector_module_path=CONNECTOR_MODULE, kv_role="kv_producer"
        )
        logger.info(
            "vllm-prune: %s gates at strength %g, %d layers, planned kept fraction %g",
            section.method, section.strength, section.num_layers, section.expected_keep,
        )  # fmt: skip
        warn_if_unsafe(section)
