"""Logits of the server against a masked Hugging Face forward pass.

Of prompts by flash-attention's rule: our error to the float32 reference is at most 3 times that of the same pass in low
precision (the masks are the server's own recorded drops). Of what is generated, for every other method: in float32, against
the twin by its own decisions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import RECORD, VOCAB, engine, prompts, recorded, save_gated, tiny_config
from test_ftp_prompt import save_ftp
from test_prompt_forms import save_prompt_gated
from vllm_prune_training.masked import load_gated

METHODS = {"dcp": {"beta": 3.6}, "dms": {"delay": 8}}
HALF = {"query_heads": 4, "width": 256, "hidden": 32, "closed": 0.5}
OTHERS = {
    "ltp": {"span": 20, "grid": 16, "theta": 0.98},
    "acc": {"grid": 16, "sinks": 2, "window": 8},
    "ltp_prompt": {},
    "acc_prompt": {},
    "ftp": {},
    "ftp_of_prompts": {},
    "shadow": HALF,
    "shadow_token": {**HALF, "neurons": 192, "neuron_hidden": 24, "closed_neurons": 0.5},
}


def logprobs(model, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        rows = model(ids, mode="hard").logits.float().log_softmax(-1)
    return rows[:-1].gather(1, ids[1:, None])[:, 0].numpy()


def impose(model, expiries: np.ndarray) -> None:
    """Replace each gate's decision by what the server recorded."""
    for gate, rows in zip(model.gates, expiries, strict=True):
        gate.expiry = lambda *_, rows=rows: torch.from_numpy(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [16, 0], ids=["chunk16", "whole"])
def test_prompt_logprobs(tmp_path, method, chunk, dtype):
    from vllm import SamplingParams

    folder = save_gated(tmp_path, tiny_config("qwen3"), method, dtype, **METHODS[method])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    with engine(folder, long_prefill_token_threshold=chunk, **RECORD) as llm:
        (output,) = llm.generate(prompts([180], seed=8), params, use_tqdm=False)
        ids, expiries = recorded(llm, output)
    ours = np.asarray([next(iter(row.values())).logprob for row in output.prompt_logprobs[1:]])
    tokens = torch.tensor(ids)
    low, high = load_gated(folder), load_gated(folder).float()
    for model in (low, high):
        impose(model, expiries)
    want = logprobs(high, tokens)
    error = np.abs(ours - want)
    if dtype is torch.float32:
        assert error.max() < 1e-3
        return
    allowed = np.abs(logprobs(low, tokens) - want)
    assert error.mean() <= 3 * allowed.mean() and error.max() <= 3 * allowed.max()


def checkpoint(folder: Path, method: str) -> Path:
    """A random one, in which the method drops or skips a good part."""
    if method in ("ltp_prompt", "acc_prompt"):
        return save_prompt_gated(folder, "qwen3", method)
    if method == "ftp_of_prompts":
        return save_ftp(folder, "qwen3", torch.float32, 4)
    return save_gated(folder, tiny_config("qwen3"), method, **OTHERS[method])


@pytest.mark.parametrize("method", OTHERS)
def test_logprobs_of_generated_tokens(tmp_path, method):
    """The whole distribution at each of them."""
    from vllm import SamplingParams

    folder = checkpoint(tmp_path, method)
    twin = load_gated(folder)
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=VOCAB, ignore_eos=True, detokenize=False)
    with engine(folder, max_logprobs=VOCAB) as llm:
        outputs = llm.generate(prompts([180, 33], seed=8), params, use_tqdm=False)
    for output in outputs:
        said, prompt = output.outputs[0], len(output.prompt_token_ids)
        ours = np.asarray([[row[token].logprob for token in range(VOCAB)] for row in said.logprobs])
        ids = torch.tensor([*output.prompt_token_ids, *said.token_ids])
        with torch.no_grad():
            want, dense = (
                twin(ids, mode, prompt=prompt).logits[prompt - 1 : -1].log_softmax(-1).numpy()
                for mode in ("hard", "open")
            )
        assert np.abs(ours - want).max() < 1e-3
        assert np.abs(dense - want).max() > 0.02, "what the gates do must show"
