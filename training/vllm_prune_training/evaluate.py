"""Held-out perplexity and recall accuracy of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from . import recall, tasks
from .packing import Corpus, encode_recall, held_out_blocks, line_counter


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
def recall_accuracy(
    model: nn.Module,
    corpus: Corpus,
    lengths: Sequence[int] = (256, 512, 1024, 2048, 4096),
    tasks: int = 16,
    *,
    pairs: int = 8,
    queries: int = 4,
    seed: int = 10_000_019,
) -> dict[str, dict[str, float]]:
    """Share of answers whose tokens are all greedy (teacher forced), by kind and by task length T.

    Each task of T tokens: ``pairs`` definitions, held-out filler, ``queries`` questions at the end, so that
    the distance from a definition to its question is close to T.
    """
    training = model.training
    model.eval()
    filler = corpus.filler("held_out")
    count = line_counter(corpus.tokenizer)
    result: dict[str, dict[str, float]] = {}
    for kind in ("lookup", "variables"):
        row: dict[str, float] = {}
        for length in lengths:
            right, number = 0, 0
            for i in range(tasks):
                task = recall.make_recall(
                    seed + 1000 * length + i, length - 8, filler, kind=kind, pairs=pairs, queries=queries,
                    count=count,
                )  # fmt: skip
                ids, spans = encode_recall(task, corpus.tokenizer)
                best = _logits(model, torch.tensor([ids[:4096]]))[0].argmax(-1).tolist()
                spans = [span for span in spans if span.stop <= 4096]
                right += sum(all(best[at - 1] == ids[at] for at in span) for span in spans)
                number += len(spans)
            row[str(length)] = right / max(1, number)
        result[kind] = row
    model.train(training)
    return result


@torch.no_grad()
def task_accuracy(
    model: nn.Module,
    corpus: Corpus,
    names: Sequence[str],
    lengths: Sequence[int] = (1024, 4096),
    samples: int = 16,
    *,
    seed: int = 20_000_003,
) -> dict[str, dict[str, float]]:
    """Share of answers whose tokens are all greedy (teacher forced), by task and by length T: one question, asked after
    the whole context."""
    training = model.training
    model.eval()
    filler = corpus.filler("held_out")
    count = tasks.counter(corpus.tokenizer)
    result: dict[str, dict[str, float]] = {}
    for name in names:
        if name not in tasks.TASKS:
            continue
        row: dict[str, float] = {}
        for length in lengths:
            right, number = 0, 0
            for i in range(samples):
                ids, spans = tasks.make_sample(
                    corpus.tokenizer,
                    [name],
                    length - 8,
                    seed + 1000 * length + i,
                    filler=filler,
                    count=count,
                    questions=1,
                )
                ids = [corpus.tokenizer.bos_token_id, *ids]
                best = _logits(model, torch.tensor([ids]))[0].argmax(-1).tolist()
                right += sum(all(best[at] == ids[at + 1] for at in span) for span in spans)
                number += len(spans)
            row[str(length)] = right / max(1, number)
        result[name] = row
    model.train(training)
    return result
