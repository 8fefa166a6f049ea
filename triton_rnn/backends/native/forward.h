/* The forward: projections, steps, and the loop over time. */

/* Bytes of the preactivations of some steps at once: they should still be in the second-level
   cache when the steps come to them. But W_ih is read once for them, so that of a large one, which
   comes from further away, they may be a part as large as this. */
enum { CHUNK_BYTES = 256 << 10, PART_OF_WEIGHT = 2 };

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

/* The same of all rows, as many at once as keep some sums going: weights are read once for them. */
INLINE void step_rows(int cell, int U, const Call *call, const Forward *f, i64 rows, i64 unit,
                      const REAL *preact, REAL *kept_rows)
{
    i64 row = 0;
    /* Of many gates fewer rows: no more sums than MOST_VECTORS. */
    if (PRODUCTS[cell] * MOST_ROWS <= MOST_VECTORS)
        for (; AT_ONCE(rows - row); row += MOST_ROWS)
            step_block(cell, MOST_ROWS, U, call, f, row, unit, preact, kept_rows);
    for (; row + 2 <= rows; row += 2)
        step_block(cell, 2, U, call, f, row, unit, preact, kept_rows);
    for (; row < rows; row++)
        step_block(cell, 1, U, call, f, row, unit, preact, kept_rows);
}

/* One step of `rows` rows, the units [unit, end). */
INLINE void step(int cell, const Call *call, const Forward *f, i64 rows, i64 unit, i64 end,
                 const REAL *preact, REAL *kept_rows)
{
    /* As many unit-vectors at once as keep about eight sums going, which then do not wait for each
       other, and as there are registers for; of what is left over half as many, and so on. */
    const int narrow = is_narrow(cell), many = narrow ? NARROW_WIDTH : 1, wide = narrow ? 8 : 2;
    if (rows == 1) {
        for (; unit + wide * LANES <= end; unit += wide * LANES)
            step_block(cell, 1, wide, call, f, 0, unit, preact, kept_rows);
        if (wide > 4 && unit + 4 * LANES <= end) {
            step_block(cell, 1, 4, call, f, 0, unit, preact, kept_rows);
            unit += 4 * LANES;
        }
        if (wide > 2 && unit + 2 * LANES <= end) {
            step_block(cell, 1, 2, call, f, 0, unit, preact, kept_rows);
            unit += 2 * LANES;
        }
        if (unit < end)
            step_block(cell, 1, 1, call, f, 0, unit, preact, kept_rows);
        return;
    }
    for (; unit + many * LANES <= end; unit += many * LANES)
        step_rows(cell, many, call, f, rows, unit, preact, kept_rows);
    if (many > 2 && unit + 2 * LANES <= end) {
        step_rows(cell, 2, call, f, rows, unit, preact, kept_rows);
        unit += 2 * LANES;
    }
    if (many > 1 && unit < end)
        step_rows(cell, 1, call, f, rows, unit, preact, kept_rows);
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
