"""First crossing, for gates that decide by query (DCP): the first query whose score with a key is not above 0 drops it.

    expiry_j = min { n > j : <q'_n, k'_j> * scale + bias <= 0 },   only n with n - j > window, never for j < sinks

Past keys' k' lie in gate lanes, their expiries are lowered there; those of the step's own tokens come with the features and go to
``chunk``. Products are of whole tiles whatever the step's length, so that a score does not depend on chunking. A program stops
once all its keys are crossed. ``crossing_naive`` is the twin. Letters as in ``lanes``; R rows, T tokens, C of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import INTERPRETED, NEVER, Lanes
from .narrow import gate_view
from .rows import Rows
from .spared import is_spared, spared_naive

KEYS = 64


@triton.jit
def _first(q0, k, born, may, begin, count, start, scale, bias, window, stride, R: tl.constexpr, WIDE: tl.constexpr,
           QUERIES: tl.constexpr, WIDEN: tl.constexpr, NEVER: tl.constexpr):  # fmt: skip
    """First crossing of keys k [WIDE, KEYS] born at ``born``, over queries begin .. count - 1 of a row; NEVER unless ``may``."""
    x = tl.arange(0, WIDE)
    found = tl.zeros_like(born) + NEVER
    at = begin
    while at < count:
        i = at + tl.arange(0, QUERIES)
        q = tl.load(
            q0 + i[:, None].to(tl.int64) * stride + x[None, :], mask=(i < count)[:, None] & (x < R)[None, :], other=0.0
        )
        if WIDEN:
            q = q.to(tl.float32)
        n = start + i
        score = tl.dot(q, k, input_precision="ieee") * scale + bias
        drops = (score <= 0.0) & (i < count)[:, None] & (n[:, None] - born[None, :] > window) & may[None, :]
        found = tl.minimum(found, tl.min(tl.where(drops, n[:, None], NEVER), 0))
        at = tl.where(tl.max(found, 0) == NEVER, at + QUERIES, count)
    return found


@triton.jit(do_not_specialize=["layer"])
def _crossing(
    table, length, position, expiry, gates, row_slot, first, row_start, features, chunk, biases, shift, spared, n_spared, scale,
    sinks, window, layer, stride, lanes, W, total,
    PER_LAYER: tl.constexpr, H: tl.constexpr, E: tl.constexpr, N: tl.constexpr, NG: tl.constexpr, PAGE: tl.constexpr,
    R: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, SPLITS: tl.constexpr,
    WIDEN: tl.constexpr, NEVER: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row, unit = tl.program_id(0), tl.program_id(1)
    slot = tl.load(row_slot + row).to(tl.int64)
    if slot < 0:
        return
    begin = tl.load(first + row)
    count = tl.load(first + row + 1) - begin
    start = tl.load(row_start + row)
    bias = tl.load(biases + unit) + tl.load(shift + slot)
    lane = slot * lanes + layer * PER_LAYER + unit
    past = tl.load(length + lane)
    gate = slot * lanes + layer * PER_LAYER + H + unit
    x, o = tl.arange(0, WIDE), tl.arange(0, KEYS)
    q0 = features + begin.to(tl.int64) * stride + unit * R
    k0 = features + begin.to(tl.int64) * stride + (E + unit) * R
    tiles = (past + KEYS - 1) // KEYS
    for tile in range(tl.program_id(2), tiles + (count + KEYS - 1) // KEYS, SPLITS):
        if tile < tiles:
            j = tile * KEYS + o
            ok = j < past
            page = tl.load(table + gate * W + j // NG, mask=ok, other=0).to(tl.int64)
            k = tl.load(
                gates + (page * PAGE + (j % NG) * R)[None, :] + x[:, None],
                mask=ok[None, :] & (x < R)[:, None],
                other=0.0,
            )
            if WIDEN:
                k = k.to(tl.float32)
            at = tl.load(table + lane * W + j // N, mask=ok, other=0).to(tl.int64) * N + j % N
            born = tl.load(position + at, mask=ok, other=-1)
            may = ok & ~is_spared(spared, n_spared, slot, born, sinks, ok, WORDS)
            found = _first(
                q0, k, born, may, 0, count, start, scale, bias, window, stride, R, WIDE, QUERIES, WIDEN, NEVER
            )
            old = tl.load(expiry + at, mask=ok, other=0)
            tl.store(expiry + at, tl.minimum(found, old), mask=ok & (found < old))
        else:
            j = (tile - tiles) * KEYS + o
            ok = j < count
            k = tl.load(
                k0 + j[None, :].to(tl.int64) * stride + x[:, None], mask=ok[None, :] & (x < R)[:, None], other=0.0
            )
            if WIDEN:
                k = k.to(tl.float32)
            # window >= 0: no key is judged by itself or by an earlier query
            may = ok & ~is_spared(spared, n_spared, slot, start + j, sinks, ok, WORDS)
            found = _first(q0, k, start + j, may, (tile - tiles) * KEYS, count, start, scale, bias, window, stride, R, WIDE,
                           QUERIES, WIDEN, NEVER)  # fmt: skip
            tl.store(chunk + unit * total + begin + j, found, mask=ok)


def crossing(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, features: torch.Tensor, chunk: torch.Tensor, scale: float,
    biases: torch.Tensor, sinks: int, window: int, splits: int, most_tokens: int,
) -> None:  # fmt: skip
    """Expiries that the step's queries give to live keys (in ``lanes.expiry``) and to the step's own keys.

    Args:
        kv: [P, 2 N D], the cache.
        rows: of the step; ``layer``: 0 to L - 1.
        features: [T, 2 E r], q' of each unit, then k' of each.
        chunk: int32 [E, T], filled for tokens of rows.
        scale: of the dot products; biases: float32 [E], to which each request's shift comes.
        sinks, window: protected keys, in tokens.
        splits: programs a row and unit.
        most_tokens: the most tokens a row has.
    """
    s = lanes.sizes
    if rows.count == 0:
        return
    gates, rank = gate_view(s, kv, features.dtype)
    if features.stride(-1) != 1 or features.shape[-1] != 2 * s.units * rank:
        raise ValueError(f"features must be [T, {2 * s.units * rank}] with dense rows, got {list(features.shape)}")
    _crossing[(rows.count, s.units, splits)](
        lanes.table, lanes.length, lanes.position, lanes.expiry, gates, rows.slot, rows.first, rows.start, features, chunk,
        biases, lanes.shift, lanes.spared, lanes.n_spared, scale, sinks, window, layer, features.stride(0), s.lanes, s.width,
        chunk.shape[1],
        PER_LAYER=s.per_layer, H=s.heads, E=s.units, N=s.page_tokens, NG=s.gate_page_tokens, PAGE=gates.shape[1],
        R=rank, WIDE=max(16, triton.next_power_of_2(rank)), KEYS=KEYS, QUERIES=16 if most_tokens == 1 else 64,
        SPLITS=splits, WIDEN=INTERPRETED, NEVER=NEVER, WORDS=s.words,
    )  # fmt: skip


def crossing_naive(
    lanes: Lanes, kv: torch.Tensor, rows: Rows, layer: int, features: torch.Tensor, chunk: torch.Tensor, scale: float,
    biases: torch.Tensor, sinks: int, window: int,
) -> None:  # fmt: skip
    """``crossing``, key by key. Arguments as there."""
    s = lanes.sizes
    gates, rank = gate_view(s, kv, features.dtype)
    for row, slot in enumerate(rows.slot.tolist()):
        if slot < 0:
            continue
        begin, end, start = int(rows.first[row]), int(rows.first[row + 1]), int(rows.start[row])
        for unit in range(s.units):
            q = features[begin:end, unit * rank : (unit + 1) * rank].float()
            own = features[begin:end, (s.units + unit) * rank : (s.units + unit + 1) * rank].float()
            bias = float(biases[unit] + lanes.shift[slot])
            lane = layer * s.per_layer + unit
            places = [place(lanes, slot, lane, j) for j in range(int(lanes.length[slot, lane]))]
            keys = [
                (int(lanes.position[at]), gate_key(lanes, gates, slot, layer, unit, j)) for j, at in enumerate(places)
            ]
            keys += [(start + i, own[i]) for i in range(end - begin)]
            for index, (born, k) in enumerate(keys):
                found = NEVER
                for i in range(end - begin):
                    n = start + i
                    if (
                        n - born > window
                        and not spared_naive(lanes, slot, born, sinks)
                        and float(q[i] @ k) * scale + bias <= 0.0
                    ):
                        found = n
                        break
                if index < len(places):
                    lanes.expiry[places[index]] = min(found, int(lanes.expiry[places[index]]))
                else:
                    chunk[unit, begin + index - len(places)] = found


def place(lanes: Lanes, slot: int, lane: int, index: int) -> tuple[int, int]:
    """Page and offset of a token of a K/V lane."""
    n = lanes.sizes.page_tokens
    return int(lanes.table[slot, lane, index // n]), index % n


def gate_key(lanes: Lanes, gates: torch.Tensor, slot: int, layer: int, unit: int, index: int) -> torch.Tensor:
    """k' [r] of a token, float32. gates: see ``gate_pages``."""
    s = lanes.sizes
    page = int(lanes.table[slot, layer * s.per_layer + s.heads + unit, index // s.gate_page_tokens])
    rank = s.gate_rank * gates.shape[1] // s.page_numbers
    at = index % s.gate_page_tokens * rank
    return gates[page, at : at + rank].float()
