"""From answers to numbers: one row for each task and length, with what the gates kept, and averages.

A row's ``open`` part is the same requests with gates open (strength 0, stock vLLM), where they were run. A task that the
model cannot do open says nothing of the gates: it is marked and left out of the averages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from . import stats
from .jobs import BLOCK_TOKENS, Answer
from .samples import MANY_QUESTIONS, NEUTRAL, PERPLEXITY, Sample

DENSE_FLOOR = 0.5
"""Least score with gates open for a task to count: below it the model cannot do the task."""

DEPTH_BINS = 5


@dataclass(frozen=True)
class KVSize:
    """Bytes of the model's KV cache: L layers, H KV heads, D head size."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    number_bytes: int

    @property
    def token(self) -> int:
        """K and V of one token in all layers and heads."""
        return self.num_layers * self.num_kv_heads * 2 * self.head_size * self.number_bytes

    @property
    def block(self) -> int:
        """One block of vLLM's pool."""
        return self.token * BLOCK_TOKENS


@dataclass(frozen=True)
class Judged:
    """One sample with the engine's answer and its score (None for perplexity)."""

    sample: Sample
    answer: Answer
    output: str
    score: float | None


def judge(samples: Sequence[Sample], answers: Sequence[Answer], tokenizer: Any) -> list[Judged]:
    judged = []
    for sample, answer in zip(samples, answers, strict=True):
        output = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        judged.append(Judged(sample, answer, output, sample.score(output) if sample.references else None))
    return judged


def memory(judged: Sequence[Judged], size: KVSize) -> dict[str, float]:
    """Means over requests, as the plugin measured them at the last report of each request.

    ``kept_fraction`` is of keys over all layers and heads; ``kv_bytes`` of K and V of the kept keys; blocks hold them and
    what the gate remembers. ``dense_*``: what stock vLLM holds for the same tokens.
    """
    rows = [each.answer.memory for each in judged]
    kept = [row["kept_fraction"] for row in rows]
    return {
        "tokens": fmean(row["tokens"] for row in rows),
        "kept_fraction": fmean(kept),
        "kept_fraction_least": min(kept),
        "kept_fraction_most": max(kept),
        "kv_bytes": fmean(row["kept_fraction"] * row["tokens"] for row in rows) * size.token,
        "blocks_peak": fmean(row["blocks_peak"] for row in rows),
        "blocks_held": fmean(row["blocks_held"] for row in rows),
        "blocks_returned": fmean(row["blocks_returned"] for row in rows),
        "peak_bytes": fmean(row["blocks_peak"] for row in rows) * size.block,
        "dense_kv_bytes": fmean(row["tokens"] for row in rows) * size.token,
        "dense_blocks": fmean(row["blocks_dense"] for row in rows),
        "dense_bytes": fmean(row["blocks_dense"] for row in rows) * size.block,
    }


def _groups(judged: Sequence[Judged]) -> Iterator[tuple[str, int, list[int]]]:
    """Task, length and indices of their samples, in order of appearance."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, each in enumerate(judged):
        groups.setdefault((each.sample.task, each.sample.length), []).append(index)
    for (task, length), indices in groups.items():
        yield task, length, indices


def rows(gated: Sequence[Judged], opened: Sequence[Judged] | None, size: KVSize) -> list[dict[str, Any]]:
    """One row for each task and length.

    Args:
        gated: judged samples.
        opened: the same samples with gates open, where run.
        size: of the KV cache.
    """
    result = []
    for task, length, indices in _groups(gated):
        here = [gated[i] for i in indices]
        base = None if opened is None else [opened[i] for i in indices]
        row: dict[str, Any] = {"task": task, "length": length, "samples": len(here), "memory": memory(here, size)}
        row.update(_perplexity(here, base) if task == PERPLEXITY else _share(here, base))
        if task.removesuffix(NEUTRAL) in MANY_QUESTIONS:
            row["obeyed"] = obeyed(here)
            if base is not None:
                row["open"]["obeyed"] = obeyed(base)
        if base is not None:
            row["open"]["memory"] = memory(base, size)
        result.append(row)
    return result


def _perplexity(here: Sequence[Judged], base: Sequence[Judged] | None) -> dict[str, Any]:
    nll = [each.answer.nll or 0.0 for each in here]
    tokens = [len(each.sample.request.prompt) - 1 for each in here]
    row: dict[str, Any] = {"perplexity": stats.perplexity(nll, tokens), "window_tokens": tokens[0] + 1}
    if base is not None:
        other = [each.answer.nll or 0.0 for each in base]
        ratio, interval = stats.perplexity_ratio(nll, other, tokens)
        row |= {"open": {"perplexity": stats.perplexity(other, tokens)}, "ratio": ratio, "ratio_interval": interval}
    return row


def _share(here: Sequence[Judged], base: Sequence[Judged] | None) -> dict[str, Any]:
    def part(judged: Sequence[Judged]) -> dict[str, Any]:
        scores = [each.score or 0.0 for each in judged]
        share = fmean(scores)
        return {"score": share, "interval": stats.wilson(share, len(scores)), "by_depth": by_depth(judged)}

    row = part(here)
    if base is not None:
        row["open"] = part(base)
        row["excluded"] = row["open"]["score"] < DENSE_FLOOR
    return row


def by_depth(judged: Sequence[Judged], bins: int = DEPTH_BINS) -> list[dict[str, float]]:
    """Score by where in the context the answer lies, for samples with one place; empty bins are left out.

    ``distance``: mean tokens from there to the question, about.
    """
    result = []
    for at in range(bins):
        low, high = at / bins, (at + 1) / bins
        inside = [
            each for each in judged if len(each.sample.depths) == 1
            and (low <= each.sample.depths[0] < high or (at == bins - 1 and each.sample.depths[0] == high))
        ]  # fmt: skip
        if inside:
            score = fmean(each.score or 0.0 for each in inside)
            distance = fmean((1 - each.sample.depths[0]) * len(each.sample.request.prompt) for each in inside)
            result.append({"from": low, "to": high, "samples": len(inside), "score": score, "distance": distance})
    return result


def obeyed(judged: Sequence[Judged]) -> dict[str, Any]:
    """Of the rules of each context: how many are obeyed on average, and the share by the rule's position.

    ``spread``: largest minus smallest share over positions.
    """
    contexts: dict[int, list[Judged]] = {}
    for each in judged:
        contexts.setdefault(each.sample.context, []).append(each)
    ordered = [sorted(rules, key=lambda each: each.sample.depths) for rules in contexts.values()]
    scores: dict[int, list[float]] = {}  # short contexts may hold fewer rules
    for rules in ordered:
        for position, each in enumerate(rules):
            scores.setdefault(position, []).append(each.score or 0.0)
    shares = [fmean(scores[position]) for position in sorted(scores)]
    return {
        "contexts": len(ordered),
        "rules": fmean(map(len, ordered)),
        "obeyed": fmean(sum(each.score or 0.0 for each in rules) for rules in ordered),
        "by_position": shares,
        "spread": max(shares) - min(shares),
    }


def averages(table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean score over the rows that count, and which do not. With no open run nothing can be excluded, and it says so."""
    scored = [row for row in table if "score" in row]
    used = [row for row in scored if not row.get("excluded", False)]
    result: dict[str, Any] = {
        "rows": len(used),
        "score": fmean(row["score"] for row in used) if used else None,
        "excluded": [f"{row['task']} at {row['length']}" for row in scored if row.get("excluded", False)],
        "excluded_below": DENSE_FLOOR,
        "checked_open": all("open" in row for row in scored),
    }
    if used and all("open" in row for row in used):
        result["open_score"] = fmean(row["open"]["score"] for row in used)
    return result
