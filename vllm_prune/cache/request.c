/* Whole lanes of a request close at its prompt's end (ShadowLLM, request form). The naive twin is gates/shadow.py.
 *
 * In a closed lane key j expires at max(P, j), P the prompt's tokens: nothing from P on is stored. The decision is made in
 * layer 0 of the step that computes position P - 1, so that every other layer of that step knows it already.
 */
#include <stdlib.h>
#include "lanes.h"

static int closed_at(const Store *a, int64_t s, int64_t layer, int64_t unit) { return a->closed[(s * a->L + layer) * a->units + unit]; }

/* Drop whatever a unit's lanes hold. */
static int empty(const Store *a, int64_t s, int64_t layer, int64_t unit) {
    const int64_t length = *length_of(a, s, layer * a->per_layer + unit);
    if (length == 0) return 0;
    int32_t *victims = malloc(sizeof(int32_t) * 2 * length), *when = victims + length;
    if (!victims) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < length; i++) {
        victims[i] = (int32_t)i;
        when[i] = a->prompt[s];
    }
    const int error = lanes_drop(a, s, layer, unit, victims, when, length);
    free(victims);
    return error;
}

/* After the step that ends the prompt: the closed lanes of a slot come free. */
int request_close(const Store *a, int64_t s) {
    for (int64_t layer = 0; layer < a->L; layer++)
        for (int64_t unit = 0; unit < a->units; unit++)
            if (closed_at(a, s, layer, unit)) {
                const int error = empty(a, s, layer, unit);
                if (error) return error;
            }
    return 0;
}

int request_decode(const Store *a, int64_t layer, int64_t rows, const int32_t *slots, const int32_t *first, const int32_t *positions, const Tokens *t) {
    const int32_t never = NEVER;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t unit = 0; unit < a->units; unit++) {
            const int64_t s = slots[i];
            int error;
            if (closed_at(a, s, layer, unit) && positions[i] >= a->prompt[s]) {
                a->dropped[(s * a->L + layer) * a->units + unit]++;
                error = lanes_record(a, s, layer, unit, positions[i], positions[i]);
            } else {
                error = lanes_append(a, s, layer, unit, positions[i], &never, 0, t, first[i], 1);
            }
            if (error) return error;
        }
    return 0;
}

/* Expiries of a chunk: past [E, width] of the keys held, chunk [E, C] of its own. */
void request_chunk_expiry(const Store *a, int64_t s, int64_t layer, int32_t start, int64_t c, int32_t *past, int64_t width, int32_t *chunk) {
    for (int64_t unit = 0; unit < a->units; unit++) {
        if (!closed_at(a, s, layer, unit)) continue; /* the caller filled in NEVER */
        const int64_t length = *length_of(a, s, layer * a->per_layer + unit);
        const int32_t end = a->prompt[s];
        for (int64_t i = 0; i < length; i++) past[unit * width + i] = end;
        for (int64_t i = 0; i < c; i++) chunk[unit * c + i] = start + (int32_t)i > end ? start + (int32_t)i : end;
    }
}
