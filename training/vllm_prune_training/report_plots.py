"""The pictures of the report card, one PNG each. Fixed size and fonts; nothing is looked up on the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_prune.calibration import Calibration
from vllm_prune.errors import PruneError

from .depth_recall import BINS, Recall
from .recency import Recency
from .token_classes import ClassShare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GREY, ACCENT, SAFE = "#10151a", "#5c6670", "#c2410c", "#2b7a90"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlelocation": "left", "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False, "figure.facecolor": "white",
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "xtick.color": GREY, "ytick.color": GREY, "figure.dpi": 120,
}  # fmt: skip


def require_matplotlib() -> None:
    """Raises PruneError when it is not installed: better before measuring than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PruneError(
            "the report draws with matplotlib, which is not installed.", "pip install matplotlib."
        ) from None


def _figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, list[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)
    return figure, list(axes[0])


def _drawn(path: Path, draw: Any, *args: Any) -> Path:
    import matplotlib
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(STYLE):
        figure = draw(*args)
        figure.savefig(path)
        plt.close(figure)
    return path


def _cells(ax: Axes, values: np.ndarray, **options: Any) -> Any:
    """A heat map 0..1 with its numbers in it where there is room; nan is left grey."""
    image = ax.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", **options)
    ax.set_facecolor("#e3e6e9")
    for side in ax.spines.values():
        side.set_visible(False)
    if values.size <= 400:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = "white" if value < 0.6 else INK
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    return image


def kept_map(path: Path, kept: np.ndarray, live: np.ndarray) -> Path:
    """Kept and live fractions [L, E] by layer and head."""
    return _drawn(path, _kept_map, kept, live)


def _kept_map(kept: np.ndarray, live: np.ndarray) -> Any:
    layers, units = kept.shape
    figure, axes = _figure(max(6.5, 2.4 + 0.9 * units), max(2.4, 1.2 + 0.26 * layers), 2, sharey=True)
    for ax, values, title in zip(axes, (kept, live), ("Past pairs kept", "Keys live at the end"), strict=True):
        image = _cells(ax, values)
        ax.set_title(title)
        ax.set_xticks(range(units), [str(i) for i in range(units)] if units > 1 else ["all heads"])
        ax.set_xlabel("KV head" if units > 1 else "")
        every = max(1, layers // 24)
        ax.set_yticks(range(0, layers, every))
        ax.tick_params(length=0)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="fraction", pad=0.02)
    return figure


def tradeoff(path: Path, table: Calibration, strength: float) -> Path:
    """Perplexity and KL against the kept fraction, with the safe range and the checkpoint's own strength."""
    return _drawn(path, _tradeoff, table, strength)


def _tradeoff(table: Calibration, strength: float) -> Any:
    figure, axes = _figure(10, 4, 2)
    kept = [row.kept for row in table.rows]
    here = table.keep_at(strength)
    edge = table.keep_at(table.safe_strength)
    for ax, values, label in zip(
        axes, ([row.ppl for row in table.rows], [row.kl for row in table.rows]),
        ("perplexity", "KL(open || gated), nats a token"), strict=True,
    ):  # fmt: skip
        ax.axvspan(edge, 1.0, color=SAFE, alpha=0.12, lw=0, label=f"safe: strength up to {table.safe_strength:.2g}")
        ax.plot(kept, values, color=INK, marker="o", markersize=4, linewidth=1.5)
        ax.axvline(here, color=ACCENT, linewidth=1.4, label=f"as served: strength {strength:.3g}, keeps {here:.2f}")
        top = max(values)
        for row, value in _spread_labels(table, kept, values):
            ax.annotate(f"{row.strength:.2g}", (row.kept, value), xytext=(-4, 4), textcoords="offset points",
                        fontsize=8, ha="right", color=GREY)  # fmt: skip
        ax.set_xlim(1.03, max(0.0, min(kept) - 0.06))
        low = min(values)
        ax.set_ylim(low - 0.06 * (top - low), top + 0.14 * (top - low) + 1e-9)
        ax.set_xlabel("past pairs kept (small numbers: strength)")
        ax.set_ylabel(label)
    axes[0].set_title(f"{table.length} tokens, {table.tokens:,} held out")
    axes[1].legend(frameon=False, loc="upper left")
    return figure


def _spread_labels(table: Calibration, kept: list[float], values: list[float]) -> list[Any]:
    """Rows whose labels do not lie on each other, from both ends."""
    span = max(max(values) - min(values), 1e-12)
    chosen: list[Any] = []
    for row, k, v in sorted(zip(table.rows, kept, values, strict=True), key=lambda x: -x[0].strength):
        far = all(abs(k - other.kept) > 0.05 or abs(v - w) / span > 0.09 for other, w in chosen)
        if far:
            chosen.append((row, v))
    return chosen


def recall_map(path: Path, rows: Sequence[Recall]) -> Path:
    """Exact answers by task, length and depth: open gates left, as served right."""
    return _drawn(path, _recall_map, rows)


def _recall_map(rows: Sequence[Recall]) -> Any:
    figure, axes = _figure(10.5, max(2.2, 1.3 + 0.32 * len(rows)), 2, sharey=True)
    parts = [f"{100 * i // BINS}-{100 * (i + 1) // BINS} %" for i in range(BINS)]
    for ax, mode, title in zip(axes, ("open", "hard"), ("Gates open", "Gated, as served"), strict=True):
        shares = [[np.nan if x is None else x for x in row.share(mode)] for row in rows]  # type: ignore[arg-type]
        image = _cells(ax, np.asarray(shares, dtype=float))
        ax.set_title(title)
        ax.set_xticks(range(BINS), parts)
        ax.set_yticks(range(len(rows)), [f"{row.task}, {row.length}" for row in rows])
        ax.set_xlabel("depth of the needle in the context")
        ax.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="exact answers", pad=0.02)
    return figure


def class_bars(path: Path, shares: Sequence[ClassShare], mean: float) -> Path:
    """Kept fraction by token class, against the mean of all tokens."""
    return _drawn(path, _class_bars, shares, mean)


def _class_bars(shares: Sequence[ClassShare], mean: float) -> Any:
    shares = sorted(shares, key=lambda item: item.kept)
    figure, (ax,) = _figure(8, 1.3 + 0.36 * len(shares))
    widths = [item.kept for item in shares]
    ax.barh(range(len(shares)), widths, color=[ACCENT if w > mean else SAFE for w in widths], height=0.7)
    for at, item in enumerate(shares):
        ax.text(
            item.kept + 0.004,
            at,
            f" {item.kept:.3f}   ({100 * item.share:.1f} % of tokens)",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )
    ax.axvline(mean, color=INK, linewidth=1.2, linestyle="--", zorder=2)
    ax.text(mean, len(shares) - 0.35, f" all tokens {mean:.3f}", fontsize=9, color=INK, va="bottom")
    ax.set_yticks(range(len(shares)), [item.name for item in shares])
    ax.set_xlim(0, max([*widths, mean]) * 1.35 + 1e-9)
    ax.set_ylim(-0.6, len(shares) + 0.1)
    ax.set_xlabel("past pairs kept, mean over layers and heads")
    return figure


def recency_curves(path: Path, distances: Sequence[int], seen: np.ndarray, recency: Recency) -> Path:
    """Share of visible pairs by distance: a line a layer [L, D], and the one logistic fit of distance."""
    return _drawn(path, _recency_curves, distances, seen, recency)


def _recency_curves(distances: Sequence[int], seen: np.ndarray, recency: Recency) -> Any:
    import matplotlib

    figure, (ax,) = _figure(8.5, 4.2)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(seen)))
    auc = [[fit.auc for fit in row if fit is not None] for row in recency.lanes]
    for layer, line in enumerate(seen):
        name = f"layer {layer}" + (f", AUC {sum(auc[layer]) / len(auc[layer]):.2f}" if auc[layer] else "")
        ax.plot(distances, line, color=colors[layer], linewidth=1.6, label=name if len(seen) <= 16 else None)
    if recency.pooled is not None:
        x = np.geomspace(distances[0], distances[-1], 200)
        fit = 1 / (1 + np.exp(-(recency.pooled.bias + recency.pooled.slope * np.log(x))))
        ax.plot(x, fit, color=ACCENT, linestyle="--", linewidth=1.8, label=f"one fit, AUC {recency.pooled.auc:.2f}")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("distance between query and key, tokens")
    ax.set_ylabel("share of pairs still visible")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure
