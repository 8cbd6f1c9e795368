"""Public DMS checkpoints that cannot be served with certainty: refused while the configuration is made, with the way out; and
that no other checkpoint is touched."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from public_checkpoints import MODELOPT_FIELDS, SAVED, edit, edit_tensors
from support import engine, generate, prompts, save_base, save_gated, tiny_config, token_ids
from test_bad_checkpoints import configure as configure_as_it_is
from test_bad_checkpoints import refused as refused_as_it_is
from vllm_prune_training.masked import load_gated

from vllm_prune.config import DropGateConfig, parse_drop_gate
from vllm_prune.errors import PruneError
from vllm_prune.models import hook
from vllm_prune.models.public import PublicDMSConfig
from vllm_prune.public_dms import public_section

FLOAT32 = {"dtype": "float32"}
"""Of a folder that vLLM takes for an embedding model at first, "auto" is not what float32 weights say."""
PROJECTION = "model.layers.1.self_attn.dms_proj_alpha"


def configure(folder: Path, **options: Any) -> Any:
    return configure_as_it_is(folder, **{**FLOAT32, **options})


def refused(folder: Path, *said: str, **options: Any) -> None:
    refused_as_it_is(folder, *said, **{**FLOAT32, **options})


def put(**fields: Any) -> Any:
    return lambda config: config.update(fields)


def drop(*names: str) -> Any:
    return lambda config: [config.pop(name) for name in names]


CONFIGS: dict[str, tuple[str, Any, list[str]]] = {
    "unknown_field": ("nvidia", put(dms_merge="mean"), ["'dms_merge'", "not known of nvidia", '{"dms_merge": null}']),
    "unknown_field_of_fastdms": ("fastdms", put(dms_initial=1), ["'dms_initial'", "not known of fastdms"]),
    "no_window": ("nvidia", drop("dms_window_size"), ["does not say its window", '{"dms_window_size": N}']),
    "no_window_of_modelopt": ("modelopt", drop("dms_window_size"), ["does not say its window"]),
    "window_a_fraction": ("nvidia", put(dms_window_size=8.5), ["whole number of tokens, got 8.5"]),
    "window_negative": ("nvidia", put(dms_window_size=-1), ["whole number of tokens, got -1"]),
    "window_text": ("nvidia", put(dms_window_size="512"), ["dms_window_size in config.json must be a finite number"]),
    "scale_true": ("nvidia", put(dms_alpha_scale=True), ["dms_alpha_scale in config.json must be a finite number"]),
    "scale_zero": ("nvidia", put(dms_alpha_scale=0.0), ["scale must not be 0"]),
    "offset_negative": ("nvidia", put(dms_initial_alpha_offset=-5.0), ["offset be > 0"]),
    "alpha_per_what": ("modelopt", put(dms_alpha_per="token"), ["per must be one of 'head', 'layer'"]),
    "separate_text": ("modelopt", put(dms_separate_alpha="yes"), ["dms_separate_alpha", "true or false"]),
    "separate_with_biases": ("modelopt", put(attention_bias=True), ["attention_bias"]),
    "nothing_says_whose": ("nvidia", drop("auto_map"), ["says whose", '"dms_format": "nvidia"', '"dms_format": "fastdms"']),
    "no_such_format": ("fastdms", put(dms_format="own"), ["dms_format is 'own'"]),
    "two_offsets": ("fastdms", put(dms_initial_alpha_offset=4.0), ["contradicts itself", "offset"]),
    "metadata_disagrees": ("fastdms", put(dms_window_size=9), ["contradicts itself", "9 (dms_window_size in config.json)"]),
    "keep_too_large": ("nvidia", put(dms_expected_keep=2), ["drop_gate.expected_keep"]),
    "gates_that_nobody_announced": ("modelopt", put(dms_separate_alpha=False), ["dms_proj_alpha", "not part of this method"]),
    "gates_missing": ("modelopt_borrowed", put(dms_separate_alpha=True), ["dms_proj_alpha", "is missing"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case, tmp_path):
    """By the server before any worker starts, and by the trainer's twin."""
    name, change, said = CONFIGS[case]
    folder = SAVED[name](tmp_path)
    edit(folder, change)
    refused(folder, *said)
    with pytest.raises(PruneError, match="vllm-prune: "):
        load_gated(folder)


TENSORS: dict[str, tuple[Any, list[str]]] = {
    "missing": (lambda t: t.pop(f"{PROJECTION}.weight"), [f"'{PROJECTION}.weight' in the weights is missing"]),
    "norm_missing": (lambda t: t.pop(f"{PROJECTION}_norm.weight"), [f"'{PROJECTION}_norm.weight'", "is missing"]),
    "shape": (
        lambda t: t.update({f"{PROJECTION}.weight": torch.zeros(4, 128)}),
        [f"'{PROJECTION}.weight' in the weights has shape [4, 128], expected [2, 128]"],
    ),
    "bias": (lambda t: t.update({f"{PROJECTION}.bias": torch.zeros(2)}), [f"'{PROJECTION}.bias'", "not part of this method"]),
    "another": (
        lambda t: t.update({"model.layers.0.self_attn.dms_gate.weight": torch.zeros(2)}),
        ["'model.layers.0.self_attn.dms_gate.weight'", "not part of this method"],
    ),
    "of_a_layer_too_many": (
        lambda t: t.update({"model.layers.7.self_attn.dms_proj_alpha.weight": torch.zeros(2, 128)}),
        ["'model.layers.7.self_attn.dms_proj_alpha.weight'", "not part of this method"],
    ),
    "not_finite": (lambda t: t[f"{PROJECTION}.weight"].fill_(float("nan")), ["not finite"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case, tmp_path):
    change, said = TENSORS[case]
    folder = SAVED["modelopt"](tmp_path)
    edit_tensors(folder, change)
    refused(folder, *said)
    with pytest.raises(PruneError, match="vllm-prune: "):
        load_gated(folder)


@pytest.mark.parametrize("name", SAVED)
def test_nothing_need_be_said(name, tmp_path):
    """Real exports are in bfloat16: not even --dtype."""
    config = configure_as_it_is(SAVED[name](tmp_path, torch.bfloat16))
    model = config.model_config
    assert (model.dtype, model.runner_type, model.convert_type) == (torch.bfloat16, "generate", "none")
    assert model.architectures[0] in ("PrunedQwen3ForCausalLM", "PrunedLlamaForCausalLM")
    assert config.kv_transfer_config.kv_connector == "PruneConnector"


def test_a_folder_of_both(tmp_path):
    folder = SAVED["nvidia"](tmp_path)
    (folder / "dms_metadata.json").write_text(json.dumps({"window_size": 8, "alpha_scale": 100.0, "alpha_offset": 5.0}))
    refused(folder, "their gates decide about different keys", '"dms_format": "nvidia"')
    for stated, form in (("nvidia", "query"), ("fastdms", "query_kept")):
        config = configure(folder, hf_overrides={"dms_format": stated}).model_config.hf_config
        assert config.drop_gate["params"]["form"] == form


def test_unreadable_metadata(tmp_path):
    folder = SAVED["fastdms"](tmp_path)
    (folder / "dms_metadata.json").write_text("{")
    refused(folder, "dms_metadata.json cannot be read")
    (folder / "dms_metadata.json").write_text("[]")
    refused(folder, "dms_metadata.json must hold an object")


def test_what_a_user_may_state(tmp_path):
    """The ways out that refusals name are ways out."""
    folder = SAVED["nvidia"](tmp_path)
    edit(
        folder, lambda config: (config.pop("auto_map"), config.pop("dms_window_size"), config.update(dms_merge="mean"))
    )
    stated = {"dms_format": "nvidia", "dms_window_size": 16, "dms_merge": None, "dms_expected_keep": 0.25}
    found = parse_drop_gate(configure(folder, hf_overrides=stated).model_config.hf_config)
    assert (found.params["delay"], found.params["about"], found.expected_keep) == (16, "previous", 0.25)


def test_eviction_disabled_by_the_checkpoint_opens_every_gate(tmp_path):
    folder = SAVED["modelopt"](tmp_path)
    edit(folder, put(dms_disable_eviction=True))
    assert parse_drop_gate(configure(folder).model_config.hf_config).strength == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_impl": "transformers"}, "--model-impl transformers"),
        ({"runner": "pooling"}, "refused (task)"),
        ({"kv_cache_dtype": "fp8"}, "refused (kv-cache-dtype)"),
    ],
    ids=["transformers", "pooling", "fp8"],
)
@pytest.mark.parametrize("name", ["nvidia", "modelopt"])
def test_options(name, options, said, tmp_path):
    """Nothing that a user asks for gets such a folder served without its gates."""
    refused(SAVED[name](tmp_path), said, **options)


@pytest.mark.parametrize("name", ["nvidia", "modelopt", "fastdms"])
def test_a_gpu(name, tmp_path):
    """Served there; but for NVIDIA's with open gates, whose borrowed numbers stock attention would use."""
    real = configure(SAVED[name](tmp_path))
    section = parse_drop_gate(real.model_config.hf_config)
    gpu = SimpleNamespace(**{**vars(real), "device_config": SimpleNamespace(device_type="cuda")})
    hook.check_reads(gpu, section)
    with pytest.raises(PruneError, match="borrowed-at-strength-0") if name == "nvidia" else nullcontext():
        hook.check_reads(gpu, section.model_copy(update={"strength": 0.0}))


def test_a_borrowed_neuron_at_strength_0_on_a_gpu():
    """Stock attention would serve it there, and use the neuron."""
    base = {"num_layers": 2, "num_kv_heads": 2, "hidden_size": 64}
    given = SimpleNamespace(device_config=SimpleNamespace(device_type="cuda"),
                            parallel_config=SimpleNamespace(tensor_parallel_size=1),
                            model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=[])))  # fmt: skip
    for strength, form, fails in ((0.0, "borrowed", True), (0.5, "borrowed", False), (0.0, "separate", False)):
        section = DropGateConfig(method="dms", params={"delay": 8, "form": form}, strength=strength, **base)
        with pytest.raises(PruneError, match="borrowed-at-strength-0") if fails else nullcontext():
            hook.check_reads(given, section)


def test_another_model_type():
    config = SimpleNamespace(model_type="mistral", **MODELOPT_FIELDS)
    with pytest.raises(PruneError, match="model_type 'mistral' are not known"):
        public_section(config, "nowhere/at-all")


def test_the_remote_code_is_named_in_a_hub_s_way():
    config = SimpleNamespace(
        model_type="qwen3", auto_map={"AutoModelForCausalLM": "nvidia/Qwen3-8B-DMS-8x--modeling_qwen3_dms.Qwen3ForCausalLM"},
        dms_window_size=512, dms_cr=8, num_hidden_layers=36, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    section = public_section(config, "nowhere/at-all")
    assert section["params"]["delay"] == 512 and section["params"]["form"] == "query"


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_other_checkpoints_of_these_architectures_are_stock(family, tmp_path, monkeypatch):
    folder = save_base(tmp_path / "base", tiny_config(family), torch.float32)
    for other in ("{", "[1]", '{"config": {"window_size": 8}}'):  # somebody else's log above it
        (tmp_path / "training_log.json").write_text(other)
        config = configure(folder)
    assert config.kv_transfer_config is None
    assert config.model_config.hf_config.architectures[0] in ("Qwen3ForCausalLM", "LlamaForCausalLM")
    asked = prompts([40], seed=1)
    with engine(folder) as llm:
        ours = token_ids(generate(llm, asked, tokens=8))
    monkeypatch.setattr(PublicDMSConfig, "verify_and_update_model_config", staticmethod(lambda config: None))
    with engine(folder) as llm:
        assert token_ids(generate(llm, asked, tokens=8)) == ours


def test_the_generic_class_reads_the_normed_input_alone(tmp_path):
    folder = save_gated(tmp_path, tiny_config("qwen3"), "dms", generic=True, form="stream")
    refused(folder, "gates that read the stream cannot be served by the generic class")


def test_public_tensors_in_a_folder_of_ours(tmp_path):
    """Nobody would read them: the engine does not start."""
    folder = save_gated(tmp_path, tiny_config("qwen3"), "dms")
    edit_tensors(folder, lambda tensors: tensors.update({f"{PROJECTION}.weight": torch.zeros(2, 128)}))
    with pytest.raises(PruneError, match="belongs to DMS gates"), engine(folder):
        pass
