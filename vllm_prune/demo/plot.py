"""map.png: an excerpt of the text coloured by lifetime, lifetimes of all keys, and the blocks held over the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_prune.demo.maps import ACCENT, LIGHT, EvictionMap
from vllm_prune.errors import PruneError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, LINES, GAP = 80, 27, 6
"""Of one of the two columns of text; between them."""

GREY = "#5c6670"
WIDTH, HEIGHT, LEFT, RIGHT = 13.5, 11.65, 0.75, 0.4
"""Inches."""

Timeline = list[tuple[int, int]]


def require_matplotlib() -> None:
    """Raises PruneError when it is not installed: better before two engine runs than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PruneError("the demo draws with matplotlib, which is not installed.", "pip install matplotlib.") from None


def lines_of(pieces: list[str], columns: int) -> list[list[tuple[int, int, str]]]:
    """The text broken into lines.

    Args:
        pieces: text of each token.
        columns: longest line; longer ones are wrapped.

    Returns:
        Of each line, its parts: token index, column, text. A line break is shown as a sign at the end of its line.
    """
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for index, piece in enumerate(pieces):
        for number, part in enumerate(piece.expandtabs(4).split("\n")):
            if number:
                if number == 1 and column < columns:
                    lines[-1].append((index, column, "\u21b5"))
                lines.append([])
                column = 0
            while part:
                if column >= columns:
                    lines.append([])
                    column = 0
                head, part = part[: columns - column], part[columns - column :]
                lines[-1].append((index, column, head))
                column += len(head)
    return lines


def excerpt(lines: list[list[tuple[int, int, str]]], count: int) -> tuple[int, int]:
    """First and one-past-last line of a readable piece: from a definition that begins in the second quarter on."""
    last = max(len(lines) - count, 0)
    start = min(len(lines) // 4, last)
    for number in range(start, min(len(lines) // 2, last)):
        text = "".join(part for _, _, part in lines[number])
        if text.lstrip().startswith(("def ", "class ")):
            return number, number + count
    return start, min(start + count, len(lines))


def luminance(rgb: np.ndarray) -> float:
    """Relative luminance of an sRGB colour, 0..1."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def draw(data: EvictionMap, timelines: dict[str, Timeline], subtitle: str, path: Path) -> None:
    """Draw the picture.

    Args:
        data: the map.
        timelines: of each run by name, (tokens computed, blocks held).
        subtitle: one line below the title.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    colors = LinearSegmentedColormap.from_list("lifetime", LIGHT)
    norm = LogNorm(1, data.tokens)
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.parse_math": False}):
        figure = plt.figure(figsize=(WIDTH, HEIGHT), dpi=120, facecolor="white")
        figure.text(LEFT / WIDTH, 1 - 0.42 / HEIGHT, data.title, fontsize=15, fontweight="bold")
        figure.text(LEFT / WIDTH, 1 - 0.66 / HEIGHT, subtitle, fontsize=10.5, color=GREY)

        def axes(top: float, height: float) -> Axes:
            box = (LEFT / WIDTH, 1 - (top + height) / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, height / HEIGHT)
            return figure.add_axes(box)

        text, bar, heat, pool = axes(1.15, 4.85), axes(6.2, 0.14), axes(7.15, 1.85), axes(9.8, 1.35)
        _text(text, data, colors, norm)
        scale = figure.colorbar(matplotlib.cm.ScalarMappable(norm, colors), cax=bar, orientation="horizontal")
        _scale(scale, data.tokens)
        _heat(heat, data, colors, norm)
        _pool(pool, timelines, data.prompt_tokens)
        figure.savefig(path)
        plt.close(figure)


def _text(ax: Axes, data: EvictionMap, colors: Any, norm: Any) -> None:
    lines = lines_of(data.pieces, COLUMNS)
    first, last = excerpt(lines, 2 * LINES)
    shown = lines[first:last]
    width = 2 * COLUMNS + GAP
    ax.set_xlim(0, width)
    ax.set_ylim(LINES, 0)
    ax.axis("off")
    points = ax.get_window_extent().width * 72 / ax.figure.dpi / width  # width of one character
    size = points / 0.602  # DejaVu Sans Mono's advance, in em
    shade = data.mean_shade
    for number, line in enumerate(shown):
        left, row = (COLUMNS + GAP) * (number // LINES), number % LINES
        for token, column, part in line:
            color = np.asarray(colors(norm(shade[token])))[:3]
            ink = "#10151a" if luminance(color) > 0.19 else "#f6f8fa"
            if column or not part.isspace():  # not the indentation, which belongs to the line break before it
                ax.add_patch(_box(left + column, row, len(part), color))
            ax.text(left + column, row + 0.7, part, fontsize=size, color=ink, family="DejaVu Sans Mono", va="baseline")
    indices = [token for line in shown for token, _, _ in line]
    span = f"tokens {min(indices):,} to {max(indices):,} of {data.tokens:,}" if indices else ""
    count, drop = data.dropping.size, int(data.dropping.sum())
    over = "layers" if data.expiry.shape[1] == 1 else "heads"
    over = f"all {count} {over}" if drop == count else f"the {drop} of {count} {over} that drop"
    title = f"An excerpt ({span}); colour: how long a token's key was kept, mean over {over}"
    ax.set_title(title, loc="left", fontsize=10.5)


def _box(column: int, row: int, width: int, color: np.ndarray) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column + 0.05, row + 0.04), width - 0.1, 0.92, facecolor=color, edgecolor="none")


def _scale(bar: Any, tokens: int) -> None:
    ticks = [10**power for power in range(8) if np.log(10**power) < 0.9 * np.log(tokens)]
    bar.set_ticks([*ticks, tokens], labels=[*(f"{tick:,}" for tick in ticks), "kept to the end"])
    bar.ax.get_xticklabels()[-1].set_ha("right")
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.set_xlabel("lifetime: how many tokens could see it (log scale)", color=GREY, labelpad=2)


def _heat(ax: Axes, data: EvictionMap, colors: Any, norm: Any) -> None:
    layers, units, tokens = data.expiry.shape
    rows = np.log(data.shade.reshape(layers * units, tokens))
    width = max(1, round(tokens / 1000))  # about one column a pixel, each the mean of its tokens on the log scale
    starts = np.arange(0, tokens, width)
    sums = np.add.reduceat(rows, starts, axis=1)
    cells = np.exp(sums / np.diff([*starts, tokens]))
    ax.imshow(cells, aspect="auto", cmap=colors, norm=norm, interpolation="nearest",
              extent=(0, starts[-1] + width, layers * units - 0.5, -0.5))  # fmt: skip
    ax.set_xlim(0, tokens)
    every = max(1, layers // 12)
    ax.set_yticks([layer * units + (units - 1) / 2 for layer in range(0, layers, every)],
                  labels=[str(layer) for layer in range(0, layers, every)])  # fmt: skip
    for layer in range(1, layers):
        ax.axhline(layer * units - 0.5, color="white", linewidth=1.2)
    _frame(ax)
    ax.set_ylabel("layer" + (" (rows: heads)" if units > 1 else ""))
    ax.axvline(data.prompt_tokens, color=ACCENT, linewidth=1.4)
    ax.set_title("All tokens: lifetime of each key, by layer and position", loc="left", fontsize=10.5)
    ax.set_xlabel("position", labelpad=2)


def _pool(ax: Axes, timelines: dict[str, Timeline], prompt_tokens: int) -> None:
    most = max(y for points in timelines.values() for _, y in points)
    for (name, points), color in zip(timelines.items(), ("#2b7a90", "#8a939b"), strict=False):
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=color, linewidth=2.2)
        at = 0.93 * prompt_tokens
        below = y[-1] < most and y[-1] > 0.5 * most  # out of the way of the line above
        height = float(np.interp(0.78 * at if below else at, x, y))  # where the rising line comes closest to the label
        ax.annotate(f"{name}: {y[-1]} at the end", (at, height), xytext=(0, -2 if below else 5), color=color,
                    textcoords="offset points", ha="right", va="top" if below else "bottom",
                    fontweight="bold")  # fmt: skip
    ax.set_ylim(0, most * 1.22)
    ax.set_xlim(0, max(points[-1][0] for points in timelines.values()))
    ax.axvline(prompt_tokens, color=ACCENT, linewidth=1.4)
    ax.annotate("generated from here", (prompt_tokens, 0), xytext=(-5, 4), textcoords="offset points", ha="right",
                fontsize=9, color=ACCENT)  # fmt: skip
    _frame(ax)
    ax.set_title("Blocks held in vLLM's pool after each step", loc="left", fontsize=10.5)
    ax.set_xlabel("tokens computed", labelpad=2)
    ax.set_ylabel("blocks")


def _frame(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(colors=GREY, labelcolor="black")
