"""Combinations refused once a checkpoint's gates are known (``vllm_prune/refusals.py``): each is started for real.

Where a GPU is what is refused, the real configuration is made here and the whole hook is run on it with its device type changed.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from public_checkpoints import SAVED
from support import save_gated, tiny_config
from test_refusals import ON_ONE_RANK, Build, configure, nothing_started, of_method, start

from vllm_prune import refusals
from vllm_prune.models.hook import GatedModelConfig

__all__ = ["start"]
LTP_PROMPT = of_method("ltp_prompt", ON_ONE_RANK["ltp_prompt"])


def ours(**options: Any) -> dict[str, Any]:
    return {"additional_config": {"vllm_prune": options}}


def dms(form: str, generic: bool = False, **params: Any) -> Build:
    return lambda folder: save_gated(folder, tiny_config("qwen3"), "dms", generic=generic, form=form, **params)


def generic(method: str) -> Build:
    return lambda folder: save_gated(folder, tiny_config("qwen3"), method, generic=True, **ON_ONE_RANK[method])


DCP, LTP = of_method("dcp", {"rank": 16}), of_method("ltp", ON_ONE_RANK["ltp"])
TWO_RANKS = {"tensor_parallel_size": 2}

# Refusal name to cases: what to build, the options to start it with, and words of the message.
CASES: dict[str, dict[str, tuple[Build, dict[str, Any], str]]] = {
    "method-on-ranks": {
        "acc": (of_method("acc", {}), TWO_RANKS, "acc decides from what all heads do, and a rank of 2")
    },
    "dms-per-layer-on-ranks": {
        "separate": (dms("separate", per="layer"), TWO_RANKS, "the first KV head decides"),
        "stream": (SAVED["modelopt_layer"], TWO_RANKS, "the first KV head decides"),
    },
    "rotary-op-of-its-own": {
        what: (
            SAVED["fastdms"],
            {"enforce_eager": False, "compilation_config": {"custom_ops": [what]}},
            "gates of form query_kept read queries before",
        )
        for what in ("+rotary_embedding", "all")
    },
    "generic-class-skips": {"shadow_token": (generic("shadow_token"), {}, "shadow_token skips part")},
    "generic-class-reads": {"stream": (dms("stream", generic=True), {}, "that read the stream")},
    "whole-prompts": {
        "ltp_prompt": (
            LTP_PROMPT,
            {"max_model_len": 512, "max_num_batched_tokens": 300},
            "max_num_batched_tokens 300 is less than max_model_len 512",
        )
    },
    "whole-prompts-cut": {
        "ltp_prompt": (LTP_PROMPT, {"long_prefill_token_threshold": 64}, "long_prefill_token_threshold 64 cuts")
    },
    "pressure": {"ltp": (LTP, ours(pressure=True), "ltp decides by what happened")},
    "pressure-at-strength-0": {"dcp": (DCP, ours(pressure=True, strength=0.0), "gates are open")},
    "protect": {"ltp": (LTP, ours(protect="0:4"), "ltp gates decide about many keys")},
    "protect-chat": {"no_tokenizer": (DCP, ours(protect="system"), "no chat template")},
    "maps-on-ranks": {"dcp": (DCP, {**ours(maps=True), **TWO_RANKS}, "the first of 2 ranks reports")},
    "public-dms-model-impl": {
        "nvidia": (SAVED["nvidia"], {"model_impl": "transformers"}, "with --model-impl transformers")
    },
}
# Likewise on a GPU.
ON_A_GPU: dict[str, dict[str, tuple[Build, dict[str, Any], str]]] = {
    "method-on-gpu": {
        method: (of_method(method, params), {}, f"{method} is served on CPU")
        for method, params in ON_ONE_RANK.items()
        if method not in ("ltp", "acc")
    },
    "borrowed-at-strength-0": {"borrowed": (dms("borrowed"), ours(strength=0.0), "attend to the number of each query")},
    "maps-on-gpu": {"dcp": (DCP, ours(maps=True), "a GPU's reports")},
}
# Of single requests: where a real engine refuses them.
OF_REQUESTS = {
    "prompt-logprobs": "test_prompt_forms.py",
    "map-of-several": "test_maps.py",
    "protect-of-chat": "test_protect_served.py",
}


def cases(table: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(name, *case, id=f"{name}-{what}") for name, made in table.items() for what, case in made.items()
    ]


def check(message: str, name: str, said: str) -> None:
    (refusal,) = [refusal for refusal in refusals.OF_SERVERS if refusal.name == name]
    assert f"refused ({name}): " in message and said in message
    assert refusal.way_out.partition("{")[0] in message


@pytest.mark.parametrize(("name", "build", "options", "said"), cases(CASES))
def test_refused(name: str, build: Build, options: dict[str, Any], said: str, tmp_path: Path, start: Any) -> None:
    folder = build(tmp_path)
    with nothing_started(), pytest.raises(ValueError) as caught:
        start(folder, **options)
    check(str(caught.value), name, said)


@pytest.mark.parametrize(("name", "build", "options", "said"), cases(ON_A_GPU))
def test_refused_on_a_gpu(name: str, build: Build, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    real = configure(build(tmp_path), **options)
    real.kv_transfer_config = None
    gpu = SimpleNamespace(**{**vars(real), "device_config": SimpleNamespace(device_type="cuda")})
    with pytest.raises(ValueError) as caught:
        GatedModelConfig.verify_and_update_config(gpu)
    check(str(caught.value), name, said)


@pytest.mark.parametrize(
    "build",
    [DCP, LTP, of_method("acc", {}), SAVED["nvidia"], SAVED["fastdms"], dms("stream"), dms("separate", about="own")],
    ids=["dcp", "ltp", "acc", "nvidia", "fastdms", "stream", "own"],
)
def test_what_is_served_on_a_gpu_is_not_refused(build: Build, tmp_path: Path) -> None:
    """The control of the changed device."""
    real = configure(build(tmp_path))
    real.kv_transfer_config = None
    gpu = SimpleNamespace(**{**vars(real), "device_config": SimpleNamespace(device_type="cuda")})
    GatedModelConfig.verify_and_update_config(gpu)
    assert gpu.kv_transfer_config.kv_connector == "PruneConnector"


def test_every_refusal_is_started() -> None:
    assert {refusal.name for refusal in refusals.OF_SERVERS} == set(CASES) | set(ON_A_GPU)
    assert {refusal.name for refusal in refusals.OF_REQUESTS} == set(OF_REQUESTS)
    for name, file in OF_REQUESTS.items():
        assert rf"refused \({name}\)" in Path(__file__).with_name(file).read_text(encoding="utf-8")
