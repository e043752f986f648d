/*
What PyTorch has no quick function for when a GPT generates: pocket/native.py compiles this file.

    multiply_bfloat16   a linear layer of one token, with GELU if it is wanted
    multiply_int8       a linear layer with 8-bit weights
    add_and_norm        x = x + y, then the norm of x
    attend              QK-norm, rotary positions, append to the cache, attention
    swiglu              the nonlinearity of a Llama

The last three are what a block does between its linear layers, for one new token in each of B
texts; nonlinearities other than SwiGLU stay in PyTorch. They compute what Block.forward in model.py
does, up to rounding. Inputs and outputs of linear layers are bfloat16 if is_bfloat16, otherwise
float32; everything else is float32.

The loops are plain, and the compiler vectorizes them. Only bfloat16_dot() and multiply_in_tiles()
name instructions.
*/
#include "native.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
#define HAS_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* The inputs of a layer become whole numbers up to LEVELS. A sum of CHUNK products with 8-bit
   weights then fits into 32 bits, whatever they are: 127 * LEVELS * CHUNK < 2^31 */
enum {LEVELS = 8191, CHUNK = 2048};

/* Weights are requested this many bytes before they are needed: memory takes long to answer, and
   the processor's own guess of what comes next is too late */
enum {AHEAD = 8192};

/* weight (count) times x (count) */
static float bfloat16_dot(const uint16_t *weight, const uint16_t *x, int count) {
    int i = 0;
    float sum = 0;
#ifdef __AVX512BF16__
    /* 64 products per round, in two sums of 16 lanes each, so that neither waits for the other */
    __m512 first = _mm512_setzero_ps();
    __m512 second = _mm512_setzero_ps();
    for (; i + 64 <= count; i += 64) {
        __m512i w = _mm512_loadu_si512(weight + i);
        __m512i v = _mm512_loadu_si512(x + i);
        first = _mm512_dpbf16_ps(first, (__m512bh)w, (__m512bh)v);
        w = _mm512_loadu_si512(weight + i + 32);
        v = _mm512_loadu_si512(x + i + 32);
        second = _mm512_dpbf16_ps(second, (__m512bh)w, (__m512bh)v);
    }
    sum = _mm512_reduce_add_ps(_mm512_add_ps(first, second));
#endif
    for (; i < count; i++) sum += from_bfloat16(weight[i]) * from_bfloat16(x[i]);
    return sum;
}

typedef struct {
    int in, out;
    const uint16_t *weight; /* (out, in) */
    const float *bias;      /* (out), or NULL */
} Bfloat16Weights;

/* y (out) = x (in) times the weights, plus bias; then its GELU in the tanh form, if it is wanted */
void multiply_bfloat16(const Bfloat16Weights *weights, const uint16_t *x, uint16_t *y, int gelu) {
    int in = weights->in;
    #pragma omp parallel for
    for (int i = 0; i < weights->out; i++) {
        const uint16_t *channel = weights->weight + (long)i * in;
        for (int k = 0; k < in; k += 32) { /* 32 weights are a cache line of 64 bytes */
            __builtin_prefetch((const char *)(channel + k) + AHEAD);
        }
        float sum = bfloat16_dot(channel, x, in);
        if (weights->bias) sum += weights->bias[i];
        if (gelu) sum *= gelu_share(sum);
        y[i] = to_bfloat16(sum);
    }
}


/* weight (count) times one row of x */
static float int8_dot(const int8_t *weight, const int16_t *x, int count) {
    float total = 0;
    for (int start = 0; start < count; start += CHUNK) {
        int end = smaller(start + CHUNK, count);
        int32_t sum = 0;
        for (int i = start; i < end; i++) {
            int16_t wide = weight[i]; /* processors have an instruction that adds 16-bit products */
            sum += wide * x[i];
        }
        total += sum;
    }
    return total;
}

/* weight (count) times four rows of x, which are `stride` numbers apart, so that each weight is
   widened only once */
static void four_dots(const int8_t *weight, const int16_t *x, long stride, int count, float to[4]) {
    const int16_t *x1 = x + stride, *x2 = x1 + stride, *x3 = x2 + stride;
    memset(to, 0, 4 * sizeof(float));
    for (int start = 0; start < count; start += CHUNK) {
        int end = smaller(start + CHUNK, count);
        int32_t sum = 0, sum1 = 0, sum2 = 0, sum3 = 0;
        for (int i = start; i < end; i++) {
            int16_t wide = weight[i];
            sum += wide * x[i];
            sum1 += wide * x1[i];
            sum2 += wide * x2[i];
            sum3 += wide * x3[i];
        }
        to[0] += sum;
        to[1] += sum1;
        to[2] += sum2;
        to[3] += sum3;
    }
}

typedef struct {
    int in, out;
    const int8_t *weight; /* (out, in) */
    const float *scale;   /* (out), of the weights */
    const float *bias;    /* (out), or NULL */
} Int8Weights;

/* x (count) as whole numbers up to LEVELS. Returns their scale: x ~ scale * to */
static float round_inputs(const float *x, int16_t *to, int count) {
    float largest = 1e-12f; /* not 0: a row of zeros must not divide by zero */
    for (int i = 0; i < count; i++) largest = larger(largest, fabsf(x[i]));
    float scale = largest / LEVELS;
    for (int i = 0; i < count; i++) to[i] = floorf(x[i] / scale + 0.5f);
    return scale;
}

#ifdef HAS_TILES
/* Intel's AMX. A tile is a register of 16 rows of 64 bytes. One instruction multiplies 16 channels
   x 64 inputs of weights by 64 inputs x 16 rows of x, and adds the result to 16 x 16 sums: that is
   16,384 products. It takes bytes, so each input is split in two, x = 128 * high + low, which both
   lie from -64 to 64 and are multiplied separately */
enum {TILE = 16, TILE_BYTES = 64, MAX_TILE_ROWS = 16};

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16]; /* of each tile */
    uint8_t rows[16];
} TileConfig;

/* Linux lets a process use tiles only after it has asked */
static int may_use_tiles(void) {
    enum {ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18};
    static int answer = -1;
    if (answer < 0) {
        answer = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    }
    return answer;
}

/* multiply_int8() with tiles. x: (rows, in), rounded; rows <= MAX_TILE_ROWS, in is a multiple of
   TILE_BYTES, out >= 2 * TILE. No CHUNK is needed: 127 * 64 * in < 2^31 as long as in < 264,000,
   and pocket/native.py allows half of that */
static void multiply_in_tiles(const Int8Weights *weights, const int16_t *x, const float *x_scale,
                              float *y, int rows) {
    int in = weights->in, out = weights->out;

    /* The order in which the instruction wants its inputs: (in / 4, rows, 4) */
    int8_t high[rows * in], low[rows * in];
    for (int row = 0; row < rows; row++) {
        for (int i = 0; i < in; i++) {
            int number = x[(long)row * in + i];
            int upper = (number + 64) >> 7;
            long place = ((long)(i / 4) * rows + row) * 4 + i % 4;
            high[place] = upper;
            low[place] = number - 128 * upper;
        }
    }

    /* Tiles 0 to 3: sums of two groups of channels with high and low inputs. 4 and 5: weights of
       the two groups. 6 and 7: high and low inputs */
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = TILE;
        config.bytes_per_row[tile] = tile == 4 || tile == 5 ? TILE_BYTES : rows * 4;
    }

    #pragma omp parallel
    {
        _tile_loadconfig(&config);
        #pragma omp for
        for (int part = 0; part < (out + 2 * TILE - 1) / (2 * TILE); part++) {
            int first = smaller(part * 2 * TILE, out - 2 * TILE); /* the last part may overlap */
            const int8_t *channel = weights->weight + (long)first * in;
            /* What comes next is requested in the order of memory, as hopping would be slow */
            const int8_t *next = channel + 2L * TILE * in;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int i = 0; i < in; i += TILE_BYTES) {
                for (int c = 0; c < 2 * TILE; c++) {
                    __builtin_prefetch(next + (long)i * 2 * TILE + c * TILE_BYTES);
                }
                _tile_loadd(4, channel + i, in);
                _tile_loadd(5, channel + (long)TILE * in + i, in);
                _tile_loadd(6, high + (long)i * rows, rows * 4);
                _tile_loadd(7, low + (long)i * rows, rows * 4);
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(1, 4, 7);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
            int32_t high_sums[2 * TILE][rows], low_sums[2 * TILE][rows];
            _tile_stored(0, high_sums[0], rows * 4);
            _tile_stored(1, low_sums[0], rows * 4);
            _tile_stored(2, high_sums[TILE], rows * 4);
            _tile_stored(3, low_sums[TILE], rows * 4);

            for (int c = 0; c < 2 * TILE; c++) {
                float bias = weights->bias ? weights->bias[first + c] : 0;
                for (int row = 0; row < rows; row++) {
                    double sum = 128.0 * high_sums[c][row] + low_sums[c][row];
                    float product = (float)sum * x_scale[row] * weights->scale[first + c];
                    y[(long)row * out + first + c] = product + bias;
                }
            }
        }
        _tile_release();
    }
}
#endif

/* y (rows, out) = x (rows, in) times the weights, plus bias */
void multiply_int8(const Int8Weights *weights, const float *x, float *y, int rows) {
    int in = weights->in, out = weights->out;
    int16_t x_int[rows * in];
    float x_scale[rows];
    for (int row = 0; row < rows; row++) {
        x_scale[row] = round_inputs(x + (long)row * in, x_int + (long)row * in, in);
    }

#ifdef HAS_TILES
    int fits = rows <= MAX_TILE_ROWS && in % TILE_BYTES == 0 && out >= 2 * TILE;
    if (rows > 1 && fits && may_use_tiles()) { /* one row is limited by memory in any case */
        multiply_in_tiles(weights, x_int, x_scale, y, rows);
        return;
    }
#endif

    #pragma omp parallel for
    for (int i = 0; i < out; i++) {
        const int8_t *channel = weights->weight + (long)i * in;
        for (int byte = 0; byte < in; byte += 64) __builtin_prefetch(channel + byte + AHEAD);
        float sums[rows];
        int row = 0;
        for (; row + 4 <= rows; row += 4) {
            four_dots(channel, x_int + (long)row * in, in, in, sums + row);
        }
        for (; row < rows; row++) sums[row] = int8_dot(channel, x_int + (long)row * in, in);
        for (row = 0; row < rows; row++) {
            float bias = weights->bias ? weights->bias[i] : 0;
            y[(long)row * out + i] = sums[row] * x_scale[row] * weights->scale[i] + bias;
        }
    }
}

/* What all blocks share while one token is generated */
typedef struct {
    int B;                   /* texts */
    int is_bfloat16;
    int size, length;        /* columns of the cache, and how many of them are filled */
    const int64_t *pad;      /* (B), how many of these are padding, or NULL */
    const float *cos, *sin;  /* (B, D / 2), or NULL without rotary positions */
} StepContext;

typedef struct {
    int H, G, D;                    /* query heads, key-value heads, width of each */
    float eps;
    const float *q_norm, *k_norm;   /* (D), or NULL without QK-norm */
} Heads;

/* x += y, unless y is NULL; out = the norm of x. All are (B, width) */
void add_and_norm(const StepContext *step, const Norm *norm, float *x, const void *y, void *out) {
    int width = norm->width;
    float h[width];
    for (int row = 0; row < step->B; row++, x += width) {
        if (y) {
            read_numbers(h, y, (long)row * width, width, step->is_bfloat16);
            for (int i = 0; i < width; i++) x[i] += h[i];
        }
        float mean = 0, squares = 0;
        if (norm->is_layer_norm) {
            for (int i = 0; i < width; i++) mean += x[i];
            mean /= width;
        }
        for (int i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean);
        float scale = 1 / sqrtf(squares / width + norm->eps);
        for (int i = 0; i < width; i++) h[i] = (x[i] - mean) * scale * norm->weight[i];
        if (norm->bias) {
            for (int i = 0; i < width; i++) h[i] += norm->bias[i];
        }
        write_numbers(out, (long)row * width, h, width, step->is_bfloat16);
    }
}

/* out (B, width) = silu(gate) * rest, where in (B, 2 * width) holds both */
void swiglu(const StepContext *step, const void *in, void *out, int width) {
    float gate[2 * width];
    float *rest = gate + width;
    for (int row = 0; row < step->B; row++) {
        read_numbers(gate, in, 2L * row * width, 2 * width, step->is_bfloat16);
        for (int i = 0; i < width; i++) gate[i] = gate[i] / (1 + exponential(-gate[i])) * rest[i];
        write_numbers(out, (long)row * width, gate, width, step->is_bfloat16);
    }
}

/* What model.py's normalize() does with QK-norm's weights, for one head */
static void normalize_head(float *head, const float *weight, float eps, int D) {
    float squares = 0;
    for (int i = 0; i < D; i++) squares += head[i] * head[i];
    float scale = 1 / sqrtf(squares / D + eps);
    for (int i = 0; i < D; i++) head[i] *= scale * weight[i];
}

/* Attention of one head: out (D), from a query (D) and columns `first` to `last` of keys and values
   (columns, D) */
static void attend_one(const float *query, const float *keys, const float *values, float *out,
                       int first, int last, int D) {
    int count = last - first + 1;
    float weights[count];
    keys += (long)first * D;
    values += (long)first * D;

    float largest = -1e30f, total = 0; /* softmax, whose largest exponent is 0 */
    for (int s = 0; s < count; s++) {
        float score = 0;
        for (int i = 0; i < D; i++) score += query[i] * keys[(long)s * D + i];
        weights[s] = score / sqrtf(D);
        largest = larger(largest, weights[s]);
    }
    for (int s = 0; s < count; s++) {
        weights[s] = exponential(weights[s] - largest);
        total += weights[s];
    }
    memset(out, 0, D * sizeof(float));
    for (int s = 0; s < count; s++) {
        float weight = weights[s] / total;
        for (int i = 0; i < D; i++) out[i] += weight * values[(long)s * D + i];
    }
}

/* Attention. qkv: (B, H + 2 G, D), out: (B, H, D). keys, values: a layer of the cache,
   (B, G, size, D), whose next column this function fills */
void attend(const StepContext *step, const Heads *heads, const void *qkv, void *out, float *keys,
            float *values) {
    int H = heads->H, G = heads->G, D = heads->D, is_bfloat16 = step->is_bfloat16;
    int length = step->length;

    /* An iteration for each text and key-value head. Short texts are done before other threads wake
       up: where that ends is a guess */
    #pragma omp parallel for if (step->B * H * length > 4096)
    for (int part = 0; part < step->B * G; part++) {
        int row = part / G, g = part % G, queries = H / G;
        const float *cos = step->cos ? step->cos + row * (D / 2) : NULL;
        const float *sin = step->sin ? step->sin + row * (D / 2) : NULL;
        int first = step->pad ? smaller(step->pad[row], length) : 0; /* padding sees itself */
        long qkv_row = (long)row * (H + 2 * G);
        long column = (long)part * step->size + length;
        float *k = keys + column * D, *v = values + column * D;

        read_numbers(k, qkv, (qkv_row + H + g) * D, D, is_bfloat16);
        read_numbers(v, qkv, (qkv_row + H + G + g) * D, D, is_bfloat16);
        if (heads->k_norm) normalize_head(k, heads->k_norm, heads->eps, D);
        if (cos) rotate(k, cos, sin, D, 1);

        for (int h = g * queries; h < (g + 1) * queries; h++) {
            float q[D], y[D];
            read_numbers(q, qkv, (qkv_row + h) * D, D, is_bfloat16);
            if (heads->q_norm) normalize_head(q, heads->q_norm, heads->eps, D);
            if (cos) rotate(q, cos, sin, D, 1);
            attend_one(q, k - (long)length * D, v - (long)length * D, y, first, length, D);
            write_numbers(out, ((long)row * H + h) * D, y, D, is_bfloat16);
        }
    }
}
