"""Keys that a request protects are never dropped; all others are as the trainer's twin drops them with the same ones spared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import RECORD, engine, pool_is_whole, preempted, prompts, recorded, save_gated, tiny_config
from test_law2_drop_sets import METHODS, visible_drops
from test_request_strength import greedy
from vllm.exceptions import VLLMValidationError
from vllm_prune_training.masked import load_gated

from vllm_prune.gates import GATES, NEVER

REFERENCE = Path(__file__).parents[2] / "examples" / "reference-dcp"
SPARED = "5:9,30:64,77:78"
POSITIONS = frozenset([*range(5, 9), *range(30, 64), 77])
SERVED = ("dcp", "dcp_kv_head", "dms", "window", "random")


def folder_of(method: str, tmp_path: Any) -> Any:
    name = method.removesuffix("_kv_head")
    section: dict[str, Any] = {"protect": {"sinks": 2}} if GATES[name].protects else {}
    return save_gated(tmp_path, tiny_config("qwen3", layers=2), name, section=section, **METHODS[method])


def check_spared(llm: Any, folder: Any, outputs: list[Any], spared: list[frozenset[int]]) -> None:
    """Of each output the positions that its request spared."""
    twin = load_gated(folder)
    for output, positions in zip(outputs, spared, strict=True):
        ids, found = recorded(llm, output)
        inside = frozenset(p for p in positions if p < len(output.prompt_token_ids))
        for gate in twin.gates:
            gate.expiry = lambda features, strength, protection, gate=gate, own=inside: type(gate).expiry(
                gate, features, strength, replace(protection, spared=own)
            )
        with torch.no_grad():
            want = twin(torch.tensor(ids), mode="hard").expiry.numpy()
        want = np.where(want <= len(ids) - 1, want, NEVER)
        np.testing.assert_array_equal(visible_drops(found), want)
        assert (want[..., sorted(inside)] == NEVER).all()
        assert output.kv_transfer_params["vllm_prune"]["tokens_protected"] == len(inside)


@pytest.mark.parametrize("method", SERVED)
def test_what_is_protected_stays(tmp_path, method):
    """In a batch with requests that protect nothing; in chunks; after preemption."""
    folder = folder_of(method, tmp_path)
    asked = {"prune.protect": SPARED}
    with engine(folder, long_prefill_token_threshold=24, **RECORD) as llm:
        batch = prompts([130, 90, 111], seed=3)
        outputs = llm.generate(batch, [greedy(asked), greedy(), greedy(asked)], use_tqdm=False)
        check_spared(llm, folder, outputs, [POSITIONS, frozenset(), POSITIONS])
        plain = recorded(llm, outputs[1])[1]
        assert (plain[..., sorted(POSITIONS)] != NEVER).any(), "the gates would have dropped some of these"
        again = preempted(llm, prompts([90, 40], seed=5), tokens=12, extra_args=asked)
        check_spared(llm, folder, again, [POSITIONS, POSITIONS])
        (reused,) = llm.generate(prompts([100], seed=6), greedy(), use_tqdm=False)  # a slot that was another's
        check_spared(llm, folder, [reused], [frozenset()])
        llm.generate(prompts([3]), greedy(tokens=2), use_tqdm=False)
        assert pool_is_whole(llm)


TOO_MANY = {"prune.protect": "5:9,sistem"}


def test_wrong_wishes(tmp_path):
    folder = folder_of("dcp", tmp_path)
    with engine(folder) as llm:
        for asked, words in ((TOO_MANY, "has the word 'sistem'"), ({"prune.protect": 3}, "must be text"),
                             ({"prune.protect": "system"}, r"refused \(protect-of-chat\)")):  # fmt: skip
            with pytest.raises(VLLMValidationError, match=words):
                llm.generate(prompts([9]), greedy(asked), use_tqdm=False)
        assert llm.generate(prompts([9]), greedy({"prune.protect": "none"}), use_tqdm=False)


def test_gates_that_decide_about_many_keys_refuse_it(tmp_path):
    folder = save_gated(tmp_path / "ltp", tiny_config("qwen3", layers=2), "ltp", **METHODS["ltp"])
    with engine(folder) as llm, pytest.raises(VLLMValidationError, match="not possible with ltp gates"):
        llm.generate(prompts([9]), greedy({"prune.protect": "0:4"}), use_tqdm=False)
    with pytest.raises(Exception, match=r"refused \(protect\): ltp gates decide"):  # noqa: SIM117
        with engine(folder, additional_config={"vllm_prune": {"protect": "0:4"}}):
            pass


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("system", r"refused \(protect-chat\): the tokenizer has no chat"),
        ("all", "has the word 'all'"),
        (5, "must be text"),
    ],
)
def test_options_are_refused(tmp_path, option, words):
    folder = folder_of("dcp", tmp_path)
    with pytest.raises(Exception, match=words):  # noqa: SIM117
        with engine(folder, additional_config={"vllm_prune": {"protect": option}}):
            pass


def test_a_chat_keeps_its_system_message_and_markers():
    """By default; a request can say otherwise."""
    chat = [
        {"role": "system", "content": "Keep the word cobalt in mind. " * 8},
        {"role": "user", "content": "x = 1\n" * 60},
    ]
    with engine(REFERENCE, skip_tokenizer_init=False, max_model_len=1024, **RECORD) as llm:
        wishes = [None, {"prune.protect": "none"}, {"prune.protect": "message:1"}]
        outputs = llm.chat([chat] * 3, [greedy(wish, tokens=6) for wish in wishes], use_tqdm=False)
        tokenizer = llm.get_tokenizer()
        ids = outputs[0].prompt_token_ids
        starts = [i for i, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("<|im_start|>")]
        drops = [(recorded(llm, output)[1] != NEVER).any((0, 1)) for output in outputs]
        system, user = slice(starts[0], starts[1]), slice(starts[1], starts[2])
        assert not drops[0][system].any() and not drops[0][starts].any() and drops[0][user].any()
        assert drops[1][system].any()
        assert not drops[2][user].any() and drops[2][system].any()
        told = [output.kv_transfer_params["vllm_prune"]["tokens_protected"] for output in outputs]
        assert told[1] == 0 and told[2] == starts[2] - starts[1] and told[0] > starts[1] - starts[0]
