"""A tiny model that can read: random weights, a tokenizer trained on the spot, and a text to measure it on."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from vllm_prune_training.tokenizer import train_tokenizer

from vllm_prune.checkpoint import add_gates
from vllm_prune.gates import GATES, Gate, GateShape

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LONGEST = 2, 64, 2, 1, 32, 384, 512
PARAMS: dict[str, dict[str, Any]] = {"dcp": {"rank": 8, "beta": 1.5}, "dms": {"delay": 8}}


def text() -> str:
    """Some thousand tokens of Python."""
    return "\n\n".join(inspect.getsource(module) for module in (textwrap, json.decoder))


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer([text()], vocab_size=VOCAB, max_length=LONGEST)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_base(folder: Path, family: str = "qwen3", layers: int = LAYERS, seed: int = 0, **saving: Any) -> Path:
    """A float32 base with its tokenizer; ``saving`` goes to ``save_pretrained``."""
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=LONGEST,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
    model.save_pretrained(folder, **saving)
    save_tokenizer(folder)
    return folder


def gates(method: str = "dcp", layers: int = LAYERS, seed: int = 0) -> list[Gate]:
    """Gates that drop a good part of a random model's keys, more with strength."""
    torch.manual_seed(1000 + seed)
    made = [GATES[method](GateShape(HIDDEN, KV_HEADS, layers), **PARAMS[method]) for _ in range(layers)]
    for gate in made:
        for weight in gate.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.16 if method == "dcp" else 0.01)
    return made


def save_gated(folder: Path, method: str = "dcp", **section: Any) -> Path:
    """``save_base`` with gates."""
    save_base(folder)
    add_gates(folder, gates(method), {"params": PARAMS[method], **section})
    return folder
