/*
What PyTorch has no quick function for when a GPT generates: pocket/stack.py compiles this file.

    multiply_int8   a linear layer with 8-bit weights
    add_and_norm    x = x + y, then the norm of x
    attend          QK-norm, rotary positions, append to the cache, attention
    swiglu          the nonlinearity of a Llama

The last three are all that a block does besides its linear layers, for a single token. They compute
what Block.forward in model.py does, to rounding. What comes from linear layers and goes to them is
bfloat16 with is_bfloat16, otherwise float32; all else is float32.

Reductions are written as plain loops: the compiler makes vector instructions of them.
*/
#include <math.h>
#include <stdint.h>
#include <string.h>

/* The numbers a layer reads become whole, up to LEVELS, so that 127 * LEVELS * CHUNK < 2^31: the sum
   of that many products with 8-bit weights fits into 32 bits, whatever they are */
enum {LEVELS = 8191, CHUNK = 2048};

/* How many bytes before they are needed weights are asked for. It takes long until they come from
   memory, and the processor's own guess of what is needed next comes too late */
enum {AHEAD = 8192};

static inline int smaller(int a, int b) { return a < b ? a : b; }

static float dot(const int8_t *weight, const int16_t *x, int count) {
    float total = 0;
    for (int start = 0; start < count; start += CHUNK) {
        int end = smaller(start + CHUNK, count);
        int32_t sum = 0;
        for (int i = start; i < end; i++) {
            int16_t wide = weight[i]; /* for sums of 16-bit products there is an instruction */
            sum += wide * x[i];
        }
        total += sum;
    }
    return total;
}

/* y (rows, out) = x (rows, in) times weight (out, in), whose rows have a scale each, plus bias
   (out), unless that is NULL. whole: memory for (rows, in) numbers */
void multiply_int8(const int8_t *weight, const float *scale, const float *bias, const float *x,
                   int16_t *whole, float *y, int in, int out, int rows) {
    float steps[rows];
    for (int row = 0; row < rows; row++) {
        const float *from = x + (long)row * in;
        int16_t *to = whole + (long)row * in;
        float largest = 1e-12f;
        for (int i = 0; i < in; i++) largest = fmaxf(largest, fabsf(from[i]));
        steps[row] = largest / LEVELS;
        for (int i = 0; i < in; i++) to[i] = floorf(from[i] / steps[row] + 0.5f);
    }

    #pragma omp parallel for
    for (int i = 0; i < out; i++) {
        const int8_t *channel = weight + (long)i * in;
        for (int byte = 0; byte < in; byte += 64) __builtin_prefetch(channel + byte + AHEAD);
        for (int row = 0; row < rows; row++) {
            float sum = dot(channel, whole + (long)row * in, in);
            y[(long)row * out + i] = sum * scale[i] * steps[row] + (bias ? bias[i] : 0);
        }
    }
}

/* What a linear layer has written */
static void read_numbers(float *to, const void *from, int count, int is_bfloat16) {
    if (!is_bfloat16) {
        memcpy(to, from, count * sizeof(float));
        return;
    }
    const uint16_t *halves = from; /* bfloat16 is the upper half of a float32 */
    for (int i = 0; i < count; i++) {
        union { uint32_t bits; float number; } whole = {(uint32_t)halves[i] << 16};
        to[i] = whole.number;
    }
}

/* For a linear layer to read */
static void write_numbers(void *to, const float *from, int count, int is_bfloat16) {
    if (!is_bfloat16) {
        memcpy(to, from, count * sizeof(float));
        return;
    }
    uint16_t *halves = to;
    for (int i = 0; i < count; i++) {
        union { float number; uint32_t bits; } whole = {from[i]};
        uint32_t is_odd = (whole.bits >> 16) & 1; /* round to nearest, ties to even */
        halves[i] = (whole.bits + 0x7fff + is_odd) >> 16;
    }
}

/* e^x to 1e-7, as 2^n e^r with |r| < 0.35. Unlike expf() it is made of what vectors can do.
   Constants: Cephes, by S. Moshier */
static inline float exponential(float x) {
    x = fminf(fmaxf(x, -87), 88);
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float e = 1.9875691500e-4f;
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1;
    union { int32_t bits; float number; } power = {((int32_t)n + 127) << 23};
    return e * power.number;
}

/* x += y (width), unless y is NULL; out = the norm of x: RMSNorm, or LayerNorm with is_layer_norm.
   bias: NULL for none */
void add_and_norm(float *x, const void *y, const float *weight, const float *bias, void *out,
                  int width, float eps, int is_layer_norm, int is_bfloat16) {
    float h[width];
    if (y) {
        read_numbers(h, y, width, is_bfloat16);
        for (int i = 0; i < width; i++) x[i] += h[i];
    }
    float mean = 0, squares = 0;
    if (is_layer_norm) {
        for (int i = 0; i < width; i++) mean += x[i];
        mean /= width;
    }
    for (int i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(squares / width + eps);
    for (int i = 0; i < width; i++) h[i] = (x[i] - mean) * scale * weight[i];
    if (bias) {
        for (int i = 0; i < width; i++) h[i] += bias[i];
    }
    write_numbers(out, h, width, is_bfloat16);
}

/* silu(gate) * rest, where in holds both (2 * width) */
void swiglu(const void *in, void *out, int width, int is_bfloat16) {
    float gate[2 * width];
    float *rest = gate + width;
    read_numbers(gate, in, 2 * width, is_bfloat16);
    for (int i = 0; i < width; i++) gate[i] = gate[i] / (1 + exponential(-gate[i])) * rest[i];
    write_numbers(out, gate, width, is_bfloat16);
}

/* What model.py's normalize() does with QK-norm's weights, for one head */
static void normalize(float *head, const float *weight, float eps, int D) {
    float squares = 0;
    for (int i = 0; i < D; i++) squares += head[i] * head[i];
    float scale = 1 / sqrtf(squares / D + eps);
    for (int i = 0; i < D; i++) head[i] *= scale * weight[i];
}

static void rotate(float *head, const float *cos, const float *sin, int D) {
    for (int i = 0; i < D / 2; i++) {
        float a = head[i], b = head[i + D / 2];
        head[i] = a * cos[i] - b * sin[i];
        head[i + D / 2] = a * sin[i] + b * cos[i];
    }
}

/* Attention of H heads, D wide, to G heads of keys and values. qkv: (H + 2 G, D), out: (H, D).
   keys, values: a layer of the cache, (G, size, D), of which `position` columns are filled; the
   next one is filled here. cos, sin: (D / 2) of this position, NULL without rotary positions.
   q_norm, k_norm: (D), NULL without QK-norm */
void attend(const void *qkv, void *out, float *keys, float *values, const float *cos,
            const float *sin, const float *q_norm, const float *k_norm, float eps, int position,
            int size, int H, int G, int D, int is_bfloat16) {
    float q[(H + 2 * G) * D], y[H * D], weights[position + 1];
    float *k = q + H * D, *v = k + G * D;
    read_numbers(q, qkv, (H + 2 * G) * D, is_bfloat16);
    for (int h = 0; h < H + G; h++) { /* queries, then keys */
        if (q_norm) normalize(q + h * D, h < H ? q_norm : k_norm, eps, D);
        if (cos) rotate(q + h * D, cos, sin, D);
    }
    for (int g = 0; g < G; g++) {
        memcpy(keys + ((long)g * size + position) * D, k + g * D, D * sizeof(float));
        memcpy(values + ((long)g * size + position) * D, v + g * D, D * sizeof(float));
    }

    for (int h = 0; h < H; h++) {
        int g = h / (H / G);
        const float *query = q + h * D;
        const float *key = keys + (long)g * size * D, *value = values + (long)g * size * D;
        float *to = y + h * D;

        float largest = -1e30f, total = 0; /* softmax, whose largest exponent is 0 */
        for (int s = 0; s <= position; s++) {
            float score = 0;
            for (int i = 0; i < D; i++) score += query[i] * key[(long)s * D + i];
            weights[s] = score / sqrtf(D);
            largest = fmaxf(largest, weights[s]);
        }
        for (int s = 0; s <= position; s++) {
            weights[s] = exponential(weights[s] - largest);
            total += weights[s];
        }
        memset(to, 0, D * sizeof(float));
        for (int s = 0; s <= position; s++) {
            for (int i = 0; i < D; i++) to[i] += weights[s] / total * value[(long)s * D + i];
        }
    }
    write_numbers(out, y, H * D, is_bfloat16);
}
