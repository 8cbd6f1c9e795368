"""Compiled per-layer steps on lanes: what happens before attention for decodes, and for prefill chunks (numba).

Each decode step drops, then appends the new token; each has its naive twin in ``cache.reference``. Shapes use the
letters of ``lane_ops``; T tokens of the batch, C tokens of one chunk, R decode rows.
"""

from __future__ import annotations

import numba
import numpy as np

from vllm_prune.cache.lane_ops import (
    NEVER,
    append,
    drop,
    drop_by_query,
    drop_expired,
    mark_newest,
    score_page,
    widen,
)


@numba.njit(cache=True, nogil=True)
def decode_open(a, d, layer, slots, rows, positions, key, value, features):
    """Gates open: append one token per row. slots, rows, positions int32 [R]; key, value raw bits [T, H, D];
    features raw bits [T, F] (its last r are remembered, if r > 0)."""
    for i in range(slots.shape[0]):
        t = rows[i]
        remembered = features[t, features.shape[1] - d.r :]
        for unit in range(d.units):
            append(a, d, slots[i], layer, unit, positions[i], NEVER, key[t], value[t], remembered)


@numba.njit(cache=True, nogil=True)
def decode_by_query(a, d, layer, slots, rows, positions, key, value, features, scale, bias, sinks, window):
    """DCP: features raw bits [T, 2r] are (q', k'). The query drops first, then joins the lane."""
    q = np.empty(d.r, np.float32)
    for i in range(slots.shape[0]):
        t, s = rows[i], slots[i]
        widen(features[t, : d.r], d.shift, q)
        drop_by_query(a, d, s, layer, positions[i], q, scale, bias, sinks, window)
        append(a, d, s, layer, 0, positions[i], NEVER, key[t], value[t], features[t, d.r :])


@numba.njit(cache=True, nogil=True)
def decode_delayed(a, d, layer, slots, rows, positions, key, value, features, threshold, delay, sinks):
    """DMS: features raw bits [T, H] are logits. Token n decides about key n - 1, then expired keys go, then n joins."""
    logits = np.empty(features.shape[1], np.float32)
    for i in range(slots.shape[0]):
        t, s, now = rows[i], slots[i], positions[i]
        widen(features[t], d.shift, logits)
        for unit in range(d.units):
            if now > 0 and logits[unit] > threshold:
                mark_newest(a, d, s, layer, unit, now + delay, sinks)
            drop_expired(a, d, s, layer, unit, now)
            append(a, d, s, layer, unit, now, NEVER, key[t], value[t], features[t, :0])


@numba.njit(cache=True, nogil=True)
def chunk_expiry_by_query(a, d, s, layer, start, features, scale, bias, sinks, window, past, chunk):
    """First crossing over the queries of a chunk, for the live keys of a request and for the chunk's own.

    start: position of the chunk's first token; features raw bits [C, 2r]. Writes past int32 [P live keys] and
    chunk int32 [C]: position of the first query that drops the key, NEVER if none. Nothing is dropped here.
    A page is left as soon as all its keys have crossed.
    """
    c = features.shape[0]
    q = np.empty((c, d.r), np.float32)
    k = np.empty((c, d.r), np.float32)
    for i in range(c):
        widen(features[i, : d.r], d.shift, q[i])
        widen(features[i, d.r :], d.shift, k[i])
    past[:] = NEVER
    chunk[:] = NEVER
    lane = layer * d.per_layer + d.H
    length = a.length[s, lane]
    bits, acc = np.empty(d.Ng, np.uint32), np.empty(d.Ng, np.float32)
    for index in range((length + d.Ng - 1) // d.Ng):
        base = index * d.Ng
        live = min(d.Ng, length - base)
        left = live
        for i in range(c):
            score_page(a, d, a.table[s, lane, index], live, q[i], scale, bias, bits, acc)
            for j in range(live):
                if acc[j] <= 0 and past[base + j] == NEVER:
                    key = base + j
                    p = a.pos[a.table[s, layer * d.per_layer, key // d.N], key % d.N]
                    if p >= sinks and start + i - p > window:
                        past[key] = start + i
                        left -= 1
            if left == 0:
                break
    kt = np.ascontiguousarray(k.T)
    own = np.empty(c, np.float32)
    for i in range(1, c):
        own[:i] = np.float32(0)
        for x in range(d.r):
            qx = q[i, x]
            for j in range(i):
                own[j] += qx * kt[x, j]
        for j in range(i):
            if own[j] * scale + bias <= 0 and chunk[j] == NEVER and start + j >= sinks and i - j > window:
                chunk[j] = start + i


@numba.njit(cache=True, nogil=True)
def chunk_expiry_delayed(a, d, s, layer, start, features, threshold, delay, sinks, past, chunk):
    """DMS decisions of a chunk. Marks the newest past key, then writes past int32 [H, P max] and chunk int32 [H, C]
    with expiries (NEVER where none). Nothing is dropped here."""
    c = features.shape[0]
    logits = np.empty((c, features.shape[1]), np.float32)
    for i in range(c):
        widen(features[i], d.shift, logits[i])
    for unit in range(d.units):
        if start > 0 and logits[0, unit] > threshold:
            mark_newest(a, d, s, layer, unit, start + delay, sinks)
        lane = layer * d.per_layer + unit
        for i in range(a.length[s, lane]):
            past[unit, i] = a.exp[a.table[s, lane, i // d.N], i % d.N]
        for i in range(c):
            chunk[unit, i] = NEVER
            if i + 1 < c and logits[i + 1, unit] > threshold and start + i >= sinks:
                chunk[unit, i] = start + i + 1 + delay


@numba.njit(cache=True, nogil=True)
def settle_chunk(a, d, s, layer, start, dead_at, past, chunk, key, value, features):
    """After a chunk's expiries are known: drop past keys with expiry <= dead_at, append the chunk's other tokens.

    past int32 [E, P max], chunk int32 [E, C]; key, value raw bits [C, H, D]; features raw bits [C, F].
    """
    for unit in range(d.units):
        lane = layer * d.per_layer + unit if d.units > 1 else layer * d.per_layer
        length = a.length[s, lane]
        victims, when = np.empty(length, np.int32), np.empty(length, np.int32)
        count = 0
        for i in range(length):
            if past[unit, i] <= dead_at:
                victims[count] = i
                when[count] = past[unit, i]
                count += 1
        if count > 0:
            drop(a, d, s, layer, unit, victims, count, when)
        for i in range(chunk.shape[1]):
            if chunk[unit, i] <= dead_at:
                a.dropped[s, layer, unit] += 1
                if a.events.shape[0] > 0:
                    e = a.n_events[0]
                    a.events[e, 0] = s
                    a.events[e, 1] = layer * d.units + unit
                    a.events[e, 2] = start + i
                    a.events[e, 3] = chunk[unit, i]
                    a.n_events[0] = e + 1
            else:
                remembered = features[i, features.shape[1] - d.r :]
                append(a, d, s, layer, unit, start + i, chunk[unit, i], key[i], value[i], remembered)
