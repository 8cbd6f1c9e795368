/* Gates that decide at fixed positions from the attention that keys received (LTP, ACC-style). The definition and its naive
 * twin are gates/boundary.py.
 *
 * vLLM's kernel hands out no log-sum-exp, so a second pass makes the weights again: logits as floats, one dot product in one
 * order whatever the chunk; row sums and what a key received in double, added up query by query.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "lanes.h"

#define WIDTH 32 /* tokens of a page are a multiple of this */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FAST
#endif

FAST static void widen_row(const void *in, int64_t elem, float *out, int64_t n) {
    if (elem == 4) {
        memcpy(out, in, sizeof(float) * n);
        return;
    }
    const uint16_t *half = in;
    uint32_t *bits = (uint32_t *)(void *)out;
    for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)half[i] << 16;
}

/* Logits of one query head against a page, k [D, N]. */
FAST static void page_logits(const float *restrict k, const float *restrict q, int64_t d, int64_t n, float scale, float *restrict out) {
    for (int64_t base = 0; base < n; base += WIDTH) {
        float sum[WIDTH] = {0};
        for (int64_t x = 0; x < d; x++) {
            const float qx = q[x];
            const float *restrict row = k + x * n + base;
            for (int64_t i = 0; i < WIDTH; i++) sum[i] += qx * row[i];
        }
        for (int64_t i = 0; i < WIDTH; i++) out[base + i] = sum[i] * scale;
    }
}

/* exp(x) of WIDTH numbers <= 0: 2^n times a polynomial on |r| <= ln 2 / 2; relative error below 2e-7; 0 below -87. */
FAST static void exp_block(const float *restrict x, float *restrict out) {
    union { int32_t i[WIDTH]; float f[WIDTH]; } power;
    float r[WIDTH];
    for (int64_t i = 0; i < WIDTH; i++) {
        const float v = x[i] < -87.0f ? -87.0f : x[i];
        const float n = (v * 1.44269504f + 12582912.0f) - 12582912.0f; /* nearest integer */
        r[i] = (v - n * 0.693359375f) + n * 2.12194440e-4f;
        power.i[i] = ((int32_t)n + 127) * (1 << 23);
    }
    for (int64_t i = 0; i < WIDTH; i++) {
        float p = 1.0f / 5040.0f;
        p = p * r[i] + 1.0f / 720.0f;
        p = p * r[i] + 1.0f / 120.0f;
        p = p * r[i] + 1.0f / 24.0f;
        p = p * r[i] + 1.0f / 6.0f;
        p = p * r[i] + 0.5f;
        p = p * r[i] + 1.0f;
        p = p * r[i] + 1.0f;
        out[i] = x[i] < -87.0f ? 0.0f : p * power.f[i];
    }
}

/* Adds softmax(logits) to sum [n]; n a multiple of WIDTH, logits beyond what the query sees are -INFINITY. */
FAST static void add_weights(float *restrict logits, int64_t n, double *restrict sum) {
    float best[WIDTH], top = -INFINITY;
    double part[WIDTH] = {0}, total = 0.0;
    for (int64_t i = 0; i < WIDTH; i++) best[i] = -INFINITY;
    for (int64_t j = 0; j < n; j += WIDTH)
        for (int64_t i = 0; i < WIDTH; i++) best[i] = logits[j + i] > best[i] ? logits[j + i] : best[i];
    for (int64_t i = 0; i < WIDTH; i++) top = best[i] > top ? best[i] : top;
    for (int64_t j = 0; j < n; j += WIDTH) {
        float shifted[WIDTH];
        for (int64_t i = 0; i < WIDTH; i++) shifted[i] = logits[j + i] - top;
        exp_block(shifted, logits + j);
        for (int64_t i = 0; i < WIDTH; i++) part[i] += (double)logits[j + i];
    }
    for (int64_t i = 0; i < WIDTH; i++) total += part[i];
    const double share = 1.0 / total;
    for (int64_t j = 0; j < n; j++) sum[j] += (double)logits[j] * share;
}

/* What c tokens of a layer's lanes, queries at positions start + i and rows first + i of b->query, give to the keys before
 * them; `behind` more tokens lie behind them. */
static int receive(const Store *a, int64_t s, int64_t layer, const Boundary *b, int32_t start, int64_t first, int64_t c, int64_t behind) {
    const int64_t lane0 = layer * a->per_layer, length = *length_of(a, s, lane0) - behind, past = length - c, n = a->N;
    const int64_t pages = ceil_div(length, n), wide = pages * n, rows = c * b->group;
    float *logits = malloc(sizeof(float) * (rows * wide + a->D * n + rows * a->D)), *k = logits + rows * wide, *q = k + a->D * n;
    double *sum = calloc(c * wide, sizeof(double));
    if (!logits || !sum) {
        free(logits);
        free(sum);
        return OUT_OF_MEMORY;
    }
    for (int64_t h = 0; h < a->H; h++) {
        for (int64_t i = 0; i < rows; i++) {
            const int64_t at = (first + i / b->group) * b->query_stride + (h * b->group + i % b->group) * a->D;
            widen_row((const char *)b->query + at * a->elem, a->elem, q + i * a->D, a->D);
        }
        for (int64_t page = 0; page < pages; page++) {
            const char *base = (const char *)a->kv + (int64_t)row_of(a, s, lane0 + h)[page] * 2 * n * a->D * a->elem;
            widen_row(base, a->elem, k, a->D * n);
            for (int64_t i = 0; i < rows; i++) page_logits(k, q + i * a->D, a->D, n, b->scale, logits + i * wide + page * n);
        }
        for (int64_t i = 0; i < rows; i++) {
            const int64_t seen = past + i / b->group + 1;
            for (int64_t j = seen; j < wide; j++) logits[i * wide + j] = -INFINITY;
            add_weights(logits + i * wide, ceil_div(seen, WIDTH) * WIDTH, sum + i / b->group * wide);
        }
    }
    const int32_t *row = row_of(a, s, lane0);
    for (int64_t i = 0; i < c; i++) {
        const double share = (double)(past + i + 1) / (double)(a->H * b->group);
        for (int64_t j = 0; j < past + i; j++) { /* its own weight does not count */
            const int64_t at = (int64_t)row[j / n] * n + j % n;
            if (b->span && start + i - a->pos[at] > b->span) continue;
            a->mass[at] += sum[i * wide + j] * share;
        }
    }
    free(logits);
    free(sum);
    return 0;
}

typedef struct {
    double score;
    int32_t pos, index;
} Candidate;

static int by_score(const void *x, const void *y) {
    const Candidate *p = x, *q = y;
    if (p->score != q->score) return p->score < q->score ? -1 : 1;
    return p->pos < q->pos ? -1 : p->pos > q->pos;
}

static int by_index(const void *x, const void *y) {
    const int32_t p = *(const int32_t *)x, q = *(const int32_t *)y;
    return p < q ? -1 : p > q;
}

/* Indices of the keys that go at boundary `now`, ascending, into victims (room for all keys of the lane). Returns how many. */
int64_t boundary_decide(const Store *a, int64_t s, int64_t layer, const Boundary *b, int32_t now, int32_t *victims) {
    const int64_t lane = layer * a->per_layer, length = *length_of(a, s, lane);
    const int32_t *row = row_of(a, s, lane);
    int64_t excess = 0, count = 0;
    Candidate *found = NULL;
    if (b->keep >= 0.0) {
        excess = length - (int64_t)(b->keep * (double)now);
        if (excess <= 0) return 0;
        found = malloc(sizeof(Candidate) * length);
        if (!found) return OUT_OF_MEMORY;
    }
    for (int64_t j = 0; j < length; j++) {
        const int64_t at = (int64_t)row[j / a->N] * a->N + j % a->N;
        const int32_t p = a->pos[at], age = now - p;
        if (p < b->sinks || age <= b->after) continue;
        if (found) {
            found[count++] = (Candidate){a->mass[at] / (double)(age - 1), p, (int32_t)j};
        } else if (age <= b->after + b->grid && a->mass[at] / (double)b->span < b->threshold) {
            victims[count++] = (int32_t)j;
        }
    }
    if (found) {
        qsort(found, count, sizeof(Candidate), by_score);
        if (count > excess) count = excess;
        for (int64_t j = 0; j < count; j++) victims[j] = found[j].index;
        qsort(victims, count, sizeof(int32_t), by_index);
        free(found);
    }
    return count;
}

int boundary_drop(const Store *a, int64_t s, int64_t layer, int32_t now, const int32_t *victims, int64_t count) {
    int32_t *when = malloc(sizeof(int32_t) * (count + 1));
    if (!when) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < count; i++) when[i] = now;
    const int error = lanes_drop(a, s, layer, 0, victims, when, count);
    free(when);
    return error;
}

/* Writes c tokens between two boundaries at positions start + i, rows first + i of the step, and lets their queries give. */
int boundary_write(const Store *a, int64_t s, int64_t layer, const Boundary *b, int32_t start, int64_t first, int64_t c, const Tokens *t) {
    int32_t *expiry = calloc(c, sizeof(int32_t));
    if (!expiry) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < c; i++) expiry[i] = NEVER;
    int error = lanes_append(a, s, layer, 0, start, expiry, 0, t, first, c);
    free(expiry);
    for (int64_t i = 0, n; i < c && !error; i += n) { /* a few at a time: their logits are held */
        n = c - i < WIDTH ? c - i : WIDTH;
        error = receive(a, s, layer, b, start + (int32_t)i, first + i, n, c - i - n);
    }
    return error;
}

/* Decode: one token a row. */
int boundary_decode(const Store *a, int64_t layer, int64_t rows, const int32_t *slots, const int32_t *first, const int32_t *positions,
                    const Tokens *t, const Boundary *b) {
    for (int64_t i = 0; i < rows; i++) {
        const int64_t s = slots[i], length = *length_of(a, s, layer * a->per_layer);
        if (positions[i] % b->grid == 0 && length > 0) {
            int32_t *victims = malloc(sizeof(int32_t) * length);
            if (!victims) return OUT_OF_MEMORY;
            const int64_t count = boundary_decide(a, s, layer, b, positions[i], victims);
            const int error = count < 0 ? (int)count : boundary_drop(a, s, layer, positions[i], victims, count);
            free(victims);
            if (error) return error;
        }
        const int error = boundary_write(a, s, layer, b, positions[i], first[i], 1, t);
        if (error) return error;
    }
    return 0;
}
