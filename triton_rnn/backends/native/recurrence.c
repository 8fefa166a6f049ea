/* One recurrent layer on a CPU: all its directions, the whole sequence, forward and backward.

   For small sizes, where a step is a few microseconds of arithmetic and an operator call costs as
   much. It is compiled at first use by the machine's C compiler and called through ctypes: no
   Python and no torch in here, only pointers and sizes (struct Call).

   Compiled for one type of numbers, -DREAL=float or -DREAL=double, when that is first asked for.
   Everything is written once over the cell: a cell is its gates, the pointwise step forward
   (cell_forward) and the pointwise step backward (cell_backward).

   Names: T steps, N batch, I input size, H hidden size, P output size (H unless projected), G gates
   in torch's order (LSTM i f g o, GRU r z n). A row is one sequence at one step; rows lie in the
   order of time, also for the reverse direction, which only walks them the other way. "Padded"
   sizes (Hp, Pp) are rounded up to whole vectors, and so are the private buffers, so that only the
   caller's arrays need care at the end of a row: load_some and store_some.

   Products: multiply() adds to R x V vectors in registers; all products of forward and backward are
   loops around it. One thread. No function keeps state; none writes to an input. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define MOST_ROWS 4
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define MOST_ROWS 2 /* sixteen registers */
#else
#define VECTOR_BYTES 16
#define MOST_ROWS 4
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef int64_t i64;

#ifndef REAL
#define REAL float
#endif
enum { IS_FLOAT = sizeof(REAL) == 4 };
#define LANES ((i64)(VECTOR_BYTES / sizeof(REAL)))

/* A vector in a register, one that may lie anywhere, and the bits of one. */
typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL vec_anywhere
    __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
typedef __typeof__((vec){0} < (vec){0}) bits;

enum { RNN_TANH, RNN_RELU, GRU, LSTM, LSTM_PROJECTED };
enum { MOST_GATES = 4, MOST_VECTORS = 16 };

/* Bytes of the preactivations of some steps at once: they should still be in the second-level
   cache when the steps come to them. */
#define CHUNK_BYTES (256 << 10)

/* What Python fills in, in this order; all fields are eight bytes. Strides are in numbers. */
typedef struct {
    i64 cell, steps, batch, input_size, hidden_size, output_size, directions;
    /* keep: a backward will follow, and saved is to be written. */
    i64 biased, keep;
    /* Rows of each step of a packed batch, never growing; NULL for a padded batch. */
    const i64 *batch_sizes;
    /* (T, N, I) by strides, or packed (sum of lengths, I) by x_row; the last dimension is dense. */
    const void *x;
    i64 x_step, x_row;
    /* (D, N, P), (D, N, H), dense; NULL for zeros. */
    const void *h_0, *c_0;
    /* weight_ih (G*H, I), weight_hh (G*H, P), bias_ih, bias_hh (G*H), weight_hr (P, H), dense. */
    const void *weights[2][5];
    /* output (rows, D*P), h_n, c_n as h_0 and c_0: dense. saved: saved_numbers() numbers. */
    void *output, *h_n, *c_n, *saved;
    /* Backward: grad_output (rows, D*P) by its stride; NULL for zeros, these and the states'. */
    const void *grad_output, *grad_h_n, *grad_c_n;
    i64 grad_output_row;
    /* What to compute; NULL for what nobody wants. grad_x (rows, I), the others as their names. */
    void *grad_x, *grad_h_0, *grad_c_0;
    void *grad_weights[2][5];
} Call;

static const int GATES[] = {1, 1, 3, 4, 4};

/* Numbers kept per hidden unit and row for the backward. The first is h before the step, of the
   output's size; the others are listed with cell_forward. */
static const int KEPT[] = {1, 1, 4, 5, 6};

/* Gradients of preactivations per hidden unit and row. GRU's new gate has two, since the reset gate
   stands between its input's part and its state's part. */
static const int GRADS[] = {1, 1, 4, 4, 4};
static const int INPUT_SLOT[] = {0, 1, 2, 3};
static const int STATE_SLOT[] = {0, 1, 3, 3};
INLINE int state_slot(int cell, int gate)
{
    return cell == GRU ? STATE_SLOT[gate] : INPUT_SLOT[gate];
}

/* Where a step's rows begin: sums of the batch sizes, or NULL for multiples of the batch. */
static int make_offsets(const Call *call, i64 **offsets)
{
    *offsets = NULL;
    if (!call->batch_sizes)
        return 0;
    *offsets = malloc((size_t)(call->steps + 1) * sizeof(i64));
    if (!*offsets)
        return 1;
    (*offsets)[0] = 0;
    for (i64 t = 0; t < call->steps; t++)
        (*offsets)[t + 1] = (*offsets)[t] + call->batch_sizes[t];
    return 0;
}
INLINE i64 first_row(const Call *call, const i64 *offsets, i64 t)
{
    return offsets ? offsets[t] : t * call->batch;
}
INLINE i64 rows_of(const Call *call, i64 t)
{
    return call->batch_sizes ? call->batch_sizes[t] : call->batch;
}

/* A piece of a block of memory; counts first, hands out then. */
typedef struct {
    char *base;
    size_t used;
} Arena;
static void *take(Arena *arena, size_t bytes)
{
    size_t at = arena->used;
    /* A vector more, so that a whole vector may be read at any number. */
    arena->used += (bytes + 2 * VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES;
    return arena->base ? arena->base + at : NULL;
}


INLINE vec load(const REAL *from)
{
    return *(const vec_anywhere *)from;
}
INLINE void store(REAL *to, vec value)
{
    *(vec_anywhere *)to = value;
}
INLINE vec all(REAL value)
{
    return value - (vec){0};
}
/* The first `count` numbers of a caller's row, zeros behind them. */
INLINE vec load_some(const REAL *from, i64 count)
{
    if (count >= LANES)
        return load(from);
    vec value = {0};
    for (i64 lane = 0; lane < count; lane++)
        value[lane] = from[lane];
    return value;
}
INLINE void store_some(REAL *to, vec value, i64 count)
{
    if (count >= LANES)
        store(to, value);
    else
        for (i64 lane = 0; lane < count; lane++)
            to[lane] = value[lane];
}
INLINE vec choose(bits mask, vec yes, vec no)
{
    return (vec)(((bits)yes & mask) | ((bits)no & ~mask));
}
INLINE i64 padded(i64 count)
{
    return (count + LANES - 1) / LANES * LANES;
}


/* e^x. Reduction to |r| <= ln2/2 and the polynomials are those of the Cephes library (S. Moshier,
   netlib.org/cephes: expf.c, exp.c). The power of two is put together in the exponent's bits by
   adding a number so large that its last bits are the integer; a NaN stays one by way of r. From
   about 88.4 (709) on infinite, from -87.7 (-708.7) on zero. */
INLINE vec exponential(vec x)
{
    const REAL high = IS_FLOAT ? 89 : 710, low = IS_FLOAT ? -88 : -709;
    /* 1.5 * 2^23 and 1.5 * 2^52; ln 2 in two parts. */
    const REAL shift = IS_FLOAT ? 12582912.0 : 6755399441055744.0;
    const REAL log2_high = IS_FLOAT ? 0.693359375 : 6.93145751953125e-1;
    const REAL log2_low = IS_FLOAT ? -2.12194440e-4 : 1.42860682030941723212e-6;
    const int mantissa = IS_FLOAT ? 23 : 52, bias = IS_FLOAT ? 127 : 1023;
    x = choose(x > high, all(high), x);
    x = choose(x < low, all(low), x);
    vec shifted = x * (REAL)1.44269504088896340736 + shift;
    vec power = shifted - shift;
    vec r = x - power * log2_high - power * log2_low, z = r * r;
    bits exponent = ((bits)shifted - (bits)all(shift) + bias) << mantissa;
    if (IS_FLOAT) {
        vec p = all((REAL)1.9875691500e-4);
        p = p * r + (REAL)1.3981999507e-3;
        p = p * r + (REAL)8.3334519073e-3;
        p = p * r + (REAL)4.1665795894e-2;
        p = p * r + (REAL)1.6666665459e-1;
        p = p * r + (REAL)5.0000001201e-1;
        return (p * z + r + (REAL)1) * (vec)exponent;
    }
    vec p = all((REAL)1.26177193074810590878e-4);
    p = p * z + (REAL)3.02994407707441961300e-2;
    p = (p * z + (REAL)1) * r;
    vec q = all((REAL)3.00198505138664455042e-6);
    q = q * z + (REAL)2.52448340349684104192e-3;
    q = q * z + (REAL)2.27265548208155028766e-1;
    q = q * z + (REAL)2;
    return ((REAL)1 + (REAL)2 * p / (q - p)) * (vec)exponent;
}

INLINE vec sigmoid(vec x)
{
    return (REAL)1 / ((REAL)1 + exponential(-x));
}
/* Near zero the polynomials of Cephes (tanhf.c, tanh.c), which keep the relative error small;
   beyond, by e^2x. */
INLINE vec hyperbolic_tangent(vec x)
{
    vec z = x * x, p, near;
    if (IS_FLOAT) {
        p = all((REAL)-5.70498872745e-3);
        p = p * z + (REAL)2.06390887954e-2;
        p = p * z - (REAL)5.37397155531e-2;
        p = p * z + (REAL)1.33314422036e-1;
        p = p * z - (REAL)3.33332819422e-1;
        near = p * z * x + x;
    } else {
        p = all((REAL)-9.64399179425052238628e-1);
        p = p * z - (REAL)9.92877231001918586564e1;
        p = p * z - (REAL)1.61468768441708447952e3;
        vec q = z + (REAL)1.12811678491632931402e2;
        q = q * z + (REAL)2.23548839060100448583e3;
        q = q * z + (REAL)4.84406305325125486048e3;
        near = x + x * (z * (p / q));
    }
    const bits sign = (bits)all(-(REAL)0);
    vec size = (vec)((bits)x & ~sign);
    vec far = (REAL)1 - (REAL)2 / (exponential(size + size) + (REAL)1);
    far = (vec)((bits)far | ((bits)x & sign));
    return choose(size < (REAL)0.625, near, far);
}

/* The pointwise functions by themselves, for the tests of their accuracy: 0 sigmoid, 1 tanh. */
EXPORT void pointwise(i64 which, i64 count, const REAL *from, REAL *to)
{
    for (i64 i = 0; i < count; i += LANES) {
        vec x = load_some(from + i, count - i);
        store_some(to + i, which ? hyperbolic_tangent(x) : sigmoid(x), count - i);
    }
}

/* sum[r][u][g] += sum over m < count of a[r * a_row + m * a_step] * b[m * b_row + g * gate + u],
   u in vectors. R, G and U are constants, so that the sums stay in registers. */
INLINE void multiply(int R, int G, int U, vec *sum, const REAL *a, i64 a_row, i64 a_step,
                           i64 count, const REAL *b, i64 b_row, i64 gate)
{
    vec s[MOST_VECTORS];
    UNROLL for (int i = 0; i < R * G * U; i++) s[i] = sum[i];
    for (i64 m = 0; m < count; m++) {
        vec w[MOST_VECTORS];
        UNROLL for (int u = 0; u < U; u++)
            UNROLL for (int g = 0; g < G; g++) w[u * G + g] = load(b + g * gate + u * LANES);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int i = 0; i < G * U; i++) s[r * G * U + i] += a[r * a_row] * w[i];
        a += a_step;
        b += b_row;
    }
    UNROLL for (int i = 0; i < R * G * U; i++) sum[i] = s[i];
}

/* A matrix product: out[i][j] = start[i][j] + sum over parts and m of
   a[i * a_row + part_at[part] + m * a_step] * b[(part * count + m) * b_row + j].
   b's rows may be read up to a whole vector; start may be out, a row for all (start_row 0), NULL. */
typedef struct {
    i64 rows, columns, parts, count;
    const REAL *a;
    i64 a_row, a_step, part_at[MOST_GATES];
    const REAL *b;
    i64 b_row;
    REAL *out;
    i64 out_row;
    const REAL *start;
    i64 start_row;
} Product;

INLINE void product_block(int R, int V, const Product *p, i64 i, i64 j)
{
    vec sum[MOST_VECTORS];
    i64 left = p->columns - j;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++)
            sum[r * V + v] = p->start
                ? load_some(p->start + (i + r) * p->start_row + j + v * LANES, left - v * LANES)
                : (vec){0};
    for (i64 part = 0; part < p->parts; part++)
        multiply(R, 1, V, sum, p->a + i * p->a_row + p->part_at[part], p->a_row, p->a_step,
                 p->count, p->b + part * p->count * p->b_row + j, p->b_row, 0);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++)
            store_some(p->out + (i + r) * p->out_row + j + v * LANES, sum[r * V + v],
                       left - v * LANES);
}
static void product(const Product *p)
{
    i64 j = 0;
    for (; j + 4 * LANES <= p->columns; j += 4 * LANES) {
        i64 i = 0;
        for (; i + MOST_ROWS <= p->rows; i += MOST_ROWS)
            product_block(MOST_ROWS, 4, p, i, j);
        for (; i < p->rows; i++)
            product_block(1, 4, p, i, j);
    }
    for (; j < p->columns; j += LANES) {
        i64 i = 0;
        for (; i + MOST_ROWS <= p->rows; i += MOST_ROWS)
            product_block(MOST_ROWS, 1, p, i, j);
        for (; i < p->rows; i++)
            product_block(1, 1, p, i, j);
    }
}

/* A weight (G*H, K) as (K, G*Hp): the gates of a unit are then read by vectors. */
static void transpose(const REAL *from, i64 gates, i64 hidden, i64 columns, REAL *to)
{
    i64 width = padded(hidden);
    for (i64 g = 0; g < gates; g++)
        for (i64 first = 0; first < hidden; first += LANES) {
            i64 count = hidden - first < LANES ? hidden - first : LANES;
            const REAL *source = from + (g * hidden + first) * columns;
            REAL *target = to + g * width + first;
            for (i64 k = 0; k < columns; k++) {
                vec column = {0};
                if (count == LANES)
                    UNROLL for (i64 lane = 0; lane < LANES; lane++)
                        column[lane] = source[lane * columns + k];
                else
                    for (i64 lane = 0; lane < count; lane++)
                        column[lane] = source[lane * columns + k];
                store(target + k * gates * width, column);
            }
        }
}

/* Rows with `columns` numbers, which whole vectors may be read from: themselves, or a copy. */
static const REAL *readable(const REAL *from, i64 rows, i64 columns, REAL *copy, i64 *row)
{
    if (columns % LANES == 0) {
        *row = columns;
        return from;
    }
    *row = padded(columns);
    for (i64 i = 0; i < rows; i++)
        memcpy(copy + i * *row, from + i * columns, (size_t)columns * sizeof(REAL));
    return copy;
}

/* One unit-vector of one row, forward. preact: the gates' preactivations; of GRU's new gate the
   state's part, and its input's part is `other`. Returns what the state's product is made of next:
   h, or for a projected LSTM what W_hr is to multiply. kept: h before the step lies ahead of it,
   then RNN: h; GRU: r, z, n, the state's part of n; LSTM: i, f, g, o, c before the step;
   projected: these and the result. Here and in cell_backward, `cell` is a constant and one for both
   kinds of RNN (`relu` tells) and of LSTM. */
INLINE vec cell_forward(int cell, int relu, const vec *preact, vec other, vec before, REAL *c, vec *kept)
{
    if (cell == RNN_TANH) {
        vec x = preact[0];
        kept[0] = relu ? choose(x < 0, (vec){0}, x) : hyperbolic_tangent(x);
        return kept[0];
    }
    if (cell == GRU) {
        kept[0] = sigmoid(preact[0]);
        kept[1] = sigmoid(preact[1]);
        kept[2] = hyperbolic_tangent(other + kept[0] * preact[2]);
        kept[3] = preact[2];
        return kept[2] + kept[1] * (before - kept[2]);
    }
    kept[0] = sigmoid(preact[0]);
    kept[1] = sigmoid(preact[1]);
    kept[2] = hyperbolic_tangent(preact[2]);
    kept[3] = sigmoid(preact[3]);
    kept[4] = load(c);
    vec now = kept[1] * kept[4] + kept[0] * kept[2];
    store(c, now);
    kept[5] = kept[3] * hyperbolic_tangent(now);
    return kept[5];
}

/* One unit-vector of one row, backward, from the gradient of the step's result. Writes grads, the
   gradients of the preactivations; adds to and replaces *dc; returns what h before the step gets
   other than by W_hh. */
INLINE vec cell_backward(int cell, int relu, vec dh, vec before, const vec *kept, vec *dc, vec *grads)
{
    const REAL one = 1;
    if (cell == RNN_TANH) {
        vec h = kept[0];
        grads[0] = relu ? choose(h <= 0, (vec){0}, dh) : dh * (one - h * h);
        return (vec){0};
    }
    if (cell == GRU) {
        vec r = kept[0], z = kept[1], n = kept[2];
        grads[1] = dh * (before - n) * z * (one - z);
        grads[2] = dh * (one - z) * (one - n * n);
        grads[0] = grads[2] * kept[3] * r * (one - r);
        grads[3] = grads[2] * r;
        return dh * z;
    }
    vec i = kept[0], f = kept[1], g = kept[2], o = kept[3], c = kept[4];
    vec t = hyperbolic_tangent(f * c + i * g);
    vec grad_c = *dc + dh * o * (one - t * t);
    grads[0] = grad_c * g * i * (one - i);
    grads[1] = grad_c * c * f * (one - f);
    grads[2] = grad_c * i * (one - g * g);
    grads[3] = dh * t * o * (one - o);
    *dc = grad_c * f;
    return (vec){0};
}

/* Private buffers of one direction, forward. */
typedef struct {
    REAL *weight_ih, *weight_hh, *weight_hr, *bias, *preact, *before, *after, *inner, *c;
    REAL *saved;
    i64 kept_row, chunk_rows;
} Forward;

/* R rows from `row` on and U unit-vectors from `unit` on, of one step. */
INLINE void step_block(int cell, int R, int U, const Call *call, const Forward *f, i64 row,
                             i64 unit, const REAL *preact, REAL *kept_rows)
{
    const int G = GATES[cell], relu = call->cell == RNN_RELU;
    const int is_projected = call->cell == LSTM_PROJECTED;
    const i64 Hp = padded(call->hidden_size), Pp = padded(call->output_size);
    vec sum[MOST_VECTORS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int u = 0; u < U; u++)
            UNROLL for (int g = 0; g < G; g++) {
                const REAL *at = preact + (row + r) * G * Hp;
                /* The state's part of GRU's new gate begins with b_hn. */
                if (cell == GRU && g == 2)
                    at = f->bias + Hp;
                sum[(r * U + u) * G + g] = load(at + g * Hp + unit + u * LANES);
            }
    multiply(R, G, U, sum, f->before + row * Pp, Pp, 1, call->output_size, f->weight_hh + unit,
             G * Hp, Hp);
    REAL *result = is_projected ? f->inner : f->after;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int u = 0; u < U; u++) {
            i64 at = unit + u * LANES, place = (row + r) * Hp + at;
            vec other = {0}, before = {0}, kept[6];
            if (cell == GRU) {
                other = load(preact + (row + r) * G * Hp + 2 * Hp + at);
                before = load(f->before + place);
            }
            vec h = cell_forward(cell, relu, sum + (r * U + u) * G, other, before, f->c + place,
                                       kept);
            store(result + place, h);
            if (call->keep)
                UNROLL for (int k = 0; k < 6; k++)
                    if (k < KEPT[cell] || (cell == LSTM && k == 5 && is_projected))
                        store(kept_rows + (row + r) * f->kept_row + Pp + k * Hp + at, kept[k]);
        }
}

/* One step of `rows` rows: weights are read once for all of them. */
INLINE void step(int cell, const Call *call, const Forward *f, i64 rows, const REAL *preact,
                       REAL *kept_rows)
{
    /* As many unit-vectors at once as there are registers for, so that the sums do not wait for
       each other: eight or so are enough. */
    enum { WIDE = 8 };
    const int many = cell == RNN_TANH ? 4 : 1, wide = cell == RNN_TANH ? WIDE : 2;
    const i64 Hp = padded(call->hidden_size);
    i64 unit = 0;
    if (rows == 1)
        for (; unit + wide * LANES <= Hp; unit += wide * LANES)
            step_block(cell, 1, wide, call, f, 0, unit, preact, kept_rows);
    else
        for (; unit + many * LANES <= Hp; unit += many * LANES) {
            i64 row = 0;
            for (; row + MOST_ROWS <= rows; row += MOST_ROWS)
                step_block(cell, MOST_ROWS, many, call, f, row, unit, preact, kept_rows);
            for (; row < rows; row++)
                step_block(cell, 1, many, call, f, row, unit, preact, kept_rows);
        }
    for (; unit < Hp; unit += LANES)
        for (i64 row = 0; row < rows; row++)
            step_block(cell, 1, 1, call, f, row, unit, preact, kept_rows);
}

static void any_step(const Call *call, const Forward *f, i64 rows, const REAL *preact,
                           REAL *kept_rows)
{
    switch (call->cell) {
    case RNN_TANH:
    case RNN_RELU: step(RNN_TANH, call, f, rows, preact, kept_rows); break;
    case GRU: step(GRU, call, f, rows, preact, kept_rows); break;
    default: step(LSTM, call, f, rows, preact, kept_rows);
    }
    if (call->cell == LSTM_PROJECTED) {
        i64 Pp = padded(call->output_size);
        Product p = {.rows = rows, .columns = Pp, .parts = 1, .count = call->hidden_size,
                     .a = f->inner, .a_row = padded(call->hidden_size), .a_step = 1,
                     .b = f->weight_hr, .b_row = Pp, .out = f->after, .out_row = Pp};
        product(&p);
    }
}

/* x of the steps [first, last), times W_ih, plus biases, into f->preact. */
static void project(const Call *call, const Forward *f, const i64 *offsets, i64 first, i64 last)
{
    const i64 width = GATES[call->cell] * padded(call->hidden_size);
    const i64 begin = first_row(call, offsets, first);
    Product p = {.columns = width, .parts = 1, .count = call->input_size, .a_step = 1,
                 .b = f->weight_ih, .b_row = width, .start = f->bias};
    if (offsets || call->x_step == call->batch * call->x_row || call->batch == 1) {
        /* One row after the other. */
        i64 stride = !offsets && call->batch == 1 ? call->x_step : call->x_row;
        p.rows = first_row(call, offsets, last) - begin;
        p.a = (const REAL *)call->x + begin * stride;
        p.a_row = stride;
        p.out = f->preact;
        p.out_row = width;
        product(&p);
        return;
    }
    for (i64 n = 0; n < call->batch; n++) {
        p.rows = last - first;
        p.a = (const REAL *)call->x + first * call->x_step + n * call->x_row;
        p.a_row = call->x_step;
        p.out = f->preact + n * width;
        p.out_row = call->batch * width;
        product(&p);
    }
}

static void copy_rows(REAL *to, i64 to_row, const REAL *from, i64 from_row, i64 rows, i64 count)
{
    for (i64 i = 0; i < rows; i++)
        memcpy(to + i * to_row, from + i * from_row, (size_t)count * sizeof(REAL));
}

static void plan_forward(const Call *call, Arena *arena, Forward *f)
{
    const i64 G = GATES[call->cell], H = call->hidden_size, P = call->output_size, N = call->batch;
    const i64 Hp = padded(H), Pp = padded(P), number = sizeof(REAL);
    i64 steps = CHUNK_BYTES / (N * G * Hp * number);
    steps = steps < 1 ? 1 : steps > call->steps ? call->steps : steps;
    f->chunk_rows = steps * N;
    f->kept_row = Pp + KEPT[call->cell] * Hp;
    f->weight_ih = take(arena, (size_t)(call->input_size * G * Hp * number));
    f->weight_hh = take(arena, (size_t)(P * G * Hp * number));
    f->weight_hr = take(arena, (size_t)(call->cell == LSTM_PROJECTED ? H * Pp * number : 0));
    f->bias = take(arena, (size_t)((G + 1) * Hp * number));
    f->preact = take(arena, (size_t)(f->chunk_rows * G * Hp * number));
    f->before = take(arena, (size_t)(N * Pp * number));
    f->after = take(arena, (size_t)(N * Pp * number));
    f->inner = take(arena, (size_t)(call->cell == LSTM_PROJECTED ? N * Hp * number : 0));
    f->c = take(arena, (size_t)(N * Hp * number));
}

/* Biases fold into the projection, but for b_hn, which the reset gate multiplies. */
static void fold_bias(const Call *call, int d, REAL *bias)
{
    const i64 G = GATES[call->cell], H = call->hidden_size, Hp = padded(H);
    const REAL *input = call->weights[d][2], *state = call->weights[d][3];
    memset(bias, 0, (size_t)((G + 1) * Hp) * sizeof(REAL));
    if (!call->biased)
        return;
    for (i64 g = 0; g < G; g++)
        for (i64 u = 0; u < H; u++) {
            int apart = call->cell == GRU && g == 2;
            bias[g * Hp + u] = apart ? input[g * H + u] : input[g * H + u] + state[g * H + u];
            if (apart)
                bias[(g + 1) * Hp + u] = state[g * H + u];
        }
}

static void forward_direction(const Call *call, const i64 *offsets, int d, const Forward *f)
{
    const i64 G = GATES[call->cell], H = call->hidden_size, P = call->output_size, N = call->batch;
    const i64 Hp = padded(H), Pp = padded(P), T = call->steps, D = call->directions;
    transpose(call->weights[d][0], G, H, call->input_size, f->weight_ih);
    transpose(call->weights[d][1], G, H, P, f->weight_hh);
    if (call->cell == LSTM_PROJECTED)
        transpose(call->weights[d][4], 1, P, H, f->weight_hr);
    fold_bias(call, d, f->bias);
    memset(f->before, 0, (size_t)(N * Pp) * sizeof(REAL));
    memset(f->c, 0, (size_t)(N * Hp) * sizeof(REAL));
    if (call->h_0)
        copy_rows(f->before, Pp, (const REAL *)call->h_0 + d * N * P, P, N, P);
    if (call->c_0)
        copy_rows(f->c, Hp, (const REAL *)call->c_0 + d * N * H, H, N, H);
    i64 ready_from = 0, ready_to = 0;
    for (i64 s = 0; s < T; s++) {
        const i64 t = d ? T - 1 - s : s, rows = rows_of(call, t);
        const i64 row = first_row(call, offsets, t);
        if (t < ready_from || t >= ready_to) {
            /* As many steps as fit, this one first. */
            ready_from = t;
            ready_to = t + 1;
            i64 left = f->chunk_rows - rows;
            for (;;) {
                i64 next = d ? ready_from - 1 : ready_to;
                if (next < 0 || next >= T || rows_of(call, next) > left)
                    break;
                left -= rows_of(call, next);
                if (d)
                    ready_from = next;
                else
                    ready_to = next + 1;
            }
            project(call, f, offsets, ready_from, ready_to);
        }
        const REAL *preact = f->preact + (row - first_row(call, offsets, ready_from)) * G * Hp;
        REAL *kept = call->keep ? f->saved + row * f->kept_row : NULL;
        if (call->keep)
            copy_rows(kept, f->kept_row, f->before, Pp, rows, Pp);
        any_step(call, f, rows, preact, kept);
        copy_rows((REAL *)call->output + row * D * P + d * P, D * P, f->after, Pp, rows, P);
        /* Rows that have ended keep their last state, and rows to come their first. */
        memcpy(f->before, f->after, (size_t)(rows * Pp) * sizeof(REAL));
    }
    copy_rows((REAL *)call->h_n + d * N * P, P, f->before, Pp, N, P);
    if (call->c_n)
        copy_rows((REAL *)call->c_n + d * N * H, H, f->c, Hp, N, H);
}

/* 0, or 1 when there is no memory; then nothing that was written means anything. */
EXPORT i64 forward(const Call *call)
{
    Arena arena = {0};
    Forward f;
    i64 *offsets;
    plan_forward(call, &arena, &f);
    if (make_offsets(call, &offsets))
        return 1;
    arena.base = aligned_alloc(VECTOR_BYTES, arena.used);
    if (!arena.base) {
        free(offsets);
        return 1;
    }
    arena.used = 0;
    plan_forward(call, &arena, &f);
    f.saved = call->saved;
    for (int d = 0; d < call->directions; d++) {
        forward_direction(call, offsets, d, &f);
        f.saved += f.kept_row * first_row(call, offsets, call->steps);
    }
    free(arena.base);
    free(offsets);
    return 0;
}

/* Private buffers of one direction, backward. */
typedef struct {
    REAL *grads, *dh, *dc, *dm, *grad_states, *weight_ih, *weight_hh, *weight_hr, *x, *after;
    const REAL *saved;
    i64 kept_row;
} Backward;

static void plan_backward(const Call *call, i64 rows, Arena *arena, Backward *b)
{
    const i64 G = GATES[call->cell], H = call->hidden_size, P = call->output_size, N = call->batch;
    const i64 Hp = padded(H), Pp = padded(P), I = call->input_size, number = sizeof(REAL);
    const int is_projected = call->cell == LSTM_PROJECTED;
    b->kept_row = Pp + KEPT[call->cell] * Hp;
    b->grads = take(arena, (size_t)(rows * GRADS[call->cell] * Hp * number));
    b->dh = take(arena, (size_t)(N * Pp * number));
    b->dc = take(arena, (size_t)(N * Hp * number));
    b->after = take(arena, (size_t)(N * Pp * number));
    b->dm = take(arena, (size_t)(is_projected ? N * Hp * number : 0));
    b->grad_states = take(arena, (size_t)(is_projected ? rows * Pp * number : 0));
    b->weight_ih = take(arena, (size_t)(I % LANES ? G * H * padded(I) * number : 0));
    b->weight_hh = take(arena, (size_t)(P % LANES ? G * H * Pp * number : 0));
    b->weight_hr = take(arena, (size_t)(is_projected && H % LANES ? P * Hp * number : 0));
    b->x = take(arena, (size_t)(rows * padded(I) * number));
}

/* The pointwise half of a backward step: from dh (N, Pp) the gradients of the preactivations of its
   rows, and in `after` what h before the step gets past W_hh. */
INLINE void backward_step(int cell, const Call *call, const Backward *b, i64 rows,
                                const REAL *dh, const REAL *kept_rows, REAL *grads)
{
    const i64 Hp = padded(call->hidden_size), Pp = padded(call->output_size);
    const int kept_count = KEPT[cell], grad_count = GRADS[cell], relu = call->cell == RNN_RELU;
    for (i64 row = 0; row < rows; row++)
        for (i64 unit = 0; unit < Hp; unit += LANES) {
            const REAL *kept_row = kept_rows + row * b->kept_row;
            vec kept[6], grad[4], before = {0}, dc = load(b->dc + row * Hp + unit);
            UNROLL for (int k = 0; k < 5; k++)
                if (k < kept_count)
                    kept[k] = load(kept_row + Pp + k * Hp + unit);
            if (cell == GRU)
                before = load(kept_row + unit);
            vec past = cell_backward(cell, relu, load(dh + row * Hp + unit), before, kept, &dc, grad);
            UNROLL for (int g = 0; g < 4; g++)
                if (g < grad_count)
                    store(grads + row * grad_count * Hp + g * Hp + unit, grad[g]);
            if (cell >= LSTM)
                store(b->dc + row * Hp + unit, dc);
            if (cell == GRU)
                store(b->after + row * Pp + unit, past);
        }
}

static void any_backward_step(const Call *call, const Backward *b, i64 rows, const REAL *dh,
                                    const REAL *kept, REAL *grads)
{
    switch (call->cell) {
    case RNN_TANH:
    case RNN_RELU: backward_step(RNN_TANH, call, b, rows, dh, kept, grads); break;
    case GRU: backward_step(GRU, call, b, rows, dh, kept, grads); break;
    default: backward_step(LSTM, call, b, rows, dh, kept, grads);
    }
}

/* Rows of x one after the other, in whole vectors: themselves, or a copy. */
static const REAL *rows_of_x(const Call *call, const i64 *offsets, REAL *copy, i64 *row)
{
    const i64 I = call->input_size;
    const REAL *x = call->x;
    const int in_order = offsets || call->x_step == call->batch * call->x_row;
    if (I % LANES == 0 && in_order) {
        *row = call->x_row;
        return x;
    }
    *row = padded(I);
    if (offsets) {
        copy_rows(copy, *row, x, call->x_row, offsets[call->steps], I);
        return copy;
    }
    for (i64 t = 0; t < call->steps; t++)
        copy_rows(copy + t * call->batch * *row, *row, x + t * call->x_step, call->x_row,
                  call->batch, I);
    return copy;
}

/* Gradients of the weights and of x, from those of all preactivations. */
static void after_the_loop(const Call *call, const i64 *offsets, int d, const Backward *b,
                                 i64 total)
{
    const int cell = (int)call->cell;
    const i64 G = GATES[cell], H = call->hidden_size, P = call->output_size, I = call->input_size;
    const i64 Hp = padded(H), Pp = padded(P), width = GRADS[cell] * Hp;
    void *const *grad_weights = call->grad_weights[d];
    if (grad_weights[0]) {
        i64 x_row;
        const REAL *x = rows_of_x(call, offsets, b->x, &x_row);
        for (int g = 0; g < G; g++) {
            Product p = {.rows = H, .columns = I, .parts = 1, .count = total,
                         .a = b->grads + INPUT_SLOT[g] * Hp, .a_row = 1, .a_step = width, .b = x,
                         .b_row = x_row, .out = (REAL *)grad_weights[0] + g * H * I, .out_row = I};
            product(&p);
        }
    }
    if (grad_weights[1])
        for (int g = 0; g < G; g++) {
            Product p = {.rows = H, .columns = P, .parts = 1, .count = total,
                         .a = b->grads + state_slot(cell, g) * Hp, .a_row = 1, .a_step = width,
                         .b = b->saved, .b_row = b->kept_row,
                         .out = (REAL *)grad_weights[1] + g * H * P, .out_row = P};
            product(&p);
        }
    for (int which = 2; which < 4; which++)
        for (int g = 0; grad_weights[which] && g < G; g++) {
            const i64 slot = which == 2 ? INPUT_SLOT[g] : state_slot(cell, g);
            for (i64 unit = 0; unit < H; unit += LANES) {
                vec sum = {0};
                for (i64 row = 0; row < total; row++)
                    sum += load(b->grads + row * width + slot * Hp + unit);
                store_some((REAL *)grad_weights[which] + g * H + unit, sum, H - unit);
            }
        }
    if (cell == LSTM_PROJECTED && grad_weights[4]) {
        Product p = {.rows = P, .columns = H, .parts = 1, .count = total, .a = b->grad_states,
                     .a_row = 1, .a_step = Pp, .b = b->saved + Pp + 5 * Hp, .b_row = b->kept_row,
                     .out = grad_weights[4], .out_row = H};
        product(&p);
    }
    if (call->grad_x) {
        i64 w_row;
        const REAL *weight = readable(call->weights[d][0], G * H, I, b->weight_ih, &w_row);
        Product p = {.rows = total, .columns = I, .parts = G, .count = H, .a = b->grads,
                     .a_row = width, .a_step = 1, .b = weight, .b_row = w_row, .out = call->grad_x,
                     .out_row = I, .start = d ? call->grad_x : NULL, .start_row = I};
        for (int g = 0; g < G; g++)
            p.part_at[g] = INPUT_SLOT[g] * Hp;
        product(&p);
    }
}

static void backward_direction(const Call *call, const i64 *offsets, int d, const Backward *b)
{
    const int cell = (int)call->cell;
    const i64 G = GATES[cell], H = call->hidden_size, P = call->output_size, N = call->batch;
    const i64 Hp = padded(H), Pp = padded(P), T = call->steps, width = GRADS[cell] * Hp;
    i64 hh_row, hr_row = 0;
    const REAL *weight_hh = readable(call->weights[d][1], G * H, P, b->weight_hh, &hh_row);
    const REAL *weight_hr = NULL;
    if (cell == LSTM_PROJECTED)
        weight_hr = readable(call->weights[d][4], P, H, b->weight_hr, &hr_row);
    memset(b->dh, 0, (size_t)(N * Pp) * sizeof(REAL));
    memset(b->dc, 0, (size_t)(N * Hp) * sizeof(REAL));
    if (call->grad_h_n)
        copy_rows(b->dh, Pp, (const REAL *)call->grad_h_n + d * N * P, P, N, P);
    if (call->grad_c_n)
        copy_rows(b->dc, Hp, (const REAL *)call->grad_c_n + d * N * H, H, N, H);
    for (i64 s = T - 1; s >= 0; s--) {
        const i64 t = d ? T - 1 - s : s, rows = rows_of(call, t);
        const i64 row = first_row(call, offsets, t);
        const REAL *kept = b->saved + row * b->kept_row, *dh = b->dh;
        REAL *grads = b->grads + row * width;
        if (call->grad_output)
            for (i64 n = 0; n < rows; n++) {
                const REAL *from = (const REAL *)call->grad_output
                                   + (row + n) * call->grad_output_row + d * P;
                for (i64 unit = 0; unit < P; unit += LANES) {
                    REAL *to = b->dh + n * Pp + unit;
                    store(to, load(to) + load_some(from + unit, P - unit));
                }
            }
        if (cell == LSTM_PROJECTED) {
            copy_rows(b->grad_states + row * Pp, Pp, b->dh, Pp, rows, Pp);
            Product p = {.rows = rows, .columns = H, .parts = 1, .count = P, .a = b->dh,
                         .a_row = Pp, .a_step = 1, .b = weight_hr, .b_row = hr_row, .out = b->dm,
                         .out_row = Hp};
            product(&p);
            dh = b->dm;
        }
        any_backward_step(call, b, rows, dh, kept, grads);
        Product p = {.rows = rows, .columns = P, .parts = G, .count = H, .a = grads,
                     .a_row = width, .a_step = 1, .b = weight_hh, .b_row = hh_row, .out = b->dh,
                     .out_row = Pp, .start = cell == GRU ? b->after : NULL, .start_row = Pp};
        for (int g = 0; g < G; g++)
            p.part_at[g] = state_slot(cell, g) * Hp;
        product(&p);
    }
    if (call->grad_h_0)
        copy_rows((REAL *)call->grad_h_0 + d * N * P, P, b->dh, Pp, N, P);
    if (call->grad_c_0)
        copy_rows((REAL *)call->grad_c_0 + d * N * H, H, b->dc, Hp, N, H);
    after_the_loop(call, offsets, d, b, first_row(call, offsets, T));
}

/* As forward. */
EXPORT i64 backward(const Call *call)
{
    Arena arena = {0};
    Backward b;
    i64 *offsets;
    if (make_offsets(call, &offsets))
        return 1;
    const i64 total = first_row(call, offsets, call->steps);
    plan_backward(call, total, &arena, &b);
    arena.base = aligned_alloc(VECTOR_BYTES, arena.used);
    if (!arena.base) {
        free(offsets);
        return 1;
    }
    arena.used = 0;
    plan_backward(call, total, &arena, &b);
    /* Ends of rows that no product writes are read by whole vectors. */
    memset(arena.base, 0, arena.used);
    b.saved = call->saved;
    for (int d = 0; d < call->directions; d++) {
        backward_direction(call, offsets, d, &b);
        b.saved += b.kept_row * total;
    }
    free(arena.base);
    free(offsets);
    return 0;
}

/* Numbers of Call.saved: for each direction its rows, each KEPT padded hidden sizes beside a padded
   output size, and a vector at the end. */
EXPORT i64 saved_numbers(i64 cell, i64 rows, i64 hidden, i64 output, i64 directions)
{
    return directions * rows * (KEPT[cell] * padded(hidden) + padded(output)) + LANES;
}

/* Numbers in a vector. */
EXPORT i64 lanes(void)
{
    return LANES;
}
