"""``vllm-prune report``: a card in Markdown with pictures that says what a checkpoint's gates keep, cost and forget.

Runs the masked Hugging Face model on a CPU or GPU, never the server. Dimension letters: N windows, T tokens, L layers,
E eviction units of a layer (1 or H KV heads).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_prune.calibration import Calibration
from vllm_prune.config import GATE_FILE, DropGateConfig, check_calibration
from vllm_prune.errors import PruneError

from .calibrate import build_table, check_length, measure_table, open_checkpoint
from .depth_recall import Recall, measure_recall
from .held_text import Windows, library_texts, make_windows, read_texts
from .recency import Recency, draw_pairs, explain, visible_at
from .report_plots import class_bars, kept_map, recall_map, recency_curves, require_matplotlib, tradeoff
from .sweep import Point, sweep
from .token_classes import ClassShare, class_shares, classes_of

QUICK_STRENGTHS = (0.06, 0.25, 1.0, 4.0)
PAIRS = 20_000
Say = Callable[[str], None]


@dataclass(frozen=True)
class ReportOptions:
    """Options of the command.

    Attributes:
        folder: of the gated checkpoint.
        data: held-out text; None takes held-out modules of the standard library.
        out: folder of the card; None is ``report`` in the checkpoint.
        length: T; None is the calibration table's, else the model's (``calibrate.model_length``).
        tokens: held-out tokens.
        texts: of each recall task and length.
        quick: a quarter of the tokens at no more than 1024 tokens, two texts.
    """

    folder: Path
    data: Path | None = None
    out: Path | None = None
    length: int | None = None
    tokens: int = 16384
    texts: int = 4
    quick: bool = False


@dataclass(frozen=True)
class Report:
    """All that a card says.

    Attributes:
        section: of the checkpoint, at its own strength.
        served: at that strength on the windows.
        dense_ppl: with gates open, on the same windows.
        table: the checkpoint's, or a small one measured now.
        calibrated: whether the table is the checkpoint's.
        classes: None without offsets of tokens.
    """

    section: DropGateConfig
    source: str
    windows: tuple[int, int]
    data_sha256: str
    served: Point
    dense_ppl: float
    table: Calibration
    calibrated: bool
    recency: Recency
    classes: list[ClassShare] | None
    recall: list[Recall]


def lengths_up_to(length: int) -> list[int]:
    """Lengths of the recall tasks: 256, doubled, up to and with ``length``; none when it is smaller than 160 tokens."""
    if length < 160:
        return []
    found = [n for n in (256 * 2**i for i in range(20)) if n < length]
    return [*found, length]


def report(options: ReportOptions, say: Say = lambda _: None) -> Path:
    """Measure, draw and write; returns the card's path.

    Raises:
        PruneError: the checkpoint, the data or an option is unusable, the calibration table belongs to other gates, or
            matplotlib is missing.
    """
    require_matplotlib()
    if options.tokens < 2 or options.texts < 1:
        raise PruneError("--tokens and --texts must be positive.", "Leave them out for the defaults.")
    texts = library_texts() if options.data is None else read_texts(options.data)
    gated, tokenizer = open_checkpoint(options.folder)
    section: DropGateConfig = gated.section
    check_calibration(str(options.folder / GATE_FILE), section)
    length = options.length
    if length is None and section.calibration is not None:
        length = section.calibration.length
    length = check_length(gated.config, length)
    tokens, repeats = options.tokens, options.texts
    if options.quick:
        length, tokens, repeats = min(length, 1024), min(tokens // 4, 4096), min(2, repeats)
    windows = make_windows(texts, tokenizer, length, max(tokens, length))

    expiries: list[Any] = []
    say(f"gates at strength {section.strength:g}: {len(windows.ids)} windows of {length} tokens")
    dense, served = sweep(gated, windows.ids, [0.0, section.strength], lambda _, found: expiries.append(found))
    if not expiries:
        raise PruneError("the checkpoint's gates are open (strength 0): nothing to report.", "Set its strength to 1.")
    table, calibrated = section.calibration, section.calibration is not None
    if table is None:
        say("no calibration table: a small one is measured and not stored")
        few = windows.ids[: max(1, len(windows.ids) // 4)]
        points = measure_table(gated, few, QUICK_STRENGTHS)
        table = build_table(points, _part(windows, len(few)), "", "auto", 0.01)
    recency_pairs = draw_pairs(expiries, PAIRS)
    classes = classes_of(windows)
    filler = [line + "\n" for text in texts for line in text.text.split("\n") if line.strip()]
    rows = []
    if tokenizer.is_fast:
        rows = measure_recall(gated, tokenizer, lengths_up_to(length), repeats, filler, say=say)
    found = Report(
        section, str(options.data or "modules of the Python standard library"), (len(windows.ids), length), windows.sha256,
        served, dense.ppl, table, calibrated, explain(recency_pairs),
        None if classes is None else class_shares(classes, expiries), rows,
    )  # fmt: skip
    distances = sorted({round(d) for d in np.geomspace(1, 0.75 * length, 24)})  # beyond, few keys are left
    out = options.out or options.folder / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw(found, out, distances, visible_at(expiries, distances).numpy())
        (out / "report.json").write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
        (out / "README.md").write_text(card(found), encoding="utf-8")
    except OSError as error:
        raise PruneError(
            f"the report cannot be written to {out}: {error}.", "Name another folder with --out."
        ) from None
    return out / "README.md"


def _part(windows: Windows, count: int) -> Windows:
    span = None if windows.span is None else windows.span[:count]
    return Windows(windows.ids[:count], windows.document[:count], span, windows.texts)


def draw(found: Report, out: Path, distances: list[int], seen: np.ndarray) -> None:
    """The pictures. ``seen``: share of visible pairs [L, D] at ``distances``."""
    kept_map(out / "kept.png", found.served.kept.numpy(), found.served.live.numpy())
    tradeoff(out / "tradeoff.png", found.table, found.section.strength)
    recency_curves(out / "recency.png", distances, seen, found.recency)
    if found.classes is not None:
        class_bars(out / "classes.png", found.classes, float(found.served.kept.mean()))
    if found.recall:
        recall_map(out / "recall.png", found.recall)


def as_json(found: Report) -> dict[str, Any]:
    """The numbers of the card, for machines."""
    recency = {
        "mean_auc": found.recency.mean_auc, "verdict": found.recency.verdict,
        "pooled": None if found.recency.pooled is None else asdict(found.recency.pooled),
        "lanes": [[None if fit is None else asdict(fit) for fit in row] for row in found.recency.lanes],
    }  # fmt: skip
    text = {
        "method": found.section.method, "strength": found.section.strength, "source": found.source,
        "windows": found.windows[0], "length": found.windows[1], "data_sha256": found.data_sha256,
        "ppl_open": found.dense_ppl, "ppl": found.served.ppl, "kl": found.served.kl,
        "kept": found.served.kept.tolist(), "live": found.served.live.tolist(),
        "calibrated": found.calibrated, "calibration": found.table.model_dump(mode="json"), "recency": recency,
        "classes": None if found.classes is None else [asdict(item) for item in found.classes],
        "recall": [asdict(row) for row in found.recall],
    }  # fmt: skip
    # An infinite half distance is no JSON number.
    return json.loads(json.dumps(text).replace("Infinity", "null"))


def card(found: Report) -> str:
    """The Markdown of the card."""
    section, served, table = found.section, found.served, found.table
    kept, live = served.kept.mean().item(), served.live.mean().item()
    rise = 100 * (served.ppl / found.dense_ppl - 1)
    low, high = table.keep_range
    inside = section.strength <= table.safe_strength
    measured = "measured by `vllm-prune calibrate`" if found.calibrated else (
        "a small sweep made for this card: run `vllm-prune calibrate` for one that the server can use"
    )  # fmt: skip
    rows = [f"| {r.strength:.3g} | {r.kept:.3f} | {r.live:.3f} | {r.ppl:.3f} | {r.kl:.4f} |" for r in table.rows]
    parts = [f"""# Report card: {section.method} gates, strength {section.strength:g}

Measured with the hard mask that the server applies, on {found.windows[0]} windows of {found.windows[1]} tokens of
{found.source} (token ids {found.data_sha256[:12]}).

| | |
|---|---|
| past pairs kept | {kept:.3f} |
| keys live at the end of a window | {live:.3f} |
| perplexity, gates open | {found.dense_ppl:.3f} |
| perplexity, gated | {served.ppl:.3f} ({rise:+.1f} %) |
| KL(open to gated), nats a token | {served.kl:.4f} |
| safe range of strength | up to {table.safe_strength:.3g} (keeps {table.keep_at(table.safe_strength):.3f}) |

Safe: perplexity rises by at most {100 * table.max_rise:g} % over open gates and over any weaker strength that was measured.
The checkpoint's own strength lies
{"within" if inside else "**beyond**"} the safe range. A fraction from {low:.3f} to {high:g} can be asked for by `keep`.

## Kept by layer and head

![Kept by layer and head](kept.png)

## Quality against kept fraction

![Perplexity and KL against kept fraction](tradeoff.png)

{len(table.rows)} strengths at {table.length} tokens, {table.tokens:,} tokens each, {measured}.

| strength | past pairs kept | live at the end | perplexity | KL, nats |
|---|---|---|---|---|
{chr(10).join(rows)}

## More than recency?

{found.recency.verdict}

The fit predicts from the distance alone whether a query still sees a key (AUC 0.5: distance tells nothing, 1: it tells all).

![Visible pairs by distance](recency.png)
"""]  # fmt: skip
    parts.append(_recency_rows(found.recency))
    if found.classes is None:
        parts.append("## Which tokens survive\n\nThe tokenizer gives no character offsets: not measured.\n")
    else:
        parts.append("## Which tokens survive\n\n![Kept by token class](classes.png)\n\n" + _class_rows(found.classes))
    if found.recall:
        parts.append("## Recall by depth\n\n![Recall by depth](recall.png)\n\n" + _recall_rows(found.recall))
    else:
        parts.append("## Recall by depth\n\nNot measured: windows too short, or a tokenizer without offsets.\n")
    return "\n".join(parts)


def _recency_rows(recency: Recency) -> str:
    rows = ["| layer | AUC of distance alone | calibration error | half distance, tokens |", "|---|---|---|---|"]
    for layer, lanes in enumerate(recency.lanes):
        fits = [fit for fit in lanes if fit is not None]
        if not fits:
            rows.append(f"| {layer} | keeps all, or nothing | | |")
            continue
        mean = [sum(values) / len(fits) for values in zip(*((f.auc, f.error) for f in fits), strict=True)]
        halves = sorted(fit.half for fit in fits)
        half = halves[len(halves) // 2]
        rows.append(f"| {layer} | {mean[0]:.3f} | {mean[1]:.3f} | {f'{half:,.0f}' if half < 1e9 else 'beyond'} |")
    if recency.pooled is not None:
        rows.append(f"| one rule for all | {recency.pooled.auc:.3f} | {recency.pooled.error:.3f} | |")
    return "\n".join(rows) + "\n"


def _class_rows(classes: list[ClassShare]) -> str:
    rows = ["| class | share of tokens | past pairs kept | live at the end |", "|---|---|---|---|"]
    for item in sorted(classes, key=lambda c: -c.kept):
        rows.append(f"| {item.name} | {item.share:.3f} | {item.kept:.3f} | {item.live:.3f} |")
    return "\n".join(rows) + "\n"


def _recall_rows(recall: list[Recall]) -> str:
    rows = ["| task | tokens | answers | open | gated |", "|---|---|---|---|---|"]
    for row in recall:
        rows.append(
            f"| {row.task} | {row.length} | {sum(row.asked)} | {row.total('open'):.2f} | {row.total('hard'):.2f} |"
        )
    note = "Exact answers, teacher-forced; several questions are asked after each context."
    if all(row.total("open") == 0 for row in recall):
        note += " The model finds nothing even with open gates: these tasks say nothing about its gates."
    return "\n".join(rows) + f"\n\n{note}\n"
