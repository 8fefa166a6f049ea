/* States and rows of x: from the caller's form and order to ours and back. */

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
