"""The configuration hook of gated architectures: refuses early, then sets what serving a gated checkpoint needs.

Runs in the front end while VllmConfig is made. A user passes no flag; what is set here can be read in the log.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import KVTransferConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_prune.attention.serving import ServedGate
from vllm_prune.cache.geometry import LaneGeometry
from vllm_prune.chat import Markers, find_markers
from vllm_prune.checkpoint import GENERIC_ARCHITECTURE
from vllm_prune.compat import CONNECTOR, CONNECTOR_MODULE, KV_DTYPES, check
from vllm_prune.config import (
    MAX_STRENGTH,
    DropGateConfig,
    check_calibration,
    find_gate_file,
    served_section,
    server_options,
    serves_stock,
)
from vllm_prune.errors import PruneError, short
from vllm_prune.gates import Reads, Reveal
from vllm_prune.models.request_check import Served, is_check, name_check
from vllm_prune.models.whole_prompt import need_whole_prompts
from vllm_prune.pressure import pressure_options
from vllm_prune.protect import DEFAULT, Protect, parse_protect
from vllm_prune.public_dms import read_gates
from vllm_prune.refusals import refused
from vllm_prune.requests import may_protect

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's logger: only that one has a handler

BLOCK_TOKENS = {"cpu": 32, "cuda": 64}
"""Tokens a block unless --block-size says otherwise: the least that vLLM's CPU kernel takes at full speed; on a GPU the page
table, in reach of every lane for its longest request, weighs more than half a page a lane."""

OP = "vllm_prune::gated_attention"

OPTIONS = {
    "strength": float, "record": bool, "keep": float, "floor": float, "pressure": object, "protect": str, "maps": bool,
    "snapshot_spacing": int,
}  # fmt: skip
"""Server options: ``--additional-config '{"vllm_prune": {...}}'``. ``floor``: kept fraction that no request may go below by its
own wish; ``maps``: requests may ask for their eviction maps (``requests.py``). ``pressure``: strength follows how full the pool
is (``pressure.py``). ``protect``: what of every prompt is never dropped, unless the request says (``protect.py``).
``snapshot_spacing``: tokens between the places of a prompt that are held for later ones in any case (``cache/partings.py``)."""


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
                f"additional_config.vllm_prune.{name} must be true or false, got {short(value)}.", "Correct it."
            )
        if OPTIONS[name] is str and not isinstance(value, str):
            raise PruneError(f"additional_config.vllm_prune.{name} must be text, got {short(value)}.", "Correct it.")
        if OPTIONS[name] is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise PruneError(
                f"additional_config.vllm_prune.{name} must be a number, got {short(value)}.", "Correct it."
            )
        if OPTIONS[name] is int and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise PruneError(
                f"additional_config.vllm_prune.{name} must be a number of tokens, 0 or more, got {short(value)}.",
                "0 is for none.",
            )
    strength = options.get("strength")
    if strength is not None and not 0.0 <= strength <= MAX_STRENGTH:
        raise PruneError(
            f"additional_config.vllm_prune.strength must lie in 0..{MAX_STRENGTH:g}, got {short(strength)}.",
            "0 opens every gate, 1 is as trained.",
        )
    for name in ("keep", "floor"):
        share = options.get(name)
        if share is not None and not 0.0 < share <= 1.0:
            raise PruneError(
                f"additional_config.vllm_prune.{name} must lie in 0..1, above 0, got {short(share)}.",
                "It is a share of the keys: 1 is all of them.",
            )
    pressure_options(options)
    return options


def check_pressure(vllm_config: VllmConfig, section: DropGateConfig, served: ServedGate) -> None:
    """Raises PruneError where strength cannot follow the pool."""
    if pressure_options(server_options(vllm_config)) is None:
        return
    if section.strength == 0.0:
        raise refused("pressure-at-strength-0")
    if not served.by_token:
        raise refused("pressure", method=section.method)


def no_prefixes(served: ServedGate, options: dict[str, Any]) -> str | None:
    """Why what gates leave of a prompt's beginning cannot serve another request; None where it can."""
    if not served.leaves_prefixes:
        return "with these gates what is left of a prompt's beginning hangs on what follows it"
    if pressure_options(options) is not None:
        return "with the option pressure it hangs on how full the pool was"
    return None


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
        raise refused("generic-class-skips", method=section.method)
    if not vllm_config.model_config.enforce_eager:
        logger.info("vllm-prune: torch.compile is switched off: how much a layer computes is known at run time only")
        vllm_config.model_config.enforce_eager = True


def prepare_cuda(vllm_config: VllmConfig, section: DropGateConfig, served: ServedGate) -> None:
    """What a GPU needs: piecewise graphs must leave our attention op out, as they do vLLM's own.

    Raises:
        PruneError: the method is served on CPU only.
    """
    if not served.on_gpu:
        raise refused("method-on-gpu", method=section.method)
    compilation = vllm_config.compilation_config
    ops = compilation.splitting_ops
    if ops is None:
        compilation.splitting_ops = [*compilation._attention_ops, OP]
    elif ops and OP not in ops:
        compilation.splitting_ops = [*ops, OP]


def markers_of(vllm_config: VllmConfig) -> Markers | None:
    """Of the chat template of the model's tokenizer; None where there is none, or none that we understand."""
    from vllm.tokenizers import cached_tokenizer_from_config

    model = vllm_config.model_config
    if model.skip_tokenizer_init:
        return None
    try:
        return find_markers(cached_tokenizer_from_config(model))
    except (OSError, ValueError) as error:  # vLLM itself will say what is wrong with the tokenizer
        logger.info("vllm-prune: no chat markers are known: %s", error)
        return None


def served_protect(vllm_config: VllmConfig, section: DropGateConfig, markers: Markers | None) -> Protect:
    """What is protected in every prompt. Raises PruneError when the option asks for what cannot be had."""
    said = server_options(vllm_config).get("protect")
    try:
        found = parse_protect(DEFAULT if said is None else said)
    except ValueError as error:
        raise PruneError(f"additional_config.vllm_prune.protect {error}", "Correct it.") from None
    if not may_protect(section) or (found.asks_for_chat and markers is None):
        if said is None or not found:
            return Protect()
        raise refused("protect-chat") if may_protect(section) else refused("protect", method=section.method)
    return found


def check_maps(device: str, ranks: int, options: dict[str, Any]) -> None:
    """Raises PruneError where requests' maps cannot be made.

    Args:
        device: type of it.
        ranks: tensor parallel ones.
        options: the plugin's server options.
    """
    if options.get("maps", False) and (device != "cpu" or ranks > 1):
        raise refused("maps-on-gpu") if device != "cpu" else refused("maps-on-ranks", ranks=ranks)


def prepare_ranks(vllm_config: VllmConfig, section: DropGateConfig, served: ServedGate) -> None:
    """What several tensor parallel ranks need: see ``cache/ranks.py``.

    Raises:
        PruneError: the method decides from more than one rank sees.
    """
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1 and served.reveal is not None and not served.by_token:
        raise refused("method-on-ranks", method=section.method, ranks=ranks)


def check_requests(vllm_config: VllmConfig, section: DropGateConfig, whole_prompt: bool, chat: bool) -> None:
    """Have vLLM ask us about every request's parameters (``request_check``)."""
    model, options = vllm_config.model_config, server_options(vllm_config)
    served = Served(section, options.get("floor", 0.0), whole_prompt, chat, options.get("maps", False))
    others = [name for name in model.logits_processors or () if not is_check(name)]
    model.logits_processors = [*others, name_check(served)]


def check_reads(vllm_config: VllmConfig, section: DropGateConfig) -> None:
    """Refuse DMS gates that read something else than the layer's normed input, or of which one head decides for all, where
    they cannot be served.

    Raises:
        PruneError: on several ranks, or with the generic class; on a GPU with open gates that borrow from queries.
    """
    with torch.device("meta"):
        gate = section.build_gate()
    if getattr(gate, "per", "head") == "layer" and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise refused("dms-per-layer-on-ranks")
    # Where a number is taken out of the query, what is rotated is another tensor.
    if gate.reads is Reads.QUERY and not gate.borrows and not vllm_config.model_config.enforce_eager:
        ops = set(vllm_config.compilation_config.custom_ops)
        if ops & {"+rotary_embedding", "all"} and "-rotary_embedding" not in ops:
            raise refused("rotary-op-of-its-own", form=section.params.get("form"))
    if gate.borrows and section.strength == 0.0 and vllm_config.device_config.device_type == "cuda":
        raise refused("borrowed-at-strength-0")
    if gate.reads is not Reads.INPUT and GENERIC_ARCHITECTURE in (
        vllm_config.model_config.hf_config.architectures or ()
    ):
        raise refused("generic-class-reads", reads=gate.reads)


class GatedModelConfig(VerifyAndUpdateConfig):
    """See the module."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        check(vllm_config)
        options_of(vllm_config)
        model = vllm_config.model_config
        section = served_section(vllm_config)
        device = vllm_config.device_config.device_type
        check_reads(vllm_config, section)
        here = section.tensors == "file" or os.path.isdir(model.model)
        if here:  # a hub's weights are checked when they are loaded
            read_gates(model.model, section, model.revision)
        if section.tensors == "file":
            check_calibration(find_gate_file(model.model, model.revision), section)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        served = ServedGate.of(section, ranks, device == "cuda")
        check_maps(device, ranks, server_options(vllm_config))
        markers = markers_of(vllm_config)
        protect = served_protect(vllm_config, section, markers)
        check_requests(vllm_config, section, served.whole_prompt, markers is not None)
        check_pressure(vllm_config, section, served)
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
        # Of the cache's numbers: what gates remember is not narrowed with an FP8 cache.
        cached = 1 if cache.cache_dtype in KV_DTYPES[device] else model.dtype.itemsize  # type: ignore[union-attr]
        cells = served.dtype(model.dtype).itemsize // cached  # type: ignore[arg-type]
        try:
            LaneGeometry(
                section.num_layers,
                section.num_kv_heads,
                model.get_head_size(),
                cache.block_size,
                served.rank * cells,
                served.gate_lanes,
            )
        except ValueError as error:
            raise PruneError(
                f"drop_gate.params.rank does not fit the base: {error}.", "Train with another rank."
            ) from None
        reason = no_prefixes(served, server_options(vllm_config))
        if cache.enable_prefix_caching and reason:
            logger.info("vllm-prune: prefix caching is switched off: %s", reason)
            cache.enable_prefix_caching = False
        # No consumer: blocks of a request that ended while a step is in flight may go to the next one at once, since all that
        # touches them is in the order of one stream.
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector=CONNECTOR, kv_connector_module_path=CONNECTOR_MODULE, kv_role="kv_producer",
            kv_connector_extra_config={"protect": protect, "markers": markers},
        )  # fmt: skip
        logger.info(
            "vllm-prune: %s gates at strength %g, %d layers, planned kept fraction %g",
            section.method, section.strength, section.num_layers, section.expected_keep,
        )  # fmt: skip
        warn_if_unsafe(section)
