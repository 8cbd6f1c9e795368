"""Token routing: layers that run on a subset of a step's tokens, against the same computed whole and thrown away."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    EXACT,
    engine,
    ftp_gates,
    generate,
    pool_is_whole,
    prompts,
    recorded,
    save_base,
    save_gated,
    state_of,
    tiny_config,
    token_ids,
)
from transformers import AutoConfig
from vllm_prune_training.masked import GatedModel, load_gated

from vllm_prune.attention.subset import subset, subset_naive, token_places
from vllm_prune.checkpoint import add_gates
from vllm_prune.config import GATE_FILE, DropGateConfig, load_gates, parse_drop_gate
from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER, GateShape
from vllm_prune.gates.routing import RoutingGate

LAYERS = 4


def runs(layer: int, position: torch.Tensor) -> torch.Tensor:
    """Layer 0 skips too; layer 1 skips whole stretches, so that steps have no token left; layer 3 runs on everything."""
    mixed = (position * 2654435761 + layer * 40503) % 97
    return (mixed % 2 == 0) if layer in (0, 2) else (position // 11 % 2 == 0) if layer == 1 else position >= 0


class ByPosition(RoutingGate):
    """Skips by position alone."""

    method: ClassVar[str] = "by_position"

    def __init__(self, shape: GateShape, layer: int) -> None:
        super().__init__()
        self.shape, self.layer = shape, layer

    def keep(self, facts: torch.Tensor, strength: float) -> torch.Tensor:
        return runs(self.layer, facts[..., 0].long())

    def keep_soft(self, facts: torch.Tensor, strength: float = 1.0, **soft: Any) -> torch.Tensor:
        return self.keep(facts, strength).float()


def twin(folder: Any, config: Any) -> GatedModel:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shape = GateShape(config.hidden_size, config.num_key_value_heads, LAYERS)
    section = DropGateConfig(
        method="dms", num_layers=LAYERS, num_kv_heads=shape.num_kv_heads, hidden_size=shape.hidden_size
    )
    return GatedModel(model, [ByPosition(shape, layer) for layer in range(LAYERS)], section).eval()


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def made(request, tmp_path_factory):
    """A checkpoint with open gates, and the routed twin of its base, both before any engine."""
    config = tiny_config(request.param, layers=LAYERS)
    folder = tmp_path_factory.mktemp(request.param)
    save_base(folder / "base", config, torch.float32)
    gated = save_gated(folder / "gated", config, "dcp", section={"strength": 0.0})
    return gated, twin(folder / "base", config)


@pytest.mark.parametrize("chunk", [1, 16, 0], ids=["chunk1", "chunk16", "whole"])
def test_skipped_tokens_are_as_if_they_had_been_thrown_away(made, chunk):
    from vllm_prune.models.native import route_layers
    from vllm_prune.models.routing import Router

    class HashRouter(Router):
        seen = 0

        def keep(self, layer, step, hidden, residual):
            self.seen += 1
            _, positions = token_places(step)
            return runs(layer, torch.from_numpy(positions).long()).numpy()

    folder, masked = made
    with engine(folder, long_prefill_token_threshold=chunk, additional_config={"vllm_prune": {"record": True}}) as llm:
        router = HashRouter()
        route_layers(llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model(), router)
        outputs = generate(llm, prompts([1, 5, 33, 130, 64], seed=8), tokens=24)
        for output in outputs:
            ids, found = recorded(llm, output)
            with torch.no_grad():
                out = masked(torch.tensor(ids), "hard")
            assert out.expiry is not None
            np.testing.assert_array_equal(found, out.expiry.numpy())
            said = list(output.outputs[0].token_ids)
            assert out.logits[-len(said) :].argmax(-1).tolist() == said
            assert len(ids) < 40 or 0.2 < (found != NEVER).mean() < 0.6
        generate(llm, prompts([3]), tokens=2)
        assert router.seen > 0 and pool_is_whole(llm)
        held = outputs[3].kv_transfer_params["vllm_prune"]
        tokens = held["tokens"]
        assert held["keys_held"] + held["keys_dropped"] == tokens * LAYERS


def test_rows_of_a_subset_equal_the_naive_ones():
    from vllm_prune.attention.state import PruneAttentionMetadata, Rows

    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens = rng.integers(1, 6, rng.integers(1, 7)).astype(np.int32)
        first = np.concatenate([[0], np.cumsum(tokens)[:-1]]).astype(np.int32)
        slots = rng.permutation(20)[: len(tokens)].astype(np.int32)
        rows = Rows(slots, first, tokens, rng.integers(0, 50, len(tokens)).astype(np.int32), np.ones(len(tokens)))
        step = PruneAttentionMetadata(int(tokens.sum()), None, rows.pick(tokens == 1), rows.pick(tokens > 1))
        keep = rng.random(int(tokens.sum())) < rng.random()
        made = subset(step, keep)
        found = []
        for part in (made.decodes, made.chunks):
            for i in range(part.count):
                at = int(part.first[i])
                own = made.positions[at : at + int(part.tokens[i])]
                assert own[0] == part.positions[i]
                found.append((at, int(part.slots[i]), own.tolist()))
        assert [(slot, own) for _, slot, own in sorted(found)] == subset_naive(step, keep)
        assert made.kept.tolist() == np.flatnonzero(keep).tolist()


@pytest.mark.parametrize("chunk", [16, 0], ids=["chunk16", "whole"])
def test_kept_kv_of_skipped_tokens(tmp_path, chunk):
    """FTP with kv: keep. Every key is stored; the layers that the server bypassed are the twin's, and so is the text."""
    folder = save_gated(tmp_path, tiny_config("qwen3", layers=3), "ftp", kv="keep")
    options = {"vllm_prune": {"record": True}}
    twin = load_gated(folder)
    with engine(folder, long_prefill_token_threshold=chunk, additional_config=options) as llm:
        for output in generate(llm, prompts([1, 33, 130], seed=8), tokens=24):
            ids, found = recorded(llm, output)
            assert (found == NEVER).all()
            store = state_of(llm).store
            (req_id,) = {key for key, _ in store.events if key.split("-")[0] == output.request_id.split("-")[0]}
            with torch.no_grad():
                out = twin(torch.tensor(ids), "hard")
            ran = torch.stack(out.runs).numpy() > 0
            np.testing.assert_array_equal(store.passed_by(req_id, len(ids)), ~ran)
            said = list(output.outputs[0].token_ids)
            assert out.logits[-len(said) :].argmax(-1).tolist() == said
            assert len(ids) < 40 or 0.2 < ran.mean() < 0.9
        assert pool_is_whole(llm)


def test_a_router_that_never_skips_is_stock_vllm(tmp_path):
    """And so is strength 0, at which no router is there at all."""
    from vllm_prune.models.native import RoutedQwen3Layer

    config = tiny_config("qwen3", layers=3)
    stock = save_base(tmp_path / "base", config, EXACT)
    save_base(tmp_path / "gated", config, EXACT)
    gates = ftp_gates(GateShape(config.hidden_size, config.num_key_value_heads, 3))
    with torch.no_grad():
        gates[0].router[2].bias[0] += 1e4
    add_gates(tmp_path / "gated", gates, {})
    batch = prompts([1, 31, 64, 150], seed=2)
    with engine(stock) as llm:
        want = token_ids(generate(llm, batch))
    for strength, routed in ((1.0, True), (0.0, False)):
        with engine(tmp_path / "gated", additional_config={"vllm_prune": {"strength": strength}}) as llm:
            layers = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().model.layers
            assert all(isinstance(layer, RoutedQwen3Layer) == routed for layer in layers)
            assert token_ids(generate(llm, batch)) == want
            assert pool_is_whole(llm)


def test_no_compilation_and_no_generic_class(tmp_path):
    from vllm.config import CompilationMode
    from vllm.engine.arg_utils import EngineArgs

    def configure(folder):
        args = {
            "skip_tokenizer_init": True,
            "max_model_len": 256,
            "dtype": "float32",
            "kv_cache_memory_bytes": 16 << 20,
        }
        return EngineArgs(str(folder), **args).create_engine_config()

    native = save_gated(tmp_path / "native", tiny_config("qwen3"), "ftp")
    assert configure(native).compilation_config.mode == CompilationMode.NONE
    generic = save_gated(tmp_path / "generic", tiny_config("llama"), "ftp", generic=True)
    with pytest.raises(ValueError, match=r"generic class cannot"):
        configure(generic)
    window = save_gated(tmp_path / "window", tiny_config("qwen3"), "ftp", section={"protect": {"window": 4}})
    with pytest.raises(ValueError, match=r"protect\.window is 4"):
        configure(window)


def test_bad_checkpoints(tmp_path):
    config = tiny_config("qwen3", layers=3)
    folder = save_gated(tmp_path, config, "ftp")
    section = parse_drop_gate(AutoConfig.from_pretrained(folder))
    path = folder / GATE_FILE
    good = load_file(path)
    for change, said in (
        ({"drop_gate.layers.2.router.0.bias": good["drop_gate.layers.2.router.0.bias"] + 1}, "one for all blocks"),
        ({"drop_gate.layers.1.sparsity": torch.tensor(1.5)}, "no share"),
        ({"drop_gate.layers.0.sparsity": torch.tensor(0.5)}, "always runs"),
        ({"drop_gate.layers.1.sparsity": torch.tensor(float("nan"))}, "not finite"),
        ({"drop_gate.layers.1.sparsity": torch.zeros(2)}, "has shape"),
    ):
        save_file({**good, **change}, path)
        with pytest.raises(PruneError, match=said):
            load_gates(str(path), section)
    for params, said in (
        ({"kv": "drop"}, "'skip' or 'keep'"),
        ({"form": "whole"}, "must be 'causal' or 'prompt'"),
        ({"x": 1}, "x"),
    ):
        with pytest.raises(PruneError, match=said):
            section.model_copy(update={"params": params}).build_gate()
