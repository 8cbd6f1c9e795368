"""Law 1: with every gate open, a gated model is stock vLLM, token for token.

"Open" both ways: strength 0 (nothing computed) and gates that run but never drop. Chunk sizes 16 and 512, batches of 1 and
of 8 mixed lengths, in each engine; VLLM_PRUNE_FULL=1 takes every shape of every family.
"""

from __future__ import annotations

from functools import cache

import pytest
from support import (
    EXACT,
    FULL,
    engine,
    generate,
    pool_is_whole,
    prompts,
    save_base,
    save_gated,
    scheduler_of,
    tiny_config,
    token_ids,
)

FAMILIES = ("qwen3", "llama", "generic")
SHAPES = [(64, 1), (64, 2), (64, 8), (128, 1), (128, 2), (128, 8)]
FEW = {"qwen3": [(64, 1), (128, 8)], "llama": [(64, 1)], "generic": [(128, 8)]}
EAGER = [(family, *shape) for family in FAMILIES for shape in (SHAPES if FULL else FEW[family])]
BOUNDARY = {"ltp": {"theta": 1e-6}, "acc": {"least": 1.0}}
"""LTP runs its second pass and drops nothing; a budget of everything is not even counted."""
BATCHES = ([77], [1, 5, 31, 32, 33, 64, 150, 300])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Stock models and their gated twins, all made before the first engine starts: vLLM's Transformers backend rewrites
    the Hugging Face classes it serves, so that they can no longer be built outside of it."""
    made = {}
    for family in FAMILIES:
        for head_dim, group in SHAPES:
            # The generic class serves a family without a class of its own.
            config = tiny_config("qwen2" if family == "generic" else family, head_dim=head_dim, group=group, layers=2)
            folder = tmp_path_factory.mktemp(f"{family}-{head_dim}-{group}")
            made[family, head_dim, group] = (
                save_base(folder / "base", config, EXACT),
                save_gated(folder / "zero", config, "dcp", EXACT, section={"strength": 0.0},
                           generic=family == "generic"),
                save_gated(folder / "never", config, "dcp", EXACT, generic=family == "generic", beta=60.0),
            )  # fmt: skip
    config, (base, *_) = tiny_config("qwen3", layers=2), made["qwen3", 64, 2]
    for method, params in BOUNDARY.items():  # what decides from attention has a path of its own
        folder = tmp_path_factory.mktemp(method)
        made[method] = (
            base,
            save_gated(folder / "zero", config, method, EXACT, section={"strength": 0.0}),
            save_gated(folder / "never", config, method, EXACT, **params),
        )
    return made


def run(model, tokens: int = 16, **options) -> list[list[int]]:
    found = []
    with engine(model, max_num_batched_tokens=512, **options) as llm:
        for chunk in (16, 512):
            scheduler_of(llm).scheduler_config.long_prefill_token_threshold = chunk
            for lengths in BATCHES:
                found += token_ids(generate(llm, prompts(lengths, seed=len(lengths)), tokens))
        assert pool_is_whole(llm)
    return found


@cache
def stock(base, **options) -> list[list[int]]:
    """What stock vLLM says, once for all that is compared with it."""
    return run(base, **({"model_impl": "transformers"} if "generic" in str(base) else {}), **options)


def compare(made, which: int, **options) -> None:
    base, gated = made[0], made[which]
    want = stock(base, **options)
    assert len({tuple(tokens) for tokens in want}) > 4, "a model that always says the same proves nothing"
    assert run(gated, **options) == want


ZERO, NEVER = 1, 2


@pytest.mark.parametrize("family,head_dim,group", EAGER)
def test_strength_zero_eager(checkpoints, family, head_dim, group):
    compare(checkpoints[family, head_dim, group], ZERO)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_that_never_drop_eager(checkpoints, family):
    compare(checkpoints[family, 64, 2], NEVER)


@pytest.mark.parametrize("which", [ZERO, NEVER], ids=["zero", "never"])
@pytest.mark.parametrize("method", BOUNDARY)
def test_gates_at_boundaries(checkpoints, method, which):
    compare(checkpoints[method], which)


@pytest.mark.parametrize("head_dim,group", SHAPES if FULL else [(64, 2)])
@pytest.mark.parametrize("family", FAMILIES if FULL else ["qwen3"])
def test_strength_zero_compiled(checkpoints, family, head_dim, group):
    compare(checkpoints[family, head_dim, group], ZERO, enforce_eager=False)


@pytest.mark.parametrize("family", FAMILIES if FULL else ["qwen3"])
def test_gates_that_never_drop_compiled(checkpoints, family):
    compare(checkpoints[family, 64, 2], NEVER, enforce_eager=False)
