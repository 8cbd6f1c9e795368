"""What serves on a GPU, on the CPU: vLLM's engine with our CUDA backend, whose kernels run under Triton's interpreter.

Collected by ``test_device_path.py`` alone, in a process of its own: the interpreter is chosen before Triton is imported.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from public_checkpoints import SAVED
from support import (
    FULL,
    engine,
    generate,
    pool_is_whole,
    preempted,
    prompts,
    save_gated,
    state_of,
    tiny_config,
    token_ids,
)
from test_law2_drop_sets import METHODS, RECORD, check, expected, recorded, visible_drops
from test_prefix_caching import all_ended, ask, same
from test_pressure import check_pressure, options
from test_protect_served import POSITIONS, SPARED, check_spared
from test_request_strength import asking, check_strengths, greedy
from vllm_prune_kernels import decode
from vllm_prune_training.masked import load_gated

from vllm_prune import compat, connector
from vllm_prune.attention import cuda, device_state, gated
from vllm_prune.attention.cuda_backend import PruneCUDABackend
from vllm_prune.attention.device_state import DeviceState
from vllm_prune.gates import GATES, NEVER
from vllm_prune.models import native

SMALL = {} if torch.cuda.is_available() else {
    "kv_cache_memory_bytes": 4 << 20, "max_model_len": 192, "max_num_seqs": 4, "max_num_batched_tokens": 96,
}  # fmt: skip
"""The interpreter copies every tensor that a kernel is given."""
BY_TOKEN = ("dcp", "dcp_kv_head", "dms", "window", "random")
ON_GPU = (*BY_TOKEN, "ltp", "acc")
SHORT = ON_GPU if FULL else ("dcp", "acc")
"""Under the interpreter, a minute each; the kernels of the others are compared with their twins in any case."""


@pytest.fixture(autouse=True)
def device_path(monkeypatch):
    if torch.cuda.is_available():
        return
    # On CPU vLLM takes no other name.
    monkeypatch.setattr(PruneCUDABackend, "get_name", staticmethod(lambda: "CPU_ATTN"))
    monkeypatch.setattr(gated, "backend_class", lambda: PruneCUDABackend)
    monkeypatch.setattr(cuda, "PROGRAMS", 8)  # the interpreter runs them one after another
    monkeypatch.setattr(decode, "MOST_SPLITS", 2)
    monkeypatch.setattr(connector, "MOST", 6)
    monkeypatch.setattr(device_state, "MOST_ON_GPU", 6)
    monkeypatch.setattr(native, "may_fuse", lambda vllm_config: True)


def check_drops(model, llm, spares: bool) -> None:
    """Mixed batches, chunks, strengths, preemption, and spared positions where gates know them: the same drops as the trainer's
    twin, and a whole pool."""
    assert isinstance(state_of(llm), DeviceState)
    check(model, llm, generate(llm, prompts([1, 70] if SMALL else [1, 33, 70, 130], seed=4), tokens=5 if SMALL else 8))
    strengths = (None, 0.0, 0.5)
    mixed = llm.generate(prompts([40, 50, 45], seed=6), [greedy(asking(x), 4) for x in strengths], use_tqdm=False)
    assert check_strengths(model, llm, mixed, strengths)[1] == 0.0
    if spares:
        sparing = [greedy({"prune.protect": SPARED}, 4), greedy(tokens=4)]
        batch = prompts([85, 60], seed=3)
        check_spared(llm, model, llm.generate(batch, sparing, use_tqdm=False), [POSITIONS, frozenset()])
        # In a used slot.
        check_spared(llm, model, llm.generate(batch[1:], sparing[1], use_tqdm=False), [frozenset()])
    check(model, llm, preempted(llm, prompts([40, 9], seed=5), tokens=5, after=(3, 6)))
    generate(llm, prompts([3]), tokens=2)  # the ended are buried by a step
    assert pool_is_whole(llm)


@pytest.mark.parametrize("name", ON_GPU if torch.cuda.is_available() else SHORT)
def test_law_2(tmp_path, name):
    """Mixed batches, chunks, preemption: the same drops as the trainer's twin."""
    method = name.removesuffix("_kv_head")
    section = {"protect": {"sinks": 2}} if GATES[method].protects else {}
    model = save_gated(tmp_path, tiny_config("qwen3", layers=2), method, section=section, **METHODS[name])
    with engine(model, long_prefill_token_threshold=24, **RECORD, **SMALL) as llm:
        layers = llm.apply_model(
            lambda model: [m.fused for m in model.modules() if isinstance(m, native.GatedForward)]
        )[0]
        assert [layer is not None for layer in layers] == [method == "dcp"] * 2
        assert state_of(llm).store.num_blocks > 20
        check_drops(model, llm, spares=name in BY_TOKEN)


@pytest.mark.parametrize("name", SAVED if FULL or torch.cuda.is_available() else ["nvidia", "fastdms"])
def test_public_dms(tmp_path, name):
    """Published formats: gates that read queries before RoPE or the stream, and decide about the key before or their own."""
    model = SAVED[name](tmp_path)
    with engine(model, long_prefill_token_threshold=24, **RECORD, **SMALL) as llm:
        check_drops(model, llm, spares=True)


@pytest.mark.parametrize("name", BY_TOKEN if torch.cuda.is_available() else ["dcp"])
def test_pressure(tmp_path, name):
    """Strength that changes while a request runs."""
    model = save_gated(tmp_path, tiny_config("qwen3", layers=2), name, **METHODS[name])
    room = {**SMALL, "kv_cache_memory_bytes": 2 << 20, **options(start=0.14, full=0.26, slack=0.01)}
    with engine(model, long_prefill_token_threshold=24, **room) as llm:
        check_pressure(llm, model, [50, 60])


@pytest.mark.parametrize("name", ON_GPU if FULL or torch.cuda.is_available() else ["dms"])
def test_prefixes(tmp_path, name):
    """Prompts that begin alike, from snapshots, shared or not, and computed anew: the same tokens, logits and drops."""
    method = name.removesuffix("_kv_head")
    model = save_gated(tmp_path, tiny_config("qwen3", layers=2), method, **METHODS[name])
    root = prompts([70], seed=3)[0]["prompt_token_ids"]
    one, other = (root + prompts([more], seed=more)[0]["prompt_token_ids"] for more in (30, 47))
    batch = [{"prompt_token_ids": ids} for ids in (root, one, other)]
    with engine(model, enable_prefix_caching=True, **RECORD, **SMALL) as llm:
        assert isinstance(state_of(llm), DeviceState)
        first = [ask(llm, [prompt], tokens=2)[0] for prompt in batch]
        assert [output.num_cached_tokens for output in first] == [0, 64, 64]
        again = ask(llm, batch, tokens=2)
        assert [output.num_cached_tokens for output in again] == [64, 96, 96]
        # One by one: what expires with a step's end is dropped in it, or in the next where a prompt's last chunk is of one token.
        cold = [ask(llm, [prompt], cold=True, tokens=2)[0] for prompt in batch]
        assert all(output.num_cached_tokens == 0 for output in cold)
        same(llm, first, cold)
        same(llm, again, cold)
        shared = max(output.kv_transfer_params["vllm_prune"]["blocks_shared"] for output in again)
        assert (shared > 0) == (name in ("dms", "random")), "pages in which nothing changes any more"
        dropped = [output.kv_transfer_params["vllm_prune"]["keys_dropped"] for output in cold]
        assert min(dropped) > 0, "the test must see drops"
        all_ended(llm)


@pytest.mark.parametrize("name", ON_GPU if torch.cuda.is_available() else ["dcp", *(ON_GPU[1:] if FULL else [])])
def test_fp8(tmp_path, name, monkeypatch):
    """A KV cache of half the bytes: twice the blocks, nearly the same logits, and gates that decide as they did where nothing
    of the cache has reached them: in layer 0, and everywhere if they decide by position; elsewhere nearly as the trainer's."""
    if not torch.cuda.is_available():
        monkeypatch.setitem(compat.KV_DTYPES, "cpu", ("fp8",))
        monkeypatch.setattr(compat, "has_fp8", lambda: True)
    method = name.removesuffix("_kv_head")
    model = save_gated(tmp_path, tiny_config("qwen3", layers=2), method, torch.bfloat16, **METHODS[name])
    batch, found = prompts([1, 120], seed=4), {}
    for cache in ("auto", "fp8"):
        with engine(model, long_prefill_token_threshold=24, kv_cache_dtype=cache, **RECORD, **SMALL) as llm:
            kv = state_of(llm).store.kv
            assert (kv.dtype == torch.float8_e4m3fn) == (cache == "fp8")
            outputs = llm.generate(batch, greedy(tokens=1, logprobs=5), use_tqdm=False)
            drops = [visible_drops(recorded(llm, output)[1]) for output in outputs]
            found[cache] = state_of(llm).store.num_blocks, outputs, drops
            same = [expected(model, recorded(llm, o)[0], len(o.prompt_token_ids)) for o in outputs]
            for seen, want in zip(drops, same, strict=True):
                assert (seen == want).mean() > (0.999 if method in ("window", "random") else 0.9)
            generate(llm, prompts([3]), tokens=2)
            assert pool_is_whole(llm)
    assert found["fp8"][0] in (2 * found["auto"][0], 2 * found["auto"][0] + 1)
    assert min((drops != NEVER).sum() for drops in found["fp8"][2][1:]) > 5, "the test must see drops"
    for seen, narrow in zip(found["auto"][2], found["fp8"][2], strict=True):
        if name in BY_TOKEN:  # the others decide by what the cache's keys received
            np.testing.assert_array_equal(seen[0], narrow[0])
    gaps = []
    for plain, narrow in zip(found["auto"][1], found["fp8"][1], strict=True):
        one, other = (output.outputs[0].logprobs[0] for output in (plain, narrow))
        gaps += [abs(one[token].logprob - other[token].logprob) for token in set(one) & set(other)]
    assert 0 < max(gaps) < 0.2, gaps


@pytest.mark.parametrize(("family", "group"), [("qwen3", 3), ("llama", 2)] if FULL else [("llama", 2)])
def test_open_lanes(tmp_path, family, group):
    """Gates that run and never drop: what Hugging Face's model says, token for token, in float32."""
    model = save_gated(tmp_path, tiny_config(family, layers=2, group=group), "dcp", beta=60.0)
    twin = load_gated(model)
    with engine(model, long_prefill_token_threshold=24, **SMALL) as llm:
        outputs = generate(llm, prompts([50, 5]), tokens=6)
    assert len({tuple(tokens) for tokens in token_ids(outputs)}) == 2
    for output in outputs:
        ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        with torch.no_grad():
            best = twin(ids, "open").logits[0].argmax(-1)
        assert best[len(output.prompt_token_ids) - 1 : -1].tolist() == list(output.outputs[0].token_ids)
