"""Recall and task accuracy of models whose answers are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vllm_prune_training import tasks
from vllm_prune_training.evaluate import recall_accuracy, task_accuracy
from vllm_prune_training.packing import Corpus
from vllm_prune_training.tokenizer import train_tokenizer

FILLER = [f"value_{i} = compute(item_{i})\n" for i in range(200)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder: Path = tmp_path_factory.mktemp("corpus")
    texts = [tasks.make_task(name, 1, 8000, len, filler=FILLER).prompt for name in tasks.TASKS]
    (folder / "filler_held_out.txt").write_text("".join(FILLER))
    return Corpus(folder, train_tokenizer(iter(texts), 512), {})


class Knowing(torch.nn.Module):
    """Its first choice is the token that comes next, but for one position in ``every``."""

    def __init__(self, every: int = 0) -> None:
        super().__init__()
        self.every = every
        self.lengths: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not self.training
        self.lengths.append(input_ids.shape[1])
        best = input_ids.roll(-1, 1)
        if self.every:
            best[:, :: self.every] = 0
        return SimpleNamespace(logits=F.one_hot(best, 512).float())


def test_accuracy_of_what_is_known(corpus: Corpus) -> None:
    knowing = Knowing()
    names = ("lookup", "niah_multikey_1", "instructions")
    assert recall_accuracy(knowing, corpus, (256, 512), 2) == {
        kind: {"256": 1.0, "512": 1.0} for kind in ("lookup", "variables")
    }
    assert task_accuracy(knowing, corpus, names, (512,), 2) == {name: {"512": 1.0} for name in names[1:]}
    assert knowing.training
    for found in (recall_accuracy(Knowing(1), corpus, (256,), 2), task_accuracy(Knowing(1), corpus, names, (512,), 2)):
        assert all(share == 0.0 for row in found.values() for share in row.values())
    some = recall_accuracy(Knowing(7), corpus, (512,), 6)["lookup"]["512"]  # an answer has four digits
    assert 0.1 < some < 0.9 and np.isclose(some * 24, round(some * 24))


def test_long_texts_are_cut_and_what_lies_behind_is_not_asked(corpus: Corpus) -> None:
    knowing = Knowing()
    assert recall_accuracy(knowing, corpus, (6000,), 1) == {kind: {"6000": 0.0} for kind in ("lookup", "variables")}
    assert knowing.lengths == [4096, 4096]
