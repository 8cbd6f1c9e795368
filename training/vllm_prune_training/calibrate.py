"""``vllm-prune calibrate``: measures what each strength keeps and costs, and stores the table in the checkpoint.

Only config.json is written, by a rename: a reader sees the old file or the new one. Runs outside of vLLM, on the
checkpoint as it is served (its dtype, the hard mask). Dimension letters: N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_prune.calibration import (
    Calibration,
    CalibrationRow,
    gates_digest,
    middle_strength,
    non_increasing,
    safe_strength,
)
from vllm_prune.checkpoint import write_json
from vllm_prune.config import GATE_FILE, MAX_STRENGTH, SECTION, DropGateConfig, read_config_json
from vllm_prune.errors import PruneError

from .held_text import Windows, make_windows, read_texts
from .masked import GatedModel, load_gated
from .sweep import Point, sweep

DEFAULT_STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
DEFAULT_LENGTH = 4096
WIDEST_GAP = 0.1
"""Of kept fractions between neighbouring rows, above which a strength between them is measured too."""

MAX_ROWS = 16
Say = Callable[[str], None]


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of the command.

    Attributes:
        folder: of the gated checkpoint.
        data: held-out text; see ``held_text``.
        length: T; None is the model's, at most ``DEFAULT_LENGTH``.
        strengths: to measure, 0 is added; None measures ``DEFAULT_STRENGTHS`` and what is needed between them.
        tokens: held-out tokens, rounded to whole windows, at least one.
        max_rise: perplexity rise that counts as safe, a fraction.
    """

    folder: Path
    data: Path
    length: int | None = None
    strengths: tuple[float, ...] | None = None
    tokens: int = 16384
    max_rise: float = 0.01


def model_length(config: Any) -> int:
    """T that a model is measured at unless one is given. Raises PruneError when its config names no length."""
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 2:
        raise PruneError("config.json has no max_position_embeddings.", "Give --length.")
    return min(longest, DEFAULT_LENGTH)


def check_length(config: Any, length: int | None) -> int:
    """The length to measure at. Raises PruneError for one that the model has no positions for."""
    if length is None:
        return model_length(config)
    longest = getattr(config, "max_position_embeddings", None)
    if length < 2 or (isinstance(longest, int) and length > longest):
        raise PruneError(
            f"--length {length} does not fit: the model has positions for {longest} tokens.",
            "Choose one from 2 to that.",
        )
    return length


def parse_strengths(text: str) -> tuple[float, ...] | None:
    """Strengths with commas between; None for empty text. Raises PruneError for what is no number."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip()) or None
    except ValueError:
        raise PruneError(f"--strengths {text!r} is no list of numbers.", "Write it like 0.5,1,2.") from None


def check_strengths(strengths: Sequence[float]) -> list[float]:
    """Sorted, without repeats, 0 in front. Raises PruneError when there is none but 0, or one out of range."""
    for strength in strengths:
        if not 0.0 <= strength <= MAX_STRENGTH:
            raise PruneError(f"--strengths {strength:g} must lie in 0..{MAX_STRENGTH:g}.", "1 is as trained.")
    found = sorted({0.0, *strengths})
    if len(found) < 2:
        raise PruneError("--strengths names none but 0, which keeps everything.", "Name one or more above 0.")
    return found


def open_checkpoint(folder: Path) -> tuple[GatedModel, Any]:
    """The gated model as served, and its tokenizer.

    Raises:
        PruneError: no folder, no gated checkpoint, or no tokenizer in it.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise PruneError(f"{folder} is no model folder: it has no config.json.", "Name a gated checkpoint's folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PruneError(f"{folder} has no tokenizer that loads: {error}.", "Copy the base's into it.") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what is made of a folder without tokenizer files
        raise PruneError(f"{folder} has no tokenizer that loads: an empty one.", "Copy the base's into it.")
    gated = load_gated(folder)
    if len(tokenizer) > gated.config.vocab_size and max(tokenizer.get_vocab().values()) >= gated.config.vocab_size:
        raise PruneError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens, the model {gated.config.vocab_size}.",
            "Copy the base's tokenizer into the folder.",
        )
    return gated, tokenizer


def measure_table(
    gated: GatedModel, ids: torch.Tensor, strengths: Sequence[float] | None, say: Say = lambda _: None
) -> list[Point]:
    """Points by strength, the first at 0.

    Args:
        gated: in evaluation mode.
        ids: int64 [N, T].
        strengths: exactly these and 0; None starts from ``DEFAULT_STRENGTHS`` and halves gaps of the kept fraction
            wider than ``WIDEST_GAP``, up to ``MAX_ROWS`` points.
        say: told what is being measured.
    """

    def measure(more: Sequence[float]) -> list[Point]:
        say(f"measuring strengths {', '.join(f'{s:.3g}' for s in more)} on {ids.numel():,} tokens")
        return sweep(gated, ids, more)

    points = measure(check_strengths(DEFAULT_STRENGTHS if strengths is None else strengths))
    while strengths is None and len(points) < MAX_ROWS:
        kept = [point.kept.mean().item() for point in points]
        gaps = sorted(range(len(kept) - 1), key=lambda i: kept[i + 1] - kept[i])  # widest first
        wide = [i for i in gaps if kept[i] - kept[i + 1] > WIDEST_GAP][: MAX_ROWS - len(points)]
        if not wide:
            break
        more = sorted(middle_strength(points[i].strength, points[i + 1].strength) for i in wide)
        points = sorted([*points, *measure(more)], key=lambda point: point.strength)
    return points


def build_table(
    points: Sequence[Point], windows: Windows, gates_sha256: str, dtype: str, max_rise: float
) -> Calibration:
    """The table of measured points, with kept and live fractions made monotone."""
    kept = [point.kept.mean().item() for point in points]
    live = [point.live.mean().item() for point in points]
    smooth, smooth_live = non_increasing(kept), non_increasing(live)
    smooth[0] = smooth_live[0] = 1.0
    lengths = tuple(points[0].shorter)
    shorter = [non_increasing([point.shorter[t] for point in points]) for t in lengths]
    noise = max(abs(a - b) for a, b in zip([*kept, *live], [*smooth, *smooth_live], strict=True))
    length = windows.ids.shape[1]
    rows = tuple(
        CalibrationRow(
            strength=point.strength, kept=round(k, 6), live=round(v, 6), ppl=round(point.ppl, 6),
            kl=round(point.kl, 6), length=length, shorter=[round(kept_at[i], 6) for kept_at in shorter],
        )
        for i, (point, k, v) in enumerate(zip(points, smooth, smooth_live, strict=True))
    )  # fmt: skip
    safe = safe_strength([point.strength for point in points], [point.ppl for point in points], max_rise)
    return Calibration(
        length=length, lengths=lengths, tokens=windows.ids.numel(), data_sha256=windows.sha256,
        gates_sha256=gates_sha256, dtype=dtype, max_rise=max_rise, safe_strength=safe, noise=round(noise, 6), rows=rows,
    )  # fmt: skip


def section_at(folder: Path) -> DropGateConfig:
    """The ``drop_gate`` section as it stands in the folder's config.json, already checked by a load."""
    return DropGateConfig.model_validate(read_config_json(str(folder))[SECTION])


def store_table(folder: Path, table: Calibration) -> None:
    """Write the table into config.json, atomically, with the ``expected_keep`` of the checkpoint's own strength.

    Raises:
        PruneError: the folder cannot be written; config.json is as before.
    """
    config = read_config_json(str(folder))
    strength = config[SECTION].get("strength", 1.0)
    config[SECTION]["calibration"] = table.model_dump(mode="json")
    config[SECTION]["expected_keep"] = round(table.keep_at(strength), 6)
    try:
        write_json(folder / "config.json", config)
    except OSError as error:
        raise PruneError(f"config.json of {folder} cannot be written: {error}.", "Nothing was changed.") from None


def calibrate(options: CalibrateOptions, say: Say = lambda _: None) -> Calibration:
    """Measure and store; returns the table.

    Raises:
        PruneError: the checkpoint, the data or an option is unusable; nothing was changed.
    """
    if options.tokens < 2:
        raise PruneError(f"--tokens must be at least 2, got {options.tokens}.", "Some thousands give steady numbers.")
    if not 0.0 <= options.max_rise < float("inf"):
        raise PruneError(f"--max-rise must be a fraction, 0 or more, got {options.max_rise}.", "0.01 is 1 %.")
    strengths = None if options.strengths is None else check_strengths(options.strengths)
    texts = read_texts(options.data)
    gated, tokenizer = open_checkpoint(options.folder)
    length = check_length(gated.config, options.length)
    windows = make_windows(texts, tokenizer, length, max(length, options.tokens))
    say(f"{len(windows.ids)} windows of {length} tokens from {len(texts)} documents")
    digest = gates_digest(options.folder / GATE_FILE, section_at(options.folder).model_dump())
    points = measure_table(gated, windows.ids, strengths, say)
    dtype = str(gated.model.dtype).removeprefix("torch.")
    table = build_table(points, windows, digest, dtype, options.max_rise)
    store_table(options.folder, table)
    return table


def describe(table: Calibration) -> str:
    """The table as aligned text, and what it means for a user."""
    head = f"{'strength':>9} {'kept':>7} {'live':>7} {'perplexity':>11} {'KL, nats':>9}"
    rows = [f"{r.strength:9.3g} {r.kept:7.3f} {r.live:7.3f} {r.ppl:11.3f} {r.kl:9.4f}" for r in table.rows]
    low, high = table.keep_range
    safe = f"safe up to strength {table.safe_strength:.3g} (keeps {table.keep_at(table.safe_strength):.3f}): "
    return "\n".join([
        head, *rows,
        f"{safe}perplexity rises by at most {100 * table.max_rise:g} %",
        f"keep can be {low:.3f} to {high:g}, at {table.length} tokens",
    ])  # fmt: skip
