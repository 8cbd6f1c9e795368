"""Where a Hugging Face decoder keeps its layers and attention, and which attention gates cannot work on.

Supported: causal decoders with full attention and rotary or learned positions that use the attention interface. What is
refused is refused by its config before any weight is read; ``same_attention`` then makes sure on the model itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vllm_prune.errors import PruneError
from vllm_prune.gates import GateShape

BASES = "Use a decoder with full attention and rotary or learned positions (Qwen2, Qwen3, Llama, Mistral, GPT-2, ...)."
LAYERS = ("layers", "h")
ATTENTION = ("self_attn", "attn")


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer: ``layers[i].self_attn``, or ``h[i].attn`` in GPT-2.

    Raises:
        PruneError: the decoder has no such layers.
    """
    decoder = model.get_decoder()
    layers = next((getattr(decoder, name) for name in LAYERS if hasattr(decoder, name)), None)
    if layers is not None:
        name = next((name for name in ATTENTION if all(hasattr(layer, name) for layer in layers)), None)
        if name is not None:
            return [getattr(layer, name) for layer in layers]
    raise PruneError(f"the layers of {type(model).__name__} were not found.", BASES)


def gate_shape(config: PretrainedConfig) -> GateShape:
    """Sizes that gates need, from a base's config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return GateShape(config.hidden_size, heads, config.num_hidden_layers)


def unsupported(config: PretrainedConfig) -> str | None:
    """What gates cannot work with in this config, or None."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "attention"})
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    checks = {
        "an encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "a multimodal model": any(hasattr(config, name) for name in ("vision_config", "audio_config", "text_config")),
        f"layers of other kinds ({', '.join(kinds)})": kinds,
        "multi-head latent attention (MLA)": getattr(config, "kv_lora_rank", None),
        "a sliding window": sliding and not getattr(config, "layer_types", None),
        "local attention": "local" in (getattr(config, "attention_layers", None) or ()),
        "linear or state-space layers": any(
            hasattr(config, name) for name in ("ssm_cfg", "state_size", "mamba_d_state", "linear_num_key_heads")
        ),
        "ALiBi positions": getattr(config, "alibi", False)
        or getattr(config, "position_embedding_type", None) == "alibi"
        or config.model_type in ("bloom", "mpt"),
        "soft-capped logits": getattr(config, "attn_logit_softcapping", None)
        or getattr(config, "final_logit_softcapping", None),
        "quantised weights": getattr(config, "quantization_config", None),
        "no attention heads": not getattr(config, "num_attention_heads", None),
        "no causal language model": config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    return next((name for name, holds in checks.items() if holds), None)


def check_config(config: PretrainedConfig, where: str) -> None:
    """Raises PruneError when gates cannot be trained on such a base."""
    found = unsupported(config)
    if found is not None:
        raise PruneError(f"{where} (model_type {config.model_type}) has {found}; gates need full attention.", BASES)


@torch.no_grad()
def probe(model: PreTrainedModel) -> torch.Tensor:
    """Logits [1, 16, V] of a fixed short input, by the attention that the model has now, in evaluation mode."""
    training = model.training
    model.eval()
    vocab = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(16, device=device) * 7919 + 11) % vocab
    hidden: Any = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    model.train(training)
    return logits.float()


def same_attention(before: torch.Tensor, after: torch.Tensor, name: str) -> None:
    """Refuses a model whose attention does something that our attention function does not.

    Args:
        before, after: ``probe`` with the model's own attention and with ours, all gates open.
        name: of the model's class.

    Raises:
        PruneError: they differ by more than rounding (biases, sinks, caps: whatever the interface does not carry).
    """
    scale = before.abs().max().clamp_min(1e-6)
    if not bool(((after - before).abs().max() / scale) < 2e-2):
        raise PruneError(f"the attention of {name} is more than softmax over keys: gates would change it.", BASES)


def without_dropout(model: nn.Module) -> int:
    """Switch every dropout off: the mask is what is learnt, and a resumed run must be the same run. Returns how many."""
    found = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0.0]
    for module in found:
        module.p = 0.0
    return len(found)
