"""A hit is a miss: a request that starts from a snapshot of compressed state goes on exactly as if it had computed its prefix.

float32 models, as in ``test_law2_drop_sets``. Cold runs are on the same engine, with vLLM's own ``skip_reading_prefix_cache``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import (
    FULL,
    RECORD,
    engine,
    pool_is_whole,
    preempted,
    prompts,
    recorded,
    save_gated,
    scheduler_of,
    state_of,
    tiny_config,
    token_ids,
)
from test_law2_drop_sets import METHODS, visible_drops
from vllm import SamplingParams
from vllm_prune_training.engine_eval.jobs import Engine, Request
from vllm_prune_training.engine_eval.run import answers

from vllm_prune.gates import GATES, by_token

REFERENCE = Path(__file__).parents[2] / "examples" / "reference-dcp"

HELD = ("dcp", "dcp_kv_head", "dms", "acc", "ftp", *(("window", "random", "ltp", "shadow_token") if FULL else ()))
"""Methods with which prefixes are held; the last four decide at write and at boundaries, like others, or drop nothing."""
PARAMS = {**METHODS, "shadow_token": {**METHODS["shadow"], "neurons": 192, "neuron_hidden": 24, "closed_neurons": 0.5}}
TOLD = (
    "tokens",
    "keys_held",
    "keys_dropped",
    "kept_fraction",
    "kept_fraction_least_layer",
    "kept_pairs",
    "blocks_dense",
)
"""Of what rides on an answer, what does not hang on who computed the prefix. Blocks held do, by the grants of a chunk."""
N = 32


def ask(llm: Any, batch: list[Any], *, cold: bool = False, tokens: int = 12, **fields: Any) -> list[Any]:
    """Greedy outputs with log-probabilities. ``fields``: of the request, in extra_args."""
    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1, extra_args=fields or None,
        skip_reading_prefix_cache=cold,
    )  # fmt: skip
    return llm.generate(batch, params, use_tqdm=False)


def snapshots_of(llm: Any) -> Any:
    return scheduler_of(llm).connector._snapshots


def tree(seed: int) -> list[dict[str, list[int]]]:
    """Prompts of a tree of three levels, root first: each its parent's tokens and some of its own, block borders or not."""
    found = [prompts([90], seed)[0]["prompt_token_ids"]]
    for at, tokens in enumerate((40, 70)):
        found.append(found[0] + prompts([tokens], seed + 1 + at)[0]["prompt_token_ids"])
    for at, tokens in enumerate((33, 64, 5, 101)):
        found.append(found[1 + at // 2] + prompts([tokens], seed + 10 + at)[0]["prompt_token_ids"])
    return [{"prompt_token_ids": ids} for ids in found]


def same(llm: Any, hot: list[Any], cold: list[Any], *, blocks: bool = False) -> None:
    """Tokens, log-probabilities, drops and what is told of two runs of the same prompts."""
    assert token_ids(hot) == token_ids(cold)
    for one, other in zip(hot, cold, strict=True):
        (ids, mine), (_, theirs) = recorded(llm, one), recorded(llm, other)
        np.testing.assert_array_equal(visible_drops(mine), visible_drops(theirs), err_msg=f"of {len(ids)} tokens")
        a, b = ([next(iter(x.values())).logprob for x in o.outputs[0].logprobs] for o in (one, other))
        np.testing.assert_allclose(a, b, atol=2e-4)
        said, told = (o.kv_transfer_params["vllm_prune"] for o in (one, other))
        assert {key: said[key] for key in TOLD} == {key: told[key] for key in TOLD}, (said, told)


@pytest.fixture(scope="module", params=HELD)
def gated(request, tmp_path_factory):
    method = request.param.removesuffix("_kv_head")
    section = {"protect": {"sinks": 2}} if GATES[method].protects else {}
    return save_gated(
        tmp_path_factory.mktemp(request.param), tiny_config("qwen3", layers=3), method, section=section, **PARAMS[request.param]
    )  # fmt: skip


def all_ended(llm: Any) -> None:
    """Nothing is owned, on either side, once the snapshots are gone too."""
    ask(llm, prompts([3]), tokens=2)
    assert pool_is_whole(llm)
    assert scheduler_of(llm).reset_prefix_cache()
    ask(llm, prompts([4]), tokens=2)
    assert snapshots_of(llm).blocks == 0 and not any(name.startswith("\0") for name in state_of(llm).store.slots)
    assert pool_is_whole(llm)


def test_a_tree_of_prompts(gated):
    """Chunks whole and of 48; one after another and together; a pool that holds all; thrown out in the middle."""
    with engine(gated, enable_prefix_caching=True, **RECORD) as llm:
        config, snapshots = scheduler_of(llm).scheduler_config, snapshots_of(llm)
        for seed, chunk in ((100, 0), (200, 48)):
            config.long_prefill_token_threshold = chunk
            batch = tree(seed)
            first = [ask(llm, [prompt])[0] for prompt in batch]
            assert [output.num_cached_tokens for output in first] == [0, 64, 64, 128, 128, 128, 160]
            again = ask(llm, batch)
            assert all(output.num_cached_tokens == (len(prompt["prompt_token_ids"]) - 1) // N * N
                       for output, prompt in zip(again, batch, strict=True))  # fmt: skip
            cold = ask(llm, batch, cold=True)
            assert all(output.num_cached_tokens == 0 for output in cold)
            same(llm, first, cold)
            same(llm, again, cold)
            dropped = [output.kv_transfer_params["vllm_prune"]["keys_dropped"] for output in cold]
            assert min(dropped) > 0 or "shadow_token" in gated.name, "the test must see drops"
        config.long_prefill_token_threshold = 48
        used = snapshots.used
        ids = token_ids(preempted(llm, batch, tokens=12, after=(3, 6)))
        assert ids == token_ids(cold) and snapshots.used > used
        all_ended(llm)


def test_memory_is_scarce(gated):
    """Snapshots are handed out to whoever needs blocks, in the middle of everything; nobody notices."""
    batch = [prompt for seed in range(0, 120, 20) for prompt in tree(seed)]
    with engine(
        gated,
        enable_prefix_caching=True,
        max_num_batched_tokens=256,
        max_model_len=512,
        kv_cache_memory_bytes=3 << 20,
        **RECORD,
    ) as llm:
        snapshots = snapshots_of(llm)
        hot = [output for _ in range(2) for output in ask(llm, batch)]
        assert snapshots.lost > 5 and snapshots.used > 5, (snapshots.lost, snapshots.used)
        same(llm, hot, ask(llm, batch, cold=True) * 2)
        all_ended(llm)


def test_foreign_state_is_not_read(gated):
    """Same tokens at another strength, with other protected keys or another cache salt: computed, and then held beside it."""
    (prompt,) = prompts([100], seed=9)
    method = gated.name.rstrip("0123456789")
    if method not in ("dcp", "dms", "acc", "ftp") and not FULL:
        pytest.skip("one method of each way to decide")
    gate = GATES[method.removesuffix("_kv_head")]
    spans = by_token(gate.reveal, gate.routes)
    with engine(gated, enable_prefix_caching=True, **RECORD) as llm:
        ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (prompt, {}), (prompt, {"prune.strength": 0.5}), (prompt, {"prune.off": True}), ({**prompt, "cache_salt": "a"}, {}),
            ({**prompt, "cache_salt": "b"}, {}), *([(prompt, {"prune.protect": "10:50"})] if spans else ()),
        ]  # fmt: skip
        hot = []
        for cached in (0, 96):
            for asked, fields in ways:
                (output,) = ask(llm, [asked], **fields)
                assert output.num_cached_tokens == cached, (fields, asked.get("cache_salt"))
                hot.append(output)
        if spans:  # beyond what is held no difference is made
            (output,) = ask(llm, [prompt], **{"prune.protect": "98:99"})
            assert output.num_cached_tokens == 96
        cold = [ask(llm, [asked], cold=True, **fields)[0] for asked, fields in ways]
        same(llm, hot, cold * 2)
        dropped = {output.kv_transfer_params["vllm_prune"]["keys_dropped"] for output in cold}
        assert len(dropped) > 1 or (method == "shadow_token" and dropped == {0})
        all_ended(llm)


def at_once(seed: int, tails: int) -> list[dict[str, list[int]]]:
    """Prompts that share 150 tokens, which nobody has seen, the longest first: it ends blocks behind where the others part."""
    shared = prompts([150], seed)[0]["prompt_token_ids"]
    return [
        {"prompt_token_ids": shared + prompts([70 - 7 * at], seed + at + 1)[0]["prompt_token_ids"]}
        for at in range(tails)
    ]


def test_many_at_once(gated):
    """The first of many that come together leaves what they share, whatever the chunks; all others start from there."""
    with engine(gated, enable_prefix_caching=True, **RECORD) as llm:
        config = scheduler_of(llm).scheduler_config
        for seed, chunk in ((300, 0), (400, 48), (500, 130)):
            config.long_prefill_token_threshold = chunk
            batch = at_once(seed, 5)
            hot = ask(llm, batch)
            assert [output.num_cached_tokens for output in hot] == [0] + [4 * N] * 4
            same(llm, hot, ask(llm, batch, cold=True))
        all_ended(llm)


def test_a_chats_system_message():
    """The second who comes with one finds it, as it was left by the first."""
    first, second = (
        [{"role": "system", "content": "Keep the word cobalt in mind. " * 12}, {"role": "user", "content": said}]
        for said in ("x = 1\n" * 40, "def f(): pass\n" * 20)
    )
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    with engine(REFERENCE, skip_tokenizer_init=False, max_model_len=1024, enable_prefix_caching=True) as llm:
        found = [llm.chat([chat], params, use_tqdm=False)[0] for chat in (first, second, first)]
        ids = [output.prompt_token_ids for output in found]
        parted = next(i for i, (a, b) in enumerate(zip(ids[0], ids[1], strict=False)) if a != b)
        system = llm.get_tokenizer().apply_chat_template(first[:1], tokenize=True, return_dict=False)
        assert N < len(system) <= parted
        assert [output.num_cached_tokens for output in found] == [0, len(system) // N * N, (len(ids[0]) - 1) // N * N]
        assert token_ids([found[0]]) == token_ids([found[2]])


def test_an_evaluation_finds_nothing_held():
    """What a question about a context takes is what it takes alone, whoever asked before."""
    request = Request(prompts([300], seed=4)[0]["prompt_token_ids"], new_tokens=2)
    job = Engine(str(REFERENCE), {}, "float32", 512, 64 << 20, 128, 1)
    with engine(REFERENCE, **{name: value for name, value in job.arguments().items() if name != "model"}) as llm:
        one, other = (next(iter(answers(llm, [request], []))).memory for _ in range(2))
        assert one == other and one["blocks_returned"] > 0


def test_pages_of_settled_keys_are_shared(gated):
    """Where a key that outlives its decision stays for good, requests that run at once hold it once; elsewhere each its own."""
    settles = gated.name.rstrip("0123456789") in ("dms", "random", "ftp", "shadow_token")
    with engine(gated, enable_prefix_caching=True, **RECORD) as llm:
        pool, manager = scheduler_of(llm).kv_cache_manager.block_pool, scheduler_of(llm).connector._manager
        (system,) = prompts([8 * N + 1], seed=700)
        ask(llm, [system], tokens=1)
        (snapshot,) = snapshots_of(llm)._by_prefix.values()
        batch = [{"prompt_token_ids": system["prompt_token_ids"][: 8 * N] + [3 + at] * 9} for at in range(6)]
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
        for at, prompt in enumerate(batch):
            llm.llm_engine.add_request(f"r{at}", prompt, params)
        for _ in range(8):
            llm.llm_engine.step()
        assert len(manager.grants) == 6, "all of them run"
        own = [grants.live for grants in manager.grants.values()]
        busy = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        assert busy == sum(own) + (len(snapshot.blocks) if settles else 0)
        report = snapshot.report
        assert snapshot.shared == settles and (report.unsettled[0] < report.pages[0] // 2) == settles
        told = []
        while llm.llm_engine.has_unfinished_requests():
            told += [o.kv_transfer_params["vllm_prune"] for o in llm.llm_engine.step() if o.finished]
        assert {x["blocks_shared"] for x in told} == {len(snapshot.blocks) if settles else 0} and len(told) == 6
        same(llm, ask(llm, batch), ask(llm, batch, cold=True))
        all_ended(llm)


def test_spacing(gated):
    """Places at fixed distances: already the second that begins so starts from one."""
    options = {"additional_config": {"vllm_prune": {"record": True, "snapshot_spacing": 70}}}  # three blocks of 32
    with engine(gated, enable_prefix_caching=True, **options) as llm:
        batch = at_once(600, 3)
        hot = [ask(llm, [prompt])[0] for prompt in batch]
        assert [output.num_cached_tokens for output in hot] == [0, 3 * N, 4 * N]
        assert snapshots_of(llm).made == 2 + 2 + 1, "each its end; the first 96, the second where they part"
        same(llm, hot, ask(llm, batch, cold=True))
        all_ended(llm)
