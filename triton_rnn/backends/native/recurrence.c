/* One recurrent layer on a CPU: all its directions, the whole sequence, forward and backward.

   Made for small sizes, where a step is a microsecond of arithmetic and calling an operator costs
   more; it holds its own far beyond. It is compiled at first use by the machine's C compiler and
   called through ctypes: no Python and no torch in here, only pointers and sizes (struct Call).

   Compiled for one type of numbers, -DREAL=float or -DREAL=double, one kind of cell, and forward or
   backward, when that is first asked for.
   Everything is written once over the cell: a cell is its gates, the pointwise step forward
   (cell_forward) and the pointwise step backward (cell_backward).

   Names: T steps, N batch, I input size, H hidden size, P output size (H unless projected), G gates
   in torch's order (LSTM i f g o, GRU r z n). A row is one sequence at one step; rows lie in the
   order of time, also for the reverse direction, which only walks them the other way. "Padded"
   sizes (Hp, Pp) are rounded up to whole vectors, and so are the private buffers, so that only the
   caller's arrays need care at the end of a row: load_some and store_some.

   A user's cell (OWN) is compiled into a library by itself: its numbers are macros (OWN_GATES and the
   others below), its pointwise steps own_forward and own_backward are generated (own_cell.h, by
   own.py). Without them, all that is OWN's is code that the compiler leaves out. So it is with layer
   normalization of GRU and LSTM (NORMALIZED, normalized.h), a library of its own for each.

   Products: multiply() adds to R x V vectors in registers; all products of forward and backward are
   loops around it. No function keeps state; none writes to an input.

   Threads are lent: the caller hands over the functions by which its OpenMP runtime opens a team and
   tells its size (in struct Call), so that there is no second team beside it. A team shares the
   hidden units of every step, and each member only writes what belongs to its units. */

#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define MOST_ROWS 4
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define MOST_ROWS 3 /* sixteen registers */
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

/* Hold a vector in a register: compilers would rather read it from memory for each of the rows, and
   there are as many loads in a cycle as multiply-adds, not more. */
#if defined(__x86_64__)
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))
#else
#define IN_REGISTER(vector) ((void)0)
#endif

/* What a processor wants to be told between two looks at memory that another one is to write. */
#if defined(__x86_64__)
#define PAUSE __builtin_ia32_pause()
#else
#define PAUSE ((void)0)
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

enum { RNN_TANH, RNN_RELU, GRU, LSTM, LSTM_PROJECTED, OWN };

/* Compiled for one kind of cell, -DONLY=GRU, in half the time that all take. RNN_TANH stands for
   both kinds of RNN, LSTM for both kinds of LSTM. */
#ifdef ONLY
#define HAS(cell) (ONLY == (cell))
#else
#define HAS(cell) 1
#endif
enum { MOST_VECTORS = 16 };

/* A library has a part of the functions, -DPART=BACKWARD, so that nobody waits for the compilation of
   what is not called: the forward, the backward, or both for calls with Extras. */
#define FORWARD 1
#define BACKWARD 2
#define EXTENDED 3
#if !defined(PART) || PART == EXTENDED
#define EXTRAS(extras) (extras)
#else
#define EXTRAS(extras) ((const Extras *)NULL)
#endif

/* A user's cell: gates, those with a recurrent product, states, numbers learned for a unit; numbers
   kept and gradients as in KEPT and GRADS; whether h before the step gets a gradient past W_hh; for
   each product the gate that it is added to before the step, or -1; and which gradient is whose. */
#ifdef OWN_GATES
#include <math.h>
#define HAS_OWN 1
enum { MOST_GATES = 8 };
#else
#define HAS_OWN 0
enum { MOST_GATES = 4 };
enum { OWN_GATES = 1, OWN_PRODUCTS = 1, OWN_STATES = 2, OWN_UNIT_WEIGHTS = 0, OWN_KEPT = 0 };
enum { OWN_GRADS = 1, OWN_PAST = 0 };
#define OWN_STARTS 0
#define OWN_INPUT_SLOTS 0
#define OWN_HIDDEN_SLOTS 0
#endif
/* Of a cell with layer normalization the numbers learned for a unit are its gains and the shift of
   c. */
#ifdef NORMALIZED
enum { HAS_NORM = 1, UNIT_WEIGHTS = ONLY == GRU ? 6 : 10, UNIT_BIASES = 4 };
#else
enum { HAS_NORM = 0, UNIT_WEIGHTS = OWN_UNIT_WEIGHTS, UNIT_BIASES = 0 };
#endif
static const int OWN_START[] = {OWN_STARTS}, OWN_INPUT_SLOT[] = {OWN_INPUT_SLOTS};
static const int OWN_HIDDEN_SLOT[] = {OWN_HIDDEN_SLOTS};
/* States besides h, and whether members of a team have to wait for each other at every step. */
enum { OTHERS = OWN_STATES - 1, HAS_PRODUCT = OWN_PRODUCTS > 0 };

/* Bytes of the preactivations of some steps at once: they should still be in the second-level
   cache when the steps come to them. But W_ih is read once for them, so that of a large one, which
   comes from further away, they may be a part as large as this. */
enum { CHUNK_BYTES = 256 << 10, PART_OF_WEIGHT = 2 };

/* What Python fills in, in this order; all fields are eight bytes. Strides are in numbers. */
typedef struct {
    i64 cell, steps, batch, input_size, hidden_size, output_size, directions;
    /* keep: a backward will follow, and saved is to be written. apart: two directions go side by
       side, each with buffers and a team of its own. */
    i64 biased, keep, apart;
    /* Rows of each step of a packed batch, never growing; NULL for a padded batch. */
    const i64 *batch_sizes;
    /* (T, N, I) by strides, or packed (sum of lengths, I) by x_row; the last dimension is dense. */
    const void *x;
    i64 x_step, x_row;
    /* (D, N, P), (D, N, H), dense; NULL for zeros. Of OWN all other states, (D, N, OTHERS*H). */
    const void *h_0, *c_0;
    /* weight_ih (G*H, I), weight_hh (G*H, P), bias_ih, bias_hh (G*H), weight_hr (P, H), dense. Of
       OWN weight_hh and bias_hh have OWN_PRODUCTS*H rows. The last of OWN and of NORMALIZED is
       (UNIT_WEIGHTS, H). */
    const void *weights[2][5];
    /* output (rows, D*P), h_n, c_n as h_0 and c_0, NULL if not wanted: dense. saved:
       saved_numbers() numbers. */
    void *output, *h_n, *c_n, *saved;
    /* How many threads to ask for: 1, or more with libgomp's GOMP_parallel and
       omp_get_num_threads. */
    i64 threads;
    void (*open_team)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
    int (*team_size)(void);
    /* Backward: grad_output (rows, D*P) by its stride; NULL for zeros, these and the states'. */
    const void *grad_output, *grad_h_n, *grad_c_n;
    i64 grad_output_row;
    /* What to compute; NULL for what nobody wants. grad_x (rows, I), the others as their names. */
    void *grad_x, *grad_h_0, *grad_c_0;
    void *grad_weights[2][5];
} Call;

/* What the steps of an extended call are given beside the weights, in Python's order too; NULL or 0
   for what is not. A caller's row is t * N + n, or that of a packed batch. */
typedef struct {
    /* For a padded batch whose sequences have lengths of their own: which sequence each of our rows
       is, the longest first, and the batch sizes of a Call count those that are not yet at their
       end. NULL for the caller's order. */
    const i64 *order;
    /* bool (T, N) by strides: the sequence starts anew before the step, from zeros or from h_0. */
    const uint8_t *reset_mask;
    i64 reset_step, reset_row, reset_to_initial;
    /* (D, N, P), by which h is multiplied before W_hh is, in the caller's order. */
    const void *recurrent_mask;
    /* bool (rows, D*P), (rows, D*H), dense: what keeps the value it had before the step. */
    const uint8_t *zoneout_h, *zoneout_c;
    /* (rows, D*H): the c of every step. */
    void *cells;
    const void *grad_cells;
    i64 grad_cells_row;
    /* Where there is no mask: the part of the value before the step in the one after it. */
    double keep_h, keep_c;
    /* The largest |h| and |c|; 0 for any. */
    double clip_h, clip_c;
} Extras;

/* Where members wait for each other: how many have come, and how often all had. */
typedef struct {
    _Alignas(64) i64 here;
    _Alignas(64) i64 rounds;
} Meeting;

/* A member of the team that works on a call. */
typedef struct {
    i64 index, count;
    Meeting *meeting;
} Member;

/* libgomp's barrier takes 0.4 us where this takes 0.1, and there are some in every step; and where
   another process has the processor of one member, milliseconds, for the others spin on and do not
   give way. */
static void meet(Meeting *m, i64 count)
{
    enum { SPINS = 500 };
    const i64 round = __atomic_load_n(&m->rounds, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&m->here, 1, __ATOMIC_ACQ_REL) == count) {
        __atomic_store_n(&m->here, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&m->rounds, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&m->rounds, __ATOMIC_ACQUIRE) == round;)
        /* More threads than processors: the one that is waited for may need this one's. */
        if (spins < SPINS)
            spins++, PAUSE;
        else
            sched_yield();
}

/* Everything that was written by any member before is there for all after. */
INLINE void wait_for_all(const Member *me)
{
    if (me->count > 1)
        meet(me->meeting, me->count);
}
/* A member's part of `total` things, cut between groups of `group`. */
INLINE void share(const Member *me, i64 total, i64 group, i64 *from, i64 *to)
{
    i64 groups = (total + group - 1) / group;
    *from = groups * me->index / me->count * group;
    *to = groups * (me->index + 1) / me->count * group;
    if (*from > total)
        *from = total;
    if (*to > total)
        *to = total;
}

static const int GATES[] = {1, 1, 3, 4, 4, OWN_GATES};
/* Those with a part of W_hh. */
static const int PRODUCTS[] = {1, 1, 3, 4, 4, OWN_PRODUCTS};

/* Numbers kept per hidden unit and row for the backward; ahead of them, of the output's size, h
   before the step. They are listed with cell_forward. Of a plain call of RNN they are h, and so
   what the next step has before it: there no row has it twice. */
static const int KEPT[] = {1, 1, HAS_NORM ? 10 : 4, HAS_NORM ? 14 : 5, 6, OWN_KEPT};
/* And of a row as a whole, at its end: normalized.h. */
enum { SCALES = HAS_NORM ? 4 : 0 };

/* What an extended call keeps behind these, of the output's size each: h before the step where the
   first is masked and GRU wants both, and h before it is clipped. */
typedef struct {
    i64 row, first, before, unclipped;
} Kept;
static Kept kept_of(i64 cell, i64 hidden, i64 output, int extended, int masks, int clips);

/* Gradients of preactivations per hidden unit and row. GRU's new gate has two, since the reset gate
   stands between its input's part and its state's part; where both parts are normalized by
   themselves, all gates have. */
static const int GRADS[] = {1, 1, HAS_NORM ? 6 : 4, HAS_NORM ? 8 : 4, 4, OWN_GRADS};
static const int INPUT_SLOT[] = {0, 1, 2, 3};
static const int STATE_SLOT[] = {0, 1, 3, 3};
INLINE int input_slot(int gate)
{
    return HAS_OWN ? OWN_INPUT_SLOT[gate] : INPUT_SLOT[gate];
}
INLINE int state_slot(int cell, int gate)
{
    if (HAS_OWN)
        return OWN_HIDDEN_SLOT[gate];
    if (HAS_NORM)
        return GATES[cell] + gate;
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

/* The sequence of our row `pos` of a step, and its row in the caller's arrays. */
INLINE i64 sequence_of(const Extras *e, i64 pos)
{
    return e && e->order ? e->order[pos] : pos;
}
INLINE i64 callers_row(const Call *call, const i64 *offsets, const Extras *e, i64 t, i64 pos)
{
    return e && e->order ? t * call->batch + e->order[pos] : first_row(call, offsets, t) + pos;
}
/* Whether a sequence starts anew before step t, in the order of time. */
INLINE int is_reset(const Extras *e, i64 t, i64 pos)
{
    return e->reset_mask[t * e->reset_step + sequence_of(e, pos) * e->reset_row];
}

/* The steps [from, to) that are worked on at once, t the first on the way down or up: as many as
   have no more rows than `most`, and t in any case. */
static void steps_together(const Call *call, i64 t, int down, i64 most, i64 *from, i64 *to)
{
    *from = t;
    *to = t + 1;
    for (i64 left = most - rows_of(call, t);;) {
        const i64 next = down ? *from - 1 : *to;
        if (next < 0 || next >= call->steps || rows_of(call, next) > left)
            return;
        left -= rows_of(call, next);
        if (down)
            *from = next;
        else
            *to = next + 1;
    }
}

/* Blocks of more than malloc keeps come from the system at every call and go back to it, and each of
   their pages costs a fault when it is first touched: huge ones are five hundred times fewer. */
enum { MALLOC_KEEPS = 32 << 20 };
static void in_huge_pages(const void *first, size_t bytes)
{
#if defined(MADV_HUGEPAGE)
    const size_t page = 4096;
    const size_t from = ((size_t)first + page - 1) & ~(page - 1);
    const size_t to = ((size_t)first + bytes) & ~(page - 1);
    if (bytes > MALLOC_KEEPS)
        /* Where it is refused, pages are small. */
        (void)madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)first, (void)bytes;
#endif
}

/* A piece of a block of memory; counts first, hands out then. */
typedef struct {
    char *base;
    size_t used;
} Arena;
/* The block, of all that was counted; NULL where there is no memory. Its alignment is small: of
   blocks that are aligned to pages malloc keeps none. */
static char *block_for(const Arena *arena)
{
    char *block = aligned_alloc(VECTOR_BYTES, arena->used);
    if (block)
        in_huge_pages(block, arena->used);
    return block;
}
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
static Kept kept_of(i64 cell, i64 hidden, i64 output, int extended, int masks, int clips)
{
    const int is_h_alone = !extended && !HAS_OWN && cell <= RNN_RELU;
    Kept kept = {.first = is_h_alone ? 0 : padded(output)};
    kept.row = kept.first + KEPT[cell] * padded(hidden) + padded(SCALES);
    if (masks && cell == GRU) {
        kept.before = kept.row;
        kept.row += padded(output);
    }
    if (clips) {
        kept.unclipped = kept.row;
        kept.row += padded(output);
    }
    return kept;
}
INLINE Kept kept_by(const Call *call, const Extras *e)
{
    return kept_of(call->cell, call->hidden_size, call->output_size, e != NULL,
                   e && e->recurrent_mask, e && e->clip_h > 0);
}
/* 1 where a mask is set, 0 where not: the first `count` of a vector. */
INLINE vec load_mask(const uint8_t *from, i64 count)
{
    vec value = {0};
    for (i64 lane = 0; lane < (count < LANES ? count : LANES); lane++)
        value[lane] = from[lane];
    return value;
}
/* The sum of all lanes. */
INLINE REAL total_of(vec x)
{
    REAL part[LANES];
    UNROLL for (int lane = 0; lane < LANES; lane++) part[lane] = x[lane];
    UNROLL for (int half = LANES / 2; half > 0; half /= 2)
        UNROLL for (int lane = 0; lane < half; lane++) part[lane] += part[lane + half];
    return part[0];
}
/* The lesser and the greater of x and a limit; NaN stays NaN. One instruction, which returns its first
   operand, as this order of operands has it, where either is NaN; compilers make four of `choose`. */
#if defined(__AVX__)
#define EXTREME(name, instruction, sign)                                                            \
    INLINE vec name(vec x, REAL limit)                                                              \
    {                                                                                               \
        const vec limits = all(limit);                                                              \
        vec found;                                                                                  \
        if (IS_FLOAT)                                                                               \
            __asm__(instruction "ps %1, %2, %0" : "=v"(found) : "v"(x), "v"(limits));               \
        else                                                                                        \
            __asm__(instruction "pd %1, %2, %0" : "=v"(found) : "v"(x), "v"(limits));               \
        return found;                                                                               \
    }
#else
#define EXTREME(name, instruction, sign)                                                            \
    INLINE vec name(vec x, REAL limit)                                                              \
    {                                                                                               \
        return choose(x sign limit, all(limit), x);                                                 \
    }
#endif
EXTREME(at_most, "vmin", >)
EXTREME(at_least, "vmax", <)
INLINE vec clipped(vec x, REAL limit)
{
    return at_least(at_most(x, limit), -limit);
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
    x = at_least(at_most(x, high), low);
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
    const bits sign = (bits)all(-(REAL)0);
    vec size = (vec)((bits)x & ~sign), z = x * x, p, near;
    if (IS_FLOAT) {
        p = all((REAL)-5.70498872745e-3);
        p = p * z + (REAL)2.06390887954e-2;
        p = p * z - (REAL)5.37397155531e-2;
        p = p * z + (REAL)1.33314422036e-1;
        p = p * z - (REAL)3.33332819422e-1;
    } else {
        p = all((REAL)-9.64399179425052238628e-1);
        p = p * z - (REAL)9.92877231001918586564e1;
        p = p * z - (REAL)1.61468768441708447952e3;
        vec q = z + (REAL)1.12811678491632931402e2;
        q = q * z + (REAL)2.23548839060100448583e3;
        p /= q * z + (REAL)4.84406305325125486048e3;
    }
    near = p * z * size + size;
    vec far = (REAL)1 - (REAL)2 / (exponential(size + size) + (REAL)1);
    return (vec)((bits)choose(size < (REAL)0.625, near, far) | ((bits)x & sign));
}

/* The pointwise functions by themselves, for the tests of their accuracy: 0 sigmoid, 1 tanh. */
EXPORT void pointwise(i64 which, i64 count, const REAL *from, REAL *to)
{
    for (i64 i = 0; i < count; i += LANES) {
        vec x = load_some(from + i, count - i);
        store_some(to + i, which ? hyperbolic_tangent(x) : sigmoid(x), count - i);
    }
}

/* Matrices that steps are multiplied with lie in panels: `width` vectors of columns, all rows of
   these, then the next panel. So a product reads memory from front to back. A plain matrix is one
   whose panels lie beside each other. */
typedef struct {
    const REAL *first;
    /* From a row to the next, from a panel to the next. */
    i64 row, panel;
} Matrix;
INLINE i64 panel_numbers(i64 vectors, i64 rows, i64 width)
{
    return (vectors + width - 1) / width * width * LANES * rows;
}
INLINE const REAL *column_of(const Matrix *m, i64 vector, i64 width)
{
    return m->first + vector / width * m->panel + vector % width * LANES;
}

/* sum[r][v] += sum over k < count of a[r * a_row + k * a_step] * b[k][v], b from its vector of
   columns on. R, V and the panels' width W are constants, so that the sums stay in registers. */
INLINE void multiply(int R, int V, int W, vec *sum, const REAL *a, i64 a_row, i64 a_step, i64 count,
                     const REAL *b, i64 b_row, i64 panel)
{
    vec s[MOST_VECTORS];
    UNROLL for (int i = 0; i < R * V; i++) s[i] = sum[i];
    for (i64 k = 0; k < count; k++) {
        vec x[MOST_ROWS];
        UNROLL for (int r = 0; r < R; r++) x[r] = all(a[r * a_row]);
        UNROLL for (int v = 0; v < V; v++) {
            vec w = load(b + v / W * panel + v % W * LANES);
            if (R > 1)
                IN_REGISTER(w);
            UNROLL for (int r = 0; r < R; r++) s[r * V + v] += x[r] * w;
        }
        /* GCC, tuning for some processors, rounds the product of a single running sum by itself, and
           fuses it where there are more. A row's numbers shall not depend on how many rows there
           are, so that a sequence may be cut anywhere. */
        if (R * V == 1)
            IN_REGISTER(s[0]);
        a += a_step;
        b += b_row;
    }
    UNROLL for (int i = 0; i < R * V; i++) sum[i] = s[i];
}

/* Panels of matrices that are no recurrent weight. */
enum { WIDTH = 4 };
INLINE Matrix plain(const REAL *first, i64 row)
{
    return (Matrix){first, row, WIDTH * LANES};
}

/* A matrix product: out[i][j] = start[i][j] + sum over parts and k of
   a[i * a_row + part_at[part] + k * a_step] * b[part * count + k][j].
   b's rows may be read up to a whole vector; start may be out, a row for all (start_row 0), NULL. */
typedef struct {
    /* The rows and columns [from, to) of out. */
    i64 row, rows, column, columns, parts, count;
    const REAL *a;
    i64 a_row, a_step, part_at[MOST_GATES];
    Matrix b;
    REAL *out;
    i64 out_row;
    const REAL *start;
    i64 start_row;
} Product;

/* Rows of b, of one panel, that stay in the second-level cache while rows of a pass by. */
enum { DEPTH = (64 << 10) / (WIDTH * VECTOR_BYTES) };

/* R rows and V vectors of out: the parts [part, parts), of each the numbers [k, k + count). */
INLINE void product_block(int R, int V, const Product *p, i64 i, i64 j, i64 part, i64 parts, i64 k,
                          i64 count)
{
    vec sum[MOST_VECTORS];
    const i64 left = p->columns - j;
    const int begun = part > 0 || k > 0;
    const REAL *start = begun ? p->out : p->start;
    const i64 start_row = begun ? p->out_row : p->start_row;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++)
            sum[r * V + v] = start
                ? load_some(start + (i + r) * start_row + j + v * LANES, left - v * LANES)
                : (vec){0};
    const REAL *b = column_of(&p->b, j / LANES, WIDTH);
    for (; part < parts; part++)
        multiply(R, V, WIDTH, sum, p->a + i * p->a_row + p->part_at[part] + k * p->a_step, p->a_row,
                 p->a_step, count, b + (part * p->count + k) * p->b.row, p->b.row, 0);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++)
            store_some(p->out + (i + r) * p->out_row + j + v * LANES, sum[r * V + v],
                       left - v * LANES);
}
/* All rows of out, and of its columns a panel, or a vector of one. */
static void product_panel(const Product *p, i64 j, int whole, i64 part, i64 parts, i64 k, i64 count)
{
    i64 i = p->row;
    if (whole) {
        for (; i + MOST_ROWS <= p->rows; i += MOST_ROWS)
            product_block(MOST_ROWS, WIDTH, p, i, j, part, parts, k, count);
        for (; MOST_ROWS > 2 && i + 2 <= p->rows; i += 2)
            product_block(2, WIDTH, p, i, j, part, parts, k, count);
        for (; i < p->rows; i++)
            product_block(1, WIDTH, p, i, j, part, parts, k, count);
    } else {
        for (; i + MOST_ROWS <= p->rows; i += MOST_ROWS)
            product_block(MOST_ROWS, 1, p, i, j, part, parts, k, count);
        for (; i < p->rows; i++)
            product_block(1, 1, p, i, j, part, parts, k, count);
    }
}
static void product(const Product *p)
{
    const int pieces = p->rows - p->row > MOST_ROWS && p->parts * p->count > DEPTH;
    i64 j = p->column;
    while (j < p->columns) {
        const int whole = j % (WIDTH * LANES) == 0 && j + WIDTH * LANES <= p->columns;
        if (pieces)
            for (i64 part = 0; part < p->parts; part++)
                for (i64 k = 0; k < p->count; k += DEPTH)
                    product_panel(p, j, whole, part, part + 1, k,
                                  p->count - k < DEPTH ? p->count - k : DEPTH);
        else
            product_panel(p, j, whole, 0, p->parts, 0, p->count);
        j += whole ? WIDTH * LANES : LANES;
    }
}

/* Rows of x, h and gradients that are worked on at once: they stay in the second-level cache. */
enum { ROWS_AT_ONCE = 192 };
/* Rows of steps whose gradients are kept until weights and x get theirs: pieces of ROWS_AT_ONCE, or
   not much less, whatever the batch. */
enum { STEP_ROWS = 2 * ROWS_AT_ONCE };

/* LANES rows with LANES numbers each, transposed; to_row apart. Each round interleaves the first half
   of the vectors with the second, number by number: as many rounds as LANES has bits. */
#if defined(__GNUC__) && !defined(__clang__)
#define HAS_SHUFFLE 1
INLINE void transpose_square(const REAL *from, i64 from_row, REAL *to, i64 to_row)
{
    bits low, high;
    vec v[VECTOR_BYTES / sizeof(REAL)], next[VECTOR_BYTES / sizeof(REAL)];
    UNROLL for (int lane = 0; lane < LANES; lane++) {
        low[lane] = lane / 2 + lane % 2 * LANES;
        high[lane] = low[lane] + LANES / 2;
    }
    UNROLL for (int i = 0; i < LANES; i++) v[i] = load(from + i * from_row);
    UNROLL for (int round = 1; round < LANES; round *= 2) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = __builtin_shuffle(v[i], v[i + LANES / 2], low);
            next[2 * i + 1] = __builtin_shuffle(v[i], v[i + LANES / 2], high);
        }
        UNROLL for (int i = 0; i < LANES; i++) v[i] = next[i];
    }
    UNROLL for (int i = 0; i < LANES; i++) store(to + i * to_row, v[i]);
}
#else
#define HAS_SHUFFLE 0
INLINE void transpose_square(const REAL *from, i64 from_row, REAL *to, i64 to_row)
{
    (void)from, (void)from_row, (void)to, (void)to_row;
}
#endif

/* Rows, transposed: column by column, each with room for ROWS_AT_ONCE numbers. Whole vectors are
   read. */
static void in_columns(const REAL *from, i64 from_row, i64 rows, i64 columns, REAL *to)
{
    for (i64 j = 0; j < columns; j += LANES) {
        i64 i = 0;
        if (HAS_SHUFFLE)
            for (; i + LANES <= rows; i += LANES)
                transpose_square(from + i * from_row + j, from_row, to + j * ROWS_AT_ONCE + i,
                                 ROWS_AT_ONCE);
        for (; i < rows; i++) {
            const vec row = load(from + i * from_row + j);
            for (i64 lane = 0; lane < LANES; lane++)
                to[(j + lane) * ROWS_AT_ONCE + i] = row[lane];
        }
    }
}

/* A weight (G*H, K), transposed, in panels: of all gates the units [begin, end), whole vectors.
   Either the gates of a unit-vector stand together, as a step wants them, or all units of a gate.
   The first panel begins with the unit `origin`. */
static Matrix transpose(const REAL *from, i64 gates, i64 hidden, i64 columns, i64 width,
                        int by_unit, REAL *to, i64 origin, i64 begin, i64 end)
{
    const Matrix m = {to, width * LANES, width * LANES * columns};
    for (i64 g = 0; g < gates; g++)
        for (i64 first = begin; first < end; first += LANES) {
            const i64 count = hidden - first < LANES ? hidden - first : LANES;
            const i64 unit = (first - origin) / LANES;
            i64 vector = by_unit ? unit * gates + g : g * (padded(hidden) / LANES) + unit;
            const REAL *source = from + (g * hidden + first) * columns;
            REAL *target = to + (column_of(&m, vector, width) - to);
            i64 k = 0;
            if (HAS_SHUFFLE && count == LANES)
                for (; k + LANES <= columns; k += LANES)
                    transpose_square(source + k, columns, target + k * m.row, m.row);
            for (; k < columns; k++) {
                vec column = {0};
                for (i64 lane = 0; lane < count; lane++)
                    column[lane] = source[lane * columns + k];
                store(target + k * m.row, column);
            }
        }
    return m;
}

/* A row of a matrix into its panels, of so many numbers each. */
INLINE void into_panels(const REAL *from, i64 columns, i64 panel, REAL *to)
{
    i64 j = 0;
    for (; j + WIDTH * LANES <= columns; j += WIDTH * LANES, to += panel)
        UNROLL for (int v = 0; v < WIDTH; v++) store(to + v * LANES, load(from + j + v * LANES));
    if (j < columns)
        memcpy(to, from + j, (size_t)(columns - j) * sizeof(REAL));
}

/* A weight (rows, columns) as it lies, as long as whole vectors may be read from it and few products
   will; else in panels, of which each member makes some rows. */
static Matrix readable(const REAL *from, i64 rows, i64 columns, i64 products, REAL *to,
                       const Member *me)
{
    enum { FEW = 8 };
    if (columns % LANES == 0 && (products <= FEW || columns <= WIDTH * LANES))
        return plain(from, columns);
    const Matrix m = {to, WIDTH * LANES, WIDTH * LANES * rows};
    i64 i, end;
    share(me, rows, 1, &i, &end);
    for (; i < end; i++)
        into_panels(from + i * columns, columns, m.panel, to + i * m.row);
    return m;
}

/* LSTM's gates, and c after the step, of one unit-vector of one row. */
INLINE vec lstm_c(const vec *preact, vec before, vec *kept)
{
    kept[0] = sigmoid(preact[0]);
    kept[1] = sigmoid(preact[1]);
    kept[2] = hyperbolic_tangent(preact[2]);
    kept[3] = sigmoid(preact[3]);
    kept[4] = before;
    return kept[1] * kept[4] + kept[0] * kept[2];
}
/* Backward, from the gradients of that c and of o. */
INLINE void lstm_grads(const vec *kept, vec grad_c, vec grad_o, vec *dc, vec *grads)
{
    const REAL one = 1;
    vec i = kept[0], f = kept[1], g = kept[2], o = kept[3], c = kept[4];
    grads[0] = grad_c * g * i * (one - i);
    grads[1] = grad_c * c * f * (one - f);
    grads[2] = grad_c * i * (one - g * g);
    grads[3] = grad_o * o * (one - o);
    *dc = grad_c * f;
}

/* One unit-vector of one row, forward. preact: the gates' preactivations; of GRU's new gate the
   state's part, and its input's part is `other`. Returns what the state's product is made of next:
   h, or for a projected LSTM what W_hr is to multiply. kept: h before the step lies ahead of it,
   then RNN: h; GRU: r, z, n, the state's part of n; LSTM: i, f, g, o, c before the step;
   projected: these and the result. `clip` is the largest |c|, 0 for any. Here and in cell_backward, `cell` is a constant and one for both
   kinds of RNN (`relu` tells) and of LSTM. */
INLINE vec cell_forward(int cell, int relu, const vec *preact, vec other, vec before, REAL *c,
                        REAL clip, vec *kept)
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
    vec now = lstm_c(preact, load(c), kept);
    if (clip > 0)
        now = clipped(now, clip);
    store(c, now);
    kept[5] = kept[3] * hyperbolic_tangent(now);
    return kept[5];
}

/* One unit-vector of one row, backward, from the gradient of the step's result. Writes grads, the
   gradients of the preactivations; adds to and replaces *dc; returns what h before the step gets
   other than by W_hh. */
INLINE vec cell_backward(int cell, int relu, vec dh, vec before, const vec *kept, REAL clip, vec *dc,
                         vec *grads)
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
    vec now = f * c + i * g;
    vec t = hyperbolic_tangent(clip > 0 ? clipped(now, clip) : now);
    vec grad_c = *dc + dh * o * (one - t * t);
    if (clip > 0)
        grad_c = choose((now <= clip) & (now >= -clip), grad_c, (vec){0});
    lstm_grads(kept, grad_c, dh * t, dc, grads);
    return (vec){0};
}

#if HAS_OWN
#define EACH_LANE(function, x)                                                                      \
    ({                                                                                              \
        vec result_;                                                                                \
        for (int lane_ = 0; lane_ < LANES; lane_++)                                                 \
            result_[lane_] = IS_FLOAT ? function##f((x)[lane_]) : function((x)[lane_]);             \
        result_;                                                                                    \
    })
INLINE vec magnitude(vec x)
{
    return (vec)((bits)x & ~(bits)all(-(REAL)0));
}
#include "own_cell.h"
#endif

/* Whether a unit-vector has one product: then two stand in a panel, to keep more sums going. */
INLINE int is_narrow(i64 cell)
{
    return HAS_OWN ? OWN_PRODUCTS == 1 : cell <= RNN_RELU;
}

/* A member's hidden units, whole panels of W_hh. */
INLINE void share_units(const Member *me, const Call *call, i64 *from, i64 *to)
{
    share(me, padded(call->hidden_size), is_narrow(call->cell) ? 2 * LANES : LANES, from, to);
}

/* Private buffers of one direction, forward. */
typedef struct {
    REAL *weight_ih, *weight_hh, *weight_hr, *bias, *preact, *before, *after, *inner, *c, *own;
    /* What W_hh is multiplied with: `before`, or that and a mask. */
    const REAL *operand;
    REAL *saved;
    i64 kept_row, kept_first, chunk_rows;
    Matrix input_weight, state_weight, projection;
    /* The unit that state_weight begins with. */
    i64 origin;
    /* A weight that is used once, W_ih where all steps are one chunk and W_hh where there is one
       step: as the caller has it. It is laid out piece by piece, each on the way to its product. */
    const REAL *passing_ih, *passing_hh;
    /* Of an extended call; NULL and 0 otherwise. Masked h of this step and the next, c before the
       step, rows of x one after the other for each member. */
    const Extras *extras;
    const i64 *places;
    REAL *masked, *next_masked, *c_before, *x_rows;
    REAL clip_c;
    /* Whether the products are made before the step, see `dot_products`. */
    int is_direct;
    /* Of normalized.h: W_hh h, and its statistics. */
    REAL *sums, *parts, *found;
} Forward;

/* Private buffers of one direction, backward. */
typedef struct {
    REAL *grads, *dh, *dc, *dm, *grad_states, *weight_ih, *weight_hh, *weight_hr, *after;
    REAL *own, *grad_own;
    i64 dm_numbers;
    /* Rows of the steps whose gradients go to weights and x together. Of some of them at a time:
       gradients column by column; of each member x and h in panels, `room` numbers each. */
    i64 chunk_rows;
    REAL *columns, *rows;
    i64 room;
    /* What x gets, rows as they are ours: call->grad_x, or what is added to it at the end. */
    REAL *grad_x;
    const REAL *saved;
    i64 kept_row, kept_first;
    /* h before the first step, where that is zeros and no row has kept it. */
    REAL *zeros;
    /* Where a row of what was kept has the h that GRU's update gate weighs; 0 but for masked calls. */
    i64 before_at;
    /* Of an extended call: gradients that go past the cell by a zoneout, those that the initial
       state has from resets. */
    const Extras *extras;
    const i64 *places;
    REAL *past_h, *past_c, *reset_h, *reset_c;
    REAL clip_c;
    /* Of normalized.h: the gradients of LN(W_hh h) times their gains, and their means. */
    REAL *sums, *parts, *found;
} Backward;

/* Vectors of a panel of W_hh: the gates of a unit-vector, or two unit-vectors of an RNN. */
INLINE i64 step_width(i64 cell)
{
    if (HAS_OWN && !HAS_PRODUCT)
        return 1;
    return is_narrow(cell) ? 2 : PRODUCTS[cell];
}

/* What a product's sum begins with: its gate's part of the input, or the state's bias alone. */
INLINE const REAL *start_of(int cell, const Forward *f, const REAL *preact, int product, i64 Hp)
{
    if (HAS_OWN && OWN_START[product] < 0)
        return f->bias + (OWN_GATES + product) * Hp;
    if (HAS_OWN)
        return preact + OWN_START[product] * Hp;
    /* The state's part of GRU's new gate begins with b_hn. */
    return cell == GRU && product == 2 ? f->bias + 3 * Hp : preact + product * Hp;
}

#if defined(NORMALIZED)
#include "normalized.h"
#endif

#if HAS_OWN
/* A user's cell: one unit-vector of one row, forward. hidden: its products' sums. */
static void own_step(const Call *call, const Forward *f, i64 row, i64 unit, const REAL *preact,
                     const vec *hidden, REAL *kept_row)
{
    const i64 Hp = padded(call->hidden_size), place = row * Hp + unit;
    const i64 other = call->batch * Hp;
    vec input[OWN_GATES], state[OWN_STATES], own[OWN_UNIT_WEIGHTS + 1], next[OWN_STATES];
    vec kept[OWN_KEPT + 1];
    UNROLL for (int g = 0; g < OWN_GATES; g++) input[g] = load(preact + g * Hp + unit);
    state[0] = load(f->before + place);
    UNROLL for (int s = 1; s < OWN_STATES; s++) state[s] = load(f->c + (s - 1) * other + place);
    UNROLL for (int k = 0; k < OWN_UNIT_WEIGHTS; k++) own[k] = load(f->own + k * Hp + unit);
    own_forward(input, hidden, state, own, next, kept);
    store(f->after + place, next[0]);
    UNROLL for (int s = 1; s < OWN_STATES; s++) store(f->c + (s - 1) * other + place, next[s]);
    if (call->keep)
        UNROLL for (int k = 0; k < OWN_KEPT; k++) store(kept_row + Hp + k * Hp + unit, kept[k]);
}
#endif

/* R rows from `row` on and U unit-vectors from `unit` on, of one step. */
INLINE void step_block(int cell, int R, int U, const Call *call, const Forward *f, i64 row,
                             i64 unit, const REAL *preact, REAL *kept_rows)
{
    const int G = GATES[cell], K = PRODUCTS[cell], W = step_width(cell);
    const int relu = call->cell == RNN_RELU, is_projected = call->cell == LSTM_PROJECTED;
    const i64 Hp = padded(call->hidden_size), Pp = padded(call->output_size);
    vec sum[MOST_VECTORS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int u = 0; u < U; u++)
            UNROLL for (int k = 0; k < K; k++) {
                const REAL *at = start_of(cell, f, preact + (row + r) * G * Hp, k, Hp);
                sum[(r * U + u) * K + k] = HAS_NORM ? (vec){0} : load(at + unit + u * LANES);
            }
    if (HAS_PRODUCT)
        multiply(R, K * U, W, sum, f->operand + row * Pp, Pp, 1,
                 f->is_direct ? 0 : call->output_size,
                 column_of(&f->state_weight, (unit - f->origin) / LANES * K, W), W * LANES,
                 f->state_weight.panel);
#if defined(NORMALIZED)
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int u = 0; u < U; u++)
            put_sums(call, f, row + r, unit + u * LANES, sum + (r * U + u) * K);
    return;
#endif
#if HAS_OWN
    /* Not unrolled, for a step of many operations is compiled for every copy that there is of it. */
    for (int r = 0; r < R; r++)
        for (int u = 0; u < U; u++)
            own_step(call, f, row + r, unit + u * LANES, preact + (row + r) * G * Hp,
                     sum + (r * U + u) * K, kept_rows + (row + r) * f->kept_row);
    return;
#endif
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
                                 f->clip_c, kept);
            store(result + place, h);
            if (call->keep)
                UNROLL for (int k = 0; k < 6; k++)
                    if (k < KEPT[cell] || (cell == LSTM && k == 5 && is_projected))
                        store(kept_rows + (row + r) * f->kept_row + f->kept_first + k * Hp + at,
                              kept[k]);
        }
}

/* One step of `rows` rows, the units [unit, end): weights are read once for all rows. */
INLINE void step(int cell, const Call *call, const Forward *f, i64 rows, i64 unit, i64 end,
                 const REAL *preact, REAL *kept_rows)
{
    /* As many unit-vectors at once as keep about eight sums going, which then do not wait for each
       other, and as there are registers for. */
    const int narrow = is_narrow(cell), many = narrow ? 2 : 1, wide = narrow ? 8 : 2;
    /* Of many gates fewer rows: no more sums than MOST_VECTORS. */
    const int most = PRODUCTS[cell] * MOST_ROWS > MOST_VECTORS ? 2 : MOST_ROWS;
    if (rows == 1)
        for (; unit + wide * LANES <= end; unit += wide * LANES)
            step_block(cell, 1, wide, call, f, 0, unit, preact, kept_rows);
    else
        for (; unit + many * LANES <= end; unit += many * LANES) {
            i64 row = 0;
            for (; row + most <= rows; row += most)
                step_block(cell, most, many, call, f, row, unit, preact, kept_rows);
            for (; row + 2 <= rows; row += 2)
                step_block(cell, 2, many, call, f, row, unit, preact, kept_rows);
            for (; row < rows; row++)
                step_block(cell, 1, many, call, f, row, unit, preact, kept_rows);
        }
    for (; unit < end; unit += LANES)
        for (i64 row = 0; row < rows; row++)
            step_block(cell, 1, 1, call, f, row, unit, preact, kept_rows);
}

/* The units [unit, end) of all rows of a step. */
static void units_step(const Call *call, const Forward *f, i64 rows, i64 unit, i64 end,
                       const REAL *preact, REAL *kept_rows)
{
#if HAS_OWN
    step(OWN, call, f, rows, unit, end, preact, kept_rows);
    return;
#endif
#if defined(NORMALIZED)
    step(CELL, call, f, rows, unit, end, preact, kept_rows);
    return;
#endif
    switch (call->cell) {
    case RNN_TANH:
    case RNN_RELU:
        if (HAS(RNN_TANH))
            step(RNN_TANH, call, f, rows, unit, end, preact, kept_rows);
        break;
    case GRU:
        if (HAS(GRU))
            step(GRU, call, f, rows, unit, end, preact, kept_rows);
        break;
    default:
        if (HAS(LSTM))
            step(LSTM, call, f, rows, unit, end, preact, kept_rows);
    }
}

/* Units whose part of W_hh is laid out at a time where it is used once, as many as `step` takes at
   once; and the numbers of that part. */
INLINE i64 passing_units(i64 cell)
{
    return (is_narrow(cell) ? 8 : 2) * LANES;
}
INLINE i64 passing_numbers(const Call *call)
{
    const i64 vectors = passing_units(call->cell) / LANES * PRODUCTS[call->cell];
    return panel_numbers(vectors, call->output_size, step_width(call->cell));
}

/* One step: f->after from f->before, this member's units of all rows. */
static void any_step(const Call *call, const Forward *f, const Member *me, i64 rows,
                     const REAL *preact, REAL *kept_rows)
{
    const i64 cell = call->cell, some = passing_units(cell), P = call->output_size;
    i64 unit, end;
    share_units(me, call, &unit, &end);
    if (f->passing_hh) {
        Forward piece = *f;
        for (; unit < end; unit = piece.origin + some) {
            const i64 stop = end - unit < some ? end : unit + some;
            piece.origin = unit;
            piece.state_weight =
                transpose(f->passing_hh, PRODUCTS[cell], call->hidden_size, P, step_width(cell), 1,
                          f->weight_hh + me->index * passing_numbers(call), unit, unit, stop);
            units_step(call, &piece, rows, unit, stop, preact, kept_rows);
        }
    } else {
        units_step(call, f, rows, unit, end, preact, kept_rows);
    }
#if defined(NORMALIZED)
    share_units(me, call, &unit, &end);
    normalized_step(call, f, me, rows, unit, end, preact, kept_rows);
    return;
#endif
    if (call->cell == LSTM_PROJECTED) {
        i64 Pp = padded(call->output_size);
        Product p = {.rows = rows, .parts = 1, .count = call->hidden_size, .a = f->inner,
                     .a_row = padded(call->hidden_size), .a_step = 1, .b = f->projection,
                     .out = f->after, .out_row = Pp};
        share(me, Pp, LANES, &p.column, &p.columns);
        wait_for_all(me);
        product(&p);
    }
}

/* Of rows that lie apart the columns [begin, end). */
static void copy_columns(REAL *to, i64 to_row, const REAL *from, i64 from_row, i64 rows, i64 begin,
                         i64 end)
{
    for (i64 i = 0; i < rows && begin < end; i++)
        memcpy(to + i * to_row + begin, from + i * from_row + begin,
               (size_t)(end - begin) * sizeof(REAL));
}
static void copy_rows(REAL *to, i64 to_row, const REAL *from, i64 from_row, i64 rows, i64 count)
{
    copy_columns(to, to_row, from, from_row, rows, 0, count);
}

/* Where each of our rows lies among the caller's: the two differ where sequences of a padded batch
   have lengths, and then x is read some rows at a time. */
static int make_places(const Call *call, const i64 *offsets, const Extras *e, i64 **places)
{
    *places = NULL;
    if (!e || !e->order)
        return 0;
    *places = malloc((size_t)(offsets[call->steps] + 1) * sizeof(i64));
    if (!*places)
        return 1;
    for (i64 t = 0; t < call->steps; t++)
        for (i64 pos = 0; pos < call->batch_sizes[t]; pos++)
            (*places)[offsets[t] + pos] = callers_row(call, offsets, e, t, pos);
    return 0;
}
/* Where x has our row i. */
INLINE const REAL *row_of_x(const Call *call, const i64 *offsets, const i64 *places, i64 i)
{
    const REAL *x = call->x;
    const i64 N = call->batch, place = places ? places[i] : i;
    return offsets && !places ? x + i * call->x_row
                              : x + place / N * call->x_step + place % N * call->x_row;
}

/* Columns of x W_ih of the steps [first, last), plus biases, into p.out: a member's rows. */
static void project_columns(const Call *call, const Forward *f, const Member *me,
                            const i64 *offsets, i64 first, i64 last, Product p)
{
    const i64 width = GATES[call->cell] * padded(call->hidden_size);
    const i64 begin = first_row(call, offsets, first);
    REAL *out = p.out;
    if (f->places) {
        i64 row, end;
        share(me, first_row(call, offsets, last) - begin, MOST_ROWS, &row, &end);
        p.a_row = padded(call->input_size);
        REAL *rows = f->x_rows + me->index * ROWS_AT_ONCE * p.a_row;
        p.a = rows;
        p.out_row = width;
        for (; row < end; row += p.rows) {
            p.rows = end - row < ROWS_AT_ONCE ? end - row : ROWS_AT_ONCE;
            for (i64 i = 0; i < p.rows; i++)
                memcpy(rows + i * p.a_row, row_of_x(call, offsets, f->places, begin + row + i),
                       (size_t)call->input_size * sizeof(REAL));
            p.out = out + row * width;
            product(&p);
        }
        return;
    }
    if (offsets || call->x_step == call->batch * call->x_row) {
        /* One row after the other. */
        p.a = (const REAL *)call->x + begin * call->x_row;
        p.a_row = call->x_row;
        p.out_row = width;
        share(me, first_row(call, offsets, last) - begin, MOST_ROWS, &p.row, &p.rows);
        product(&p);
        return;
    }
    share(me, last - first, MOST_ROWS, &p.row, &p.rows);
    for (i64 n = 0; n < call->batch; n++) {
        p.a = (const REAL *)call->x + first * call->x_step + n * call->x_row;
        p.a_row = call->x_step;
        p.out = out + n * width;
        p.out_row = call->batch * width;
        product(&p);
    }
}

/* x of the steps [first, last), times W_ih, plus biases, into f->preact; this member's rows, or, of
   a weight that is used once, its units. */
static void project(const Call *call, const Forward *f, const Member *me, const i64 *offsets,
                    i64 first, i64 last)
{
    const i64 H = call->hidden_size, Hp = padded(H), I = call->input_size, G = GATES[call->cell];
    Product p = {.columns = G * Hp, .parts = 1, .count = I, .a_step = 1, .b = f->input_weight,
                 .start = HAS_NORM ? NULL : f->bias, .out = f->preact};
    if (!f->passing_ih) {
        project_columns(call, f, me, offsets, first, last, p);
        return;
    }
    const Member alone = {0, 1, NULL};
    REAL *piece = f->weight_ih + me->index * panel_numbers(WIDTH, I, WIDTH);
    i64 unit, end;
    share_units(me, call, &unit, &end);
    for (i64 g = 0; g < G; g++)
        for (i64 j = unit; j < end; j += WIDTH * LANES) {
            const i64 stop = end - j < WIDTH * LANES ? end : j + WIDTH * LANES;
            p.b = transpose(f->passing_ih + g * H * I, 1, H, I, WIDTH, 0, piece, j, j, stop);
            p.columns = stop - j;
            p.start = HAS_NORM ? NULL : f->bias + g * Hp + j;
            p.out = f->preact + g * Hp + j;
            project_columns(call, f, &alone, offsets, first, last, p);
        }
}

static void plan_forward(const Call *call, const Extras *e, Arena *arena, Forward *f)
{
    const i64 G = GATES[call->cell], H = call->hidden_size, P = call->output_size, N = call->batch;
    const i64 Hp = padded(H), Pp = padded(P), number = sizeof(REAL);
    const i64 part = G * Hp * call->input_size * number / PART_OF_WEIGHT;
    i64 steps = (part > CHUNK_BYTES ? part : CHUNK_BYTES) / ((N ? N : 1) * G * Hp * number);
    steps = steps < 1 ? 1 : steps > call->steps ? call->steps : steps;
    f->chunk_rows = steps * N;
    f->origin = 0;
    f->passing_ih = steps == call->steps && !(e && e->order) ? call->weights[0][0] : NULL;
    f->passing_hh = call->steps == 1 && HAS_PRODUCT ? call->weights[0][1] : NULL;
    f->kept_row = kept_by(call, e).row;
    f->kept_first = kept_by(call, e).first;
    const i64 wide = panel_numbers(Hp / LANES * PRODUCTS[call->cell], P, step_width(call->cell));
    const i64 apart = HAS_OWN ? OWN_PRODUCTS : 1;
    const i64 projection = call->cell == LSTM_PROJECTED ? panel_numbers(Pp / LANES, H, WIDTH) : 0;
    const i64 input_vectors = f->passing_ih ? call->threads * WIDTH : Hp / LANES * G;
    const i64 passing = call->threads * passing_numbers(call);
    f->weight_ih = take(
        arena, (size_t)(panel_numbers(input_vectors, call->input_size, WIDTH) * number));
    f->weight_hh = take(arena, (size_t)((f->passing_hh ? passing : wide) * number));
    f->weight_hr = take(arena, (size_t)(projection * number));
    f->bias = take(arena, (size_t)((G + apart) * Hp * number));
    f->preact = take(arena, (size_t)(f->chunk_rows * G * Hp * number));
    f->before = take(arena, (size_t)(N * Pp * number));
    f->after = take(arena, (size_t)(N * Pp * number));
    f->inner = take(arena, (size_t)(call->cell == LSTM_PROJECTED ? N * Hp * number : 0));
    f->c = take(arena, (size_t)(OTHERS * N * Hp * number));
    f->own = take(arena, (size_t)(UNIT_WEIGHTS * Hp * number));
#if defined(NORMALIZED)
    f->sums = take(arena, (size_t)(N * G * Hp * number));
    f->parts = take(arena, (size_t)(numbers_of_parts(call) * number));
    f->found = take(arena, (size_t)(call->threads * numbers_found(call) * number));
#endif
    const i64 masked = e && e->recurrent_mask ? N * Pp : 0;
    f->masked = take(arena, (size_t)(masked * number));
    f->next_masked = take(arena, (size_t)(masked * number));
    f->c_before = take(arena, (size_t)(e && call->cell >= LSTM ? N * Hp * number : 0));
    f->x_rows = take(arena, (size_t)(e && e->order ? call->threads * ROWS_AT_ONCE
                                                         * padded(call->input_size) * number
                                                   : 0));
}

/* Biases fold into the projection, but for b_hn, which the reset gate multiplies. */
static void fold_bias(const Call *call, int d, REAL *bias)
{
    const i64 G = GATES[call->cell], H = call->hidden_size, Hp = padded(H);
    const REAL *input = call->weights[d][2], *state = call->weights[d][3];
    memset(bias, 0, (size_t)((G + (HAS_OWN ? OWN_PRODUCTS : 1)) * Hp) * sizeof(REAL));
    if (!call->biased)
        return;
    if (HAS_OWN) {
        for (i64 g = 0; g < G; g++)
            memcpy(bias + g * Hp, input + g * H, (size_t)H * sizeof(REAL));
        for (i64 k = 0; k < OWN_PRODUCTS; k++)
            for (i64 u = 0; u < H; u++)
                bias[(OWN_START[k] < 0 ? G + k : OWN_START[k]) * Hp + u] += state[k * H + u];
        return;
    }
    for (i64 g = 0; g < G; g++)
        for (i64 u = 0; u < H; u++) {
            int apart = call->cell == GRU && g == 2;
            bias[g * Hp + u] = apart ? input[g * H + u] : input[g * H + u] + state[g * H + u];
            if (apart)
                bias[(g + 1) * Hp + u] = state[g * H + u];
        }
}

/* What is learned for each unit, (UNIT_WEIGHTS, H), in whole vectors, the units [begin, end). */
static void copy_unit_weights(const Call *call, int d, REAL *to, i64 begin, i64 end)
{
    const i64 H = call->hidden_size, Hp = padded(H);
    const REAL *from = call->weights[d][4];
    for (i64 k = 0; k < UNIT_WEIGHTS; k++)
        for (i64 u = begin; u < end; u += LANES)
            store(to + k * Hp + u, load_some(from + k * H + u, H - u));
}

/* All states besides h, a caller's (N, OTHERS*H) and ours, which are OTHERS times (N, Hp). */
static void others_in(const Call *call, REAL *to, const REAL *from)
{
    const i64 H = call->hidden_size, Hp = padded(H), N = call->batch;
    for (i64 s = 0; s < OTHERS; s++)
        copy_rows(to + s * N * Hp, Hp, from + s * H, OTHERS * H, N, H);
}
static void others_out(const Call *call, REAL *to, const REAL *from, i64 begin, i64 end)
{
    const i64 H = call->hidden_size, Hp = padded(H), N = call->batch;
    for (i64 s = 0; s < OTHERS; s++)
        copy_columns(to + s * H, OTHERS * H, from + s * N * Hp, Hp, N, begin, end < H ? end : H);
}

/* States of all sequences, from the caller's order to ours and back. */
static void take_states(REAL *to, i64 to_row, const REAL *from, i64 size, i64 batch,
                        const Extras *e)
{
    for (i64 pos = 0; pos < batch; pos++)
        memcpy(to + pos * to_row, from + sequence_of(e, pos) * size, (size_t)size * sizeof(REAL));
}
static void give_states(REAL *to, const REAL *from, i64 from_row, i64 size, i64 batch, i64 begin,
                        i64 end, const Extras *e)
{
    end = end < size ? end : size;
    for (i64 pos = 0; pos < batch && begin < end; pos++)
        memcpy(to + sequence_of(e, pos) * size + begin, from + pos * from_row + begin,
               (size_t)(end - begin) * sizeof(REAL));
}

/* c and what a user's cell has in its place, which no extended call does. */
static void c_in(const Call *call, REAL *to, const REAL *from, const Extras *e)
{
    if (HAS_OWN)
        others_in(call, to, from);
    else
        take_states(to, padded(call->hidden_size), from, call->hidden_size, call->batch, e);
}
static void c_out(const Call *call, REAL *to, const REAL *from, i64 begin, i64 end, const Extras *e)
{
    const i64 H = call->hidden_size;
    if (HAS_OWN)
        others_out(call, to, from, begin, end);
    else
        give_states(to, from, padded(H), H, call->batch, begin, end, e);
}

/* The part of an extended call that a member has of every row: columns of h, units of c. */
typedef struct {
    i64 column, last, unit, end;
} Part;

/* The state of a row starts anew: zeros, or what the caller gave. */
static void start_anew(const Call *call, const Extras *e, int d, i64 pos, REAL *h, REAL *c, Part own)
{
    const i64 H = call->hidden_size, P = call->output_size;
    const i64 at = d * call->batch + sequence_of(e, pos);
    const REAL *h_0 = e->reset_to_initial && call->h_0 ? (const REAL *)call->h_0 + at * P : NULL;
    const REAL *c_0 = e->reset_to_initial && call->c_0 ? (const REAL *)call->c_0 + at * H : NULL;
    for (i64 i = own.column; i < own.last; i += LANES)
        store(h + pos * padded(P) + i, h_0 ? load_some(h_0 + i, P - i) : (vec){0});
    for (i64 i = own.unit; call->cell >= LSTM && i < own.end; i += LANES)
        store(c + pos * padded(H) + i, c_0 ? load_some(c_0 + i, H - i) : (vec){0});
}

/* What W_hh is to be multiplied with, of all rows: h and its mask. */
static void mask_states(const Call *call, const Extras *e, int d, const REAL *h, REAL *masked,
                        Part own)
{
    const i64 P = call->output_size, Pp = padded(P);
    for (i64 pos = 0; pos < call->batch; pos++) {
        const REAL *mask =
            (const REAL *)e->recurrent_mask + (d * call->batch + sequence_of(e, pos)) * P;
        for (i64 i = own.column; i < own.last; i += LANES)
            store(masked + pos * Pp + i, load(h + pos * Pp + i) * load_some(mask + i, P - i));
    }
}

/* After a zoneout: the value before the step where the mask says so, or a part of it. */
INLINE vec zoned_out(const uint8_t *mask, i64 count, REAL keep, vec before, vec now)
{
    if (!mask)
        return now + keep * (before - now);
    return choose(load_mask(mask, count) > 0, before, now);
}

static void before_step(const Call *call, const Forward *f, i64 rows, REAL *kept_rows, Part own)
{
    const i64 Hp = padded(call->hidden_size), Pp = padded(call->output_size);
    const Kept kept = kept_by(call, EXTRAS(f->extras));
    if (call->cell >= LSTM)
        copy_columns(f->c_before, Hp, f->c, Hp, rows, own.unit, own.end);
    if (call->keep && kept.before)
        copy_columns(kept_rows + kept.before, f->kept_row, f->before, Pp, rows, own.column,
                     own.last);
}

/* From the cell's results to the states after step t, the output, and the states that the next step
   begins with. */
static void after_step(const Call *call, const i64 *offsets, const Forward *f, int d, i64 t,
                       i64 rows, REAL *kept_rows, Part own)
{
    const Extras *e = EXTRAS(f->extras);
    const i64 H = call->hidden_size, P = call->output_size, N = call->batch, D = call->directions;
    const i64 Hp = padded(H), Pp = padded(P);
    const Kept kept = kept_by(call, e);
    const REAL clip_h = (REAL)e->clip_h, keep_h = (REAL)e->keep_h, keep_c = (REAL)e->keep_c;
    for (i64 pos = 0; pos < rows; pos++) {
        const i64 place = callers_row(call, offsets, e, t, pos);
        for (i64 i = own.column; i < own.last; i += LANES) {
            vec h = load(f->after + pos * Pp + i);
            if (clip_h > 0) {
                if (call->keep)
                    store(kept_rows + pos * f->kept_row + kept.unclipped + i, h);
                h = clipped(h, clip_h);
            }
            if (e->zoneout_h || keep_h > 0)
                h = zoned_out(e->zoneout_h ? e->zoneout_h + (place * D + d) * P + i : NULL, P - i,
                              keep_h, load(f->before + pos * Pp + i), h);
            store(f->after + pos * Pp + i, h);
            store_some((REAL *)call->output + (place * D + d) * P + i, h, P - i);
        }
        for (i64 i = own.unit; call->cell >= LSTM && i < own.end; i += LANES) {
            vec c = load(f->c + pos * Hp + i);
            if (e->zoneout_c || keep_c > 0)
                c = zoned_out(e->zoneout_c ? e->zoneout_c + (place * D + d) * H + i : NULL, H - i,
                              keep_c, load(f->c_before + pos * Hp + i), c);
            store(f->c + pos * Hp + i, c);
            if (e->cells)
                store_some((REAL *)e->cells + (place * D + d) * H + i, c, H - i);
        }
    }
    /* Beyond the end of a sequence; a packed batch has no such rows. */
    for (i64 pos = rows; e->order && pos < N; pos++) {
        const i64 place = callers_row(call, offsets, e, t, pos);
        for (i64 i = own.column; i < own.last; i += LANES)
            store_some((REAL *)call->output + (place * D + d) * P + i, (vec){0}, P - i);
        for (i64 i = own.unit; e->cells && i < own.end; i += LANES)
            store_some((REAL *)e->cells + (place * D + d) * H + i, (vec){0}, H - i);
    }
    copy_columns(f->after + rows * Pp, Pp, f->before + rows * Pp, Pp, N - rows, own.column,
                 own.last);
    /* An episode begins at a marked step; going back in time, the one before it begins then. */
    const i64 next = d ? t - 1 : t + 1;
    if (e->reset_mask && next >= 0 && next < call->steps) {
        const i64 both = d ? rows : rows_of(call, next);
        for (i64 pos = 0; pos < both; pos++)
            if (is_reset(e, d ? t : next, pos))
                start_anew(call, e, d, pos, f->after, f->c, own);
    }
    if (e->recurrent_mask)
        mask_states(call, e, d, f->after, f->next_masked, own);
}

/* A single row through a single step, whose state is nobody's but a cell's: the weights are used once,
   so they are read where they lie. A longer sequence adds up in another order, for which a layer, cut
   anywhere, is to give the same bits. */
static int is_direct(const Call *call)
{
    return !HAS_OWN && !HAS_NORM && call->steps == 1 && call->batch == 1 && !call->h_n
           && !call->keep && call->cell != LSTM_PROJECTED;
}

/* to[i] += the product of row i of `weights` with x, for the rows [begin, end). */
static void dot_products(REAL *to, const REAL *weights, const REAL *x, i64 count, i64 begin, i64 end)
{
    enum { ROWS = 4 };
    for (i64 i = begin; i < end; i += ROWS) {
        const int rows = end - i < ROWS ? (int)(end - i) : ROWS;
        vec sum[2 * ROWS] = {{0}};
        i64 k = 0;
        if (rows == ROWS)
            for (; k + 2 * LANES <= count; k += 2 * LANES)
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const REAL *row = weights + (i + r) * count + k;
                    sum[r] += load(row) * load(x + k);
                    sum[ROWS + r] += load(row + LANES) * load(x + k + LANES);
                }
        for (; k < count; k += LANES)
            for (int r = 0; r < rows; r++)
                sum[r] += load_some(weights + (i + r) * count + k, count - k)
                          * load_some(x + k, count - k);
        for (int r = 0; r < rows; r++) {
            const vec both = sum[r] + sum[ROWS + r];
            for (int lane = 0; lane < LANES; lane++)
                to[i + r] += both[lane];
        }
    }
}

/* A step's preactivations with both products, the units [unit, end) of row 0; of GRU's new gate that
   of the state by itself, where its bias is (`start_of`). */
static void direct_products(const Call *call, const Forward *f, int d, i64 unit, i64 end)
{
    const i64 H = call->hidden_size, Hp = padded(H), I = call->input_size;
    const i64 last = end < H ? end : H;
    for (i64 g = 0; g < GATES[call->cell] && unit < last; g++) {
        REAL *preact = f->preact + g * Hp;
        REAL *of_state = call->cell == GRU && g == 2 ? f->bias + 3 * Hp : preact;
        memcpy(preact + unit, f->bias + g * Hp + unit, (size_t)(end - unit) * sizeof(REAL));
        dot_products(preact, (const REAL *)call->weights[d][0] + g * H * I, call->x, I, unit, last);
        dot_products(of_state, (const REAL *)call->weights[d][1] + g * H * H, f->before, H, unit,
                     last);
    }
}

static void forward_direction(const Call *call, const i64 *offsets, int d, Forward f,
                              const Member *me)
{
    const Extras *e = EXTRAS(f.extras);
    const i64 G = GATES[call->cell], H = call->hidden_size, P = call->output_size, N = call->batch;
    const i64 Hp = padded(H), Pp = padded(P), T = call->steps, D = call->directions;
    REAL *output = (REAL *)call->output + d * P;
    i64 unit, end, column, last;
    share_units(me, call, &unit, &end);
    column = unit, last = end;
    f.is_direct = is_direct(call);
    if (f.passing_ih)
        f.passing_ih = call->weights[d][0];
    else
        f.input_weight = transpose(call->weights[d][0], G, H, call->input_size, WIDTH, 0,
                                   f.weight_ih, 0, unit, end);
    if (f.is_direct)
        f.passing_hh = NULL;
    else if (f.passing_hh)
        f.passing_hh = call->weights[d][1];
    else
        f.state_weight = transpose(call->weights[d][1], PRODUCTS[call->cell], H, P,
                                   step_width(call->cell), 1, f.weight_hh, 0, unit, end);
    copy_unit_weights(call, d, f.own, unit, end);
    if (call->cell == LSTM_PROJECTED) {
        share(me, Pp, LANES, &column, &last);
        f.projection =
            transpose(call->weights[d][4], 1, P, H, WIDTH, 0, f.weight_hr, 0, column, last);
    }
    const i64 shown = last < P ? last : P;
    if (me->index == 0) {
        fold_bias(call, d, f.bias);
        memset(f.before, 0, (size_t)(N * Pp) * sizeof(REAL));
        memset(f.c, 0, (size_t)(OTHERS * N * Hp) * sizeof(REAL));
        if (call->h_0)
            take_states(f.before, Pp, (const REAL *)call->h_0 + d * N * P, P, N, e);
        if (call->c_0)
            c_in(call, f.c, (const REAL *)call->c_0 + d * OTHERS * N * H, e);
        if (e) {
            const Part whole = {0, Pp, 0, Hp};
            for (i64 pos = 0; e->reset_mask && !d && pos < rows_of(call, 0); pos++)
                if (is_reset(e, 0, pos))
                    start_anew(call, e, d, pos, f.before, f.c, whole);
            if (e->recurrent_mask)
                mask_states(call, e, d, f.before, f.masked, whole);
        }
    }
    const Part own = {column, last, unit, end};
    f.operand = e && e->recurrent_mask ? f.masked : f.before;
    wait_for_all(me);
    i64 ready_from = 0, ready_to = 0;
    for (i64 s = 0; s < T; s++) {
        const i64 t = d ? T - 1 - s : s, rows = rows_of(call, t);
        const i64 row = first_row(call, offsets, t);
        if (t < ready_from || t >= ready_to) {
            steps_together(call, t, d, f.chunk_rows, &ready_from, &ready_to);
            if (!HAS_PRODUCT)
                wait_for_all(me);
            if (f.is_direct)
                direct_products(call, &f, d, unit, end);
            else
                project(call, &f, me, offsets, ready_from, ready_to);
            wait_for_all(me);
#if defined(NORMALIZED)
            const i64 first = first_row(call, offsets, ready_from);
            normalize_input(call, &f, me, first, first_row(call, offsets, ready_to) - first);
            wait_for_all(me);
#endif
        }
        const REAL *preact = f.preact + (row - first_row(call, offsets, ready_from)) * G * Hp;
        REAL *kept = call->keep ? f.saved + row * f.kept_row : NULL;
        if (call->keep && f.kept_first)
            copy_columns(kept, f.kept_row, f.operand, Pp, rows, column, last);
        if (e)
            before_step(call, &f, rows, kept, own);
        any_step(call, &f, me, rows, preact, kept);
        if (e) {
            after_step(call, offsets, &f, d, t, rows, kept, own);
        } else {
            copy_columns(output + row * D * P, D * P, f.after, Pp, rows, column, shown);
            /* Rows that have ended keep their last state, and rows to come their first. */
            copy_columns(f.after + rows * Pp, Pp, f.before + rows * Pp, Pp, N - rows, column, last);
        }
        REAL *after = f.after, *masked = f.next_masked;
        f.after = f.before;
        f.before = after;
        f.next_masked = f.masked;
        f.masked = masked;
        f.operand = e && e->recurrent_mask ? f.masked : f.before;
        if (HAS_PRODUCT)
            wait_for_all(me);
    }
    if (call->h_n)
        give_states((REAL *)call->h_n + d * N * P, f.before, Pp, P, N, column, last, e);
    if (call->c_n)
        c_out(call, (REAL *)call->c_n + d * OTHERS * N * H, f.c, unit, end, e);
    /* The other direction takes the buffers over. */
    wait_for_all(me);
}

/* What the members of a team have in common: buffers of each direction, and where those meet that
   work on it; where all do. */
typedef struct {
    const Call *call;
    const i64 *offsets;
    const void *buffers;
    i64 arrived;
    Meeting meetings[2], everybody;
} Team;

/* A member by its turn of arrival: which thread it is does not matter. */
static Member arrive(Team *team)
{
    const Call *call = team->call;
    /* A team may be smaller than was asked for: inside another one, or by OMP_THREAD_LIMIT. */
    Member me = {__atomic_fetch_add(&team->arrived, 1, __ATOMIC_RELAXED),
                 call->threads > 1 ? call->team_size() : 1, &team->everybody};
    return me;
}
/* Whether a member has a part in a direction, and as which of how many. */
static int is_member_of(Team *team, const Member *me, int d, Member *part)
{
    *part = *me;
    part->meeting = &team->meetings[d];
    if (!team->call->apart || me->count == 1)
        return 1;
    const i64 first = me->count / 2;
    part->index = d ? me->index - first : me->index;
    part->count = d ? me->count - first : first;
    return part->index >= 0 && part->index < part->count;
}
static void work_together(const Call *call, void (*work)(void *), Team *team)
{
    if (call->threads > 1)
        call->open_team(work, team, (unsigned)call->threads, 0);
    else
        work(team);
}

static void forward_work(void *data)
{
    Team *team = data;
    Member me = arrive(team), part;
    const Forward *buffers = team->buffers;
    for (int d = 0; d < team->call->directions; d++)
        if (is_member_of(team, &me, d, &part))
            forward_direction(team->call, team->offsets, d, buffers[d], &part);
}

/* The buffers of both directions, which are the same where one comes after the other. */
static void plan_forwards(const Call *call, const Extras *e, Arena *arena, Forward *f)
{
    plan_forward(call, e, arena, &f[0]);
    f[1] = f[0];
    if (call->apart)
        plan_forward(call, e, arena, &f[1]);
}

static i64 run_forward(const Call *call, const Extras *extras)
{
    const Extras *e = EXTRAS(extras);
    Arena arena = {0};
    Forward f[2];
    i64 *offsets, *places;
    plan_forwards(call, e, &arena, f);
    if (make_offsets(call, &offsets))
        return 1;
    const int failed = make_places(call, offsets, e, &places);
    arena.base = failed ? NULL : block_for(&arena);
    if (!arena.base) {
        free(places);
        free(offsets);
        return 1;
    }
    arena.used = 0;
    plan_forwards(call, e, &arena, f);
    const i64 rows = first_row(call, offsets, call->steps);
    for (int d = 0; d < 2; d++) {
        f[d].saved = call->keep ? (REAL *)call->saved + d * rows * f[d].kept_row : NULL;
        f[d].extras = e;
        f[d].places = places;
        f[d].clip_c = e ? (REAL)e->clip_c : 0;
    }
    if (call->keep) {
        /* The vector at the end is read and not used; the same call shall save the same. */
        const i64 numbers = call->directions * rows * f[0].kept_row;
        in_huge_pages(call->saved, (size_t)numbers * sizeof(REAL));
        memset((REAL *)call->saved + numbers, 0, LANES * sizeof(REAL));
    }
    Team team = {call, offsets, f, 0, {{0}}, {0}};
    work_together(call, forward_work, &team);
    free(arena.base);
    free(places);
    free(offsets);
    return 0;
}

/* 0, or 1 when there is no memory; then nothing that was written means anything. */
#if !defined(PART) || PART == FORWARD
EXPORT i64 forward(const Call *call)
{
    return run_forward(call, NULL);
}
#endif
#if !defined(PART) || PART == EXTENDED
EXPORT i64 forward_extended(const Call *call, const Extras *extras)
{
    return run_forward(call, extras);
}
#endif

static void plan_backward(const Call *call, const Extras *e, i64 rows, Arena *arena, Backward *b)
{
    const i64 G = GATES[call->cell], H = call->hidden_size, P = call->output_size, N = call->batch;
    const i64 Hp = padded(H), Pp = padded(P), I = call->input_size, number = sizeof(REAL);
    const i64 K = PRODUCTS[call->cell];
    const int is_projected = call->cell == LSTM_PROJECTED;
    const Kept kept = kept_by(call, e);
    b->kept_row = kept.row;
    b->kept_first = kept.first;
    b->before_at = kept.before;
    b->zeros = take(arena, (size_t)(kept.first ? 0 : Pp * number));
    b->chunk_rows = rows < STEP_ROWS ? rows : N > STEP_ROWS ? N : STEP_ROWS;
    b->grads = take(arena, (size_t)(b->chunk_rows * GRADS[call->cell] * Hp * number));
    b->dh = take(arena, (size_t)(N * Pp * number));
    b->dc = take(arena, (size_t)(OTHERS * N * Hp * number));
    b->after = take(arena, (size_t)(N * Pp * number));
    b->grad_states = take(arena, (size_t)(is_projected ? b->chunk_rows * Pp * number : 0));
    const i64 projection = is_projected ? panel_numbers(Hp / LANES, P, WIDTH) : 0;
    b->weight_ih = take(arena, (size_t)(panel_numbers(padded(I) / LANES, G * H, WIDTH) * number));
    b->weight_hh = take(arena, (size_t)(panel_numbers(Pp / LANES, K * H, WIDTH) * number));
    b->weight_hr = take(arena, (size_t)(projection * number));
    b->own = take(arena, (size_t)(UNIT_WEIGHTS * Hp * number));
    b->grad_own = take(arena, (size_t)((UNIT_WEIGHTS + UNIT_BIASES) * Hp * number));
#if defined(NORMALIZED)
    b->sums = take(arena, (size_t)(N * G * Hp * number));
    b->parts = take(arena, (size_t)(numbers_of_parts(call) * number));
    b->found = take(arena, (size_t)(call->threads * numbers_found(call) * number));
#endif
    b->columns = take(arena, (size_t)(Hp * ROWS_AT_ONCE * number));
    b->room = panel_numbers(padded(I > P ? I : P) / LANES, ROWS_AT_ONCE, WIDTH);
    b->rows = take(arena, (size_t)(2 * call->threads * b->room * number));
    b->past_h = take(arena, (size_t)(e ? N * Pp * number : 0));
    b->past_c = take(arena, (size_t)(e ? N * Hp * number : 0));
    b->reset_h = take(arena, (size_t)(e ? N * Pp * number : 0));
    b->reset_c = take(arena, (size_t)(e ? N * Hp * number : 0));
    /* Zeroed at the start. */
    b->dm_numbers = is_projected || HAS_NORM ? N * Hp : 0;
    b->dm = take(arena, (size_t)(b->dm_numbers * number));
}

/* The pointwise half of a backward step: from dh (N, Pp) the gradients of the preactivations of its
   rows, and in `after` what h before the step gets past W_hh. The units [begin, end). */
INLINE void backward_step(int cell, const Call *call, const Backward *b, i64 rows, i64 begin,
                          i64 end, const REAL *dh, const REAL *kept_rows, REAL *grads)
{
    const i64 Hp = padded(call->hidden_size), Pp = padded(call->output_size);
    const int kept_count = KEPT[cell], grad_count = GRADS[cell], relu = call->cell == RNN_RELU;
    for (i64 row = 0; row < rows; row++)
        for (i64 unit = begin; unit < end; unit += LANES) {
            const REAL *kept_row = kept_rows + row * b->kept_row;
            vec kept[6], grad[4], before = {0}, dc = load(b->dc + row * Hp + unit);
            UNROLL for (int k = 0; k < 5; k++)
                if (k < kept_count)
                    kept[k] = load(kept_row + b->kept_first + k * Hp + unit);
            if (cell == GRU)
                before = load(kept_row + b->before_at + unit);
            vec past = cell_backward(cell, relu, load(dh + row * Hp + unit), before, kept,
                                     b->clip_c, &dc, grad);
            UNROLL for (int g = 0; g < 4; g++)
                if (g < grad_count)
                    store(grads + row * grad_count * Hp + g * Hp + unit, grad[g]);
            if (cell >= LSTM)
                store(b->dc + row * Hp + unit, dc);
            if (cell == GRU)
                store(b->after + row * Pp + unit, past);
        }
}

#if HAS_OWN
/* The same of a user's cell. One unit-vector for all rows, so that what its own weights get stays in
   registers; it adds up over rows and steps in one order, whatever the team. */
static void own_backward_step(const Call *call, const Backward *b, i64 rows, i64 unit, i64 end,
                              const REAL *dh, const REAL *kept_rows, REAL *grads)
{
    const i64 Hp = padded(call->hidden_size), other = call->batch * Hp;
    for (; unit < end; unit += LANES) {
        vec own[OWN_UNIT_WEIGHTS + 1], total[OWN_UNIT_WEIGHTS + 1];
        UNROLL for (int k = 0; k < OWN_UNIT_WEIGHTS; k++) {
            own[k] = load(b->own + k * Hp + unit);
            total[k] = load(b->grad_own + k * Hp + unit);
        }
        for (i64 row = 0; row < rows; row++) {
            const REAL *kept_row = kept_rows + row * b->kept_row;
            const i64 place = row * Hp + unit;
            vec kept[OWN_KEPT + 1], after[OWN_STATES], before[OWN_STATES], grad[OWN_GRADS];
            vec share_of_own[OWN_UNIT_WEIGHTS + 1];
            UNROLL for (int k = 0; k < OWN_KEPT; k++)
                kept[k] = load(kept_row + Hp + k * Hp + unit);
            after[0] = load(dh + place);
            UNROLL for (int s = 1; s < OWN_STATES; s++)
                after[s] = load(b->dc + (s - 1) * other + place);
            own_backward(after, load(kept_row + unit), kept, own, grad, before, share_of_own);
            UNROLL for (int g = 0; g < OWN_GRADS; g++)
                store(grads + row * OWN_GRADS * Hp + g * Hp + unit, grad[g]);
            if (OWN_PAST)
                store(b->after + place, before[0]);
            UNROLL for (int s = 1; s < OWN_STATES; s++)
                store(b->dc + (s - 1) * other + place, before[s]);
            UNROLL for (int k = 0; k < OWN_UNIT_WEIGHTS; k++) total[k] += share_of_own[k];
        }
        UNROLL for (int k = 0; k < OWN_UNIT_WEIGHTS; k++)
            store(b->grad_own + k * Hp + unit, total[k]);
    }
}
#endif

static void any_backward_step(const Call *call, const Backward *b, const Member *me, i64 rows,
                              const REAL *dh, const REAL *kept, REAL *grads)
{
    i64 unit, end;
    share_units(me, call, &unit, &end);
#if HAS_OWN
    own_backward_step(call, b, rows, unit, end, dh, kept, grads);
    return;
#endif
#if defined(NORMALIZED)
    normalized_backward_step(call, b, me, rows, unit, end, dh, kept, grads);
    return;
#endif
    switch (call->cell) {
    case RNN_TANH:
    case RNN_RELU:
        if (HAS(RNN_TANH))
            backward_step(RNN_TANH, call, b, rows, unit, end, dh, kept, grads);
        break;
    case GRU:
        if (HAS(GRU))
            backward_step(GRU, call, b, rows, unit, end, dh, kept, grads);
        break;
    default:
        if (HAS(LSTM))
            backward_step(LSTM, call, b, rows, unit, end, dh, kept, grads);
    }
}

/* Some steps that follow on each other, and whose gradients are in b->grads: the first of them, its
   first row, how many rows there are, and whether other steps have been here before. */
typedef struct {
    i64 from, first, rows;
    int begun;
} Steps;

/* The gradient of x where our rows are not in the caller's order; each member some rows. */
static void give_grad_x(const Call *call, int d, const Backward *b, const Member *me, Steps steps,
                        Product p, REAL *x_rows)
{
    const i64 I = call->input_size, N = call->batch;
    REAL *grad_x = call->grad_x;
    const REAL *grads = p.a;
    i64 row = p.row, end = p.rows;
    p.row = 0;
    p.out = x_rows;
    p.out_row = padded(I);
    p.start = NULL;
    for (; row < end; row += p.rows) {
        p.rows = end - row < ROWS_AT_ONCE ? end - row : ROWS_AT_ONCE;
        p.a = grads + row * p.a_row;
        product(&p);
        for (i64 i = 0; i < p.rows; i++) {
            REAL *to = grad_x + b->places[steps.first + row + i] * I;
            for (i64 k = 0; k < I; k += LANES) {
                vec found = load(x_rows + i * p.out_row + k);
                store_some(to + k, d ? load_some(to + k, I - k) + found : found, I - k);
            }
        }
    }
    /* Nothing comes to what lies beyond the ends. */
    share(me, d || steps.begun ? 0 : call->steps, 1, &row, &end);
    for (i64 t = row; t < end; t++)
        for (i64 pos = call->batch_sizes[t]; pos < N; pos++)
            memset(grad_x + (t * N + b->extras->order[pos]) * I, 0, (size_t)I * sizeof(REAL));
}

/* to[u] += the sum of the first `count` numbers of a column; or to[u] is that. */
static void add_sums(REAL *to, i64 units, const REAL *columns, i64 count, int begun)
{
    for (i64 u = 0; u < units; u++) {
        vec sum = {0};
        for (i64 i = 0; i < count; i += LANES)
            sum += load_some(columns + u * ROWS_AT_ONCE + i, count - i);
        const REAL total = total_of(sum);
        to[u] = begun ? to[u] + total : total;
    }
}

/* h before step t of a row of it: kept there, or as what the step before it has kept. */
static const REAL *before_of(const Call *call, const i64 *offsets, const Backward *b, int d, i64 t,
                             i64 n)
{
    if (b->kept_first)
        return b->saved + (first_row(call, offsets, t) + n) * b->kept_row;
    const i64 before = d ? t + 1 : t - 1;
    if (before >= 0 && before < call->steps && n < rows_of(call, before))
        return b->saved + (first_row(call, offsets, before) + n) * b->kept_row;
    if (!call->h_0)
        return b->zeros;
    return (const REAL *)call->h_0 + (d * call->batch + n) * call->output_size;
}

/* What weights and x get from the gradients of the preactivations of some steps, before these make
   room for those of the next; weights by units, x by rows. */
static void after_steps(const Call *call, int d, const Backward *b, const Member *me, Steps steps,
                        const i64 *offsets, Matrix weight_ih)
{
    const int cell = (int)call->cell;
    const i64 G = GATES[cell], H = call->hidden_size, P = call->output_size, I = call->input_size;
    const i64 Hp = padded(H), Pp = padded(P), width = GRADS[cell] * Hp;
    const i64 K = PRODUCTS[cell], most = G > K ? G : K;
    /* W_ih and its bias, W_hh and its bias: what is multiplied with a gate's gradient. */
    static const int WEIGHTS[] = {0, 2, 1, 3};
    void *const *grad_weights = call->grad_weights[d];
    const REAL *kept = b->saved + steps.first * b->kept_row;
    i64 unit, end;
    share(me, H, LANES, &unit, &end);
    /* Some rows of x and h at a time, for all units. One gate after the other, for rows of a weight
       are units of a gate. */
    const i64 blocks = (steps.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    const i64 block = blocks ? (steps.rows + blocks - 1) / blocks : 0;
    REAL *columns = b->columns + unit * ROWS_AT_ONCE;
    Matrix rows_of[2];
    for (int which = 0; which < 2; which++)
        rows_of[which] = (Matrix){b->rows + (2 * me->index + which) * b->room, WIDTH * LANES,
                                  WIDTH * LANES * ROWS_AT_ONCE};
    i64 row = 0, t = steps.from;
    do { /* Once for no rows too: their gradients are zeros. */
        const i64 count = steps.rows - row < block ? steps.rows - row : block;
        const int begun = steps.begun || row;
        for (i64 i = 0; i < count && grad_weights[0]; i++)
            into_panels(row_of_x(call, offsets, b->places, steps.first + row + i), I,
                        rows_of[0].panel, (REAL *)rows_of[0].first + i * WIDTH * LANES);
        for (i64 i = 0; i < count && grad_weights[1]; i++) {
            const i64 at = steps.first + row + i;
            while (at >= first_row(call, offsets, t + 1))
                t++;
            const REAL *from = before_of(call, offsets, b, d, t, at - first_row(call, offsets, t));
            into_panels(from, P, rows_of[1].panel, (REAL *)rows_of[1].first + i * WIDTH * LANES);
        }
        int there = -1;
        for (int g = 0; g < most; g++)
            for (int i = 0; i < 4; i++) {
                const int which = WEIGHTS[i], is_state = which % 2, is_bias = which >= 2;
                if (!grad_weights[which] || g >= (is_state ? K : G) || (is_bias && HAS_NORM))
                    continue;
                const int slot = is_state ? state_slot(cell, g) : input_slot(g);
                if (slot != there)
                    in_columns(b->grads + row * width + slot * Hp + unit, width, count,
                               end - unit, columns);
                there = slot;
                if (is_bias) {
                    add_sums((REAL *)grad_weights[which] + g * H + unit, end - unit, columns,
                             count, begun);
                    continue;
                }
                const i64 size = is_state ? P : I;
                Product p = {.rows = end - unit, .columns = size, .parts = 1, .count = count,
                             .a = columns, .a_row = ROWS_AT_ONCE, .a_step = 1,
                             .b = rows_of[which],
                             .out = (REAL *)grad_weights[which] + (g * H + unit) * size,
                             .out_row = size, .start_row = size};
                p.start = begun ? p.out : NULL;
                product(&p);
            }
        row += block;
    } while (row < steps.rows);
    if (cell == LSTM_PROJECTED && grad_weights[4]) {
        Product p = {.columns = H, .parts = 1, .count = steps.rows, .a = b->grad_states,
                     .a_row = 1, .a_step = Pp, .b = plain(kept + Pp + 5 * Hp, b->kept_row),
                     .out = grad_weights[4], .out_row = H, .start_row = H};
        p.start = steps.begun ? p.out : NULL;
        share(me, P, MOST_ROWS, &p.row, &p.rows);
        product(&p);
    }
    if (call->grad_x) {
        REAL *grad_x = b->grad_x + steps.first * I;
        const int is_added = d && !call->apart;
        Product p = {.columns = I, .parts = G, .count = H, .a = b->grads, .a_row = width,
                     .a_step = 1, .b = weight_ih, .out = grad_x,
                     .out_row = I, .start = is_added ? grad_x : NULL, .start_row = I};
        for (int g = 0; g < G; g++)
            p.part_at[g] = input_slot(g) * Hp;
        share(me, steps.rows, MOST_ROWS, &p.row, &p.rows);
        if (b->places && b->grad_x == call->grad_x)
            give_grad_x(call, d, b, me, steps, p, (REAL *)rows_of[0].first);
        else
            product(&p);
    }
}

static void add_columns(REAL *to, const REAL *from, i64 row, i64 rows, i64 begin, i64 end)
{
    for (i64 i = 0; i < rows; i++)
        for (i64 k = begin; k < end; k += LANES)
            store(to + i * row + k, load(to + i * row + k) + load(from + i * row + k));
}

/* Gradients of the states after step t become those of the cell's results; the rest is put by. */
static void before_backward_step(const Call *call, const i64 *offsets, const Backward *b, int d,
                                 i64 t, i64 rows, const REAL *kept_rows, Part own)
{
    const Extras *e = EXTRAS(b->extras);
    const i64 H = call->hidden_size, P = call->output_size, D = call->directions;
    const i64 Hp = padded(H), Pp = padded(P);
    const Kept kept = kept_by(call, e);
    const REAL one = 1, clip_h = (REAL)e->clip_h, keep_h = (REAL)e->keep_h;
    const REAL keep_c = (REAL)e->keep_c;
    for (i64 pos = 0; pos < rows; pos++) {
        const i64 place = callers_row(call, offsets, e, t, pos);
        for (i64 i = own.column; i < own.last; i += LANES) {
            REAL *at = b->dh + pos * Pp + i;
            vec dh = load(at);
            if (call->grad_output)
                dh += load_some((const REAL *)call->grad_output + place * call->grad_output_row
                                    + d * P + i, P - i);
            if (e->zoneout_h || keep_h > 0) {
                vec keep = e->zoneout_h
                    ? load_mask(e->zoneout_h + (place * D + d) * P + i, P - i) : all(keep_h);
                store(b->past_h + pos * Pp + i, dh * keep);
                dh *= one - keep;
            }
            if (clip_h > 0) {
                vec h = load(kept_rows + pos * b->kept_row + kept.unclipped + i);
                dh = choose((h <= clip_h) & (h >= -clip_h), dh, (vec){0});
            }
            store(at, dh);
        }
        for (i64 i = own.unit; call->cell >= LSTM && i < own.end; i += LANES) {
            REAL *at = b->dc + pos * Hp + i;
            vec dc = load(at);
            if (e->grad_cells)
                dc += load_some((const REAL *)e->grad_cells + place * e->grad_cells_row + d * H + i,
                                H - i);
            if (e->zoneout_c || keep_c > 0) {
                vec keep = e->zoneout_c
                    ? load_mask(e->zoneout_c + (place * D + d) * H + i, H - i) : all(keep_c);
                store(b->past_c + pos * Hp + i, dc * keep);
                dc *= one - keep;
            }
            store(at, dc);
        }
    }
}

/* From the gradients of what the cell was given to those of the states before step t. */
static void after_backward_step(const Call *call, const Backward *b, int d, i64 t, i64 rows,
                                Part own)
{
    const Extras *e = EXTRAS(b->extras);
    const i64 P = call->output_size, N = call->batch, Hp = padded(call->hidden_size);
    const i64 Pp = padded(P);
    const int zoned_h = e->zoneout_h || e->keep_h > 0, zoned_c = e->zoneout_c || e->keep_c > 0;
    /* As in after_step: a step that an episode begins with, the way the direction goes. */
    const i64 marked = d ? t + 1 : t;
    const i64 both = !e->reset_mask || marked >= call->steps ? 0 : rows_of(call, marked);
    for (i64 pos = 0; pos < rows; pos++) {
        const int reset = pos < both && is_reset(e, marked, pos);
        const REAL *mask = e->recurrent_mask
            ? (const REAL *)e->recurrent_mask + (d * N + sequence_of(e, pos)) * P : NULL;
        for (i64 i = own.column; i < own.last; i += LANES) {
            const i64 at = pos * Pp + i;
            vec dh = load(b->dh + at);
            if (mask) {
                dh *= load_some(mask + i, P - i);
                if (call->cell == GRU)
                    dh += load(b->after + at);
            }
            if (zoned_h)
                dh += load(b->past_h + at);
            if (reset) {
                store(b->reset_h + at, load(b->reset_h + at) + dh);
                dh = (vec){0};
            }
            store(b->dh + at, dh);
        }
        for (i64 i = own.unit; call->cell >= LSTM && i < own.end; i += LANES) {
            const i64 at = pos * Hp + i;
            vec dc = load(b->dc + at);
            if (zoned_c)
                dc += load(b->past_c + at);
            if (reset) {
                store(b->reset_c + at, load(b->reset_c + at) + dc);
                dc = (vec){0};
            }
            store(b->dc + at, dc);
        }
    }
}

static void backward_direction(const Call *call, const i64 *offsets, int d, const Backward *b,
                               const Member *me)
{
    const Extras *e = EXTRAS(b->extras);
    const int cell = (int)call->cell;
    const i64 G = GATES[cell], H = call->hidden_size, P = call->output_size, N = call->batch;
    const i64 I = call->input_size, Hp = padded(H), Pp = padded(P), T = call->steps;
    const i64 width = GRADS[cell] * Hp, total = first_row(call, offsets, T), K = PRODUCTS[cell];
    i64 from = 0, to = 0;
    Steps steps = {0};
    i64 unit, end, column, last;
    share_units(me, call, &unit, &end);
    copy_unit_weights(call, d, b->own, unit, end);
    for (i64 k = 0; k < UNIT_WEIGHTS + UNIT_BIASES && unit < end; k++)
        memset(b->grad_own + k * Hp + unit, 0, (size_t)(end - unit) * sizeof(REAL));
    column = unit, last = end;
    if (cell == LSTM_PROJECTED)
        share(me, Pp, LANES, &column, &last);
    const Matrix weight_ih = readable(call->weights[d][0], G * H, I, total, b->weight_ih, me);
    const Matrix weight_hh = readable(call->weights[d][1], K * H, P, total, b->weight_hh, me);
    Matrix weight_hr = {0};
    if (cell == LSTM_PROJECTED)
        weight_hr = readable(call->weights[d][4], P, H, total, b->weight_hr, me);
    if (me->index == 0) {
        memset(b->dh, 0, (size_t)(N * Pp) * sizeof(REAL));
        memset(b->dc, 0, (size_t)(OTHERS * N * Hp) * sizeof(REAL));
        memset(b->zeros, 0, (size_t)(b->kept_first ? 0 : Pp) * sizeof(REAL));
        if (call->grad_h_n)
            take_states(b->dh, Pp, (const REAL *)call->grad_h_n + d * N * P, P, N, e);
        if (call->grad_c_n)
            c_in(call, b->dc, (const REAL *)call->grad_c_n + d * OTHERS * N * H, e);
        if (e) {
            memset(b->reset_h, 0, (size_t)(N * Pp) * sizeof(REAL));
            memset(b->reset_c, 0, (size_t)(N * Hp) * sizeof(REAL));
        }
    }
    const Part own = {column, last, unit, end};
    wait_for_all(me);
    for (i64 s = T - 1; s >= 0; s--) {
        const i64 t = d ? T - 1 - s : s, rows = rows_of(call, t);
        const i64 row = first_row(call, offsets, t);
        if (t < from || t >= to) {
            steps_together(call, t, !d, b->chunk_rows, &from, &to);
            steps.from = from;
            steps.first = first_row(call, offsets, from);
            steps.rows = first_row(call, offsets, to) - steps.first;
        }
        const REAL *kept = b->saved + row * b->kept_row, *dh = b->dh;
        REAL *grads = b->grads + (row - steps.first) * width;
        if (e)
            before_backward_step(call, offsets, b, d, t, rows, kept, own);
        else if (call->grad_output)
            for (i64 n = 0; n < rows; n++) {
                const REAL *from = (const REAL *)call->grad_output
                                   + (row + n) * call->grad_output_row + d * P;
                for (i64 at = column; at < last; at += LANES) {
                    REAL *to = b->dh + n * Pp + at;
                    store(to, load(to) + load_some(from + at, P - at));
                }
            }
        if (cell == LSTM_PROJECTED) {
            copy_columns(b->grad_states + (row - steps.first) * Pp, Pp, b->dh, Pp, rows, column,
                         last);
            Product p = {.rows = rows, .column = unit, .columns = end < H ? end : H, .parts = 1,
                         .count = P, .a = b->dh, .a_row = Pp, .a_step = 1, .b = weight_hr,
                         .out = b->dm, .out_row = Hp};
            wait_for_all(me);
            product(&p);
            dh = b->dm;
        }
        any_backward_step(call, b, me, rows, dh, kept, grads);
        /* The product is made of all units' gradients, and writes what only this member reads. */
        if (HAS_PRODUCT)
            wait_for_all(me);
        Product p = {.rows = rows, .column = column, .columns = last < P ? last : P, .parts = K,
                     .count = H, .a = grads, .a_row = width, .a_step = 1, .b = weight_hh,
                     .out = b->dh, .out_row = Pp,
                     .start = (cell == GRU && !(e && e->recurrent_mask)) || OWN_PAST ? b->after : NULL,
                     .start_row = Pp};
        for (int k = 0; k < K; k++)
            p.part_at[k] = state_slot(cell, k) * Hp;
        product(&p);
        if (e)
            after_backward_step(call, b, d, t, rows, own);
        if (t == (d ? to - 1 : from)) {
            if (!HAS_PRODUCT)
                wait_for_all(me);
#if defined(NORMALIZED)
            normalized_after_steps(call, b, me, steps.first, steps.rows);
#endif
            after_steps(call, d, b, me, steps, offsets, weight_ih);
            steps.begun = 1;
            wait_for_all(me);
        }
    }
    if (e && e->reset_to_initial) {
        add_columns(b->dh, b->reset_h, Pp, N, column, last);
        add_columns(b->dc, b->reset_c, Hp, N, unit, end);
    }
    if (call->grad_h_0)
        give_states((REAL *)call->grad_h_0 + d * N * P, b->dh, Pp, P, N, column, last, e);
    if (call->grad_c_0)
        c_out(call, (REAL *)call->grad_c_0 + d * OTHERS * N * H, b->dc, unit, end, e);
    for (i64 k = 0; k < UNIT_WEIGHTS && call->grad_weights[d][4]; k++)
        for (i64 u = unit; u < end; u += LANES)
            store_some((REAL *)call->grad_weights[d][4] + k * H + u,
                       load(b->grad_own + k * Hp + u), H - u);
#if defined(NORMALIZED)
    normalized_after_the_loop(call, d, b, me);
#endif
    /* The other direction takes the buffers over. */
    wait_for_all(me);
}

/* Where directions went side by side: what the second has for x is added to what the first has. */
static void add_grad_x(const Call *call, const Backward *b, const Member *me, i64 rows)
{
    const i64 I = call->input_size;
    i64 row, end;
    share(me, rows, 1, &row, &end);
    for (; row < end; row++) {
        const REAL *from = b->grad_x + row * I;
        REAL *to = (REAL *)call->grad_x + (b->places ? b->places[row] : row) * I;
        for (i64 k = 0; k < I; k += LANES)
            store_some(to + k, load_some(to + k, I - k) + load_some(from + k, I - k), I - k);
    }
}

static void backward_work(void *data)
{
    Team *team = data;
    const Call *call = team->call;
    Member me = arrive(team), part;
    const Backward *buffers = team->buffers;
    for (int d = 0; d < call->directions; d++)
        if (is_member_of(team, &me, d, &part))
            backward_direction(call, team->offsets, d, &buffers[d], &part);
    if (call->apart && call->grad_x) {
        wait_for_all(&me);
        add_grad_x(call, &buffers[1], &me, first_row(call, team->offsets, call->steps));
    }
}

/* As plan_forwards. */
static void plan_backwards(const Call *call, const Extras *e, i64 rows, Arena *arena, Backward *b)
{
    plan_backward(call, e, rows, arena, &b[0]);
    b[0].grad_x = call->grad_x;
    b[1] = b[0];
    if (call->apart) {
        plan_backward(call, e, rows, arena, &b[1]);
        b[1].grad_x = take(
            arena, (size_t)(call->grad_x ? rows * call->input_size : 0) * sizeof(REAL));
    }
}

static i64 run_backward(const Call *call, const Extras *extras)
{
    const Extras *e = EXTRAS(extras);
    Arena arena = {0};
    Backward b[2];
    i64 *offsets, *places;
    if (make_offsets(call, &offsets))
        return 1;
    const i64 total = first_row(call, offsets, call->steps);
    plan_backwards(call, e, total, &arena, b);
    const int failed = make_places(call, offsets, e, &places);
    arena.base = failed ? NULL : block_for(&arena);
    if (!arena.base) {
        free(places);
        free(offsets);
        return 1;
    }
    arena.used = 0;
    plan_backwards(call, e, total, &arena, b);
    for (int d = 0; d < 2; d++) {
        b[d].extras = e;
        b[d].places = places;
        b[d].clip_c = e ? (REAL)e->clip_c : 0;
        b[d].saved = (const REAL *)call->saved + d * total * b[d].kept_row;
        /* Ends of rows that no product writes are read by whole vectors. */
        memset(b[d].dm, 0, (size_t)b[d].dm_numbers * sizeof(REAL));
    }
    Team team = {call, offsets, b, 0, {{0}}, {0}};
    work_together(call, backward_work, &team);
    free(arena.base);
    free(places);
    free(offsets);
    return 0;
}

/* As forward. */
#if !defined(PART) || PART == BACKWARD
EXPORT i64 backward(const Call *call)
{
    return run_backward(call, NULL);
}
#endif
#if !defined(PART) || PART == EXTENDED
EXPORT i64 backward_extended(const Call *call, const Extras *extras)
{
    return run_backward(call, extras);
}
#endif

/* Numbers of Call.saved: for each direction its rows, each KEPT padded hidden sizes beside a padded
   output size, and a vector at the end. */
EXPORT i64 saved_numbers(i64 cell, i64 rows, i64 hidden, i64 output, i64 directions)
{
    return directions * rows * kept_of(cell, hidden, output, 0, 0, 0).row + LANES;
}
/* Likewise of an extended call, with a recurrent mask, with a largest |h|. */
EXPORT i64 saved_numbers_extended(i64 cell, i64 rows, i64 hidden, i64 output, i64 directions,
                                  i64 masks, i64 clips)
{
    return directions * rows * kept_of(cell, hidden, output, 1, masks != 0, clips != 0).row + LANES;
}

/* Numbers in a vector. */
EXPORT i64 lanes(void)
{
    return LANES;
}
