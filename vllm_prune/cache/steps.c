/* What happens to lanes before (decode) and around (prefill chunk) attention in one layer. The naive twin is reference.py.
 *
 * by query (DCP): score = dot(q', k') * scale + bias of its unit, key dropped iff score <= 0, by the query's own position.
 * delayed (DMS): logit of token n > threshold gives key n - 1 the expiry n + delay, or its own key n + 1 + delay.
 * at write (window, random): key j gets the expiry j + 1 + delay unless a hash of its position lies below a limit.
 * Sums run over r in one fixed order and without contraction, so that chunking cannot change a decision.
 */
#include <stdlib.h>
#include <string.h>
#include "lanes.h"

#define BLOCK 64

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FAST
#endif

/* Scores of one query against up to BLOCK keys, kt [r, BLOCK]. */
FAST static void score_block(const float *restrict kt, const float *restrict q, int64_t r, float scale, float bias, float *restrict out) {
    for (int64_t i = 0; i < BLOCK; i++) out[i] = 0.0f;
    for (int64_t x = 0; x < r; x++) {
        const float qx = q[x];
        const float *restrict k = kt + x * BLOCK;
        for (int64_t i = 0; i < BLOCK; i++) out[i] += qx * k[i];
    }
    for (int64_t i = 0; i < BLOCK; i++) out[i] = out[i] * scale + bias;
}

static inline float widen(const Store *a, const void *base, int64_t i) {
    union { uint32_t u; float f; } x;
    x.u = a->elem == 2 ? (uint32_t)((const uint16_t *)base)[i] << 16 : ((const uint32_t *)base)[i];
    return x.f;
}

FAST static void widen16(const uint16_t *restrict in, uint32_t *restrict out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = (uint32_t)in[i] << 16;
}

static const void *feature(const Store *a, const Tokens *t, int64_t token, int64_t at) {
    return (const char *)t->features + (token * t->feature_stride + at) * a->elem;
}

/* Gate keys [first, first + count) of a lane as floats, kt [r, BLOCK]; they lie within one page. */
static void load_gate_keys(const Store *a, int64_t s, int64_t lane, int64_t first, int64_t count, float *kt) {
    const int64_t page = row_of(a, s, lane)[first / a->Ng], off = first % a->Ng;
    const char *base = (const char *)a->kv + page * 2 * a->N * a->D * a->elem;
    for (int64_t x = 0; x < a->r; x++) {
        const char *in = base + (x * a->Ng + off) * a->elem;
        if (a->elem == 2) widen16((const uint16_t *)in, (uint32_t *)(kt + x * BLOCK), count);
        else memcpy(kt + x * BLOCK, in, sizeof(float) * count);
        for (int64_t i = count; i < BLOCK; i++) kt[x * BLOCK + i] = 0.0f;
    }
}

static int64_t block_in_page(const Store *a, int64_t first, int64_t length) {
    int64_t n = a->Ng - first % a->Ng;
    if (n > BLOCK) n = BLOCK;
    return n < length - first ? n : length - first;
}

static int32_t position_of(const Store *a, int64_t s, int64_t lane, int64_t i) {
    return a->pos[row_of(a, s, lane)[i / a->N] * a->N + i % a->N];
}

static void load_row(const Store *a, const Tokens *t, int64_t token, int64_t at, int64_t n, float *out) {
    const void *in = feature(a, t, token, at);
    for (int64_t x = 0; x < n; x++) out[x] = widen(a, in, x);
}

/* Drops the keys of a unit whose expiry has come. */
static int drop_expired(const Store *a, int64_t s, int64_t layer, int64_t unit, int32_t now) {
    const int64_t lane = layer * a->per_layer + unit, length = *length_of(a, s, lane);
    int32_t *victims = malloc(sizeof(int32_t) * (2 * length + 2)), *when = victims + length + 1;
    if (!victims) return OUT_OF_MEMORY;
    int64_t count = 0;
    for (int64_t j = 0; j < length; j++) {
        const int32_t e = a->exp[row_of(a, s, lane)[j / a->N] * a->N + j % a->N];
        if (e <= now) {
            victims[count] = (int32_t)j;
            when[count++] = e;
        }
    }
    const int error = lanes_drop(a, s, layer, unit, victims, when, count);
    free(victims);
    return error;
}

static int append_one(const Store *a, int64_t s, int64_t layer, int64_t unit, int32_t position, const Tokens *t, int64_t token) {
    const int32_t expiry = NEVER;
    return lanes_append(a, s, layer, unit, position, &expiry, 0, t, token, 1);
}

int steps_decode_open(const Store *a, int64_t layer, int64_t rows, const int32_t *slots, const int32_t *first, const int32_t *positions, const Tokens *t) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t unit = 0; unit < a->units; unit++)
            if (append_one(a, slots[i], layer, unit, positions[i], t, first[i])) return OUT_OF_PAGES;
    return 0;
}

int steps_decode_by_query(const Store *a, int64_t layer, int64_t rows, const int32_t *slots, const int32_t *first, const int32_t *positions,
                          const Tokens *t, float scale, const float *biases, int32_t sinks, int32_t window) {
    int64_t most = 1;
    for (int64_t i = 0; i < rows * a->units; i++) {
        const int64_t n = *length_of(a, slots[i / a->units], gate_lane_of(a, layer, i % a->units));
        if (n > most) most = n;
    }
    int32_t *victims = malloc(sizeof(int32_t) * 2 * most), *when = victims + most;
    float *kt = malloc(sizeof(float) * a->r * (BLOCK + 1)), *q = kt + a->r * BLOCK;
    float out[BLOCK];
    int error = victims && kt ? 0 : OUT_OF_MEMORY;
    for (int64_t iu = 0; iu < rows * a->units && !error; iu++) {
        const int64_t i = iu / a->units, unit = iu % a->units, s = slots[i];
        const int64_t gate_lane = gate_lane_of(a, layer, unit), kv_lane = layer * a->per_layer + unit;
        const int64_t length = *length_of(a, s, gate_lane);
        int64_t count = 0, n;
        load_row(a, t, first[i], unit * a->r, a->r, q);
        for (int64_t base = 0; base < length; base += n) {
            n = block_in_page(a, base, length);
            load_gate_keys(a, s, gate_lane, base, n, kt);
            score_block(kt, q, a->r, scale, biases[unit], out);
            for (int64_t j = 0; j < n; j++) {
                if (out[j] > 0.0f) continue;
                if (sinks > 0 || window > 0 || a->n_spared[s]) {
                    const int32_t p = position_of(a, s, kv_lane, base + j);
                    if (is_spared(a, s, p, sinks) || positions[i] - p <= window) continue;
                }
                victims[count] = (int32_t)(base + j);
                when[count++] = positions[i];
            }
        }
        error = lanes_drop(a, s, layer, unit, victims, when, count);
        if (!error) error = append_one(a, s, layer, unit, positions[i], t, first[i]);
    }
    free(victims);
    free(kt);
    return error;
}

static void mark_newest(const Store *a, int64_t s, int64_t lane, int32_t expiry, int32_t sinks) {
    const int64_t i = *length_of(a, s, lane) - 1;
    if (i < 0) return;
    const int64_t at = row_of(a, s, lane)[i / a->N] * a->N + i % a->N;
    if (!is_spared(a, s, a->pos[at], sinks)) a->exp[at] = expiry;
}

int steps_decode_delayed(const Store *a, int64_t layer, int64_t rows, const int32_t *slots, const int32_t *first, const int32_t *positions,
                         const Tokens *t, float threshold, int32_t delay, int32_t sinks, int32_t own) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t unit = 0; unit < a->units; unit++) {
            const int64_t s = slots[i], lane = layer * a->per_layer + unit;
            const int32_t now = positions[i];
            const int evict = widen(a, feature(a, t, first[i], 0), unit) > threshold;
            const int32_t expiry = own && evict && !is_spared(a, s, now, sinks) ? now + 1 + delay : NEVER;
            if (!own && now > 0 && evict) mark_newest(a, s, lane, now + delay, sinks);
            int error = drop_expired(a, s, layer, unit, now);
            if (!error) error = lanes_append(a, s, layer, unit, now, &expiry, 0, t, first[i], 1);
            if (error) return error;
        }
    return 0;
}

/* 32 well mixed bits of 32: a bijection (constants of Wellons' "lowbias32"). gates/random_drop.py has the twin. */
static uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

/* Expiry of a key known when it is written. limit 0 lets every key expire, 2^32 none. */
static int32_t expiry_at_write(const Store *a, int64_t s, int32_t position, uint32_t salt, int64_t limit, int32_t delay, int32_t sinks) {
    if (is_spared(a, s, position, sinks) || (int64_t)mix(mix((uint32_t)position) ^ salt) < limit) return NEVER;
    return position + 1 + delay;
}

/* salts: one per unit of this layer. */
int steps_decode_at_write(const Store *a, int64_t layer, int64_t rows, const int32_t *slots, const int32_t *first, const int32_t *positions,
                          const Tokens *t, const uint32_t *salts, int64_t limit, int32_t delay, int32_t sinks) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t unit = 0; unit < a->units; unit++) {
            const int32_t expiry = expiry_at_write(a, slots[i], positions[i], salts[unit], limit, delay, sinks);
            int error = drop_expired(a, slots[i], layer, unit, positions[i]);
            if (!error) error = lanes_append(a, slots[i], layer, unit, positions[i], &expiry, 0, t, first[i], 1);
            if (error) return error;
        }
    return 0;
}

/* Expiries at write of a chunk: past [E, width] as they stand, chunk [E, C]. */
void steps_chunk_expiry_at_write(const Store *a, int64_t s, int64_t layer, int32_t start, int64_t c, const uint32_t *salts, int64_t limit,
                                 int32_t delay, int32_t sinks, int32_t *past, int64_t width, int32_t *chunk) {
    for (int64_t unit = 0; unit < a->units; unit++) {
        const int64_t lane = layer * a->per_layer + unit, length = *length_of(a, s, lane);
        for (int64_t i = 0; i < length; i++) past[unit * width + i] = a->exp[row_of(a, s, lane)[i / a->N] * a->N + i % a->N];
        for (int64_t i = 0; i < c; i++)
            chunk[unit * c + i] = expiry_at_write(a, s, start + (int32_t)i, salts[unit], limit, delay, sinks);
    }
}

/* First crossing of up to BLOCK keys (positions p, expiries e) over queries i in [from, c) at positions start + i. */
static void first_crossing(const Store *a, int64_t s, const float *kt, const int32_t *p, int32_t *e, int64_t n, const float *q, int64_t r, int64_t from, int64_t c,
                           int32_t start, float scale, float bias, int32_t sinks, int32_t window) {
    float out[BLOCK];
    int64_t left = n;
    for (int64_t i = from; i < c && left > 0; i++) {
        score_block(kt, q + i * r, r, scale, bias, out);
        for (int64_t j = 0; j < n; j++)
            if (out[j] <= 0.0f && e[j] == NEVER && start + i - p[j] > window && !is_spared(a, s, p[j], sinks)) {
                e[j] = (int32_t)(start + i);
                left--;
            }
    }
}

static int unit_expiry_by_query(const Store *a, int64_t s, int64_t layer, int64_t unit, int32_t start, int64_t first, int64_t c,
                                const Tokens *t, float scale, float bias, int32_t sinks, int32_t window, int32_t *past, int32_t *chunk) {
    const int64_t gate_lane = gate_lane_of(a, layer, unit), kv_lane = layer * a->per_layer + unit, length = *length_of(a, s, gate_lane);
    float *q = malloc(sizeof(float) * (c * a->r + a->r * (BLOCK + 1))), *kt = q + c * a->r, *k = kt + a->r * BLOCK;
    if (!q) return OUT_OF_MEMORY;
    int32_t p[BLOCK];
    for (int64_t i = 0; i < c; i++) load_row(a, t, first + i, unit * a->r, a->r, q + i * a->r);
    for (int64_t i = 0; i < length; i++) past[i] = NEVER;
    for (int64_t i = 0; i < c; i++) chunk[i] = NEVER;
    for (int64_t base = 0, n; base < length; base += n) {
        n = block_in_page(a, base, length);
        load_gate_keys(a, s, gate_lane, base, n, kt);
        for (int64_t j = 0; j < n; j++) p[j] = position_of(a, s, kv_lane, base + j);
        first_crossing(a, s, kt, p, past + base, n, q, a->r, 0, c, start, scale, bias, sinks, window);
    }
    for (int64_t base = 0; base < c; base += BLOCK) {
        const int64_t n = c - base < BLOCK ? c - base : BLOCK;
        memset(kt, 0, sizeof(float) * a->r * BLOCK);
        for (int64_t j = 0; j < n; j++) {
            p[j] = (int32_t)(start + base + j);
            load_row(a, t, first + base + j, (a->units + unit) * a->r, a->r, k);
            for (int64_t x = 0; x < a->r; x++) kt[x * BLOCK + j] = k[x];
        }
        /* start + i - p[j] > window >= 0 keeps a key from being judged by itself or by earlier queries. */
        first_crossing(a, s, kt, p, chunk + base, n, q, a->r, base + 1, c, start, scale, bias, sinks, window);
    }
    free(q);
    return 0;
}

/* Expiries that the queries of a chunk give to live keys, past [E, width], and to the chunk's own, chunk [E, C]. Drops nothing. */
int steps_chunk_expiry_by_query(const Store *a, int64_t s, int64_t layer, int32_t start, int64_t first, int64_t c, const Tokens *t, float scale,
                                const float *biases, int32_t sinks, int32_t window, int32_t *past, int64_t width, int32_t *chunk) {
    int error = 0;
    for (int64_t unit = 0; unit < a->units && !error; unit++)
        error = unit_expiry_by_query(a, s, layer, unit, start, first, c, t, scale, biases[unit], sinks, window, past + unit * width,
                                     chunk + unit * c);
    return error;
}

/* The same for delayed decisions: past [E, width], chunk [E, C]. Marks the newest past key of each unit, unless keys are decided
 * about by their own tokens. */
int steps_chunk_expiry_delayed(const Store *a, int64_t s, int64_t layer, int32_t start, int64_t first, int64_t c, const Tokens *t,
                               float threshold, int32_t delay, int32_t sinks, int32_t own, int32_t *past, int64_t width, int32_t *chunk) {
    for (int64_t unit = 0; unit < a->units; unit++) {
        const int64_t lane = layer * a->per_layer + unit, length = *length_of(a, s, lane);
        if (!own && start > 0 && widen(a, feature(a, t, first, 0), unit) > threshold)
            mark_newest(a, s, lane, start + delay, sinks);
        for (int64_t i = 0; i < length; i++) past[unit * width + i] = a->exp[row_of(a, s, lane)[i / a->N] * a->N + i % a->N];
        for (int64_t i = 0; i < c; i++) {
            const int64_t said = own ? i : i + 1; /* which of the chunk's tokens decides about its token i */
            const int evict = said < c && !is_spared(a, s, start + (int32_t)i, sinks) &&
                              widen(a, feature(a, t, first + said, 0), unit) > threshold;
            chunk[unit * c + i] = evict ? (int32_t)(start + i + 1 + delay) : NEVER;
        }
    }
    return 0;
}

/* After a chunk: drop past keys with expiry <= dead_at, append the chunk's other tokens. */
int steps_settle_chunk(const Store *a, int64_t s, int64_t layer, int32_t start, int32_t dead_at, int64_t first, int64_t c, const Tokens *t,
                       const int32_t *past, int64_t width, const int32_t *chunk) {
    for (int64_t unit = 0; unit < a->units; unit++) {
        const int64_t lane = layer * a->per_layer + unit, length = *length_of(a, s, lane);
        int32_t *victims = malloc(sizeof(int32_t) * (2 * length + 2)), *when = victims + length + 1;
        if (!victims) return OUT_OF_MEMORY;
        int64_t count = 0;
        for (int64_t i = 0; i < length; i++)
            if (past[unit * width + i] <= dead_at) {
                victims[count] = (int32_t)i;
                when[count++] = past[unit * width + i];
            }
        int error = lanes_drop(a, s, layer, unit, victims, when, count);
        free(victims);
        if (!error) error = lanes_append(a, s, layer, unit, start, chunk + unit * c, dead_at, t, first, c);
        for (int64_t i = 0; i < c && !error; i++) {
            if (chunk[unit * c + i] > dead_at) continue;
            a->dropped[(s * a->L + layer) * a->units + unit]++;
            error = lanes_record(a, s, layer, unit, position_in(t, start, first, i), chunk[unit * c + i]);
        }
        if (error) return error;
    }
    return 0;
}
