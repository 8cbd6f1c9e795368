"""Token routing: layers that run on a subset of a step's tokens, against the same computed whole and thrown away."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support import engine, generate, pool_is_whole, prompts, recorded, save_base, save_gated, tiny_config
from vllm_prune_training.masked import GatedModel

from vllm_prune.attention.subset import subset, subset_naive, token_places
from vllm_prune.config import DropGateConfig
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
        rows = Rows(slots, first, tokens, rng.integers(0, 50, len(tokens)).astype(np.int32))
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
