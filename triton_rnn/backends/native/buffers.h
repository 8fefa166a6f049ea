/* The private buffers of a forward and of a backward. */

/* Unit-vectors in a panel where each has one product, to keep more sums going: with the rows at once
   eight and more. */
enum { NARROW_WIDTH = MOST_ROWS < 4 ? 4 : 2 };
/* Whether a unit-vector has one product. */
INLINE int is_narrow(i64 cell)
{
    return HAS_OWN ? OWN_PRODUCTS == 1 : cell <= RNN_RELU;
}

/* A member's hidden units, whole panels of W_hh. */
INLINE void share_units(const Member *me, const Call *call, i64 *from, i64 *to)
{
    const i64 whole = is_narrow(call->cell) ? NARROW_WIDTH * LANES : LANES;
    share(me, padded(call->hidden_size), whole, from, to);
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

/* Vectors of a panel of W_hh: the gates of a unit-vector, or some unit-vectors of an RNN. */
INLINE i64 step_width(i64 cell)
{
    if (HAS_OWN && !HAS_PRODUCT)
        return 1;
    return is_narrow(cell) ? NARROW_WIDTH : PRODUCTS[cell];
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
