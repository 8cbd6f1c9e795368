"""Whole states of sharded modules and optimizers against plain ones; what processes agree on; refusals of a launch."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_prune_training import launch, ranks
from vllm_prune_training.optim import MuonAdamW
from vllm_prune_training.recipe import Recipe
from vllm_prune_training.sharding import (
    flatten_scalars,
    full_optimizer_state,
    full_state,
    is_sharded,
    layer_classes,
    load_full_optimizer_state,
    load_full_state,
)
from vllm_prune_training.trainer import LossNotFinite

from vllm_prune.errors import PruneError


class Small(nn.Module):
    """Tied weights, a scalar, a buffer, and matrices under ``.layers.`` for Muon."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Module()
        self.body.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.beta = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("steps", torch.tensor([3.0]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.body.layers:
            x = torch.tanh(layer(x)) * self.beta
        return self.head(x)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory):
    """A process group of one, over which FSDP2 makes real DTensors."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(kind: str, seed: int) -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = Small()
    if kind == "muon":
        return module, MuonAdamW(module, 0.05, 0.01)
    return module, torch.optim.AdamW(module.parameters(), lr=0.01)


def make_sharded(kind: str, seed: int) -> tuple[Small, torch.optim.Optimizer]:
    """As the Trainer and accelerate do it: the optimizer comes first and is moved to the shards."""
    module, _ = make(kind, seed)
    flatten_scalars(module)
    for layer in module.body.layers:
        fully_shard(layer)
    fully_shard(module)
    return module, MuonAdamW(module, 0.05, 0.01) if kind == "muon" else torch.optim.AdamW(module.parameters(), lr=0.01)


def train(module: Small, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(module(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_goes_from_plain_to_sharded_and_back(group: None, kind: str) -> None:
    plain, optimizer = make(kind, 0)
    wanted = train(plain, optimizer, 3)
    weights, state = copy.deepcopy(plain.state_dict()), copy.deepcopy(optimizer.state_dict())
    wanted_rest = train(plain, optimizer, 3, 3)

    sharded, other = make_sharded(kind, 1)
    assert is_sharded(sharded) and not is_sharded(plain)
    load_full_state(sharded, weights)
    load_full_optimizer_state(other, state)
    assert train(sharded, other, 3, 3) == pytest.approx(wanted_rest, rel=1e-5)

    scalars = [p for name, p in sharded.named_parameters() if name == "beta"]
    back, kept = full_state(sharded, {"beta"}), full_optimizer_state(other, scalars)
    assert {name: value.shape for name, value in back.items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert back["head.weight"].data_ptr() == back["embed.weight"].data_ptr()  # saved once
    for name, value in plain.state_dict().items():
        assert torch.allclose(back[name], value, atol=1e-5), name

    again, third = make(kind, 2)
    again.load_state_dict(back)
    third.load_state_dict(kept)  # shapes and structure are a single process's
    assert train(again, third, 2, 6) == pytest.approx(train(plain, optimizer, 2, 6), rel=1e-4)
    assert wanted[0] > wanted_rest[-1]  # something was learnt at all


def test_tied_weights_may_be_named_once_and_nothing_else_may_lack(group: None) -> None:
    plain, _ = make("adamw", 0)
    sharded, _ = make_sharded("adamw", 1)
    state = plain.state_dict()
    del state["head.weight"]
    load_full_state(sharded, state)
    assert torch.equal(full_state(sharded)["head.weight"], plain.embed.weight)
    with pytest.raises(KeyError, match=r"lacks \['beta'\]"):
        load_full_state(sharded, {name: value for name, value in state.items() if name != "beta"})
    with pytest.raises(KeyError, match="'other'"):
        load_full_state(sharded, {**state, "other": torch.zeros(1)})


def test_decoder_layers_are_what_is_gathered_alone() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for family, name in (("qwen3", "Qwen3DecoderLayer"), ("llama", "LlamaDecoderLayer")):
        config = AutoConfig.for_model(family, intermediate_size=16, num_key_value_heads=1, head_dim=8, **sizes)
        assert layer_classes(AutoModelForCausalLM.from_config(config)) == [name]
    config = AutoConfig.for_model("gpt2", vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    assert layer_classes(AutoModelForCausalLM.from_config(config)) == ["GPT2Block"]


def test_shares_are_all_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"input_ids": torch.arange(24).view(6, 4), "weight_total": torch.arange(6)}
    assert ranks.share(batch) is batch
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    parts = []
    for number in range(3):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        parts.append(ranks.share(batch))
    for name, value in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value)
    monkeypatch.setattr(ranks, "world_size", lambda: 4)
    with pytest.raises(PruneError, match="6 sequences cannot be divided equally among 4"):
        ranks.share(batch)


def test_a_refusal_travels_between_processes() -> None:
    for made in (PruneError("It is so.", "Do this."), LossNotFinite("Bad.", "Lower it.")):
        back = pickle.loads(pickle.dumps(made))
        assert (type(back), back.problem, back.way_out, str(back)) == (
            type(made),
            made.problem,
            made.way_out,
            str(made),
        )


def recipe(tmp_path: Path, **fields: object) -> Recipe:
    source = {"path": str(tmp_path / "no.txt"), "format": "text"}
    return Recipe.model_validate({
        "model": "nowhere", "output": str(tmp_path / "out"), "gate": {"method": "none"},
        "data": {"train": [source], "held_out": [source]},
        "training": {"steps": 2, "lengths": [[0.5, 16], [1.0, 32]], "batch_tokens": 128 * 1024}, **fields,
    })  # fmt: skip


def test_more_processes_than_there_are_cores_are_refused_at_once(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    wanted = 1 << cores.bit_length()
    with pytest.raises(PruneError, match=rf"asks for {wanted} processes, this machine has {cores} CPU cores.*at most"):
        launch.launch(recipe(tmp_path, launch={"kind": "accelerate", "workers": wanted}))


def test_batches_that_do_not_divide_and_one_shard_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PruneError, match=r"makes 8192 sequences of 16 tokens, which launch\.workers 3"):
        launch.launch(recipe(tmp_path, launch={"kind": "accelerate", "workers": 3}))
    with pytest.raises(PruneError, match="divides weights among processes, there is 1"):
        launch.launch(recipe(tmp_path, launch={"kind": "accelerate", "workers": 1, "fsdp": True}))


@pytest.mark.parametrize(("kind", "workers"), [("single", 1), ("accelerate", 4), ("ray", 2)])
def test_an_outer_launcher_and_the_recipe_must_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, workers: int
) -> None:
    """Otherwise two independent runs would write the same files."""
    for name in launch.LAUNCHED:
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    with pytest.raises(PruneError, match=f"one of 2 processes .* kind {kind} with {workers} .*launch.workers 2"):
        launch.launch(recipe(tmp_path, launch={"kind": kind, "workers": workers}))


def test_machines_must_see_one_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState(cpu=True)
    launch._check_shared(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []
    monkeypatch.setattr(ranks, "everywhere", lambda value: [value, False])
    with pytest.raises(PruneError, match=r"processes \[1\] do not see"):
        launch._check_shared(tmp_path / "work")


def test_a_cluster_that_is_too_small_or_busy_is_refused() -> None:
    check = launch._check_cluster
    assert check(2, {"CPU": 4.0}, {"CPU": 2.0}) is False
    assert check(2, {"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 2.0}) is True
    with pytest.raises(PruneError, match=r"3 workers with a CPU each, the Ray cluster has 2\. Set .* at most 2"):
        check(3, {"CPU": 2.0}, {"CPU": 2.0})
    with pytest.raises(PruneError, match=r"2 workers with a GPU each, the Ray cluster has free 0\. Add nodes"):
        check(2, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0})
