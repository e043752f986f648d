/*
What a Transformer does between its matrix products, forward and backward, for training on a CPU:
pocket/native.py compiles this file, and pocket/fused.py calls it.

    norm, norm_gradient                  LayerNorm, RMSNorm
    split_heads, split_heads_gradient    QK-norm, rotary positions, heads before tokens
    softmax, softmax_gradient            of attention scores, causal if wanted
    activate, activate_gradient          squared ReLU, GELU in the tanh form
    shift_tokens                         and, in the opposite direction, its gradient

PyTorch computes each of these in one to ten passes over memory. Here a row at a time is read,
converted to float32, and written when all is done with it. A gradient's name is that of its
tensor with a d: dy is that of y. Tensors are contiguous: bfloat16 if is_bfloat16, otherwise
float32.
*/

/* Vectors of 512 bits where there are any; compilers prefer 256, which suits code with few of them */
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

#include "native.h"

/* ---------------------------------------------------------------------------------------------- */
/* Norms */

typedef struct {
    int width, is_layer_norm, is_bfloat16; /* not is_layer_norm: an RMSNorm */
    float eps;
    const float *weight, *bias; /* (width), or NULL for none */
} NormLayer;

/* The sum of a * b. 64 sums at once, because each addition has to wait for the one before it */
static inline float dot(const float *a, const float *b, int count) {
    float sums[64] = {0}, sum = 0;
    int i = 0;
    for (; i + 64 <= count; i += 64) {
        for (int j = 0; j < 64; j++) sums[j] += a[i + j] * b[i + j];
    }
    for (int j = 0; j < 64; j++) sum += sums[j];
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

static inline float sum_of(const float *x, int count) {
    float sums[64] = {0}, sum = 0;
    int i = 0;
    for (; i + 64 <= count; i += 64) {
        for (int j = 0; j < 64; j++) sums[j] += x[i + j];
    }
    for (int j = 0; j < 64; j++) sum += sums[j];
    for (; i < count; i++) sum += x[i];
    return sum;
}

/* x = (x - mean) * scale, with a mean of 0 in an RMSNorm. Returns the scale */
static inline float normalize(float *x, int width, int is_layer_norm, float eps) {
    if (is_layer_norm) {
        float mean = sum_of(x, width) / width;
        for (int i = 0; i < width; i++) x[i] -= mean;
    }
    float scale = 1 / sqrtf(dot(x, x, width) / width + eps);
    if (scale == 0) scale = NAN; /* the squares overflow: training has diverged, and has to notice */
    for (int i = 0; i < width; i++) x[i] *= scale;
    return scale;
}

/* dy becomes the gradient of what normalize() was given. y, scale: what it returned. A norm removes
   the mean and the length of x, so no gradient passes along these two directions */
static inline void normalize_gradient(float *dy, const float *y, float scale, int width,
                                      int is_layer_norm) {
    float mean = is_layer_norm ? sum_of(dy, width) / width : 0;
    float along_y = dot(dy, y, width) / width;
    for (int i = 0; i < width; i++) dy[i] = (dy[i] - mean - y[i] * along_y) * scale;
}

/* y = norm of x, both (rows, width) */
void norm(const NormLayer *layer, const void *x, void *y, long rows) {
    int width = layer->width;
    #pragma omp parallel for
    for (long row = 0; row < rows; row++) {
        float h[width];
        read_numbers(h, x, row * width, width, layer->is_bfloat16);
        normalize(h, width, layer->is_layer_norm, layer->eps);
        if (layer->weight) for (int i = 0; i < width; i++) h[i] *= layer->weight[i];
        if (layer->bias) for (int i = 0; i < width; i++) h[i] += layer->bias[i];
        write_numbers(y, row * width, h, width, layer->is_bfloat16);
    }
}

/* dx (rows, width), and the gradients of weight and bias as sums over each of `parts` parts of the
   rows: (parts, 2, width). Parts, not threads: the same result with any number of threads */
void norm_gradient(const NormLayer *layer, const void *x, const void *dy, void *dx, float *sums,
                   long rows, int parts) {
    int width = layer->width;
    #pragma omp parallel for
    for (int part = 0; part < parts; part++) {
        float *dweight = sums + 2L * part * width;
        float *dbias = dweight + width;
        float h[width], d[width];
        memset(dweight, 0, 2 * width * sizeof(float));
        for (long row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
            read_numbers(h, x, row * width, width, layer->is_bfloat16);
            read_numbers(d, dy, row * width, width, layer->is_bfloat16);
            float scale = normalize(h, width, layer->is_layer_norm, layer->eps);
            for (int i = 0; i < width; i++) {
                dweight[i] += d[i] * h[i];
                dbias[i] += d[i];
            }
            if (layer->weight) for (int i = 0; i < width; i++) d[i] *= layer->weight[i];
            normalize_gradient(d, h, scale, width, layer->is_layer_norm);
            write_numbers(dx, row * width, d, width, layer->is_bfloat16);
        }
    }
}

/* ---------------------------------------------------------------------------------------------- */
/* Queries, keys and values */

typedef struct {
    int B, T, H, G, D;       /* G: heads of keys, and of values */
    int is_normed, is_bfloat16;
    const float *cos, *sin;  /* (T, D / 2), or NULL without rotary positions */
} HeadShape;

/* Turn the pairs (i, i + D / 2); direction -1: back */
static void turn(float *head, const float *cos, const float *sin, int D, int direction) {
    for (int i = 0; i < D / 2; i++) {
        float a = head[i], b = head[i + D / 2], s = direction * sin[i];
        head[i] = a * cos[i] - b * s;
        head[i + D / 2] = a * s + b * cos[i];
    }
}

/* Where head n of token (b, t) of a text is in q, k or v, and in which of them */
static long place_of(const HeadShape *shape, int b, int t, int n, int *which) {
    int H = shape->H, G = shape->G;
    *which = n < H ? 0 : n < H + G ? 1 : 2;
    int heads = *which == 0 ? H : G;
    int head = *which == 0 ? n : *which == 1 ? n - H : n - H - G;
    return (((long)b * heads + head) * shape->T + t) * shape->D;
}

/* qkv (B, T, (H + 2 G) D) to q (B, H, T, D) and k, v (B, G, T, D) */
void split_heads(const HeadShape *shape, const void *qkv, void *q, void *k, void *v) {
    int D = shape->D, T = shape->T, heads = shape->H + 2 * shape->G;
    void *targets[3] = {q, k, v};
    #pragma omp parallel for
    for (long token = 0; token < (long)shape->B * T; token++) {
        float h[D];
        int b = token / T, t = token % T, which;
        for (int n = 0; n < heads; n++) {
            read_numbers(h, qkv, (token * heads + n) * D, D, shape->is_bfloat16);
            long place = place_of(shape, b, t, n, &which);
            if (which < 2 && shape->is_normed) normalize(h, D, 1, 1e-5f);
            if (which < 2 && shape->cos) {
                turn(h, shape->cos + (long)t * D / 2, shape->sin + (long)t * D / 2, D, 1);
            }
            write_numbers(targets[which], place, h, D, shape->is_bfloat16);
        }
    }
}

/* The gradient of qkv from those of q, k and v */
void split_heads_gradient(const HeadShape *shape, const void *qkv, const void *dq, const void *dk,
                          const void *dv, void *dqkv) {
    int D = shape->D, T = shape->T, heads = shape->H + 2 * shape->G;
    const void *sources[3] = {dq, dk, dv};
    #pragma omp parallel for
    for (long token = 0; token < (long)shape->B * T; token++) {
        float d[D], h[D];
        int b = token / T, t = token % T, which;
        for (int n = 0; n < heads; n++) {
            long place = place_of(shape, b, t, n, &which);
            read_numbers(d, sources[which], place, D, shape->is_bfloat16);
            if (which < 2 && shape->cos) {
                turn(d, shape->cos + (long)t * D / 2, shape->sin + (long)t * D / 2, D, -1);
            }
            if (which < 2 && shape->is_normed) {
                read_numbers(h, qkv, (token * heads + n) * D, D, shape->is_bfloat16);
                float scale = normalize(h, D, 1, 1e-5f);
                normalize_gradient(d, h, scale, D, 1);
            }
            write_numbers(dqkv, (token * heads + n) * D, d, D, shape->is_bfloat16);
        }
    }
}

/* ---------------------------------------------------------------------------------------------- */
/* Softmax of attention scores */

typedef struct {
    long matrices;      /* batch times heads */
    int T, S;           /* queries, keys */
    int first;          /* the position of the first query if it sees no later keys, otherwise -1 */
    int is_bfloat16;
    float scale;        /* of the scores */
    const uint8_t *mask; /* (B, S): 1 for keys that may be seen; or NULL */
    int H;              /* heads, if there is a mask */
} ScoreShape;

enum {LOWEST = -1000000000}; /* instead of a score that does not count */

/* How many keys a query sees */
static int keys_of(const ScoreShape *shape, int t) {
    return shape->first < 0 ? shape->S : smaller(shape->first + t + 1, shape->S);
}

/* Loops over a multiple of 16 numbers consist of whole vectors, which are fastest */
static int whole_vectors(int count) { return (count + 15) / 16 * 16; }

/* The largest of `count` numbers, a multiple of 16: of 16 at once, as compilers do not reorder
   comparisons that may involve NaN */
static float largest_of(const float *x, int count) {
    float found[16];
    for (int j = 0; j < 16; j++) found[j] = LOWEST;
    for (int i = 0; i < count; i += 16) {
        for (int j = 0; j < 16; j++) found[j] = larger(found[j], x[i + j]);
    }
    for (int j = 1; j < 16; j++) found[0] = larger(found[0], found[j]);
    return found[0];
}

/* In place: scores (matrices, T, S) become weights, 0 for keys that are not seen */
void softmax(const ScoreShape *shape, void *scores) {
    int T = shape->T, S = shape->S;
    #pragma omp parallel for
    for (long row = 0; row < shape->matrices * T; row++) {
        float h[whole_vectors(S)];
        int keys = keys_of(shape, row % T), end = whole_vectors(keys);
        read_numbers(h, scores, row * S, keys, shape->is_bfloat16);
        if (shape->mask) {
            const uint8_t *mask = shape->mask + row / T / shape->H * S;
            for (int i = 0; i < keys; i++) h[i] = mask[i] ? h[i] : LOWEST;
        }
        for (int i = keys; i < end; i++) h[i] = LOWEST;
        float largest = largest_of(h, end), sum = 0;
        for (int i = 0; i < end; i++) {
            h[i] = exponential((h[i] - largest) * shape->scale);
            sum += h[i];
        }
        memset(h + keys, 0, (whole_vectors(S) - keys) * sizeof(float));
        float share = 1 / sum;
        for (int i = 0; i < end; i++) h[i] *= share;
        write_numbers(scores, row * S, h, S, shape->is_bfloat16);
    }
}

/* In place: gradients of weights become those of scores */
void softmax_gradient(const ScoreShape *shape, const void *weights, void *dweights) {
    int T = shape->T, S = shape->S;
    #pragma omp parallel for
    for (long row = 0; row < shape->matrices * T; row++) {
        float w[whole_vectors(S)], d[whole_vectors(S)], mean = 0;
        int end = smaller(whole_vectors(keys_of(shape, row % T)), S); /* weights beyond are 0 */
        read_numbers(w, weights, row * S, end, shape->is_bfloat16);
        read_numbers(d, dweights, row * S, end, shape->is_bfloat16);
        for (int i = 0; i < end; i++) mean += w[i] * d[i];
        for (int i = 0; i < end; i++) d[i] = w[i] * (d[i] - mean) * shape->scale;
        memset(d + end, 0, (S - end) * sizeof(float));
        write_numbers(dweights, row * S, d, S, shape->is_bfloat16);
    }
}

/* ---------------------------------------------------------------------------------------------- */
/* Nonlinearities */

enum {BLOCK = 1024}; /* numbers processed at once */

enum {SQUARED_RELU, GELU};

/* The GELU of x, in the tanh form, is x times this: (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u)) with
   u = sqrt(2 / pi) (x + 0.044715 x^3) */
static inline float gelu_share(float x) {
    return 1 / (1 + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
}

static inline float gelu_slope(float x) {
    float share = gelu_share(x);
    return share + x * share * (1 - share) * 1.59576912f * (1 + 0.134145f * x * x);
}

/* y = the nonlinearity of x */
void activate(int kind, const void *x, void *y, long count, int is_bfloat16) {
    #pragma omp parallel for
    for (long first = 0; first < count; first += BLOCK) {
        float h[BLOCK];
        int n = count - first < BLOCK ? count - first : BLOCK;
        read_numbers(h, x, first, n, is_bfloat16);
        if (kind == SQUARED_RELU) {
            for (int i = 0; i < n; i++) h[i] = larger(0, h[i]) * larger(0, h[i]);
        } else {
            for (int i = 0; i < n; i++) h[i] *= gelu_share(h[i]);
        }
        write_numbers(y, first, h, n, is_bfloat16);
    }
}

void activate_gradient(int kind, const void *x, const void *dy, void *dx, long count,
                       int is_bfloat16) {
    #pragma omp parallel for
    for (long first = 0; first < count; first += BLOCK) {
        float h[BLOCK], d[BLOCK];
        int n = count - first < BLOCK ? count - first : BLOCK;
        read_numbers(h, x, first, n, is_bfloat16);
        read_numbers(d, dy, first, n, is_bfloat16);
        if (kind == SQUARED_RELU) {
            for (int i = 0; i < n; i++) d[i] *= 2 * larger(0, h[i]);
        } else {
            for (int i = 0; i < n; i++) d[i] *= gelu_slope(h[i]);
        }
        write_numbers(dx, first, d, n, is_bfloat16);
    }
}

/* ---------------------------------------------------------------------------------------------- */
/* Token shift */

/* y (B, T, C): the first half of each token's channels from the token before, or, with `by` -1,
   from the one after; bytes: of a number. What comes from outside the text is 0 */
void shift_tokens(const char *x, char *y, long B, int T, int C, int by, int bytes) {
    long half = (C + 1L) / 2 * bytes, whole = (long)C * bytes;
    #pragma omp parallel for
    for (long token = 0; token < B * T; token++) {
        int from = token % T - by;
        char *to = y + token * whole;
        if (from < 0 || from >= T) memset(to, 0, half);
        else memcpy(to, x + (token - by) * whole, half);
        memcpy(to + half, x + token * whole + half, whole - half);
    }
}
