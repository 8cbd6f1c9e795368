"""What a request may ask of sampling while keys are dropped: parallel samples, stop strings, structured output. And gates
that are switched off for one request, which is then the stock base's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import engine, generate, pool_is_whole, prompts, token_ids
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

REFERENCE = Path(__file__).parents[2] / "examples" / "reference-dcp"
TEXT = ("def area(radius):\n    return 3.14 * radius ** 2\n\n" * 12)[:600]


def told(output: Any) -> dict[str, Any]:
    return output.kv_transfer_params["vllm_prune"]


def test_switched_off_is_the_stock_base(tmp_path):
    """``prune.off`` beside a request that drops: the tokens of the base, served by stock vLLM from the same weights."""
    for path in REFERENCE.iterdir():
        if path.is_file() and path.name not in ("config.json", "drop_gate.safetensors"):
            shutil.copy(path, tmp_path)
    config = json.loads((REFERENCE / "config.json").read_text())
    del config["drop_gate"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    batch = prompts([200, 77, 310], seed=2)
    plain: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
    off, on = SamplingParams(extra_args={"prune.off": True}, **plain), SamplingParams(**plain)
    with engine(tmp_path, max_model_len=1024) as stock:
        theirs = stock.generate(batch, on, use_tqdm=False)
    with engine(REFERENCE, max_model_len=1024) as llm:
        ours = llm.generate([batch[0], batch[1], batch[0], batch[2]], [off, off, on, off], use_tqdm=False)
    assert token_ids([ours[0], ours[1], ours[3]]) == token_ids(theirs)
    assert told(ours[2])["keys_dropped"] > 0
    assert [told(ours[i])["keys_dropped"] for i in (0, 1, 3)] == [0, 0, 0]


@pytest.fixture(scope="module")
def llm():
    """Made after the test above, which needs engines of its own, one at a time."""
    with engine(REFERENCE, skip_tokenizer_init=False, max_model_len=1024) as served:
        yield served


def test_parallel_samples_are_requests_of_their_own(llm):
    """Each of n samples says what a lone request of its seed says, and drops by itself."""
    common: dict[str, Any] = {"temperature": 1.0, "max_tokens": 24, "ignore_eos": True}
    (many,) = llm.generate([TEXT], SamplingParams(n=3, seed=7, **common), use_tqdm=False)
    alone = [llm.generate([TEXT], SamplingParams(seed=7 + i, **common), use_tqdm=False)[0] for i in range(3)]
    found = [sample.token_ids for sample in sorted(many.outputs, key=lambda sample: sample.index)]
    assert found == [output.outputs[0].token_ids for output in alone]
    assert len(set(map(tuple, found))) == 3
    assert told(alone[0])["keys_dropped"] > 0 and told(many)["keys_dropped"] > 0
    generate(llm, prompts([3]), tokens=2)
    assert pool_is_whole(llm)


def test_stop_strings(llm):
    common: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    (whole,) = llm.generate([TEXT], SamplingParams(**common), use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    (stopped,) = llm.generate([TEXT], SamplingParams(stop=[stop], **common), use_tqdm=False)
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert stopped.outputs[0].stop_reason == stop
    # vLLM's front end found it and answers before it ends the request in the engine.
    assert told(whole)["keys_dropped"] > 0 and stopped.kv_transfer_params is None
    generate(llm, prompts([3]), tokens=2)
    assert pool_is_whole(llm)


def test_structured_output(llm):
    """A grammar holds while keys are dropped, also where one batch mixes it with free text."""
    form = StructuredOutputsParams(regex=r"(keep|drop), [0-9]{3}")
    strict = SamplingParams(temperature=0, max_tokens=64, structured_outputs=form)
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (alone,) = llm.generate([TEXT], free, use_tqdm=False)
    held, beside = llm.generate([TEXT, TEXT], [strict, free], use_tqdm=False)
    assert re.fullmatch(r"(keep|drop), [0-9]{3}", held.outputs[0].text)
    assert told(held)["keys_dropped"] > 0
    assert token_ids([beside]) == token_ids([alone])


def test_embeddings_are_refused(llm):
    with pytest.raises(ValueError, match=r"[Ee]mbed|pooling"):
        llm.embed([TEXT])
