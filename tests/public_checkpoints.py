"""Small random checkpoints in the formats of public DMS checkpoints, and what their sources compute, said once more in plain
steps: nothing of ours is imported. docs/public-dms.md names the source of each field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support import save_base, tiny_config
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

LAYERS, WINDOW = 3, 8
MODELOPT_FIELDS: dict[str, Any] = {
    "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_window_size": WINDOW, "dms_paged_attention_block_size": 4,
    "dms_cr": 16, "dms_disable_eviction": False, "dms_separate_alpha": True, "dms_alpha_per": "head", "dms_tau": 0.1,
    "dms_manual_inference_mode": False, "dms_chunked_prefill": None, "dms_preallocate_for_tokens": 4096,
}  # fmt: skip


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "config.json") -> None:
    path = folder / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _base(folder: Path, family: str, dtype: torch.dtype) -> Path:
    save_base(folder, tiny_config(family, layers=LAYERS), dtype)

    def norms(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(5)
        for name in [name for name in tensors if "norm" in name]:
            tensors[name] = 1.0 + 0.3 * torch.randn_like(tensors[name])

    edit_tensors(folder, norms)
    return folder


def _remote(folder: Path, suffix: str, **fields: Any) -> None:
    """NVIDIA's remote code, which nobody may run here, and the config that names it."""
    auto_map = {
        "AutoConfig": f"configuration_qwen3_dms.Qwen3Config{suffix}",
        "AutoModel": f"modeling_qwen3_dms.Qwen3Model{suffix}",
        "AutoModelForCausalLM": f"modeling_qwen3_dms.Qwen3ForCausalLM{suffix}",
    }
    edit(folder, lambda config: config.update({**fields, "auto_map": auto_map}))
    for name in ("configuration_qwen3_dms.py", "modeling_qwen3_dms.py"):
        (folder / name).write_text("raise RuntimeError('remote code ran')\n")


def save_nvidia(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As nvidia/Qwen3-8B-DMS-8x: no tensors but the base's, four fields."""
    _base(folder, "qwen3", dtype)
    fields = {
        name: MODELOPT_FIELDS[name] for name in ("dms_alpha_scale", "dms_initial_alpha_offset", "dms_window_size")
    }
    _remote(folder, "", **fields, dms_cr=8)
    return folder


def save_modelopt(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """As ModelOpt's ``extract_student_model`` leaves it: gates among the weights, no architecture."""
    _base(folder, "qwen3", dtype)
    _remote(folder, "DMS", **{**MODELOPT_FIELDS, **fields})
    edit(folder, lambda config: config.pop("architectures"))
    config = json.loads((folder / "config.json").read_text())

    def gates(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(6)
        hidden, heads = config["hidden_size"], config["num_key_value_heads"]
        for layer in range(LAYERS):
            name = f"model.layers.{layer}.self_attn.dms_proj_alpha"
            tensors[f"{name}.weight"] = (torch.randn(heads, hidden) / hidden**0.5).to(dtype)
            tensors[f"{name}_norm.weight"] = (1.0 + 0.3 * torch.randn(hidden)).to(dtype)

    if config["dms_separate_alpha"]:
        edit_tensors(folder, gates)
    return folder


def save_fastdms(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As shisa-ai/Llama-3.2-1B-DMS-8x: a Llama with the parameters in config.json and dms_metadata.json."""
    _base(folder, "llama", dtype)
    fields = {"dms_window_size": WINDOW, "dms_alpha_scale": 100.0, "dms_alpha_offset": 5.0, "dms_cr": 8}
    edit(folder, lambda config: config.update(fields))
    said = {"window_size": WINDOW, "alpha_scale": 100.0, "alpha_offset": 5.0, "target_cr": 8, "context_len": 4096}
    (folder / "dms_metadata.json").write_text(json.dumps({"config": said}))
    return folder


SAVED: dict[str, Callable[..., Path]] = {
    "nvidia": save_nvidia,
    "modelopt": save_modelopt,
    "fastdms": save_fastdms,
    "modelopt_layer": lambda folder, dtype=torch.float32: save_modelopt(folder, dtype, dms_alpha_per="layer"),
    "modelopt_borrowed": lambda folder, dtype=torch.float32: save_modelopt(folder, dtype, dms_separate_alpha=False),
}


@torch.no_grad()
def published(folder: Path, ids: torch.Tensor, evicts: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """What the format's own code computes of one sequence: logits [T, V], and for each key whether it is marked, [L, H, T].

    Read of NVIDIA's ``prepare_attention_input`` and ``make_mask`` (key t is marked by token t + 1, hidden from queries n with
    n - t > window) and of FastDMS's ``dms_inference_forward`` (by token t itself, the same window, nothing set to 0).
    """
    config = json.loads((folder / "config.json").read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    fastdms, separate = (folder / "dms_metadata.json").exists(), config.get("dms_separate_alpha", False)
    t, heads, size = len(ids), config["num_key_value_heads"], config["head_dim"]
    group = config["num_attention_heads"] // heads
    x = model.model.embed_tokens(ids[None])
    cos, sin = model.model.rotary_emb(x, torch.arange(t)[None])
    n, j = torch.arange(t)[:, None], torch.arange(t)[None]
    marks = []
    for index, layer in enumerate(model.model.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            project(normed).view(1, t, -1, size) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if config["model_type"] == "qwen3":
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if separate:
            name = f"model.layers.{index}.self_attn.dms_proj_alpha"
            norm = Qwen3RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])
            norm.weight.copy_(tensors[f"{name}_norm.weight"])
            said = (norm(x) @ tensors[f"{name}.weight"].T * 100.0 - 5.0).transpose(1, 2)
        else:
            said = q[:, ::group, :, -1] * 100.0 - 5.0
        zeroed = not separate and not fastdms
        if zeroed:
            q[:, ::group, :, -1] = 0
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        if zeroed:
            q[:, ::group, :, -1] = 0
        if config.get("dms_alpha_per") == "layer":
            said = said[:, [0]].expand(said.shape)
        mark = said[0] > 0
        if not fastdms:  # the decision about key t comes from token t + 1
            mark = torch.cat([mark[:, 1:], torch.zeros(heads, 1, dtype=torch.bool)], dim=1)
        mark = mark & evicts
        marks.append(mark)
        hidden = (j > n) | (mark[:, None] & (n - j > WINDOW))  # [H, T, T]
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * size**-0.5
        weights = scores.masked_fill(hidden.repeat_interleave(group, 0), float("-inf")).softmax(-1)
        out = (weights @ v.repeat_interleave(group, 1)).transpose(1, 2).reshape(1, t, -1)
        x = x + attention.o_proj(out)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))[0], torch.stack(marks)
