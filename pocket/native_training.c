/*
What a Transformer does between its matrix products, forward and backward, for training on a CPU:
pocket/native.py compiles this file, and pocket/fused.py calls it.

    norm, norm_gradient                  LayerNorm, RMSNorm
    split_heads, split_heads_gradient    QK-norm, rotary positions, heads before tokens
    softmax, softmax_gradient            of attention scores, optionally causal
    activate, activate_gradient          squared ReLU, GELU in the tanh form
    drop                                 dropout, and its gradient
    shift_tokens                         and, in the opposite direction, its gradient

PyTorch computes each of these in one to ten passes over memory. Here each row is read once,
converted to float32, processed, and written once. A leading d means gradient: dy is that of y.
Tensors are contiguous: bfloat16 if is_bfloat16, otherwise float32.
*/

/* Use vectors of 512 bits if the processor has them: GCC prefers 256 */
#if defined(__AVX512F__) && !defined(__clang__) && __GNUC__ >= 8
#pragma GCC target("prefer-vector-width=512")
#endif

#include "native.h"

/* ---------------------------------------------------------------------------------------------- */
/* Norms */

static inline float dot(const float *a, const float *b, int count) {
    float sum = 0;
    for (int i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

static inline float sum_of(const float *x, int count) {
    float sum = 0;
    for (int i = 0; i < count; i++) sum += x[i];
    return sum;
}

/* x = (x - mean) * scale, with a mean of 0 in an RMSNorm. Returns the scale */
static inline float normalize(float *x, int width, int is_layer_norm, float eps) {
    if (is_layer_norm) {
        float mean = sum_of(x, width) / width;
        for (int i = 0; i < width; i++) x[i] -= mean;
    }
    float scale = 1 / sqrtf(dot(x, x, width) / width + eps);
    if (scale == 0) scale = NAN; /* the squares overflow: train.py must see that it diverges */
    for (int i = 0; i < width; i++) x[i] *= scale;
    return scale;
}

/* Turns dy, the gradient of normalize()'s output y, into that of its input. scale: what it
   returned. A norm removes mean and length, so no gradient passes along these two directions */
static inline void normalize_gradient(float *dy, const float *y, float scale, int width,
                                      int is_layer_norm) {
    float mean = is_layer_norm ? sum_of(dy, width) / width : 0;
    float along_y = dot(dy, y, width) / width;
    for (int i = 0; i < width; i++) dy[i] = (dy[i] - mean - y[i] * along_y) * scale;
}

/* y = norm of x, both (rows, width) */
void norm(const Norm *layer, const void *x, void *y, int64_t rows, int is_bfloat16) {
    int width = layer->width;
    #pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        float h[width];
        read_numbers(h, x, row * width, width, is_bfloat16);
        normalize(h, width, layer->is_layer_norm, layer->eps);
        if (layer->weight) {
            for (int i = 0; i < width; i++) h[i] *= layer->weight[i];
        }
        if (layer->bias) {
            for (int i = 0; i < width; i++) h[i] += layer->bias[i];
        }
        write_numbers(y, row * width, h, width, is_bfloat16);
    }
}

/* dx (rows, width), and the gradients of weight and bias as sums over each of `parts` parts of the
   rows: (parts, 2, width). Parts, not threads: the same result with any number of threads */
void norm_gradient(const Norm *layer, const void *x, const void *dy, void *dx, float *sums,
                   int64_t rows, int parts, int is_bfloat16) {
    int width = layer->width;
    #pragma omp parallel for
    for (int part = 0; part < parts; part++) {
        float *dweight = sums + (int64_t)2 * part * width;
        float *dbias = dweight + width;
        float h[width], d[width];
        memset(dweight, 0, 2 * width * sizeof(float));
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
            read_numbers(h, x, row * width, width, is_bfloat16);
            read_numbers(d, dy, row * width, width, is_bfloat16);
            float scale = normalize(h, width, layer->is_layer_norm, layer->eps);
            for (int i = 0; i < width; i++) {
                dweight[i] += d[i] * h[i];
                dbias[i] += d[i];
            }
            if (layer->weight) {
                for (int i = 0; i < width; i++) d[i] *= layer->weight[i];
            }
            normalize_gradient(d, h, scale, width, layer->is_layer_norm);
            write_numbers(dx, row * width, d, width, is_bfloat16);
        }
    }
}

/* ---------------------------------------------------------------------------------------------- */
/* Queries, keys and values */

#define EPS 1e-5f /* of QK-norm: the default of F.layer_norm, which model.py's normalize() calls */

typedef struct {
    int B, T, H, G, D;       /* G: heads of keys, and of values */
    int is_normed, is_bfloat16;
    const float *cos, *sin;  /* (T, D / 2), or NULL without rotary positions */
} HeadShape;

enum {QUERY, KEY, VALUE};

/* Where head n of token (b, t) is in q, k or v, and in which of them */
static int64_t offset_of(const HeadShape *shape, int b, int t, int n, int *which) {
    int heads = shape->H;
    *which = QUERY;
    if (n >= shape->H) {
        n -= shape->H;
        heads = shape->G;
        *which = KEY;
    }
    if (*which == KEY && n >= shape->G) {
        n -= shape->G;
        *which = VALUE;
    }
    return (((int64_t)b * heads + n) * shape->T + t) * shape->D;
}

/* qkv (B, T, (H + 2 G) D) to q (B, H, T, D) and k, v (B, G, T, D) */
void split_heads(const HeadShape *shape, const void *qkv, void *q, void *k, void *v) {
    int D = shape->D, T = shape->T, heads = shape->H + 2 * shape->G;
    void *targets[3] = {q, k, v};
    #pragma omp parallel for
    for (int64_t token = 0; token < (int64_t)shape->B * T; token++) {
        float h[D];
        int b = token / T, t = token % T, which;
        for (int n = 0; n < heads; n++) {
            read_numbers(h, qkv, (token * heads + n) * D, D, shape->is_bfloat16);
            int64_t offset = offset_of(shape, b, t, n, &which);
            if (which != VALUE && shape->is_normed) normalize(h, D, 1, EPS);
            if (which != VALUE && shape->cos) {
                int64_t angle = (int64_t)t * (D / 2);
                rotate(h, shape->cos + angle, shape->sin + angle, D, 1);
            }
            write_numbers(targets[which], offset, h, D, shape->is_bfloat16);
        }
    }
}

/* The gradient of qkv from those of q, k and v */
void split_heads_gradient(const HeadShape *shape, const void *qkv, const void *dq, const void *dk,
                          const void *dv, void *dqkv) {
    int D = shape->D, T = shape->T, heads = shape->H + 2 * shape->G;
    const void *sources[3] = {dq, dk, dv};
    #pragma omp parallel for
    for (int64_t token = 0; token < (int64_t)shape->B * T; token++) {
        float d[D], h[D];
        int b = token / T, t = token % T, which;
        for (int n = 0; n < heads; n++) {
            int64_t offset = offset_of(shape, b, t, n, &which);
            read_numbers(d, sources[which], offset, D, shape->is_bfloat16);
            if (which != VALUE && shape->cos) {
                int64_t angle = (int64_t)t * (D / 2);
                rotate(d, shape->cos + angle, shape->sin + angle, D, -1);
            }
            if (which != VALUE && shape->is_normed) {
                read_numbers(h, qkv, (token * heads + n) * D, D, shape->is_bfloat16);
                float scale = normalize(h, D, 1, EPS);
                normalize_gradient(d, h, scale, D, 1);
            }
            write_numbers(dqkv, (token * heads + n) * D, d, D, shape->is_bfloat16);
        }
    }
}

/* ---------------------------------------------------------------------------------------------- */
/* Softmax of attention scores */

typedef struct {
    int64_t matrices;    /* batch times heads */
    int T, S;            /* queries, keys */
    int first;           /* the position of the first query, if it sees no later keys; else -1 */
    int is_bfloat16;
    float scale;         /* of the scores */
    const uint8_t *mask; /* (B, S): 1 for keys that may be seen; or NULL */
    int H;               /* heads, if there is a mask */
} ScoreShape;

#define LOWEST (-INFINITY) /* the score of a key that is not seen */

/* How many keys a query sees */
static int visible_keys(const ScoreShape *shape, int t) {
    return shape->first < 0 ? shape->S : smaller(shape->first + t + 1, shape->S);
}

/* Loops over a multiple of 16 numbers are all vector instructions, which is fastest */
static int round_up_to_16(int count) { return (count + 15) / 16 * 16; }

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
    for (int64_t row = 0; row < shape->matrices * T; row++) {
        float h[round_up_to_16(S)];
        int keys = visible_keys(shape, row % T), end = round_up_to_16(keys);
        read_numbers(h, scores, row * S, keys, shape->is_bfloat16);
        if (shape->mask) {
            const uint8_t *mask = shape->mask + row / T / shape->H * S;
            for (int i = 0; i < keys; i++) h[i] = mask[i] ? h[i] : LOWEST;
        }
        for (int i = keys; i < end; i++) h[i] = LOWEST;
        float largest = largest_of(h, end), sum = 0;
        for (int i = 0; i < end; i++) {
            float x = (h[i] - largest) * shape->scale;
            h[i] = x < -70 ? 0 : exponential(x); /* denormal numbers would be slow */
            sum += h[i];
        }
        memset(h + end, 0, (round_up_to_16(S) - end) * sizeof(float));
        float share = 1 / sum;
        for (int i = 0; i < end; i++) h[i] *= share;
        write_numbers(scores, row * S, h, S, shape->is_bfloat16);
    }
}

/* In place: gradients of weights become those of scores */
void softmax_gradient(const ScoreShape *shape, const void *weights, void *dweights) {
    int T = shape->T, S = shape->S;
    #pragma omp parallel for
    for (int64_t row = 0; row < shape->matrices * T; row++) {
        float w[round_up_to_16(S)], d[round_up_to_16(S)], mean = 0;
        int keys = visible_keys(shape, row % T);
        int end = smaller(round_up_to_16(keys), S); /* all weights beyond are 0 */
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

/* The derivative of GELU */
static inline float gelu_slope(float x) {
    float share = gelu_share(x);
    return share + x * share * (1 - share) * 1.59576912f * (1 + 0.134145f * x * x);
}

/* y = the nonlinearity of x */
void activate(int kind, const void *x, void *y, int64_t count, int is_bfloat16) {
    #pragma omp parallel for
    for (int64_t first = 0; first < count; first += BLOCK) {
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

/* dx from x and dy */
void activate_gradient(int kind, const void *x, const void *dy, void *dx, int64_t count,
                       int is_bfloat16) {
    #pragma omp parallel for
    for (int64_t first = 0; first < count; first += BLOCK) {
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
/* Dropout */

/* y = x times scale where a random byte is above the threshold, else 0. For gradients, too */
void drop(const void *x, const int8_t *bytes, void *y, int64_t count, int threshold, float scale,
          int is_bfloat16) {
    #pragma omp parallel for
    for (int64_t first = 0; first < count; first += BLOCK) {
        float h[BLOCK];
        int n = count - first < BLOCK ? count - first : BLOCK;
        read_numbers(h, x, first, n, is_bfloat16);
        for (int i = 0; i < n; i++) h[i] = bytes[first + i] > threshold ? h[i] * scale : 0;
        write_numbers(y, first, h, n, is_bfloat16);
    }
}

/* ---------------------------------------------------------------------------------------------- */
/* Token shift */

/* y (B, T, C). by 1: the first half of each token's channels comes from the token before; by -1:
   from the one after. Beyond either end it is 0. bytes: the size of a number */
void shift_tokens(const char *x, char *y, int64_t B, int T, int C, int by, int bytes) {
    int64_t half = (int64_t)((C + 1) / 2) * bytes, whole = (int64_t)C * bytes;
    #pragma omp parallel for
    for (int64_t token = 0; token < B * T; token++) {
        int from = token % T - by;
        char *to = y + token * whole;
        if (from < 0 || from >= T) memset(to, 0, half);
        else memcpy(to, x + (token - by) * whole, half);
        memcpy(to + half, x + token * whole + half, whole - half);
    }
}
