/* What native.c and native_training.c share */
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline int smaller(int a, int b) { return a < b ? a : b; }

/* If b is not a number, neither is the result. Unlike a call of fmaxf(), it vectorizes */
static inline float larger(float a, float b) { return a > b ? a : b; }

/* A bfloat16 is the upper half of a float32 */
static inline float from_bfloat16(uint16_t half) {
    union { uint32_t bits; float number; } full = {(uint32_t)half << 16};
    return full.number;
}

static inline uint16_t to_bfloat16(float number) {
    if (number != number) return 0x7fc0; /* NaN, which rounding could turn into another number */
    union { float number; uint32_t bits; } full = {number};
    uint32_t is_odd = (full.bits >> 16) & 1; /* round to nearest, ties to even */
    return (full.bits + 0x7fff + is_odd) >> 16;
}

/* `count` numbers, from number `first` on, of a tensor: bfloat16 if is_bfloat16, else float32 */
static inline void read_numbers(float *to, const void *from, long first, int count,
                                int is_bfloat16) {
    if (!is_bfloat16) {
        memcpy(to, (const float *)from + first, count * sizeof(float));
        return;
    }
    const uint16_t *halves = (const uint16_t *)from + first;
    for (int i = 0; i < count; i++) to[i] = from_bfloat16(halves[i]);
}

/* The same into a tensor */
static inline void write_numbers(void *to, long first, const float *from, int count,
                                 int is_bfloat16) {
    if (!is_bfloat16) {
        memcpy((float *)to + first, from, count * sizeof(float));
        return;
    }
    uint16_t *halves = (uint16_t *)to + first;
    for (int i = 0; i < count; i++) halves[i] = to_bfloat16(from[i]);
}

/* e^x as 2^n e^r with |r| < 0.35, to a few millionths; x is limited to 70 either way, because small
   multiples of what lies beyond would be denormal numbers, which are slow. Unlike a call of expf(),
   it vectorizes. Coefficients: Cephes, by S. Moshier */
static inline float exponential(float x) {
    x = larger(-70, x);
    x = x > 70 ? 70 : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693147181f; /* ln 2 */
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

/* The GELU of x, in the tanh form, is x times this: (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u)) with
   u = sqrt(2 / pi) (x + 0.044715 x^3) */
static inline float gelu_share(float x) {
    return 1 / (1 + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
}

/* Rotary positions: turn the pairs (i, i + D / 2) of a head; direction -1: back */
static inline void rotate(float *head, const float *cos, const float *sin, int D, int direction) {
    for (int i = 0; i < D / 2; i++) {
        float a = head[i], b = head[i + D / 2], s = direction * sin[i];
        head[i] = a * cos[i] - b * s;
        head[i + D / 2] = a * s + b * cos[i];
    }
}

typedef struct {
    int width, is_layer_norm; /* not is_layer_norm: an RMSNorm */
    float eps;
    const float *weight, *bias; /* (width), or NULL for none */
} Norm;
