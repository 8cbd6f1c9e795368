"""On a GPU: gates that run and never drop say what Hugging Face's model says, token for token, in float32.

vLLM's own float32 attention multiplies in TF32 there, so that it is no measure of ours.
"""

from __future__ import annotations

import pytest
import torch
from support import engine, generate, prompts, save_gated, tiny_config, token_ids
from vllm_prune_training.masked import load_gated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_open_lanes(tmp_path, family, eager):
    model = save_gated(tmp_path, tiny_config(family, layers=2, group=2 if family == "llama" else 3), "dcp", beta=60.0)
    twin = load_gated(model)
    with engine(model, enforce_eager=eager, long_prefill_token_threshold=16) as llm:
        outputs = generate(llm, prompts([77, 5, 33, 150]), tokens=16)
    assert len({tuple(tokens) for tokens in token_ids(outputs)}) == 4
    for output in outputs:
        ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        with torch.no_grad():
            best = twin(ids, "open").logits[0].argmax(-1)
        first = len(output.prompt_token_ids) - 1
        assert best[first:-1].tolist() == list(output.outputs[0].token_ids)
