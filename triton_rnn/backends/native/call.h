/* What a call is: kinds of cells, what Python hands over (Call, Extras), where rows lie, what a
   forward keeps for the backward. */

enum { RNN_TANH, RNN_RELU, GRU, LSTM, LSTM_PROJECTED, OWN };

/* Compiled for one kind of cell, -DONLY=GRU, in half the time that all take. RNN_TANH stands for
   both kinds of RNN, LSTM for both kinds of LSTM. */
#ifdef ONLY
#define HAS(cell) (ONLY == (cell))
#else
#define HAS(cell) 1
#endif

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
