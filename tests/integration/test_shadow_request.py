"""ShadowLLM's request form, served: what the model says after its lanes closed, what comes free, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    EXACT,
    engine,
    generate,
    pool_is_whole,
    preempted,
    prompts,
    save_base,
    save_gated,
    scheduler_of,
    state_of,
    tiny_config,
    token_ids,
)
from vllm_prune_training.masked import load_gated

from vllm_prune.config import GATE_FILE

PARAMS = {"query_heads": 4, "width": 256, "hidden": 32}


def said_by_the_twin(folder, output) -> list[int]:
    """Greedy tokens of the masked Hugging Face twin, given what the server said before each."""
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    prompt = len(output.prompt_token_ids)
    with torch.no_grad():
        logits = load_gated(folder)(torch.tensor(ids), "hard", prompt=prompt).logits
    return logits[prompt - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("closed", [0.5, 1.0], ids=["half", "all"])
def test_it_says_what_the_twin_says(tmp_path, closed):
    """Prompts of one token and around page borders; with all lanes closed, no head of layers 1 and 2 says anything."""
    folder = save_gated(tmp_path, tiny_config("llama", layers=3), "shadow", **PARAMS, closed=closed)
    with engine(folder, long_prefill_token_threshold=40) as llm:
        outputs = generate(llm, prompts([1, 31, 32, 33, 130], seed=7), tokens=20)
        for output in outputs:
            assert token_ids([output])[0] == said_by_the_twin(folder, output)
        generate(llm, prompts([3]), tokens=2)
        assert pool_is_whole(llm)
        # computed again in chunks that begin before the prompt's end and go beyond
        done = preempted(llm, prompts([70], seed=9), tokens=50, after=(30,))
        assert token_ids(done)[0] == said_by_the_twin(folder, done[0])


def test_open_gates_are_stock(tmp_path):
    """Strength 0, and a predictor that runs but closes nothing."""
    config = tiny_config("qwen3", layers=2)
    base = save_base(tmp_path / "base", config, EXACT)
    folders = [
        save_gated(tmp_path / "zero", config, "shadow", EXACT, section={"strength": 0.0}, **PARAMS),
        save_gated(tmp_path / "none", config, "shadow", EXACT, **PARAMS, closed=0.0),
    ]
    found = []
    for folder in (base, *folders):
        with engine(folder, long_prefill_token_threshold=48) as llm:
            found.append(token_ids(generate(llm, prompts([1, 33, 100, 77]), tokens=12)))
    assert found[0] == found[1] == found[2] and len({tuple(x) for x in found[0]}) > 2


def test_the_memory_of_closed_lanes_comes_back(tmp_path):
    """Half of the lanes of layers 1 to 3, of 4: 3/8 of the pages; blocks follow as soon as the prompt is computed."""
    config = tiny_config("qwen3", layers=4)
    folder = save_gated(tmp_path, config, "shadow", **PARAMS, closed=0.5, least=1)
    from vllm import SamplingParams

    with engine(folder) as llm:
        core = llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
        core.add_request("a", prompts([512])[0], params)
        core.step()
        core.step()
        (grants,) = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers[0].grants.values()
        assert grants.peak == 16 and grants.live <= 11, "5/8 of 16 blocks, and one that decoding needs"
        lanes = state_of(llm).store.lanes
        closed = lanes.closed[state_of(llm).store.slots[next(iter(state_of(llm).store.slots))].slot]
        assert closed.sum() == 3 and not closed[0].any() and (closed.sum(1) <= 1).all()
        assert _finish(core).kv_transfer_params["vllm_prune"]["kept_fraction"] == pytest.approx(5 / 8, abs=1e-3)
    assert json.loads((folder / "config.json").read_text())["drop_gate"]["params"]["least"] == 1


def _finish(core):
    finished = []
    while core.has_unfinished_requests():
        finished += [output for output in core.step() if output.finished]
    return finished[0]


def test_what_does_not_fit_is_refused(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    folder = save_gated(tmp_path, tiny_config("qwen3", layers=3), "shadow", **PARAMS)
    path = folder / "config.json"
    good = json.loads(path.read_text())

    def refused(*said: str) -> None:
        with pytest.raises(ValueError) as caught:
            EngineArgs(model=str(folder), skip_tokenizer_init=True, max_model_len=256).create_engine_config()
        assert all(text in str(caught.value) for text in ("vllm-prune: ", *said)), caught.value

    changes = [
        ({"params": {**PARAMS, "query_heads": 2}}, "query_heads is 2 but the base model has 4 attention heads"),
        ({"params": {**PARAMS, "width": 128}}, "width is 128 but the base model's attention output has 256 numbers"),
        ({"params": {**PARAMS, "closed": 2.0}}, "closed must be a share"),
        ({"params": {**PARAMS, "hidden": 64}}, "predictor.fc1."),
        ({"params": {"hidden": 32}}, "query_heads"),
        ({"protect": {"sinks": 4}}, "drop_gate.protect means nothing to method 'shadow'"),
    ]
    for change, said in changes:
        path.write_text(json.dumps({**good, "drop_gate": {**good["drop_gate"], **change}}))
        refused(said)
    path.write_text(json.dumps(good))
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / GATE_FILE).items()}
    del tensors["drop_gate.layers.0.predictor.fc2.bias"]
    save_file(tensors, folder / GATE_FILE)
    refused("drop_gate.layers.0.predictor.fc2.bias", "is missing")
