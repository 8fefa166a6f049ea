/* Layer normalization of the preactivations of GRU and LSTM, and of LSTM's c: Ba, Kiros & Hinton
   2016, arXiv:1607.06450. A part of recurrence.c, for -DNORMALIZED and one cell (-DONLY); the
   products, the loop over time and the gradients of the weights are those of all cells.

   A row's numbers x of some gates, H each, are normalized together:
       n = (x - mean(x)) * scale,  scale = 1 / sqrt(mean((x - mean(x))^2) + EPSILON),  y = n * gain
   and W_ih x for all steps of a chunk at once. Backward, d being the gradient of y:
       the gain's: the sum of d * n over rows;  x's: scale * (g - mean(g) - n * mean(g * n)),
       where g = d * gain.
   So the gradients of a step's preactivations are made twice: d, which W_ih's side has after the
   loop, and from it what W_hh is to be multiplied with.

   A row's means are of all its units. So that no member of a team has to read the others' units, each
   unit-vector leaves two numbers, its part, and from the parts of all, after it has waited for them,
   each member makes the means of every row, in one order. Numbers beyond H, which fill the last
   vector, count for nothing: gains there are zeros. */

/* Rows of the fifth weight, and so of f->own, b->own and b->grad_own: the gains of W_ih x and of
   W_hh h, and LSTM's gain and shift of c. b->grad_own has the sums for the biases behind them: those
   of the gates, and of b_hn, as in fold_bias. */
#define CELL ((int)ONLY)
enum {
    CELL_GATES = CELL == GRU ? 3 : 4,
    GAIN_HH = CELL_GATES,
    GAIN_C = 2 * CELL_GATES,
    SHIFT_C,
    GRAD_BIAS = UNIT_WEIGHTS
};
/* What a row keeps behind what its cell keeps: n of W_hh h, of W_ih x, and of LSTM's c. */
enum {
    KEPT_HH = CELL == GRU ? 4 : 5,
    KEPT_IH = KEPT_HH + CELL_GATES,
    KEPT_C = KEPT_IH + CELL_GATES
};
/* And at its end the scales, of each group of gates: of W_ih x, of W_hh h, and of c. */
enum { GROUPS = CELL == GRU ? 2 : 1, SCALE_IH = 0, SCALE_HH = GROUPS, SCALE_C = 2 * GROUPS };
/* GRU's r and z are a group, and its n; all gates of LSTM are one. */
#define GROUP_OF(gate) (CELL == GRU && (gate) == 2)
#define GROUP_FIRST(group) (2 * (group))
#define GROUP_GATES(group) (CELL == GRU ? 2 - (group) : 4)

static const REAL EPSILON = (REAL)1e-5;

/* The scales in a row of what is kept. */
INLINE i64 scales_at(const Call *call)
{
    return (1 + KEPT[CELL]) * padded(call->hidden_size);
}

/* The first `count` numbers, zeros behind them; all where there are more. */
INLINE vec first_of(vec x, i64 count)
{
    vec number;
    UNROLL for (int lane = 0; lane < LANES; lane++) number[lane] = (REAL)lane;
    return choose(number < (REAL)count, x, (vec){0});
}

INLINE vec square_root(vec x)
{
    vec root;
    for (int lane = 0; lane < LANES; lane++)
        root[lane] = IS_FLOAT ? __builtin_sqrtf((float)x[lane])
                              : (REAL)__builtin_sqrt((double)x[lane]);
    return root;
}

/* Parts of what is normalized together, of all unit-vectors and rows; then of the next: groups of
   gates, and c. Rows stand beside each other, so that a vector is one number of many rows. */
INLINE i64 numbers_of_parts(const Call *call)
{
    return (GROUPS + 1) * (padded(call->hidden_size) / LANES) * 2 * padded(call->batch);
}
INLINE REAL *parts_of(const Call *call, REAL *parts, int which)
{
    return parts + which * (padded(call->hidden_size) / LANES) * 2 * padded(call->batch);
}
/* What a member has found of each row, two numbers for each of these. */
INLINE i64 numbers_found(const Call *call)
{
    return (GROUPS + 1) * 2 * padded(call->batch);
}

/* Of a unit-vector of some gates: the sum, and the sum of squares about its own mean. */
INLINE void put_part(const Call *call, REAL *parts, int which, i64 row, i64 unit, int gates,
                     const vec *x)
{
    const i64 left = call->hidden_size - unit, Np = padded(call->batch);
    REAL *at = parts_of(call, parts, which) + unit / LANES * 2 * Np + row;
    vec sum = x[0], squares = {0};
    UNROLL for (int g = 1; g < gates; g++) sum += x[g];
    const REAL total = total_of(sum);
    const REAL mean = total / (REAL)(gates * (left < LANES ? left : LANES));
    UNROLL for (int g = 0; g < gates; g++) {
        vec off = first_of(x[g] - mean, left);
        squares += off * off;
    }
    at[0] = total;
    at[Np] = total_of(squares);
}
/* All rows' mean and scale, from the parts: Chan, Golub & LeVeque 1979. */
static void find_statistics(const Call *call, REAL *parts, int which, int gates, i64 rows,
                            REAL *found)
{
    const i64 H = call->hidden_size, Np = padded(call->batch);
    const REAL count = (REAL)(gates * H);
    parts = parts_of(call, parts, which);
    found += which * 2 * Np;
    for (i64 row = 0; row < rows; row += LANES) {
        vec sum = {0}, squares = {0};
        for (i64 unit = 0; unit < H; unit += LANES)
            sum += load(parts + unit / LANES * 2 * Np + row);
        const vec mean = sum / count;
        for (i64 unit = 0; unit < H; unit += LANES) {
            const REAL *part = parts + unit / LANES * 2 * Np + row;
            const REAL size = (REAL)(gates * (H - unit < LANES ? H - unit : LANES));
            vec off = load(part) / size - mean;
            squares += load(part + Np) + off * off * size;
        }
        store(found + row, mean);
        store(found + Np + row, (REAL)1 / square_root(squares / count + EPSILON));
    }
}

/* Of a unit-vector of some gates: the sums of g and of g * n. */
INLINE void put_slope(const Call *call, REAL *parts, int which, i64 row, i64 unit, int gates,
                      const vec *grads, const vec *normals)
{
    const i64 Np = padded(call->batch);
    REAL *at = parts_of(call, parts, which) + unit / LANES * 2 * Np + row;
    vec sum = grads[0], products = grads[0] * normals[0];
    UNROLL for (int g = 1; g < gates; g++) {
        sum += grads[g];
        products += grads[g] * normals[g];
    }
    at[0] = total_of(sum);
    at[Np] = total_of(products);
}
/* All rows' mean(g) and mean(g * n). */
static void find_slopes(const Call *call, REAL *parts, int which, int gates, i64 rows, REAL *found)
{
    const i64 H = call->hidden_size, Np = padded(call->batch);
    const REAL count = (REAL)(gates * H);
    parts = parts_of(call, parts, which);
    found += which * 2 * Np;
    for (i64 row = 0; row < rows; row += LANES) {
        vec sum = {0}, products = {0};
        for (i64 unit = 0; unit < H; unit += LANES) {
            sum += load(parts + unit / LANES * 2 * Np + row);
            products += load(parts + unit / LANES * 2 * Np + Np + row);
        }
        store(found + row, sum / count);
        store(found + Np + row, products / count);
    }
}

/* Two numbers of a row: mean and scale, or mean(g) and mean(g * n). */
typedef struct {
    REAL mean, other;
} Pair;
INLINE Pair pair_of(const Call *call, const REAL *found, int which, i64 row)
{
    const i64 Np = padded(call->batch);
    return (Pair){found[which * 2 * Np + row], found[(which * 2 + 1) * Np + row]};
}

INLINE vec grad_of(vec grad, vec normal, Pair means, REAL scale)
{
    return scale * (grad - means.mean - normal * means.other);
}

/* The same of a whole row at once, H numbers of some gates after each other. A sum of each gate, so
   that they do not wait for each other. */
INLINE Pair statistics(const REAL *from, int gates, i64 hidden)
{
    const i64 Hp = padded(hidden);
    const REAL count = (REAL)(gates * hidden);
    vec sum[4] = {{0}}, squares[4] = {{0}};
    for (i64 u = 0; u < Hp; u += LANES)
        UNROLL for (int g = 0; g < gates; g++) sum[g] += load(from + g * Hp + u);
    UNROLL for (int g = 1; g < gates; g++) sum[0] += sum[g];
    const REAL mean = total_of(sum[0]) / count;
    for (i64 u = 0; u < Hp; u += LANES)
        UNROLL for (int g = 0; g < gates; g++) {
            vec off = first_of(load(from + g * Hp + u) - mean, hidden - u);
            squares[g] += off * off;
        }
    UNROLL for (int g = 1; g < gates; g++) squares[0] += squares[g];
    const vec variance = all(total_of(squares[0]) / count + EPSILON);
    return (Pair){mean, ((REAL)1 / square_root(variance))[0]};
}
INLINE Pair slope(const REAL *grads, const REAL *normal, int gates, i64 hidden)
{
    const i64 Hp = padded(hidden);
    const REAL count = (REAL)(gates * hidden);
    vec sum[4] = {{0}}, products[4] = {{0}};
    for (i64 u = 0; u < Hp; u += LANES)
        UNROLL for (int g = 0; g < gates; g++) {
            vec grad = load(grads + g * Hp + u);
            sum[g] += grad;
            products[g] += grad * load(normal + g * Hp + u);
        }
    UNROLL for (int g = 1; g < gates; g++) {
        sum[0] += sum[g];
        products[0] += products[g];
    }
    return (Pair){total_of(sum[0]) / count, total_of(products[0]) / count};
}

/* W_ih x of some rows, the first of which is `first`, becomes LN(W_ih x) and the biases. */
static void normalize_input(const Call *call, const Forward *f, const Member *me, i64 first,
                            i64 rows)
{
    const i64 H = call->hidden_size, Hp = padded(H);
    i64 row, end;
    share(me, rows, 1, &row, &end);
    for (; row < end; row++) {
        REAL *preact = f->preact + row * CELL_GATES * Hp;
        REAL *kept = call->keep ? f->saved + (first + row) * f->kept_row : NULL;
        /* Not all of a vector is used; the same call shall save the same. */
        if (kept)
            memset(kept + scales_at(call), 0, (size_t)padded(SCALES) * sizeof(REAL));
        UNROLL for (int group = 0; group < GROUPS; group++) {
            const int g = GROUP_FIRST(group), gates = GROUP_GATES(group);
            const Pair s = statistics(preact + g * Hp, gates, H);
            if (kept)
                kept[scales_at(call) + SCALE_IH + group] = s.other;
            for (i64 at = g * Hp; at < (g + gates) * Hp; at += LANES) {
                vec normal = (load(preact + at) - s.mean) * s.other;
                if (kept)
                    store(kept + (1 + KEPT_IH) * Hp + at, normal);
                store(preact + at, normal * load(f->own + at) + load(f->bias + at));
            }
        }
    }
}

/* W_hh h of a unit-vector of one row, for when that of all units is there. Not inlined into each kind
   of block, which would take the compiler longer and a step no less. */
static __attribute__((noinline)) void put_sums(const Call *call, const Forward *f, i64 row,
                                               i64 unit, const vec *sums)
{
    UNROLL for (int g = 0; g < CELL_GATES; g++)
        store(f->sums + (row * CELL_GATES + g) * padded(call->hidden_size) + unit, sums[g]);
    UNROLL for (int group = 0; group < GROUPS; group++)
        put_part(call, f->parts, group, row, unit, GROUP_GATES(group), sums + GROUP_FIRST(group));
}

/* What a step has to do besides its product: f->after from f->sums, the units [unit, end) of all
   rows. */
static void normalized_step(const Call *call, const Forward *f, const Member *me, i64 rows,
                            i64 unit, i64 end, const REAL *preact_rows, REAL *kept_rows)
{
    const i64 Hp = padded(call->hidden_size);
    REAL *found = f->found + me->index * numbers_found(call);
    wait_for_all(me);
    UNROLL for (int group = 0; group < GROUPS; group++)
        find_statistics(call, f->parts, group, GROUP_GATES(group), rows, found);
    for (i64 row = 0; row < rows; row++) {
        const REAL *preact = preact_rows + row * CELL_GATES * Hp;
        const REAL *sums = f->sums + row * CELL_GATES * Hp;
        REAL *kept_row = call->keep ? kept_rows + row * f->kept_row : NULL;
        Pair s[GROUPS];
        UNROLL for (int group = 0; group < GROUPS; group++) {
            s[group] = pair_of(call, found, group, row);
            if (kept_row && me->index == 0)
                kept_row[scales_at(call) + SCALE_HH + group] = s[group].other;
        }
        for (i64 u = unit; u < end; u += LANES) {
            const i64 place = row * Hp + u;
            vec gates[4], kept[6];
            UNROLL for (int g = 0; g < CELL_GATES; g++) {
                vec normal =
                    (load(sums + g * Hp + u) - s[GROUP_OF(g)].mean) * s[GROUP_OF(g)].other;
                if (kept_row)
                    store(kept_row + (1 + KEPT_HH + g) * Hp + u, normal);
                gates[g] = normal * load(f->own + (GAIN_HH + g) * Hp + u)
                           + load(start_of(CELL, f, preact, g, Hp) + u);
            }
            if (CELL == GRU) {
                vec h = cell_forward(GRU, 0, gates, load(preact + 2 * Hp + u),
                                     load(f->before + place), NULL, 0, kept);
                store(f->after + place, h);
            } else {
                vec c = lstm_c(gates, load(f->c + place), kept);
                put_part(call, f->parts, GROUPS, row, u, 1, &c);
                store(f->c + place, c);
                /* Until c of all units is there. */
                store(f->after + place, kept[3]);
            }
            if (kept_row)
                UNROLL for (int k = 0; k < KEPT_HH; k++)
                    store(kept_row + (1 + k) * Hp + u, kept[k]);
        }
    }
    if (CELL == GRU)
        return;
    wait_for_all(me);
    find_statistics(call, f->parts, GROUPS, 1, rows, found);
    for (i64 row = 0; row < rows; row++) {
        const Pair s = pair_of(call, found, GROUPS, row);
        REAL *kept_row = call->keep ? kept_rows + row * f->kept_row : NULL;
        if (kept_row && me->index == 0)
            kept_row[scales_at(call) + SCALE_C] = s.other;
        for (i64 u = unit; u < end; u += LANES) {
            const i64 place = row * Hp + u;
            vec normal = (load(f->c + place) - s.mean) * s.other;
            vec shown = normal * load(f->own + GAIN_C * Hp + u) + load(f->own + SHIFT_C * Hp + u);
            if (kept_row)
                store(kept_row + (1 + KEPT_C) * Hp + u, normal);
            store(f->after + place, load(f->after + place) * hyperbolic_tangent(shown));
        }
    }
}

INLINE void add_to(REAL *sum, vec value)
{
    store(sum, load(sum) + value);
}

/* LSTM: from the gradient of h to that of the normalized c, of all rows, in b->dm. What comes to o
   waits in its place among the gradients. */
static void backward_of_shown_c(const Call *call, const Backward *b, i64 rows, i64 unit, i64 end,
                                const REAL *dh, const REAL *kept_rows, REAL *grads)
{
    const i64 Hp = padded(call->hidden_size);
    for (i64 row = 0; row < rows; row++)
        for (i64 u = unit; u < end; u += LANES) {
            const REAL *kept = kept_rows + row * b->kept_row + Hp + u;
            vec normal = load(kept + KEPT_C * Hp), gain = load(b->own + GAIN_C * Hp + u);
            vec t = hyperbolic_tangent(normal * gain + load(b->own + SHIFT_C * Hp + u));
            vec grad_h = load(dh + row * Hp + u);
            vec grad = grad_h * load(kept + 3 * Hp) * ((REAL)1 - t * t);
            add_to(b->grad_own + GAIN_C * Hp + u, grad * normal);
            add_to(b->grad_own + SHIFT_C * Hp + u, grad);
            vec scaled = grad * gain;
            put_slope(call, b->parts, GROUPS, row, u, 1, &scaled, &normal);
            store(b->dm + row * Hp + u, scaled);
            store(grads + (row * GRADS[CELL] + 3) * Hp + u, grad_h * t);
        }
}

/* The pointwise half of a backward step, as backward_step; and what gains and biases get of it. */
static void normalized_backward_step(const Call *call, const Backward *b, const Member *me,
                                     i64 rows, i64 unit, i64 end, const REAL *dh,
                                     const REAL *kept_rows, REAL *grad_rows)
{
    const i64 Hp = padded(call->hidden_size);
    REAL *found = b->found + me->index * numbers_found(call);
    if (CELL == LSTM) {
        backward_of_shown_c(call, b, rows, unit, end, dh, kept_rows, grad_rows);
        wait_for_all(me);
        find_slopes(call, b->parts, GROUPS, 1, rows, found);
    }
    for (i64 row = 0; row < rows; row++) {
        const REAL *kept_row = kept_rows + row * b->kept_row;
        REAL *grads = grad_rows + row * GRADS[CELL] * Hp;
        const REAL *normal_c = kept_row + (1 + KEPT_C) * Hp;
        const Pair means = pair_of(call, found, GROUPS, row);
        for (i64 u = unit; u < end; u += LANES) {
            const i64 place = row * Hp + u;
            vec kept[5], input[4], state[4], normals[4];
            UNROLL for (int k = 0; k < KEPT_HH; k++) kept[k] = load(kept_row + (1 + k) * Hp + u);
            if (CELL == GRU) {
                vec past = cell_backward(GRU, 0, load(dh + place), load(kept_row + u), kept, 0,
                                         NULL, input);
                store(b->after + place, past);
                state[0] = input[0], state[1] = input[1], state[2] = input[3];
                add_to(b->grad_own + (GRAD_BIAS + 3) * Hp + u, input[3]);
            } else {
                vec dc = load(b->dc + place)
                         + grad_of(load(b->dm + place), load(normal_c + u), means,
                                   kept_row[scales_at(call) + SCALE_C]);
                lstm_grads(kept, dc, load(grads + 3 * Hp + u), &dc, input);
                store(b->dc + place, dc);
                UNROLL for (int g = 0; g < 4; g++) state[g] = input[g];
            }
            UNROLL for (int g = 0; g < CELL_GATES; g++) {
                const i64 at = g * Hp + u;
                store(grads + at, input[g]);
                normals[g] = load(kept_row + (1 + KEPT_HH) * Hp + at);
                add_to(b->grad_own + at, input[g] * load(kept_row + (1 + KEPT_IH) * Hp + at));
                add_to(b->grad_own + GAIN_HH * Hp + at, state[g] * normals[g]);
                add_to(b->grad_own + GRAD_BIAS * Hp + at, input[g]);
                state[g] *= load(b->own + GAIN_HH * Hp + at);
                store(b->sums + row * CELL_GATES * Hp + at, state[g]);
            }
            UNROLL for (int group = 0; group < GROUPS; group++)
                put_slope(call, b->parts, group, row, u, GROUP_GATES(group),
                          state + GROUP_FIRST(group), normals + GROUP_FIRST(group));
        }
    }
    wait_for_all(me);
    UNROLL for (int group = 0; group < GROUPS; group++)
        find_slopes(call, b->parts, group, GROUP_GATES(group), rows, found);
    for (i64 row = 0; row < rows; row++) {
        const REAL *kept_row = kept_rows + row * b->kept_row;
        const REAL *normal = kept_row + (1 + KEPT_HH) * Hp;
        const REAL *sums = b->sums + row * CELL_GATES * Hp;
        REAL *grads = grad_rows + row * GRADS[CELL] * Hp + state_slot(CELL, 0) * Hp;
        UNROLL for (int group = 0; group < GROUPS; group++) {
            const int first = GROUP_FIRST(group), gates = GROUP_GATES(group);
            const Pair s = pair_of(call, found, group, row);
            const REAL scale = kept_row[scales_at(call) + SCALE_HH + group];
            for (i64 g = first; g < first + gates; g++)
                for (i64 at = g * Hp + unit; at < g * Hp + end; at += LANES)
                    store(grads + at, grad_of(load(sums + at), load(normal + at), s, scale));
        }
    }
}

/* After some steps: the gradients of LN(W_ih x) become those of W_ih x, each member some rows. */
static void normalized_after_steps(const Call *call, const Backward *b, const Member *me, i64 first,
                                   i64 rows)
{
    const i64 H = call->hidden_size, Hp = padded(H);
    i64 row, end;
    share(me, rows, 1, &row, &end);
    for (; row < end; row++) {
        const REAL *kept_row = b->saved + (first + row) * b->kept_row;
        const REAL *normal = kept_row + (1 + KEPT_IH) * Hp;
        REAL *grads = b->grads + row * GRADS[CELL] * Hp;
        UNROLL for (int group = 0; group < GROUPS; group++) {
            const i64 from = GROUP_FIRST(group) * Hp, to = from + GROUP_GATES(group) * Hp;
            for (i64 at = from; at < to; at += LANES)
                store(grads + at, load(grads + at) * load(b->own + at));
            const Pair s = slope(grads + from, normal + from, GROUP_GATES(group), H);
            const REAL scale = kept_row[scales_at(call) + SCALE_IH + group];
            for (i64 at = from; at < to; at += LANES)
                store(grads + at, grad_of(load(grads + at), load(normal + at), s, scale));
        }
    }
    wait_for_all(me);
}

/* After the loop: what the biases get. */
static void normalized_after_the_loop(const Call *call, int d, const Backward *b, const Member *me)
{
    const i64 H = call->hidden_size, Hp = padded(H);
    REAL *grad_bias_ih = call->grad_weights[d][2], *grad_bias_hh = call->grad_weights[d][3];
    i64 unit, last;
    share_units(me, call, &unit, &last);
    for (i64 g = 0; g < CELL_GATES; g++)
        for (i64 u = unit; u < last; u += LANES) {
            const REAL *sums = b->grad_own + GRAD_BIAS * Hp + u;
            const i64 apart = CELL == GRU && g == 2;
            if (grad_bias_ih)
                store_some(grad_bias_ih + g * H + u, load(sums + g * Hp), H - u);
            if (grad_bias_hh)
                store_some(grad_bias_hh + g * H + u, load(sums + (g + apart) * Hp), H - u);
        }
}
