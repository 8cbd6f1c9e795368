"""Compiled inner loops over lanes, for the CPU worker (numba). The naive twin is ``cache.reference``.

All functions work on views of the worker's arrays (``Lanes``) and of the KV cache, whose numbers are moved as raw bits:
``kv`` is [P pages, 2 N D] of uint16 (bfloat16) or uint32 (float32). A K/V page holds K transposed, [D, N], then V, [N, D]:
vLLM's ``vec`` CPU format. A gate page holds gate keys transposed, [r, Ng]. Letters: S request slots, W pages a lane,
P pages in all, N tokens a page, Ng tokens a gate page, D head size, r gate rank.

Lanes of one eviction unit (all KV heads of a layer and its gate lane, or one KV head) hold the same tokens at the same
indices. The newest token of a request is always the last of its lane.
"""

from __future__ import annotations

from collections import namedtuple

import numba
import numpy as np

NEVER = np.int32(2**31 - 1)

Lanes = namedtuple("Lanes", "kv table length free n_free page_lane page_index pos exp dropped events n_events")
"""kv; table int32 [S, lanes, W]; length int32 [S, lanes]; free int32 [S, F] stack of free pages; n_free int32 [S];
page_lane, page_index int32 [P] owner of each page (-1 free); pos, exp int32 [P, N] position and expiry of each slot, kept
for the first lane of each unit; dropped int64 [S, L, E]; events int32 [cap, 4] of (slot, layer * E + unit, key, expiry)
and its length n_events int64 [1]; cap 0 records nothing."""

Dims = namedtuple("Dims", "H N D r Ng per_layer shift units")
"""H KV heads; N, D, r, Ng as above; per_layer lanes a layer; shift 16 for bfloat16, 0 for float32; units E."""


@numba.njit(cache=True, nogil=True, inline="always")
def _page_tokens(d, h):
    return d.Ng if h == d.H else d.N


@numba.njit(cache=True, nogil=True)
def _take_page(a, s, lane, index):
    n = a.n_free[s] - 1
    if n < 0:
        raise RuntimeError("vllm-prune: a request ran out of granted pages (a bug in page accounting)")
    page = a.free[s, n]
    a.n_free[s] = n
    a.table[s, lane, index] = page
    a.page_lane[page] = lane
    a.page_index[page] = index


@numba.njit(cache=True, nogil=True)
def _give_page(a, s, lane, index):
    page = a.table[s, lane, index]
    a.page_lane[page] = -1
    a.free[s, a.n_free[s]] = page
    a.n_free[s] += 1


@numba.njit(cache=True, nogil=True)
def _move(a, d, s, lane, h, dst, src):
    """Copy one token of one lane from index src to dst."""
    n = _page_tokens(d, h)
    p, o = a.table[s, lane, dst // n], dst % n
    q, u = a.table[s, lane, src // n], src % n
    if h == d.H:
        for i in range(d.r):
            a.kv[p, i * n + o] = a.kv[q, i * n + u]
        return
    base = n * d.D
    for i in range(d.D):
        a.kv[p, i * n + o] = a.kv[q, i * n + u]
    for i in range(d.D):
        a.kv[p, base + o * d.D + i] = a.kv[q, base + u * d.D + i]


@numba.njit(cache=True, nogil=True)
def _unit_lanes(d, layer, unit):
    """First and one-past-last head index of a unit's lanes within its layer (index H is the gate lane)."""
    if d.units == 1:
        return 0, d.per_layer
    return unit, unit + 1


@numba.njit(cache=True, nogil=True)
def drop(a, d, s, layer, unit, victims, count, when):
    """Remove the tokens at indices victims[:count] (ascending) from a unit's lanes; keep the lanes dense.

    when: expiry to record for each victim, int32 [count].
    """
    h0, h1 = _unit_lanes(d, layer, unit)
    first = layer * d.per_layer + h0
    old = a.length[s, first]
    length = old
    for v in range(count - 1, -1, -1):
        i = victims[v]
        page, off = a.table[s, first, i // d.N], i % d.N
        if a.events.shape[0] > 0:
            e = a.n_events[0]
            a.events[e, 0] = s
            a.events[e, 1] = layer * d.units + unit
            a.events[e, 2] = a.pos[page, off]
            a.events[e, 3] = when[v]
            a.n_events[0] = e + 1
        length -= 1
        if i != length:
            for h in range(h0, h1):
                _move(a, d, s, layer * d.per_layer + h, h, i, length)
            last, lo = a.table[s, first, length // d.N], length % d.N
            a.pos[page, off] = a.pos[last, lo]
            a.exp[page, off] = a.exp[last, lo]
    for h in range(h0, h1):
        lane, n = layer * d.per_layer + h, _page_tokens(d, h)
        for index in range((old + n - 1) // n - 1, (length + n - 1) // n - 1, -1):
            _give_page(a, s, lane, index)
        a.length[s, lane] = length
    a.dropped[s, layer, unit] += count


@numba.njit(cache=True, nogil=True)
def append(a, d, s, layer, unit, position, expiry, key, value, gate_key):
    """Write one token at the end of a unit's lanes.

    key, value: raw bits [H, D]; gate_key: raw bits [r] (ignored where the gate remembers nothing).
    """
    h0, h1 = _unit_lanes(d, layer, unit)
    first = layer * d.per_layer + h0
    i = a.length[s, first]
    for h in range(h0, h1):
        lane, n = layer * d.per_layer + h, _page_tokens(d, h)
        if i % n == 0:
            _take_page(a, s, lane, i // n)
        page, off = a.table[s, lane, i // n], i % n
        if h == d.H:
            for x in range(d.r):
                a.kv[page, x * n + off] = gate_key[x]
        else:
            base = n * d.D
            for x in range(d.D):
                a.kv[page, x * n + off] = key[h, x]
            for x in range(d.D):
                a.kv[page, base + off * d.D + x] = value[h, x]
        a.length[s, lane] = i + 1
    page = a.table[s, first, i // d.N]
    a.pos[page, i % d.N] = position
    a.exp[page, i % d.N] = expiry


@numba.njit(cache=True, nogil=True)
def widen(bits, shift, out):
    """Raw bits of bfloat16 (shift 16) or float32 (shift 0) to float32, any 1-D length."""
    u = np.empty(bits.shape[0], np.uint32)
    for i in range(bits.shape[0]):
        u[i] = np.uint32(bits[i]) << np.uint32(shift)
    f = u.view(np.float32)
    for i in range(bits.shape[0]):
        out[i] = f[i]


@numba.njit(cache=True, nogil=True)
def score_page(a, d, page, count, q, scale, bias, bits, acc):
    """s of one query against the first ``count`` gate keys of a page, summed over r in a fixed order, whoever calls.

    q: float32 [r]; bits: uint32 [Ng] scratch; acc: float32 [Ng], the result.
    """
    f = bits.view(np.float32)
    for i in range(count):
        acc[i] = np.float32(0)
    for x in range(d.r):
        row = a.kv[page, x * d.Ng : x * d.Ng + count]
        for i in range(count):
            bits[i] = np.uint32(row[i]) << np.uint32(d.shift)
        qx = q[x]
        for i in range(count):
            acc[i] += qx * f[i]
    for i in range(count):
        acc[i] = acc[i] * scale + bias


@numba.njit(cache=True, nogil=True)
def drop_by_query(a, d, s, layer, position, q, scale, bias, sinks, window):
    """DCP at one query: drop every live, unprotected key whose score is <= 0. Returns how many."""
    gate_lane = layer * d.per_layer + d.H
    length = a.length[s, gate_lane]
    victims = np.empty(length, np.int32)
    bits, acc = np.empty(d.Ng, np.uint32), np.empty(d.Ng, np.float32)
    count = 0
    for index in range((length + d.Ng - 1) // d.Ng):
        base = index * d.Ng
        live = min(d.Ng, length - base)
        score_page(a, d, a.table[s, gate_lane, index], live, q, scale, bias, bits, acc)
        for i in range(live):
            if acc[i] <= 0:
                if sinks > 0 or window > 0:
                    k = base + i
                    p = a.pos[a.table[s, layer * d.per_layer, k // d.N], k % d.N]
                    if p < sinks or position - p <= window:
                        continue
                victims[count] = base + i
                count += 1
    if count > 0:
        when = np.full(count, position, np.int32)
        drop(a, d, s, layer, 0, victims, count, when)
    return count


@numba.njit(cache=True, nogil=True)
def drop_expired(a, d, s, layer, unit, now):
    """Drop every key of a unit whose expiry is <= now. Returns how many."""
    lane = layer * d.per_layer + unit
    length = a.length[s, lane]
    victims, when = np.empty(length, np.int32), np.empty(length, np.int32)
    count = 0
    for index in range((length + d.N - 1) // d.N):
        row = a.exp[a.table[s, lane, index]]
        for i in range(min(d.N, length - index * d.N)):
            if row[i] <= now:
                victims[count] = index * d.N + i
                when[count] = row[i]
                count += 1
    if count > 0:
        drop(a, d, s, layer, unit, victims, count, when)
    return count


@numba.njit(cache=True, nogil=True)
def mark_newest(a, d, s, layer, unit, expiry, sinks):
    """Set the expiry of the newest key of a unit (the decision of token j + 1 about key j), unless it is a sink."""
    lane = layer * d.per_layer + unit
    i = a.length[s, lane] - 1
    if i >= 0:
        page = a.table[s, lane, i // d.N]
        if a.pos[page, i % d.N] >= sinks:
            a.exp[page, i % d.N] = expiry


@numba.njit(cache=True, nogil=True)
def fill_tables(a, d, slots, layer, tables, lengths):
    """Block table and length of every K/V lane of a layer, as vLLM's kernel wants them.

    slots int32 [R]; tables int32 [R * H, W'], lengths int32 [R * H] are written.
    """
    for r in range(slots.shape[0]):
        s = slots[r]
        for h in range(d.H):
            lane = layer * d.per_layer + h
            n = a.length[s, lane]
            lengths[r * d.H + h] = n
            for i in range((n + d.N - 1) // d.N):
                tables[r * d.H + h, i] = a.table[s, lane, i]


@numba.njit(cache=True, nogil=True)
def summarize(a, d, slots, num_layers, out):
    """Per slot, int64 [R, 5]: head-pages in use now, after 1 and after 2 more tokens kept everywhere, keys held and keys
    dropped (both summed over layers and units)."""
    for r in range(slots.shape[0]):
        s = slots[r]
        out[r] = 0
        for layer in range(num_layers):
            for h in range(d.per_layer):
                n = _page_tokens(d, h)
                length = a.length[s, layer * d.per_layer + h]
                for more in range(3):
                    out[r, more] += (length + more + n - 1) // n
                if h < d.units:
                    out[r, 3] += length
            for unit in range(d.units):
                out[r, 4] += a.dropped[s, layer, unit]
