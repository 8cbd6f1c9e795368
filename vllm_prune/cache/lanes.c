/* Lanes and head-pages: append, drop, pack, and the tables that vLLM's kernel reads. The naive twin is reference.py. */
#include <stdlib.h>
#include <string.h>
#include "lanes.h"

static int take_page(const Store *a, int64_t s, int64_t lane, int64_t index) {
    int32_t n = a->n_free[s] - 1;
    if (n < 0) return OUT_OF_PAGES;
    int32_t page = a->free_pages[s * a->F + n];
    a->n_free[s] = n;
    /* vLLM's kernel reads whole pages and weighs what lies past the end with 0: another request's NaN would still count. */
    const int64_t size = 2 * a->N * a->D * a->elem;
    memset((char *)a->kv + page * size, 0, size);
    row_of(a, s, lane)[index] = page;
    a->page_lane[page] = (int32_t)lane;
    a->page_index[page] = (int32_t)index;
    return 0;
}

static void give_page(const Store *a, int64_t s, int64_t lane, int64_t index) {
    int32_t page = row_of(a, s, lane)[index];
    a->page_lane[page] = -1;
    a->free_pages[s * a->F + a->n_free[s]++] = page;
}

/* Copy one token between places of K/V pages or of gate pages (one number strided by n; V contiguous). */
#define DEFINE_MOVE(NAME, T)                                                                                              \
    static void NAME(const Store *a, int64_t h, int64_t p, int64_t o, int64_t q, int64_t u) {                             \
        const int64_t page = 2 * a->N * a->D, n = page_tokens(a, h);                                                      \
        T *dst = (T *)a->kv + p * page;                                                                                   \
        const T *src = (const T *)a->kv + q * page;                                                                       \
        const int64_t strided = h >= a->H ? a->r : a->D;                                                                  \
        for (int64_t i = 0; i < strided; i++) dst[i * n + o] = src[i * n + u];                                            \
        if (h < a->H) memmove(dst + n * a->D + o * a->D, src + n * a->D + u * a->D, sizeof(T) * a->D);                   \
    }
DEFINE_MOVE(move16, uint16_t)
DEFINE_MOVE(move32, uint32_t)

#define DEFINE_WRITE(NAME, T)                                                                                             \
    static void NAME(const Store *a, int64_t h, int64_t p, int64_t o, const Tokens *t, int64_t token) {                   \
        const int64_t n = page_tokens(a, h);                                                                              \
        T *dst = (T *)a->kv + p * 2 * a->N * a->D;                                                                        \
        if (h >= a->H) { /* the last numbers of a token's features, by unit */                                            \
            const T *g = (const T *)t->features + token * t->feature_stride + t->num_features - (a->per_layer - h) * a->r; \
            for (int64_t i = 0; i < a->r; i++) dst[i * n + o] = g[i];                                                     \
            return;                                                                                                       \
        }                                                                                                                 \
        const T *k = (const T *)t->key + token * t->key_stride + h * a->D;                                                \
        const T *v = (const T *)t->value + token * t->value_stride + h * a->D;                                            \
        for (int64_t i = 0; i < a->D; i++) dst[i * n + o] = k[i];                                                         \
        memcpy(dst + n * a->D + o * a->D, v, sizeof(T) * a->D);                                                           \
    }
DEFINE_WRITE(write16, uint16_t)
DEFINE_WRITE(write32, uint32_t)

int lanes_record(const Store *a, int64_t s, int64_t layer, int64_t unit, int32_t key, int32_t expiry) {
    a->ends[s * a->L + layer] += expiry > key ? expiry : key + 1;
    if (a->events_cap == 0) return 0;
    int64_t e = *a->n_events;
    if (e >= a->events_cap) return OUT_OF_EVENTS;
    int32_t *event = a->events + 4 * e;
    event[0] = (int32_t)s;
    event[1] = (int32_t)(layer * a->units + unit);
    event[2] = key;
    event[3] = expiry;
    *a->n_events = e + 1;
    return 0;
}

/* Remove the tokens at indices victims[0..count) (ascending) of a unit; the last tokens fill the holes. */
int lanes_drop(const Store *a, int64_t s, int64_t layer, int64_t unit, const int32_t *victims, const int32_t *when, int64_t count) {
    if (count == 0) return 0;
    const int64_t first = layer * a->per_layer + unit;
    const int32_t *row = row_of(a, s, first);
    const int64_t old = *length_of(a, s, first);
    int64_t length = old;
    for (int64_t v = count - 1; v >= 0; v--) {
        const int64_t i = victims[v];
        const int64_t at = row[i / a->N] * a->N + i % a->N;
        if (i / a->N < *shared_of(a, s, first)) return SHARED_PAGE;
        const int error = lanes_record(a, s, layer, unit, a->pos[at], when[v]);
        if (error) return error;
        length--;
        if (i == length) continue;
        EACH_LANE_OF(a, unit, h) {
            const int64_t lane = layer * a->per_layer + h, n = page_tokens(a, h);
            const int32_t *pages = row_of(a, s, lane);
            (a->elem == 2 ? move16 : move32)(a, h, pages[i / n], i % n, pages[length / n], length % n);
        }
        const int64_t last = row[length / a->N] * a->N + length % a->N;
        a->pos[at] = a->pos[last];
        a->exp[at] = a->exp[last];
        if (a->mass) a->mass[at] = a->mass[last];
    }
    EACH_LANE_OF(a, unit, h) {
        const int64_t lane = layer * a->per_layer + h, n = page_tokens(a, h);
        for (int64_t index = ceil_div(old, n) - 1; index >= ceil_div(length, n); index--) give_page(a, s, lane, index);
        *length_of(a, s, lane) = (int32_t)length;
    }
    a->dropped[(s * a->L + layer) * a->units + unit] += count;
    return 0;
}

/* Write those of c tokens whose expiry[i] > dead_at at the end of a unit's lanes, token i at position start + i unless
 * the tokens carry their own. */
int lanes_append(const Store *a, int64_t s, int64_t layer, int64_t unit, int32_t start, const int32_t *expiry, int32_t dead_at,
                 const Tokens *t, int64_t first, int64_t c) {
    EACH_LANE_OF(a, unit, h) { /* lane by lane: a page stays in cache while it fills */
        const int64_t lane = layer * a->per_layer + h, n = page_tokens(a, h);
        int64_t i = *length_of(a, s, lane);
        for (int64_t j = 0; j < c; j++) {
            if (expiry[j] <= dead_at) continue;
            if (i % n == 0 && take_page(a, s, lane, i / n)) return OUT_OF_PAGES;
            const int64_t page = row_of(a, s, lane)[i / n];
            (a->elem == 2 ? write16 : write32)(a, h, page, i % n, t, first + j);
            if (h == unit) {
                a->pos[page * a->N + i % n] = position_in(t, start, first, j);
                a->exp[page * a->N + i % n] = expiry[j];
                if (a->mass) a->mass[page * a->N + i % n] = 0.0;
            }
            i++;
        }
        *length_of(a, s, lane) = (int32_t)i;
    }
    return 0;
}

/* Tokens that a layer does not run on, [count] slots and positions: never stored there, expiry = position. */
int lanes_skip(const Store *a, int64_t layer, int64_t count, const int32_t *slots, const int32_t *positions) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t unit = 0; unit < a->units; unit++) {
            a->dropped[(slots[i] * a->L + layer) * a->units + unit]++;
            const int error = lanes_record(a, slots[i], layer, unit, positions[i], positions[i]);
            if (error) return error;
        }
    return 0;
}

/* Block table [R * H, W'] and lengths [R * H] of a layer's K/V lanes, as vLLM's attention kernel wants them. */
void lanes_fill_tables(const Store *a, int64_t layer, int64_t rows, const int32_t *slots, int32_t *tables, int64_t width, int32_t *lengths) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t h = 0; h < a->H; h++) {
            const int64_t lane = layer * a->per_layer + h;
            const int32_t n = *length_of(a, slots[i], lane);
            lengths[i * a->H + h] = n;
            memcpy(tables + (i * a->H + h) * width, row_of(a, slots[i], lane), sizeof(int32_t) * ceil_div(n, a->N));
        }
}

/* Per slot, int64 [R, 15]: pages of its own in use now, after 1 and 2 more tokens kept wherever lanes are open, keys held, keys
 * dropped; the most that a layer dropped, what the first, middle and last third of the layers did, and ``ends``; its own pages
 * less those that are settled, as before; pages settled; pages in use now, shared ones too. */
void lanes_summarize(const Store *a, int64_t rows, const int32_t *slots, int64_t *out) {
    memset(out, 0, sizeof(int64_t) * 15 * rows);
    for (int64_t i = 0; i < rows; i++, out += 15) {
        for (int64_t layer = 0; layer < a->L; layer++) {
            out[9] += a->ends[slots[i] * a->L + layer];
            for (int64_t h = 0; h < a->per_layer; h++) {
                const int64_t lane = layer * a->per_layer + h, n = page_tokens(a, h), length = *length_of(a, slots[i], lane);
                const int shut = h < a->H && a->closed[(slots[i] * a->L + layer) * a->units + (a->units == 1 ? 0 : h)];
                for (int64_t more = 0; more < 3; more++) {
                    const int64_t pages = ceil_div(length + (shut ? 0 : more), n) - *shared_of(a, slots[i], lane);
                    out[more] += pages;
                    out[10 + more] += pages - *settled_of(a, slots[i], lane);
                }
                out[13] += *settled_of(a, slots[i], lane);
                out[14] += ceil_div(length, n);
                if (h < a->units) out[3] += length;
            }
            int64_t gone = 0;
            for (int64_t unit = 0; unit < a->units; unit++) gone += a->dropped[(slots[i] * a->L + layer) * a->units + unit];
            out[4] += gone;
            if (gone > out[5]) out[5] = gone;
            out[6 + 3 * layer / a->L] += gone;
        }
    }
}

static void copy_page(const Store *a, int64_t to, int64_t from) {
    const int64_t size = 2 * a->N * a->D * a->elem;
    memcpy((char *)a->kv + to * size, (char *)a->kv + from * size, size);
    memcpy(a->pos + to * a->N, a->pos + from * a->N, sizeof(int32_t) * a->N);
    memcpy(a->exp + to * a->N, a->exp + from * a->N, sizeof(int32_t) * a->N);
    if (a->mass) memcpy(a->mass + to * a->N, a->mass + from * a->N, sizeof(double) * a->N);
}

/* The first `tokens` entries of a lane into free pages of another slot, whose lane there has its first `has` pages already. */
static int copy_lane(const Store *a, int64_t lane, int64_t h, int64_t from, int64_t to, int64_t has, int64_t tokens) {
    for (int64_t index = has; index < ceil_div(tokens, page_tokens(a, h)); index++) {
        if (take_page(a, to, lane, index)) return OUT_OF_PAGES;
        copy_page(a, row_of(a, to, lane)[index], row_of(a, from, lane)[index]);
    }
    *length_of(a, to, lane) = (int32_t)tokens;
    return 0;
}

/* Whether nothing will drop the key at index i of a unit's lane any more, where keys below position `before` without an expiry stay. */
static int stays(const Store *a, const int32_t *row, int64_t i, int32_t before) {
    const int64_t at = row[i / a->N] * a->N + i % a->N;
    return a->exp[at] == NEVER && a->pos[at] < before;
}

static int whole_stays(const Store *a, const int32_t *row, int64_t index, int32_t before) {
    for (int64_t i = index * a->N; i < (index + 1) * a->N; i++)
        if (!stays(a, row, i, before)) return 0;
    return 1;
}

/* A unit's K/V lanes into another slot, what stays before what may go and otherwise in their order; pages that stay as they are are
 * copied whole. Says in `settled` how many pages are full of what stays. */
static int copy_sorted(const Store *a, int64_t layer, int64_t unit, int64_t from, int64_t to, int32_t before) {
    const int64_t owner = layer * a->per_layer + unit, length = *length_of(a, from, owner), full = length / a->N;
    const int32_t *marks = row_of(a, from, owner);
    EACH_LANE_OF(a, unit, h) {
        const int64_t lane = layer * a->per_layer + h;
        const int32_t *row = row_of(a, from, lane);
        int64_t n = 0;
        for (int64_t index = 0; index < full; index++) {
            if (!whole_stays(a, marks, index, before)) continue;
            if (take_page(a, to, lane, n / a->N)) return OUT_OF_PAGES;
            copy_page(a, row_of(a, to, lane)[n / a->N], row[index]);
            n += a->N;
        }
        for (int going = 0; going < 2; going++) {
            for (int64_t i = 0; i < length; i++) {
                if (i % a->N == 0 && i / a->N < full && whole_stays(a, marks, i / a->N, before)) {
                    i += a->N - 1;
                    continue;
                }
                if (stays(a, marks, i, before) == going) continue;
                if (n % a->N == 0 && take_page(a, to, lane, n / a->N)) return OUT_OF_PAGES;
                const int64_t page = row_of(a, to, lane)[n / a->N], at = page * a->N + n % a->N;
                const int64_t was = row[i / a->N] * a->N + i % a->N;
                (a->elem == 2 ? move16 : move32)(a, h, page, n % a->N, row[i / a->N], i % a->N);
                a->pos[at] = a->pos[was];
                a->exp[at] = a->exp[was];
                if (a->mass) a->mass[at] = a->mass[was];
                n++;
            }
            if (!going) *settled_of(a, to, lane) = (int32_t)(n / a->N);
        }
        *length_of(a, to, lane) = (int32_t)n;
    }
    return 0;
}

static void copy_account(const Store *a, int64_t layer, int64_t from, int64_t to) {
    for (int64_t unit = 0; unit < a->units; unit++)
        a->dropped[(to * a->L + layer) * a->units + unit] = a->dropped[(from * a->L + layer) * a->units + unit];
    a->ends[to * a->L + layer] = a->ends[from * a->L + layer];
}

/* What a slot holds in a layer, and its account of it, into a snapshot, whose lanes there are empty. Keys at positions below `before`
 * that have no expiry stay for good (0: nothing does). */
int lanes_copy(const Store *a, int64_t layer, int64_t from, int64_t to, int32_t before) {
    if (before > 0) {
        for (int64_t unit = 0; unit < a->units; unit++)
            if (copy_sorted(a, layer, unit, from, to, before)) return OUT_OF_PAGES;
    } else {
        for (int64_t h = 0; h < a->per_layer; h++) {
            const int64_t lane = layer * a->per_layer + h;
            if (copy_lane(a, lane, h, from, to, 0, *length_of(a, from, lane))) return OUT_OF_PAGES;
        }
    }
    copy_account(a, layer, from, to);
    return 0;
}

/* What a snapshot holds in a layer into a request that begins there: its settled pages are shared, the others copied. */
int lanes_start(const Store *a, int64_t layer, int64_t from, int64_t to) {
    for (int64_t h = 0; h < a->per_layer; h++) {
        const int64_t lane = layer * a->per_layer + h;
        const int32_t share = *settled_of(a, from, lane);
        memcpy(row_of(a, to, lane), row_of(a, from, lane), sizeof(int32_t) * share);
        *shared_of(a, to, lane) = share;
        if (copy_lane(a, lane, h, from, to, share, *length_of(a, from, lane))) return OUT_OF_PAGES;
    }
    copy_account(a, layer, from, to);
    return 0;
}

/* The same of what a slot held after its first `tokens` tokens, in a layer where what is stored stays, in the order in which it
 * came, and what is not (a token that the layer did not run on) counts as dropped by itself. */
int lanes_copy_begin(const Store *a, int64_t layer, int64_t from, int64_t to, int64_t tokens) {
    a->ends[to * a->L + layer] = 0;
    for (int64_t h = 0; h < a->per_layer; h++) {
        const int64_t unit = a->units == 1 ? 0 : h % a->H, owner = layer * a->per_layer + unit;
        const int64_t held = *length_of(a, from, owner);
        int64_t n = 0, ends = tokens * (tokens + 1) / 2;
        for (; n < held; n++) {
            const int32_t position = a->pos[row_of(a, from, owner)[n / a->N] * a->N + n % a->N];
            if (position >= tokens) break;
            ends -= position + 1;
        }
        if (copy_lane(a, layer * a->per_layer + h, h, from, to, 0, n)) return OUT_OF_PAGES;
        *settled_of(a, to, layer * a->per_layer + h) = (int32_t)(n / page_tokens(a, h));
        if (h >= a->units) continue;
        a->dropped[(to * a->L + layer) * a->units + unit] = (int32_t)(tokens - n);
        a->ends[to * a->L + layer] += ends;
    }
    return 0;
}

/* Move every page in use out of the blocks `gone` into free pages of the blocks `kept` (both in log order), and rebuild
 * the free stack from `kept`, highest grant at the bottom, so that the lowest fill first. Returns pages moved. */
int64_t lanes_pack(const Store *a, int64_t s, const int32_t *kept, int64_t num_kept, const int32_t *gone, int64_t num_gone) {
    int32_t *stack = a->free_pages + s * a->F;
    int64_t n = 0, moved = 0;
    for (int64_t b = num_kept - 1; b >= 0; b--)
        for (int64_t layer = 0; layer < a->L; layer++)
            for (int64_t h = 0; h < a->H; h++) {
                const int64_t page = (layer * a->B + kept[b]) * a->H + h;
                if (a->page_lane[page] < 0) stack[n++] = (int32_t)page;
            }
    for (int64_t b = 0; b < num_gone; b++)
        for (int64_t layer = 0; layer < a->L; layer++)
            for (int64_t h = 0; h < a->H; h++) {
                const int64_t page = (layer * a->B + gone[b]) * a->H + h;
                const int32_t lane = a->page_lane[page];
                if (lane < 0) continue;
                if (n == 0) return OUT_OF_PAGES;
                const int32_t to = stack[--n];
                copy_page(a, to, page);
                row_of(a, s, lane)[a->page_index[page]] = to;
                a->page_lane[to] = lane;
                a->page_index[to] = a->page_index[page];
                a->page_lane[page] = -1;
                moved++;
            }
    a->n_free[s] = (int32_t)n;
    return moved;
}
