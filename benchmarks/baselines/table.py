"""From rows of single cases to one line a method and budget: numbers, a Markdown table and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from baselines.case_file import Row

DENSE = "dense"
OPEN = " (open)"


@dataclass(frozen=True)
class Line:
    """One method at one budget.

    Attributes:
        method, budget: as in the rows.
        kept: fraction of context keys held when the branches begin, mean over cases.
        past_kept: visible share of past pairs inside the context; None where it is read densely.
        perplexity: of held-out continuations.
        ratio: to the dense model of ``--model``.
        own_ratio: to the same weights with open gates, which a trained base is compared with; None where that is the
            dense model itself.
        recall: share of answers right token by token, over all tasks; ``answers`` how many there were.
        by_task: the same by task.
    """

    method: str
    budget: float
    kept: float
    past_kept: float | None
    perplexity: float
    ratio: float
    own_ratio: float | None
    recall: float
    answers: int
    by_task: dict[str, float]


def summarize(rows: Sequence[Row]) -> list[Line]:
    """Lines in order of first appearance.

    Raises:
        ValueError: there are no dense rows, or a method has not run on exactly the cases that the dense model has.
    """
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.budget), []).append(row)
    if (DENSE, 1.0) not in groups:
        raise ValueError("there are no rows of the dense model to compare with")
    cases = sorted(row.case for row in groups[DENSE, 1.0])
    for (method, budget), group in groups.items():
        if sorted(row.case for row in group) != cases:
            raise ValueError(f"{method} at {budget} has run on other cases than the dense model")
    perplexity = {name: _perplexity(group) for name, group in groups.items()}
    lines = []
    for (method, budget), group in groups.items():
        own = perplexity.get((method + OPEN, 1.0))
        past = [row.past_kept for row in group if row.past_kept is not None]
        asked = [row for row in group if row.answers]
        tasks = {task: [row for row in asked if row.task == task] for task in dict.fromkeys(row.task for row in asked)}
        lines.append(Line(
            method, budget, _mean([row.kept for row in group]), _mean(past) if past else None,
            perplexity[method, budget], perplexity[method, budget] / perplexity[DENSE, 1.0],
            perplexity[method, budget] / own if own is not None else None,
            _recall(asked), sum(row.answers for row in asked), {task: _recall(found) for task, found in tasks.items()},
        ))  # fmt: skip
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _recall(rows: Sequence[Row]) -> float:
    answers = sum(row.answers for row in rows)
    return sum(row.right for row in rows) / answers if answers else math.nan


def _perplexity(rows: Sequence[Row]) -> float:
    text = [row for row in rows if not row.answers]
    tokens = sum(row.tokens for row in text)
    return math.exp(sum(row.nll for row in text) / tokens) if tokens else math.nan


def markdown(lines: Sequence[Line], notes: Sequence[str] = ()) -> str:
    """The table, sorted by budget and then by recall, dense first."""
    tasks = list(dict.fromkeys(task for line in lines for task in line.by_task))
    head = ["asked", "method", "kept", "perplexity", "/ dense", "/ own dense", "recall", *tasks]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in sorted(lines, key=lambda line: (-line.budget, -line.recall, line.ratio)):
        own = "" if line.own_ratio is None else f"{line.own_ratio:.3f}"
        cells = [f"{line.budget:g}", line.method, f"{line.kept:.3f}", f"{line.perplexity:.3f}", f"{line.ratio:.3f}", own,
                 f"{line.recall:.3f}", *(f"{line.by_task.get(task, math.nan):.2f}" for task in tasks)]  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join([*out, "", *notes]) + "\n"


LEARNED = ("black", "crimson", "darkgreen", "navy")


def plot(lines: Sequence[Line], path: Path, title: str) -> None:
    """PNG: perplexity against dense and recall, over the kept fraction; one curve a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    dense = next(line for line in lines if line.method == DENSE)
    methods = list(dict.fromkeys(line.method for line in lines if line.budget < 1.0))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.2))
    colours = pyplot.get_cmap("tab20")
    shown: list[str] = []
    for number, method in enumerate(methods):
        points = sorted(
            (line.kept, line.ratio, line.recall) for line in lines if line.method == method and line.budget < 1
        )
        learned = any(line.method == method and line.own_ratio is not None for line in lines)
        style = {"marker": "o", "markersize": 7 if learned else 4, "linewidth": 3 if learned else 1.2, "label": method,
                 "zorder": 3 if learned else 2, "linestyle": "--" if "(query-aware)" in method else "-",
                 "color": LEARNED[len(shown) % len(LEARNED)] if learned else colours(number % 20),
                 }  # fmt: skip
        if learned:
            shown.append(method)
        left.plot([p[0] for p in points], [p[1] for p in points], **style)
        right.plot([p[0] for p in points], [p[2] for p in points], **style)
    left.axhline(1.0, color="grey", linewidth=0.8)
    left.set_yscale("log")
    left.yaxis.set_major_locator(FixedLocator([0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0]))
    left.yaxis.set_major_formatter(FormatStrFormatter("%.1f"))
    left.yaxis.set_minor_locator(NullLocator())
    left.set_ylabel("perplexity / dense perplexity (log)")
    right.axhline(dense.recall, color="grey", linewidth=0.8)
    right.set_ylabel("share of answers right")
    for axes in (left, right):
        axes.set_xlabel("context keys kept when the question begins")
        axes.grid(alpha=0.3)
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def as_json(lines: Sequence[Line]) -> list[dict[str, object]]:
    """Lines as JSON-able objects; what was not measured is null."""
    return [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(line).items()}
        for line in lines
    ]
