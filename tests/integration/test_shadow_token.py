"""ShadowLLM's token form, served: chosen heads and neurons, and what is said with them, are the masked twin's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    engine,
    generate,
    pool_is_whole,
    preempted,
    prompts,
    save_base,
    save_gated,
    state_of,
    tiny_config,
    token_ids,
)
from vllm_prune_training.masked import load_gated

from vllm_prune.config import GATE_FILE

PARAMS = {"query_heads": 4, "width": 256, "neurons": 192, "hidden": 32, "neuron_hidden": 24}
HALF = {**PARAMS, "closed": 0.5, "closed_neurons": 0.5}


def chooser_of(llm):
    (found,) = {id(layer.impl.chooser): layer.impl.chooser for layer in state_of(llm).layers[1:]}.values()
    return found


def check(folder, llm, outputs) -> None:
    """Choices and greedy tokens of finished requests against the twin's."""
    recorded = chooser_of(llm).recorded
    for output in outputs:
        prompt = len(output.prompt_token_ids)
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        twin = load_gated(folder)
        with torch.no_grad():
            logits = twin(torch.tensor(ids), "hard", prompt=prompt).logits
        assert logits[prompt - 1 : -1].argmax(-1).tolist() == list(output.outputs[0].token_ids)
        groups, neurons = (x[0].numpy() for x in twin.token_twin.chosen)
        mine = {at: found for (request, at), found in recorded.items() if request.split("-")[0] == output.request_id}
        assert sorted(mine) == list(range(prompt, len(ids) - 1)), "generated tokens, and only they, were chosen for"
        for at, (some_groups, some_neurons) in mine.items():
            np.testing.assert_array_equal(some_groups, groups[at - prompt])
            np.testing.assert_array_equal(some_neurons, neurons[at - prompt])
        assert len({row.tobytes() for row in neurons}) > 1 and groups[:, 0].all() and not groups[:, 1:].all()
        assert (neurons[:, 1:].sum(-1) == PARAMS["neurons"] // 2).all() and neurons[:, 0].all()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_choices_and_words_are_the_twins(tmp_path, family):
    """Alone (rows picked), two at once (their union), five with prefill chunks among them, and after preemption."""
    folder = save_gated(tmp_path, tiny_config(family, layers=3), "shadow_token", **HALF)
    options = {"vllm_prune": {"record": True}}
    with engine(folder, long_prefill_token_threshold=40, additional_config=options) as llm:
        for number, lengths in enumerate(([33], [1, 70], [2, 31, 32, 100, 45])):
            check(folder, llm, generate(llm, prompts(lengths, seed=number), tokens=16))
        generate(llm, prompts([3]), tokens=2)
        assert pool_is_whole(llm)
        check(folder, llm, preempted(llm, prompts([50], seed=9), tokens=40, after=(25,)))


def test_open_gates_are_stock(tmp_path):
    """Strength 0, and predictors that run but close nothing (there the products are picked by rows: float32)."""
    config = tiny_config("qwen3", layers=2)
    base = save_base(tmp_path / "base", config, torch.float32)
    folders = [
        save_gated(tmp_path / "zero", config, "shadow_token", section={"strength": 0.0}, **PARAMS),
        save_gated(tmp_path / "none", config, "shadow_token", **PARAMS, closed=0.0, closed_neurons=0.0),
    ]
    found = []
    for folder in (base, *folders):
        with engine(folder, long_prefill_token_threshold=48) as llm:
            found.append([token_ids(generate(llm, prompts(n), tokens=12)) for n in ([33], [1, 33, 100, 77])])
    assert found[0] == found[1] == found[2]


def test_all_closed_leaves_the_first_layer(tmp_path):
    folder = save_gated(tmp_path, tiny_config("llama", layers=2), "shadow_token",
                        **{**PARAMS, "closed": 1.0, "closed_neurons": 1.0})  # fmt: skip
    with engine(folder) as llm:
        (output,) = generate(llm, prompts([20]), tokens=8)
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    with torch.no_grad():
        logits = load_gated(folder)(torch.tensor(ids), "hard", prompt=20).logits
    assert logits[19:-1].argmax(-1).tolist() == list(output.outputs[0].token_ids)


def test_what_does_not_fit_is_refused(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    folder = save_gated(tmp_path, tiny_config("qwen3", layers=3), "shadow_token", **PARAMS)
    path = folder / "config.json"
    good = json.loads(path.read_text())

    def refused(changes: dict, section: dict, said: str) -> None:
        path.write_text(json.dumps({**good, **changes, "drop_gate": {**good["drop_gate"], **section}}))
        with pytest.raises(ValueError) as caught:
            EngineArgs(model=str(folder), skip_tokenizer_init=True, max_model_len=256).create_engine_config()
        assert "vllm-prune: " in str(caught.value) and said in str(caught.value), caught.value

    refused({}, {"params": {**PARAMS, "neurons": 96}}, "neurons is 96 but the base model's MLPs have 192")
    refused({}, {"params": {**PARAMS, "query_heads": 2}}, "4 attention heads")
    refused({}, {"params": {**PARAMS, "closed_neurons": -0.1}}, "closed_neurons must be shares")
    refused({}, {"params": {**PARAMS, "neuron_hidden": 25}}, "neuron_predictor.fc1.")
    refused({}, {"protect": {"window": 4}}, "drop_gate.protect means nothing")
    refused({"hidden_act": "gelu"}, {}, "needs silu")
    refused({"attention_bias": True}, {}, "biases")
    refused({"num_experts": 4}, {}, "mixture of experts")
    refused({"architectures": ["PrunedTransformersForCausalLM"]}, {}, "which the generic class cannot do")
    path.write_text(json.dumps(good))
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / GATE_FILE).items()}
    del tensors["drop_gate.layers.0.neuron_predictor.fc2.bias"]
    save_file(tensors, folder / GATE_FILE)
    refused({}, {}, "neuron_predictor.fc2.bias")
