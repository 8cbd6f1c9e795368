"""Held-out perplexity and recall accuracy of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from . import recall, tasks
from .packing import Corpus, encode_recall, held_out_blocks

MOST_TOKENS = 4096
"""Of a recall text that a model is asked about; what lies behind is cut."""

Accuracy = dict[str, dict[str, float]]
Make = Callable[[str, int, int], tuple[list[int], list[range]]]
"""(name, length T, number) -> token ids with bos, and the positions of each answer's tokens."""


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def held_out_perplexity(
    model: nn.Module, corpus: Corpus, length: int = 1024, blocks: int = 48, batch_tokens: int = 8192
) -> float:
    """Perplexity over ``blocks`` held-out windows of T = ``length`` tokens."""
    training = model.training
    model.eval()
    total, number = 0.0, 0
    for ids in held_out_blocks(corpus, length, blocks).split(max(1, batch_tokens // length)):
        logits = _logits(model, ids)[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        number += ids[:, 1:].numel()
    model.train(training)
    return math.exp(total / number)


@torch.no_grad()
def _accuracy(model: nn.Module, names: Sequence[str], lengths: Sequence[int], samples: int, make: Make) -> Accuracy:
    """Share of answers whose tokens are all greedy (teacher forced), by name and by length T."""
    training = model.training
    model.eval()
    result: Accuracy = {}
    for name in names:
        row: dict[str, float] = {}
        for length in lengths:
            right, asked = 0, 0
            for i in range(samples):
                ids, answers = make(name, length, i)
                best = _logits(model, torch.tensor([ids]))[0].argmax(-1).tolist()
                right += sum(all(best[at - 1] == ids[at] for at in answer) for answer in answers)
                asked += len(answers)
            row[str(length)] = right / max(1, asked)
        result[name] = row
    model.train(training)
    return result


def recall_accuracy(
    model: nn.Module,
    corpus: Corpus,
    lengths: Sequence[int] = (256, 512, 1024, 2048, 4096),
    samples: int = 16,
    *,
    pairs: int = 8,
    queries: int = 4,
    seed: int = 10_000_019,
) -> Accuracy:
    """Share of answers whose tokens are all greedy (teacher forced), by kind and by task length T.

    Each task of T tokens: ``pairs`` definitions, held-out filler, ``queries`` questions at the end, so that
    the distance from a definition to its question is close to T.
    """
    filler = corpus.filler("held_out")
    count = tasks.counter(corpus.tokenizer)

    def make(kind: str, length: int, i: int) -> tuple[list[int], list[range]]:
        task = recall.make_recall(
            seed + 1000 * length + i, length - 8, filler, kind=kind, pairs=pairs, queries=queries, count=count  # type: ignore[arg-type]
        )  # fmt: skip
        ids, answers = encode_recall(task, corpus.tokenizer)
        return ids[:MOST_TOKENS], [answer for answer in answers if answer.stop <= MOST_TOKENS]

    return _accuracy(model, tasks.RECALL, lengths, samples, make)


def task_accuracy(
    model: nn.Module,
    corpus: Corpus,
    names: Sequence[str],
    lengths: Sequence[int] = (1024, 4096),
    samples: int = 16,
    *,
    seed: int = 20_000_003,
) -> Accuracy:
    """Share of answers whose tokens are all greedy (teacher forced), by task (of ``tasks.TASKS``; other names are left out)
    and by length T: one question, asked after the whole context."""
    tokenizer, filler = corpus.tokenizer, corpus.filler("held_out")
    count = tasks.counter(tokenizer)

    def make(name: str, length: int, i: int) -> tuple[list[int], list[range]]:
        ids, answers = tasks.make_sample(
            tokenizer, [name], length - 8, seed + 1000 * length + i, filler=filler, count=count, questions=1
        )
        return [tokenizer.bos_token_id, *ids], [range(answer.start + 1, answer.stop + 1) for answer in answers]

    return _accuracy(model, [name for name in names if name in tasks.TASKS], lengths, samples, make)
