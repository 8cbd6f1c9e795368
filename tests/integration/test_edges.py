"""Edges of a request's life: border lengths, aborts at every stage, reused ids, outgrowing the pool, cache resets.

After each, nothing may be left of the dead: neither blocks in the pool's account nor slots on the worker.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support import engine, generate, pool_is_whole, prompts, save_gated, scheduler_of, state_of, tiny_config, token_ids

CHUNK = 64
LONGEST = 256
POOL_BLOCKS = 10
BLOCK_BYTES = 3 * 2 * 32 * 2 * 64 * 4  # layers, heads, tokens, key and value, size, float32
SMALL = {"max_model_len": LONGEST, "max_num_batched_tokens": CHUNK, "max_num_seqs": 4}


# What the gates promise to keep, and how much they do; "tight": a tenth is promised and everything kept, so admission
# is too hopeful, as it may be.
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "roomy": ({}, SMALL),
    "tight": (
        {"expected_keep": 0.1, "strength": 1e-3},
        {**SMALL, "max_model_len": 1024, "kv_cache_memory_bytes": POOL_BLOCKS * BLOCK_BYTES},
    ),
}


# Engines live one after the other, hence the classes: vLLM keeps one KV connector a process.
@pytest.fixture(scope="class", params=["dcp", "dms"])
def started(request, tmp_path_factory):
    section, options = ENGINES[request.cls.engine]
    folder = save_gated(tmp_path_factory.mktemp(request.param), tiny_config("qwen3"), request.param, section=section)
    with engine(folder, **options) as found:
        yield found


def emptied(llm: Any) -> None:
    """A test that failed halfway leaves nothing to the next one."""
    llm.llm_engine.abort_request(list(llm.llm_engine.output_processor.request_states), internal=True)


@pytest.fixture
def llm(started):
    """The engine of the test's class. Requests keep their ids in it: vLLM otherwise appends random letters to them."""
    import vllm.envs

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(vllm.envs), "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", True)
        yield started
    emptied(started)


def greedy(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def add(llm: Any, name: str, length: int, tokens: int, seed: int = 0) -> None:
    llm.llm_engine.add_request(name, prompts([length], seed)[0], greedy(tokens))


def steps(llm: Any, most: int) -> dict[str, Any]:
    """At most so many steps; the outputs that finished in them, by id."""
    done = {}
    for _ in range(most):
        if not llm.llm_engine.has_unfinished_requests():
            break
        done.update({output.request_id: output for output in llm.llm_engine.step() if output.finished})
    return done


def finish(llm: Any, most: int = 2000) -> dict[str, Any]:
    done = steps(llm, most)
    assert not llm.llm_engine.has_unfinished_requests(), f"still busy after {most} steps"
    return done


def computed(llm: Any, name: str) -> int:
    return scheduler_of(llm).requests[name].num_computed_tokens


def slots(llm: Any) -> set[str]:
    return set(state_of(llm).store.slots)


def nothing_left(llm: Any) -> None:
    """Blocks are back at once; the worker hears of an end with the next step, whatever that computes."""
    assert pool_is_whole(llm)
    add(llm, "probe", 1, 1)
    finish(llm)
    assert pool_is_whole(llm)
    assert {name.split("-")[0] for name in slots(llm)} == {"probe"}
    store = state_of(llm).store
    assert len(store._free_slots) == store.lanes.length.shape[0] - 1
    assert set(store.slot_of_block.values()) == slots(llm)
    assert len(scheduler_of(llm).connector._requests) == 0


def alone(llm: Any, length: int, tokens: int, seed: int = 0) -> list[int]:
    add(llm, "alone", length, tokens, seed)
    return list(finish(llm)["alone"].outputs[0].token_ids)


@pytest.fixture
def errors(caplog):
    """Error lines of the plugin. vLLM's logger does not propagate to the root, where pytest listens."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield lambda: [
        r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR and r.name.startswith("vllm.vllm_prune")
    ]
    logger.removeHandler(caplog.handler)


def check_outgrown(llm: Any, done: dict[str, Any], lines: list[str], want: dict[str, list[int]]) -> None:
    assert done["huge"].outputs[0].finish_reason == "error"
    assert {name: list(done[name].outputs[0].token_ids) for name in want} == want
    assert len(lines) == 1
    assert "request huge ends with an error" in lines[0]
    assert f"the pool has {POOL_BLOCKS - 1}" in lines[0]
    assert "Raise the KV cache memory" in lines[0]
    nothing_left(llm)


class TestLife:
    """Requests in a pool with room for all."""

    engine = "roomy"

    @pytest.mark.parametrize(
        ("length", "tokens"),
        [
            (1, 1), (1, 40), (31, 2), (32, 1), (32, 33), (33, 1), (33, 32), (CHUNK, 1), (CHUNK + 1, 1), (LONGEST - 1, 1),
            (LONGEST - 2, 2),
        ],
    )  # fmt: skip
    def test_border_lengths(self, llm, length, tokens):
        (output,) = generate(llm, prompts([length], seed=length), tokens)
        assert len(output.outputs[0].token_ids) == tokens
        assert output.outputs[0].finish_reason == "length"
        nothing_left(llm)

    def test_border_lengths_together(self, llm):
        """More requests than may run at once: the others wait, and everybody gets what they would alone."""
        lengths = [1, 32, 33, LONGEST - 9, 2, 64, 31]
        together = token_ids(generate(llm, prompts(lengths, seed=1), tokens=9))
        assert together == [token_ids(generate(llm, [prompt], tokens=9))[0] for prompt in prompts(lengths, seed=1)]
        nothing_left(llm)

    def test_longer_than_the_model_is_refused(self, llm):
        from vllm.exceptions import VLLMValidationError

        with pytest.raises(VLLMValidationError, match="maximum context length is 256 tokens"):
            generate(llm, prompts([LONGEST + 1]), 1)
        nothing_left(llm)

    def test_asking_for_more_tokens_than_fit(self, llm):
        (output,) = generate(llm, prompts([LONGEST - 5]), tokens=50)
        assert len(output.outputs[0].token_ids) == 5
        assert output.outputs[0].finish_reason == "length"
        nothing_left(llm)

    def test_abort_in_prefill(self, llm):
        want = alone(llm, 40, 30, seed=2)
        add(llm, "neighbour", 40, 30, seed=2)
        steps(llm, 3)
        add(llm, "dead", 200, 5)
        steps(llm, 2)
        assert 0 < computed(llm, "dead") < 200
        assert "dead" in slots(llm)
        llm.llm_engine.abort_request(["dead"])
        steps(llm, 1)
        assert slots(llm) == {"neighbour"}
        assert list(finish(llm)["neighbour"].outputs[0].token_ids) == want
        nothing_left(llm)

    def test_abort_in_decode(self, llm):
        want = alone(llm, 40, 30, seed=2)
        add(llm, "neighbour", 40, 30, seed=2)
        add(llm, "dead", 70, 100)
        steps(llm, 12)
        assert computed(llm, "dead") > 70
        llm.llm_engine.abort_request(["dead"])
        steps(llm, 1)
        assert slots(llm) == {"neighbour"}
        assert list(finish(llm)["neighbour"].outputs[0].token_ids) == want
        nothing_left(llm)

    def test_abort_of_everything(self, llm):
        """Nobody is left to step for: the worker learns of all the dead when somebody comes again."""
        names = [f"dead{i}" for i in range(4)]
        for i, name in enumerate(names):
            add(llm, name, 50 + 40 * i, 20, seed=i)
        steps(llm, 5)
        assert len(slots(llm)) > 1
        llm.llm_engine.abort_request(names)
        assert not llm.llm_engine.has_unfinished_requests()
        nothing_left(llm)

    def test_abort_while_waiting(self, llm):
        """Never scheduled, so the worker never heard of it."""
        for i in range(4):
            add(llm, f"running{i}", 20, 40, seed=i)
        add(llm, "waiting", 200, 5)
        steps(llm, 4)
        assert slots(llm) == {f"running{i}" for i in range(4)}
        llm.llm_engine.abort_request(["waiting"])
        assert set(finish(llm)) == {f"running{i}" for i in range(4)}
        nothing_left(llm)

    @pytest.mark.parametrize("between", [0, 1], ids=["at_once", "a_step_later"])
    @pytest.mark.parametrize("when", [2, 10], ids=["in_prefill", "in_decode"])
    def test_same_id_again_after_abort(self, llm, when, between):
        """The second life begins in the very step that buries the first, or after it; it sees none of the first's keys."""
        want, other = alone(llm, 90, 12, seed=8), alone(llm, 33, 60, seed=5)
        add(llm, "neighbour", 33, 60, seed=5)
        add(llm, "again", 200, 100, seed=7)
        steps(llm, when)
        assert (computed(llm, "again") > 200) == (when == 10)
        llm.llm_engine.abort_request(["again"])
        steps(llm, between)
        add(llm, "again", 90, 12, seed=8)
        done = finish(llm)
        assert list(done["again"].outputs[0].token_ids) == want
        assert list(done["neighbour"].outputs[0].token_ids) == other
        nothing_left(llm)

    def test_same_id_again_and_again(self, llm):
        """Aborted at a different token each time."""
        for step in range(1, 14):
            add(llm, "same", 150, 50, seed=step)
            steps(llm, step)
            llm.llm_engine.abort_request(["same"])
        want = alone(llm, 100, 6, seed=3)
        add(llm, "same", 100, 6, seed=3)
        assert list(finish(llm)["same"].outputs[0].token_ids) == want
        nothing_left(llm)

    @pytest.mark.parametrize("running", [False, True], ids=["kept", "thrown_out"])
    @pytest.mark.parametrize("when", [1, 9])
    def test_reset_prefix_cache(self, llm, running, when):
        """With requests under way: refused, or they are computed anew; either way they say what they would have said."""
        sizes = {"a": (150, 20), "b": (20, 30)}
        want = {name: alone(llm, length, tokens, seed=4) for name, (length, tokens) in sizes.items()}
        for name, (length, tokens) in sizes.items():
            add(llm, name, length, tokens, seed=4)
        steps(llm, when)
        assert not pool_is_whole(llm)
        assert llm.llm_engine.reset_prefix_cache(reset_running_requests=running) is running
        assert pool_is_whole(llm) is running
        done = finish(llm)
        assert {name: list(output.outputs[0].token_ids) for name, output in done.items()} == want
        nothing_left(llm)

    def test_reset_prefix_cache_of_an_idle_engine(self, llm):
        assert llm.llm_engine.reset_prefix_cache() is True
        assert llm.llm_engine.reset_prefix_cache(reset_connector=True) is not None
        nothing_left(llm)


class TestOutgrown:
    """One request larger than the pool."""

    engine = "tight"

    @pytest.mark.parametrize(("length", "tokens"), [(900, 10), (100, 900)], ids=["in_prefill", "in_decode"])
    def test_outgrows_the_pool(self, llm, errors, length, tokens):
        """It ends with an error and a log line; those beside it and those behind it go on, in a bounded number of steps."""
        sizes = {"beside": (20, 25), "behind": (60, 10)}
        want = {name: alone(llm, *size, seed=6) for name, size in sizes.items()}
        add(llm, "beside", *sizes["beside"], seed=6)
        add(llm, "huge", length, tokens)
        add(llm, "behind", *sizes["behind"], seed=6)
        check_outgrown(llm, finish(llm, most=600), errors(), want)

    def test_the_pool_is_as_small_as_meant(self, llm):
        assert scheduler_of(llm).kv_cache_manager.block_pool.num_gpu_blocks == POOL_BLOCKS

    def test_outgrows_the_pool_alone(self, llm, errors):
        add(llm, "huge", 500, 400)
        done = finish(llm, most=600)
        check_outgrown(llm, done, errors(), {})
        assert len(done["huge"].outputs[0].token_ids) == 0

    def test_two_outgrow_the_pool(self, llm, errors):
        """They throw each other out until one after the other is alone."""
        want = alone(llm, 30, 20, seed=6)
        for name in ("first", "second"):
            add(llm, name, 150, 800, seed=len(name))
        add(llm, "small", 30, 20, seed=6)
        done = finish(llm, most=2000)
        assert [done[name].outputs[0].finish_reason for name in ("first", "second")] == ["error", "error"]
        assert list(done["small"].outputs[0].token_ids) == want
        assert len(errors()) == 2
        nothing_left(llm)

    def test_fits_the_pool_exactly(self, llm, errors):
        """The largest request that can end well: one token more than the pool's blocks hold would be an error."""
        spec = state_of(llm).spec
        most = max(n for n in range(1, 1024) if spec.geometry.blocks_for(n) <= POOL_BLOCKS - 1)
        # The last sampled token is never computed; another one would need the next block.
        (output,) = generate(llm, prompts([most - 19]), tokens=20)
        assert output.outputs[0].finish_reason == "length"
        assert len(output.outputs[0].token_ids) == 20
        assert errors() == []
        (output,) = generate(llm, prompts([most - 19]), tokens=22)
        assert output.outputs[0].finish_reason == "error"
        assert len(errors()) == 1
        nothing_left(llm)
