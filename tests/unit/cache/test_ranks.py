"""What ranks agree on, from what each of them told; and over process groups of two ranks and of three, in vLLM's place."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from vllm_prune.cache.ranks import Counts, Ranks, joined


def told(*ranks: list[int]) -> torch.Tensor:
    """One request: need, two numbers of pages, held, ends, dropped in four layers."""
    return torch.tensor(ranks)[:, None]


SPLIT = told([7, 5, 8, 30, 90, 1, 2, 3, 4], [6, 6, 7, 40, 10, 9, 0, 0, 1])


def test_needs_are_of_the_rank_that_holds_most_and_keys_add_up():
    x = joined(SPLIT, pages=2, split=True)
    assert (x.need.tolist(), x.pages.tolist(), x.in_use.tolist()) == ([7], [[6, 8]], [11])
    assert (x.held.tolist(), x.ends.tolist(), x.dropped.tolist()) == ([70], [100], [[10, 2, 3, 5]])
    assert x.by_layer().tolist() == [[10, 12, 3, 5]], "the most of a layer, and by thirds: two layers, one, one"


def test_a_shared_decision_is_counted_once():
    x = joined(told([7, 5, 8, 30, 90, 1, 2], [6, 6, 7, 30, 90, 1, 2]), pages=2, split=False)
    assert (x.need.tolist(), x.in_use.tolist()) == ([7], [11])
    assert (x.held.tolist(), x.dropped.tolist()) == ([30], [[1, 2]])


def test_ranks_that_should_have_decided_alike_are_found_out():
    with pytest.raises(RuntimeError, match="different keys"):
        joined(SPLIT, pages=2, split=False)


def test_one_rank_has_nothing_to_share():
    assert not Ranks().split and not Ranks().several and Ranks().speaks


def counts_on(rank: int) -> Counts:
    """Of three requests, different on each rank."""
    x = torch.arange(3) * 10 + rank
    return Counts(x + 5, torch.stack([x, x + 1], 1), x * 7, x * 3, torch.stack([x, x * x], 1))


def gather(x: torch.Tensor, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts, dim)


def add(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x


def talk(rank: int, count: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    ranks = Ranks(rank, count, True, SimpleNamespace(all_gather=gather, all_reduce=add))
    found = [getattr(ranks.join(counts_on(rank)), field.name) for field in fields(Counts)]
    torch.save([*found, ranks.first(features_on(rank))], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def features_on(rank: int) -> torch.Tensor:
    return torch.randn(50, 8, generator=torch.Generator().manual_seed(rank)) / 3


@pytest.mark.parametrize("count", [2, 3])
def test_all_ranks_hear_the_same(tmp_path: Path, count: int):
    multiprocessing.spawn(talk, args=(count, str(tmp_path)), nprocs=count)
    mine = [counts_on(rank) for rank in range(count)]
    heard = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    need, pages, held, ends, dropped, in_use, features = heard[0]
    assert torch.equal(need, torch.stack([x.need for x in mine]).amax(0))
    assert torch.equal(pages, torch.stack([x.pages for x in mine]).amax(0))
    assert torch.equal(held, sum(x.held for x in mine)) and torch.equal(ends, sum(x.ends for x in mine))
    assert torch.equal(dropped, sum(x.dropped for x in mine)) and torch.equal(in_use, sum(x.pages[:, 0] for x in mine))
    assert torch.equal(features, features_on(0))
    for others in heard[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(heard[0], others, strict=True))


def test_one_rank_speaks():
    assert [Ranks(rank, 3).speaks for rank in range(3)] == [True, False, False]
    assert Ranks().speaks and not Ranks().several
