"""Strength per request: one batch mixes them, each request gets what its own strength says, and wrong wishes are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import RECORD, engine, pool_is_whole, preempted, prompts, recorded, save_gated, tiny_config, token_ids
from test_law2_drop_sets import METHODS, expected, visible_drops
from test_prompt_forms import save_prompt_gated
from test_shadow_token import HALF
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm_prune_training.data import is_held_out

from vllm_prune.gates import GATES, NEVER

PROMPTS = ("ltp_prompt", "acc_prompt")
"""Which decide about whole prompts."""
STRENGTHS = (None, 0.0, 0.5, 1.0, 1.6, 0.5)


def folder_of(method: str, tmp_path):
    if method in PROMPTS:
        return save_prompt_gated(tmp_path, "qwen3", method)
    name = method.removesuffix("_kv_head")
    section: dict[str, Any] = {"protect": {"sinks": 2}} if GATES[name].protects else {}
    return save_gated(tmp_path, tiny_config("qwen3", layers=3), name, section=section, **METHODS[method])


def greedy(asked: dict[str, Any] | None = None, tokens: int = 16, **more: Any) -> SamplingParams:
    params = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False, **more}
    return SamplingParams(**params, extra_args=asked)


def asking(strength: float | None) -> dict[str, Any] | None:
    return None if strength is None else {"prune.strength": strength}


def check_strengths(folder, llm, outputs: list[Any], strengths: Sequence[float | None]) -> list[float]:
    """Every request dropped what the trainer's twin drops at its strength; what share of its keys."""
    shares = []
    for output, strength in zip(outputs, strengths, strict=True):
        ids, found = recorded(llm, output)
        want = expected(folder, ids, len(output.prompt_token_ids), strength)
        np.testing.assert_array_equal(visible_drops(found), want)
        shares.append(float((want != NEVER).mean()))
        told = output.kv_transfer_params["vllm_prune"]
        assert told["strength"] == (1.0 if strength is None else strength)
        if told["kept_pairs"] is not None:
            assert told["kept_pairs"] == pytest.approx(kept_pairs(found[..., : told["tokens"]]), abs=1e-9)
    return shares


def kept_pairs(expiry: np.ndarray) -> float:
    """Share of past pairs that queries saw, from expiries [L, E, T]."""
    t = expiry.shape[-1]
    seen = np.maximum(np.minimum(expiry, t) - 1 - np.arange(t), 0)
    return float(seen.sum() / (expiry[..., 0].size * t * (t - 1) / 2))


@pytest.mark.parametrize("method", [*METHODS, *PROMPTS])
def test_a_batch_mixes_strengths(tmp_path, method):
    """Drop sets of every request are the trainer's at its strength, and its tokens the same as alone."""
    folder = folder_of(method, tmp_path)
    batch = prompts([130, 90, 111, 140, 97, 64], seed=3)
    params = [greedy(asking(strength)) for strength in STRENGTHS]
    with engine(folder, **RECORD) as llm:
        together = llm.generate(batch, params, use_tqdm=False)
        shares = check_strengths(folder, llm, together, STRENGTHS)
        assert shares[1] == 0.0 and max(shares) > 0.15
        assert len(set(shares)) > 2, "strengths must make a difference"
        for prompt, own, output in zip(batch, params, together, strict=True):
            assert token_ids(llm.generate([prompt], own, use_tqdm=False)) == token_ids([output])
        llm.generate(prompts([3]), greedy(tokens=2), use_tqdm=False)
        assert pool_is_whole(llm)


def test_token_form_mixes_strengths(tmp_path):
    """ShadowLLM's token form drops nothing: what tokens ran on is recorded, and tokens are the same as alone."""
    folder = save_gated(tmp_path, tiny_config("qwen3", layers=3), "shadow_token", **HALF)
    batch, params = prompts([40, 50, 60, 70], seed=3), [greedy(asking(x)) for x in (0.0, 1.0, 0.5, None)]
    with engine(folder) as llm:
        together = llm.generate(batch, params, use_tqdm=False)
        alone = [llm.generate([prompt], own, use_tqdm=False)[0] for prompt, own in zip(batch, params, strict=True)]
        assert token_ids(alone) == token_ids(together)
        assert token_ids([together[0]]) != token_ids(llm.generate([batch[0]], greedy(), use_tqdm=False))


def test_preempted_requests_keep_their_strength(tmp_path):
    folder = folder_of("dcp", tmp_path)
    batch = prompts([100, 90], seed=5)
    with engine(folder) as llm:
        wanted = [llm.generate([prompt], greedy({"prune.off": True}, 20), use_tqdm=False)[0] for prompt in batch]
        found = preempted(llm, batch, 20, extra_args={"prune.off": True})
        assert token_ids(found) == token_ids(wanted)
        served = llm.generate(batch, greedy(tokens=20), use_tqdm=False)
        assert token_ids(served) != token_ids(wanted)


BAD = [
    ({"prune.strength": -1}, "prune.strength", "must lie in 0..16"),
    ({"prune.strength": "1"}, "prune.strength", "must be a number"),
    ({"prune.strength": True}, "prune.strength", "must be a number"),
    ({"prune.strength": float("nan")}, "prune.strength", "must be a number"),
    ({"prune.keep": 0}, "prune.keep", "must lie in 0..1, above 0"),
    ({"prune.keep": 0.5}, "prune.keep", "no calibration table"),
    ({"prune.off": "yes"}, "prune.off", "must be true or false"),
    ({"prune.off": 1, "prune.strength": 1.0}, "prune.strength", "exclude each other"),
    ({"prune.keep": 0.5, "prune.strength": 1.0}, "prune.strength", "exclude each other"),
    ({"prune.stength": 1.0}, "prune.stength", "is unknown"),
    ({"prune.strength": [1.0]}, "prune.strength", "must be a number"),
]


def test_wrong_wishes_are_refused_and_the_engine_goes_on(tmp_path):
    folder = folder_of("dcp", tmp_path)
    with engine(folder) as llm:
        before = token_ids(llm.generate(prompts([40]), greedy(), use_tqdm=False))
        for asked, field, said in BAD:
            with pytest.raises(VLLMValidationError, match=said) as caught:
                llm.generate(prompts([8]), greedy(asked), use_tqdm=False)
            assert caught.value.parameter == field and field in str(caught.value)
        assert token_ids(llm.generate(prompts([40]), greedy({"other": "field"}), use_tqdm=False)) == before
        llm.generate(prompts([3]), greedy(tokens=2), use_tqdm=False)  # the ended are buried by a step
        assert pool_is_whole(llm)


def test_a_floor_and_open_servers(tmp_path):
    folder = folder_of("dcp", tmp_path)
    with engine(folder, additional_config={"vllm_prune": {"floor": 0.3}}) as llm:
        with pytest.raises(
            VLLMValidationError, match="greater strength than the server's, whose kept fraction is not known"
        ):
            llm.generate(prompts([8]), greedy({"prune.strength": 2.0}), use_tqdm=False)
        assert llm.generate(prompts([8]), greedy({"prune.strength": 1.0}), use_tqdm=False)
    with engine(folder, additional_config={"vllm_prune": {"strength": 0.0}}) as llm:
        with pytest.raises(VLLMValidationError, match="started with every gate open"):
            llm.generate(prompts([8]), greedy({"prune.strength": 0.5}), use_tqdm=False)
        assert llm.generate(prompts([8]), greedy({"prune.off": True}), use_tqdm=False)


REFERENCE = Path(__file__).parents[2] / "examples" / "reference-dcp"


def test_a_fifth_is_a_fifth():
    """``prune.keep`` of the reference checkpoint on held-out text, as long as what its table was measured on and shorter."""
    import vllm

    length = json.loads((REFERENCE / "config.json").read_text())["drop_gate"]["calibration"]["length"]
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    files = sorted(path for path in Path(vllm.__file__).parent.rglob("*.py") if path.stat().st_size > 8 * length)
    held_out = [path.read_text() for path in files if is_held_out(hashlib.sha256(path.read_bytes()).hexdigest())]
    tokens = [tokenizer(text).input_ids[: length - 2] for text in held_out]
    texts = [{"prompt_token_ids": ids} for ids in tokens if len(ids) == length - 2][:6]
    assert len(texts) == 6
    with engine(REFERENCE, max_model_len=length, max_num_batched_tokens=512) as llm:
        for keep, tokens in ((0.5, length - 2), (0.2, length - 2), (0.2, 1000), (0.2, 500)):
            asked = [{"prompt_token_ids": text["prompt_token_ids"][:tokens]} for text in texts]
            outputs = llm.generate(asked, greedy({"prune.keep": keep}, 2), use_tqdm=False)
            kept = [output.kv_transfer_params["vllm_prune"]["kept_pairs"] for output in outputs]
            assert np.mean(kept) == pytest.approx(keep, abs=0.05), (tokens, kept)
