"""The parts of a run out of its recipe: tokenizer, base, gates, teacher. What cannot be trained is refused first."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vllm_prune.config import SECTION, DropGateConfig, find_gate_file, load_gates
from vllm_prune.errors import PruneError
from vllm_prune.gates import Gate, Reads
from vllm_prune.gates.borrowed import borrow
from vllm_prune.gates.ftp import share_router

from .boundary_recipe import BOUNDARY_METHODS
from .export_files import load_model
from .families import attention_modules, check_config, gate_shape, probe, same_attention, without_dropout
from .masked import GatedModel
from .objectives import TrainedModel
from .prompt_recipe import PROMPT_METHODS
from .recipe import NO_GATES, NewModel, Recipe
from .text_files import documents, find_files
from .tokenizer import train_tokenizer

TOKENIZER_CHARS = 40_000_000


def base_config(folder: str) -> PretrainedConfig:
    """A folder's config, checked, without a drop_gate section that it may have."""
    if not (Path(folder) / "config.json").is_file():
        raise PruneError(f"{folder} is no model folder: it has no config.json.", "Set model to a Hugging Face folder.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise PruneError(f"config.json of {folder} is not understood: {error}.", "Correct it.") from None
    check_config(config, folder)
    if hasattr(config, SECTION):
        delattr(config, SECTION)
    return config


def _new_config(new: NewModel, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    fields = {key: value for key, value in new.config.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(
            new.config["model_type"],
            **{"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
               "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **fields},
        )  # fmt: skip
    except (ValueError, TypeError, KeyError) as error:
        raise PruneError(f"field 'model.new.config' makes no config: {error}.", "Correct it.") from None
    unknown = [name for name in fields if name not in config.to_dict() and name not in config.attribute_map]
    known = type(config)().to_dict()
    unknown += [name for name in fields if name not in known and name not in config.attribute_map]
    if unknown:
        raise PruneError(f"field 'model.new.config.{unknown[0]}' is unknown to {config.model_type}.", "Correct it.")
    check_config(config, "model.new")
    if config.vocab_size < len(tokenizer):
        raise PruneError(f"model.new.config.vocab_size {config.vocab_size} is less than the tokenizer's "
                         f"{len(tokenizer)}.", "Leave it out.")  # fmt: skip
    return config


def _texts(recipe: Recipe, chars: int) -> Iterator[str]:
    for source in recipe.data.train:
        files = find_files(source, recipe.data.max_line_chars)
        for row in documents(files.paths, files.format, files.field, files.max_line_chars):
            yield row["text"]
            chars -= len(row["text"])
            if chars <= 0:
                return


def make_tokenizer(recipe: Recipe, longest: int) -> PreTrainedTokenizerBase:
    """The base's tokenizer, or a new one. Training one gives the same on the same data."""
    if isinstance(recipe.model, str):
        folder = recipe.model
    elif recipe.model.new.tokenizer is not None:
        folder = recipe.model.new.tokenizer
    else:
        assert recipe.model.new.tokenizer_vocab is not None
        return train_tokenizer(_texts(recipe, TOKENIZER_CHARS), recipe.model.new.tokenizer_vocab, longest)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise PruneError(f"the tokenizer in {folder} cannot be loaded: {error}.", "Put its files there.") from None
    if not tokenizer.is_fast:
        raise PruneError(f"the tokenizer in {folder} has no tokenizer.json.", "Convert it to a fast tokenizer.")
    return tokenizer  # type: ignore[no-any-return]


def make_base(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base in float32, without dropout. Raises PruneError before any weight is read."""
    longest = max(length for _, length in recipe.training.phases)
    new = None if isinstance(recipe.model, str) else recipe.model.new
    config = base_config(recipe.model) if isinstance(recipe.model, str) else _new_config(recipe.model.new, tokenizer)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise PruneError(f"training.lengths has {longest} tokens, but the model has {limit} positions.", "Lower it.")
    if recipe.gate.method != NO_GATES:
        gate_section(recipe, config)
    torch.manual_seed(recipe.training.seed)
    if new is None:
        model = load_model(recipe.model, config, torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    without_dropout(model)
    return model  # type: ignore[no-any-return]


def start_residuals(recipe: Recipe, model: PreTrainedModel) -> None:
    """Zero the residual branches of a new Qwen- or Llama-like model, if the recipe says so."""
    if isinstance(recipe.model, str) or not recipe.model.new.residual_zero:
        return
    for layer in getattr(model.get_decoder(), "layers", []):
        for branch, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            linear = getattr(getattr(layer, branch, None), name, None)
            if isinstance(linear, nn.Linear):
                nn.init.zeros_(linear.weight)


def gate_section(recipe: Recipe, config: PretrainedConfig) -> DropGateConfig:
    """The ``drop_gate`` section of the recipe on a base. Raises PruneError when the gate's params are wrong."""
    shape = gate_shape(config)
    section = DropGateConfig(
        method=recipe.gate.method, params=dict(recipe.gate.params), num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads, hidden_size=shape.hidden_size,
        protect={"sinks": recipe.gate.protect.sinks, "window": recipe.gate.protect.window},
        # A scalar or two a layer, on which counts of tokens and comparisons depend: as trained.
        dtype="float32" if recipe.gate.method in (*BOUNDARY_METHODS, *PROMPT_METHODS, "ftp") else "auto",
    )  # fmt: skip
    with torch.device("meta"):
        section.build_gate()
    return section


def make_gates(recipe: Recipe, section: DropGateConfig) -> list[Gate]:
    """New gates in float32, or those of ``gate.init_from``."""
    torch.manual_seed(recipe.training.seed + 1)
    gates = section.build_gates()
    folder = recipe.gate.init_from
    if folder is not None:
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise PruneError(f"gate.init_from {folder} has no config.json.", "Name a gated folder.")
        raw = json.loads(path.read_text(encoding="utf-8")).get(SECTION) or {}
        if (raw.get("method"), raw.get("params", {})) != (section.method, section.params):
            raise PruneError(
                f"gate.init_from {folder} has gates of method {raw.get('method')}, params {raw.get('params')}; the "
                f"recipe wants {section.method}, {section.params}.",
                "Make them equal.",
            )
        if gates[0].borrows and not (isinstance(recipe.model, str) and os.path.samefile(recipe.model, folder)):
            raise PruneError("gates with a borrowed neuron belong to the base that they were taken from.",
                             f"Set model to {folder} too.")  # fmt: skip
        for gate, state in zip(gates, load_gates(find_gate_file(folder), section), strict=True):
            gate.load_state_dict(state)
    share_router(gates)
    return [gate.float() for gate in gates]


def make_teacher(recipe: Recipe) -> PreTrainedModel | None:
    """The frozen dense teacher: a folder's model, by default the base as it was."""
    if not recipe.distils:
        return None
    folder = recipe.teacher or (recipe.model if isinstance(recipe.model, str) else None)
    if folder is None:
        raise PruneError("a new model has nothing to teach: objective has a KL loss.", "Name a teacher folder.")
    config = base_config(folder)
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    teacher = load_model(folder, config, dtype)
    return teacher.eval().requires_grad_(False)  # type: ignore[no-any-return]


def make_trained(recipe: Recipe, model: PreTrainedModel, device: torch.device) -> TrainedModel:
    """Base, gates and teacher as one module. The module itself is moved by the Trainer, the teacher here."""
    teacher = make_teacher(recipe)
    if teacher is not None:
        if teacher.config.vocab_size != model.config.vocab_size:
            raise PruneError("teacher and model have different vocabularies.", "Use a teacher with the same tokenizer.")
        teacher = teacher.to(device)  # type: ignore[arg-type]
    model.requires_grad_(recipe.gate.train_base)
    gated = None
    if recipe.gate.method != NO_GATES:
        section = gate_section(recipe, model.config)
        gates = make_gates(recipe, section)
        if gates[0].reads is not Reads.INPUT:
            raise PruneError(f"gate.params: gates that read the {gates[0].reads} are served, not trained.",
                             "Use form separate or borrowed.")  # fmt: skip
        before = probe(model)
        dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
        gated = GatedModel(model, gates, section, cache_dtype=dtype, visibility=recipe.training.visibility)
        borrows = [call.borrows for call in gated.calls]
        for call in gated.calls:
            call.borrows = False  # a borrowed neuron does change the attention
        same_attention(before, probe(model), type(model).__name__)
        for call, borrowed in zip(gated.calls, borrows, strict=True):
            call.borrows = borrowed
        if any(borrows) and recipe.gate.init_from is None:
            borrow(attention_modules(model), gates)
        gated.float()
    start_residuals(recipe, model)
    body: Any = None
    if recipe.training.compile:
        # The hooks and the attention of every layer are compiled for each length: past the limit they would run eagerly.
        shapes = len(gated.gates if gated is not None else [None]) * len(recipe.training.phases)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * shapes + 8)
        body = torch.compile(model.get_decoder(), dynamic=False)
    return TrainedModel(recipe, model, gated, teacher, body)
