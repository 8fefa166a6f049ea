/* The backward, of which a step writes gradients of preactivations; weights and x get theirs from those
   of some hundred rows at a time. */

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
