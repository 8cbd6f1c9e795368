/* Products with some rows of a matrix W [n, k], bfloat16 or float32, sums in float32. The naive twin is sparse.py.
 *
 * Each output is a sum in one fixed order that depends on neither the other rows nor the batch.
 */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FAST
#endif

#define V 16 /* numbers a vector */
#define U 4  /* vectors in flight */

typedef float vf __attribute__((vector_size(4 * V), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(4 * V), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(2 * V), aligned(2)));

#define WIDEN16(p) ((vf)(__builtin_convertvector(*(const vh *)(p), vu) << 16))
#define WIDEN32(p) (*(const vf *)(p))
static inline float one16(const uint16_t *p) {
    union { uint32_t u; float f; } x = {(uint32_t)*p << 16};
    return x.f;
}
static inline float one32(const float *p) { return *p; }

/* out[r, i] = dot(w[idx[i]], x[r]), x float32 [rows, k]. */
#define DEFINE_DOT(NAME, T, WIDEN, ONE)                                                                          \
    FAST void NAME(const T *w, int64_t k, const int32_t *idx, int64_t n, const float *x, int64_t rows, float *out) { \
        for (int64_t i = 0; i < n; i++) {                                                                        \
            const T *row = w + (int64_t)idx[i] * k, *next = w + (int64_t)idx[i + 1 < n ? i + 1 : i] * k;         \
            for (int64_t r = 0; r < rows; r++) {                                                                 \
                const float *q = x + r * k;                                                                      \
                vf sum[U];                                                                                       \
                memset(sum, 0, sizeof(sum));                                                                     \
                int64_t c = 0;                                                                                   \
                for (; c + U * V <= k; c += U * V) {                                                             \
                    __builtin_prefetch(next + c);                                                                \
                    __builtin_prefetch(next + c + U * V / 2);                                                    \
                    for (int u = 0; u < U; u++) sum[u] += WIDEN(row + c + u * V) * *(const vf *)(q + c + u * V); \
                }                                                                                                \
                for (; c + V <= k; c += V) sum[0] += WIDEN(row + c) * *(const vf *)(q + c);                      \
                const vf all = (sum[0] + sum[1]) + (sum[2] + sum[3]);                                            \
                float total = 0.0f;                                                                              \
                for (int v = 0; v < V; v++) total += all[v];                                                     \
                for (; c < k; c++) total += ONE(row + c) * q[c];                                                 \
                out[r * n + i] = total;                                                                          \
            }                                                                                                    \
        }                                                                                                        \
    }
DEFINE_DOT(sparse_dot16, uint16_t, WIDEN16, one16)
DEFINE_DOT(sparse_dot32, float, WIDEN32, one32)

/* out[r] = sum over i of a[r, i] w[idx[i]], in the order of idx; out float32 [rows, k]. */
#define DEFINE_ADD(NAME, T, WIDEN, ONE)                                                                                 \
    FAST void NAME(const T *w, int64_t k, const int32_t *idx, int64_t n, const float *a, int64_t rows, float *out) {    \
        memset(out, 0, sizeof(float) * rows * k);                                                                       \
        int64_t i = 0;                                                                                                  \
        for (; i + 4 <= n; i += 4) {                                                                                    \
            const T *w0 = w + (int64_t)idx[i] * k, *w1 = w + (int64_t)idx[i + 1] * k, *w2 = w + (int64_t)idx[i + 2] * k, \
                    *w3 = w + (int64_t)idx[i + 3] * k;                                                                  \
            const int64_t ahead = i + 8 <= n ? i + 4 : i;                                                               \
            const T *p0 = w + (int64_t)idx[ahead] * k, *p1 = w + (int64_t)idx[ahead + 1] * k,                           \
                    *p2 = w + (int64_t)idx[ahead + 2] * k, *p3 = w + (int64_t)idx[ahead + 3] * k;                       \
            for (int64_t r = 0; r < rows; r++) {                                                                        \
                const float *f = a + r * n + i;                                                                         \
                float *o = out + r * k;                                                                                 \
                int64_t c = 0;                                                                                          \
                for (; c + V <= k; c += V) {                                                                            \
                    __builtin_prefetch(p0 + c);                                                                         \
                    __builtin_prefetch(p1 + c);                                                                         \
                    __builtin_prefetch(p2 + c);                                                                         \
                    __builtin_prefetch(p3 + c);                                                                         \
                    vf s = *(const vf *)(o + c);                                                                        \
                    s += f[0] * WIDEN(w0 + c);                                                                          \
                    s += f[1] * WIDEN(w1 + c);                                                                          \
                    s += f[2] * WIDEN(w2 + c);                                                                          \
                    s += f[3] * WIDEN(w3 + c);                                                                          \
                    *(vf *)(o + c) = s;                                                                                 \
                }                                                                                                       \
                for (; c < k; c++) {                                                                                    \
                    float s = o[c];                                                                                     \
                    s += f[0] * ONE(w0 + c);                                                                            \
                    s += f[1] * ONE(w1 + c);                                                                            \
                    s += f[2] * ONE(w2 + c);                                                                            \
                    s += f[3] * ONE(w3 + c);                                                                            \
                    o[c] = s;                                                                                           \
                }                                                                                                       \
            }                                                                                                           \
        }                                                                                                               \
        for (; i < n; i++) {                                                                                            \
            const T *w0 = w + (int64_t)idx[i] * k;                                                                      \
            for (int64_t r = 0; r < rows; r++) {                                                                        \
                const float f = a[r * n + i];                                                                           \
                float *o = out + r * k;                                                                                 \
                for (int64_t c = 0; c < k; c++) o[c] += f * ONE(w0 + c);                                                \
            }                                                                                                           \
        }                                                                                                               \
    }
DEFINE_ADD(sparse_add16, uint16_t, WIDEN16, one16)
DEFINE_ADD(sparse_add32, float, WIDEN32, one32)
