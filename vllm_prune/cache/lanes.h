/* The worker's arrays as C sees them. Filled in by lane_ops.py; all memory belongs to Python.
 *
 * Letters: S request slots, L layers, H KV heads, B blocks, P = L B H head-pages, N tokens a page, D head size, r numbers
 * a gate lane remembers per token, Ng = 2 N D / r tokens a gate page, W pages a lane, E eviction units a layer (1 or H).
 * A layer's lanes: H of K/V, then those of gate keys, one a unit, if the gate remembers anything. A K/V page holds K
 * transposed, [D, N], then V, [N, D] (vLLM's "vec" CPU format); a gate page gate keys, [r, Ng].
 * Lanes of one unit hold the same tokens at the same indices; a request's newest token is always the last of its lane.
 */
#ifndef VLLM_PRUNE_LANES_H
#define VLLM_PRUNE_LANES_H
#include <stdint.h>

#define NEVER INT32_MAX
#define OUT_OF_PAGES (-1)
#define OUT_OF_EVENTS (-2)
#define OUT_OF_MEMORY (-3)
#define SHARED_PAGE (-4)

typedef struct {
    void *kv;            /* [P, 2 N D] bfloat16 or float32, as raw bits */
    int32_t *table;      /* [S, lanes, W] pages of each lane */
    int32_t *length;     /* [S, lanes] tokens of each lane */
    int32_t *settled;    /* [S, lanes] of a snapshot: leading pages of a lane, full of keys that no gate will drop */
    int32_t *shared;     /* [S, lanes] of a request: leading pages of a lane that are a snapshot's; only read */
    int32_t *free_pages; /* [S, F] stack */
    int32_t *n_free;     /* [S] */
    int32_t *page_lane;  /* [P] owner of each page, -1 when free */
    int32_t *page_index; /* [P] its place in the owner's table row */
    int32_t *pos;        /* [P, N] position of each slot, for the first lane of each unit */
    int32_t *exp;        /* [P, N] its expiry */
    double *mass;        /* [P, N] attention it received (boundary.c), NULL where no gate asks */
    int64_t *dropped;    /* [S, L, E] keys dropped so far */
    int64_t *ends;       /* [S, L] sum over dropped keys of the first query that did not see them */
    uint8_t *closed;     /* [S, L, E] lanes that hold nothing from the prompt's end on */
    int32_t *prompt;     /* [S] tokens of the prompt */
    uint8_t *spared;     /* [S, T] positions whose keys no gate may drop */
    int32_t *n_spared;   /* [S] how many */
    int32_t *events;     /* [cap, 4] slot, layer * E + unit, key, expiry */
    int64_t *n_events;   /* [1] */
    int64_t events_cap;  /* 0 records nothing */
    int64_t lanes, W, F, T;
    int64_t L, H, B, N, D, r, Ng, per_layer, units, elem; /* elem: bytes of a number, 2 (bfloat16) or 4 (float32) */
} Store;

/* New tokens of a layer's call. Strides in numbers; features may be NULL when nothing is remembered. positions, int32 by
 * token, where the layer runs on a subset of the step's tokens; NULL where each request's follow one another. */
typedef struct {
    const void *key, *value, *features;
    const int32_t *positions;
    int64_t key_stride, value_stride, feature_stride, num_features;
} Tokens;

/* How a layer's gate decides at boundaries, and the queries of the step. See gates/boundary.py. */
typedef struct {
    const void *query; /* rows of H * group heads, D numbers each */
    int64_t query_stride, group;
    int64_t grid, span, after, sinks;
    double threshold, keep; /* keep < 0: by threshold */
    float scale;
} Boundary;

static inline int32_t *row_of(const Store *a, int64_t s, int64_t lane) { return a->table + (s * a->lanes + lane) * a->W; }
static inline int32_t *length_of(const Store *a, int64_t s, int64_t lane) { return a->length + s * a->lanes + lane; }
static inline int32_t *settled_of(const Store *a, int64_t s, int64_t lane) { return a->settled + s * a->lanes + lane; }
static inline int32_t *shared_of(const Store *a, int64_t s, int64_t lane) { return a->shared + s * a->lanes + lane; }
static inline int32_t position_in(const Tokens *t, int32_t start, int64_t first, int64_t i) {
    return t->positions ? t->positions[first + i] : start + (int32_t)i;
}
/* Whether the key at a position may not be dropped: one of the first ``sinks``, or of those that its request spares. */
static inline int is_spared(const Store *a, int64_t s, int32_t p, int64_t sinks) {
    return p < sinks || (a->n_spared[s] && a->spared[s * a->T + p]);
}
static inline int64_t page_tokens(const Store *a, int64_t h) { return h >= a->H ? a->Ng : a->N; }
static inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

/* A unit's lanes within its layer: all of them, or its KV head's and, H further on, that of its gate keys. */
#define EACH_LANE_OF(a, unit, h) \
    for (int64_t h = (a)->units == 1 ? 0 : (unit); h < (a)->per_layer; h += (a)->units == 1 ? 1 : (a)->H)
static inline int64_t gate_lane_of(const Store *a, int64_t layer, int64_t unit) { return layer * a->per_layer + a->H + unit; }

int lanes_drop(const Store *a, int64_t s, int64_t layer, int64_t unit, const int32_t *victims, const int32_t *when, int64_t count);
int lanes_append(const Store *a, int64_t s, int64_t layer, int64_t unit, int32_t start, const int32_t *expiry, int32_t dead_at,
                 const Tokens *t, int64_t first, int64_t c);
int lanes_record(const Store *a, int64_t s, int64_t layer, int64_t unit, int32_t key, int32_t expiry);
#endif
