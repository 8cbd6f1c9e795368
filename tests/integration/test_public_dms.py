"""Public DMS checkpoints, served as they are: ``vllm serve FOLDER``. What is dropped is what the formats' own code drops (said
once more in ``public_checkpoints.published``), and what the trainer's twin drops."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from public_checkpoints import LAYERS, SAVED, WINDOW, edit, published
from support import (
    FULL,
    RECORD,
    VOCAB,
    engine,
    generate,
    pool_is_whole,
    preempted,
    prompts,
    recorded,
    scheduler_of,
    state_of,
)
from test_law2_drop_sets import check
from vllm_prune_training.masked import load_gated

from vllm_prune.gates import NEVER

OFTEN = ("nvidia", "fastdms")


@pytest.fixture(scope="module", params=SAVED, ids=list(SAVED))
def folder(request, tmp_path_factory):
    return SAVED[request.param](tmp_path_factory.mktemp(request.param))


def as_published(folder, ids: list[int]) -> np.ndarray:
    """Expiries [L, H, T] by the format's own code, of drops that happened by the last computed query."""
    mark = published(folder, torch.tensor(ids))[1].numpy()
    at = np.arange(len(ids)) + WINDOW + 1
    return np.where(mark & (at <= len(ids) - 1), at, NEVER)


@torch.no_grad()
def test_the_twin_is_what_the_source_computes(folder):
    ids = torch.tensor(prompts([120], seed=2)[0]["prompt_token_ids"])
    twin = load_gated(folder)
    found = twin(ids, "hard")
    want, mark = published(folder, ids)
    torch.testing.assert_close(found.logits, want, rtol=0, atol=2e-4)
    at = torch.arange(len(ids)) + WINDOW + 1
    assert torch.equal(found.expiry, torch.where(mark, at, NEVER))
    assert 0.05 < mark.float().mean() < 0.95
    dense = published(folder, ids, evicts=False)[0]
    torch.testing.assert_close(twin(ids, "open").logits, dense, rtol=0, atol=2e-4)
    assert (dense - want).abs().max() > 0.1, "what the gates do must show"


def test_drops(folder):
    """No option says what the folder is."""
    with engine(folder, **RECORD) as llm:
        for chunk in (1, 16, 0):
            scheduler_of(llm).scheduler_config.long_prefill_token_threshold = chunk
            lengths = [1, 2, 31, 32, 33, 100, 257, 64] if chunk else [130]
            outputs = generate(llm, prompts(lengths, seed=4), tokens=24)
            check(folder, llm, outputs)
            for output in outputs:
                ids, found = recorded(llm, output)
                assert found.shape == (LAYERS, 2, len(ids))
                np.testing.assert_array_equal(np.where(found < len(ids), found, NEVER), as_published(folder, ids))
        generate(llm, prompts([3]), tokens=2)
        assert pool_is_whole(llm)


def test_drops_after_preemption_and_compiled(folder, request):
    eager = not FULL and request.node.callspec.params["folder"] not in OFTEN
    with engine(folder, enforce_eager=eager, long_prefill_token_threshold=16, **RECORD) as llm:
        check(folder, llm, preempted(llm, prompts([90, 40], seed=5), tokens=30))
        assert {epoch for _, epoch in state_of(llm).store.events} >= {3, 4}


def test_logprobs(folder, request):
    """The whole distribution at every generated token, in float32, by the format's own code; and with every gate open."""
    if not FULL and request.node.callspec.params["folder"] not in OFTEN:
        pytest.skip("drops are compared for every format")
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=20, logprobs=VOCAB, ignore_eos=True, detokenize=False)
    is_open = SamplingParams(temperature=0, max_tokens=20, logprobs=VOCAB, ignore_eos=True, detokenize=False,
                             extra_args={"prune.off": True})  # fmt: skip
    (prompt,) = prompts([150], seed=8)
    with engine(folder, max_logprobs=VOCAB) as llm:
        outputs = llm.generate([prompt, prompt], [params, is_open], use_tqdm=False)
    for output, evicts in zip(outputs, (True, False), strict=True):
        said = output.outputs[0]
        ours = np.asarray([[row[token].logprob for token in range(VOCAB)] for row in said.logprobs])
        ids = torch.tensor([*output.prompt_token_ids, *said.token_ids])
        want, other = (
            published(folder, ids, x)[0][len(output.prompt_token_ids) - 1 : -1].log_softmax(-1).numpy()
            for x in (evicts, not evicts)
        )
        assert np.abs(ours - want).max() < 1e-3
        assert np.abs(other - want).max() > 0.02, "what the gates do must show"


def test_in_bfloat16_and_with_a_strength_of_the_server(folder, tmp_path, request):
    name = request.node.callspec.params["folder"]
    if not FULL and name not in OFTEN:
        pytest.skip("one format of each family of bases")
    low = SAVED[name](tmp_path, torch.bfloat16)
    options = {"additional_config": {"vllm_prune": {"strength": 0.0}}}
    with engine(low, **options) as llm:
        (output,) = generate(llm, prompts([90], seed=1), tokens=12)
        assert output.kv_transfer_params["vllm_prune"]["keys_dropped"] == 0
    with engine(low) as llm:
        (output,) = generate(llm, prompts([90], seed=1), tokens=12)
        held = output.kv_transfer_params["vllm_prune"]
        assert 0.1 < held["keys_dropped"] / (held["keys_held"] + held["keys_dropped"]) < 0.9


def test_modelopts_folder_is_served_however_its_runner_is_named(tmp_path):
    """Without an architecture vLLM takes it for an embedding model, or for its Transformers backend's."""
    folder = SAVED["modelopt"](tmp_path)
    assert "architectures" not in json.loads((folder / "config.json").read_text())
    named = {"hf_overrides": {"architectures": ["Qwen3ForCausalLMDMS"]}}
    for options in ({}, {"runner": "generate"}, named):
        with engine(folder, **RECORD, **options) as llm:
            check(folder, llm, generate(llm, prompts([80], seed=3), tokens=8))


def test_a_trainers_output_beside_its_log(tmp_path):
    """FastDMS's ``final/``: nothing in config.json, all in the log above it."""
    folder = SAVED["fastdms"](tmp_path / "final")
    want = as_published(folder, prompts([90], seed=3)[0]["prompt_token_ids"])
    (folder / "dms_metadata.json").unlink()
    edit(folder, lambda config: [config.pop(name) for name in list(config) if name.startswith("dms_")])
    log = {
        "config": {"window_size": WINDOW, "zeroing_steps": 2000, "alpha_scale": 100.0, "alpha_offset": 5.0},
        "log": [],
    }
    (tmp_path / "training_log.json").write_text(json.dumps(log))
    with engine(folder, **RECORD) as llm:
        (output,) = generate(llm, prompts([90], seed=3), tokens=1)
        ids, found = recorded(llm, output)
        np.testing.assert_array_equal(np.where(found < len(ids), found, NEVER), want)
