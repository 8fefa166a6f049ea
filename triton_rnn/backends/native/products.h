/* Matrix products, and matrices laid out for them. */

enum { MOST_VECTORS = 16 };

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

/* Whether the next MOST_ROWS of so many rows go together. Four are two and two where three would leave
   one, whose sums are too few and wait for each other. */
#define AT_ONCE(rows) ((rows) >= MOST_ROWS && !(MOST_ROWS == 3 && (rows) == 4))

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
/* All rows of out, and of its columns V vectors of one panel. */
INLINE void product_rows(int V, const Product *p, i64 j, i64 part, i64 parts, i64 k, i64 count)
{
    i64 i = p->row;
    for (; AT_ONCE(p->rows - i); i += MOST_ROWS)
        product_block(MOST_ROWS, V, p, i, j, part, parts, k, count);
    for (; i + 2 <= p->rows; i += 2)
        product_block(2, V, p, i, j, part, parts, k, count);
    for (; i < p->rows; i++)
        product_block(1, V, p, i, j, part, parts, k, count);
}
static void product_panel(const Product *p, i64 j, int vectors, i64 part, i64 parts, i64 k,
                          i64 count)
{
    if (vectors == WIDTH)
        product_rows(WIDTH, p, j, part, parts, k, count);
    else if (vectors == 2)
        product_rows(2, p, j, part, parts, k, count);
    else
        product_rows(1, p, j, part, parts, k, count);
}
static void product(const Product *p)
{
    const int pieces = p->rows - p->row > MOST_ROWS && p->parts * p->count > DEPTH;
    i64 j = p->column;
    while (j < p->columns) {
        const i64 left = padded(p->columns - j) / LANES, inside = j / LANES % WIDTH;
        const int vectors = inside == 0 && left >= WIDTH      ? WIDTH
                            : inside % 2 == 0 && left >= 2    ? 2
                                                              : 1;
        if (pieces)
            for (i64 part = 0; part < p->parts; part++)
                for (i64 k = 0; k < p->count; k += DEPTH)
                    product_panel(p, j, vectors, part, part + 1, k,
                                  p->count - k < DEPTH ? p->count - k : DEPTH);
        else
            product_panel(p, j, vectors, 0, p->parts, 0, p->count);
        j += vectors * LANES;
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
