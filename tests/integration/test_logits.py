"""Logits of the server against a masked Hugging Face forward pass, by flash-attention's rule: our error to the float32
reference is at most 3 times that of the same pass in low precision (the masks are the server's own recorded drops)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import engine, prompts, recorded, save_gated, tiny_config
from vllm_prune_training.masked import load_gated

METHODS = {"dcp": {"beta": 3.6}, "dms": {"delay": 8}}


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
    options = {"vllm_prune": {"record": True}}
    with engine(folder, long_prefill_token_threshold=chunk, additional_config=options) as llm:
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
