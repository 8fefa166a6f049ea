/* One recurrent layer on a CPU: all its directions, the whole sequence, forward and backward.

   Made for small sizes, where a step is a microsecond of arithmetic and calling an operator costs
   more; it holds its own far beyond. It is compiled at first use by the machine's C compiler and
   called through ctypes: no Python and no torch in here, only pointers and sizes (Call, in call.h).

   Compiled for one type of numbers, -DREAL=float or -DREAL=double, one kind of cell, and forward or
   backward, when that is first asked for.
   Everything is written once over the cell: a cell is its gates, the pointwise step forward
   (cell_forward) and the pointwise step backward (cell_backward), both in cells.h.

   Names: T steps, N batch, I input size, H hidden size, P output size (H unless projected), G gates
   in torch's order (LSTM i f g o, GRU r z n). A row is one sequence at one step; rows lie in the
   order of time, also for the reverse direction, which only walks them the other way. "Padded"
   sizes (Hp, Pp) are rounded up to whole vectors, and so are the private buffers, so that only the
   caller's arrays need care at the end of a row: load_some and store_some.

   A user's cell (OWN) is compiled into a library by itself: its numbers are macros (OWN_GATES and the
   others below), its pointwise steps own_forward and own_backward are generated (own_cell.h, by
   own.py). Without them, all that is OWN's is code that the compiler leaves out. So it is with layer
   normalization of GRU and LSTM (NORMALIZED, normalized.h), a library of its own for each.

   Products (products.h): multiply() adds to R x V vectors in registers; all products of forward and backward are
   loops around it. No function keeps state; none writes to an input.

   Threads are lent: the caller hands over the functions by which its OpenMP runtime opens a team and
   tells its size (in Call), so that there is no second team beside it. A team shares the
   hidden units of every step, and each member only writes what belongs to its units. */

#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

/* In this order: each builds on those before it. */
#include "vectors.h"
#include "call.h"
#include "memory.h"
#include "team.h"
#include "products.h"
#include "cells.h"
#include "buffers.h"
#if defined(NORMALIZED)
#include "normalized.h"
#endif
#include "states.h"
#include "forward.h"
#include "backward.h"

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

/* The pointwise functions by themselves, for the tests of their accuracy: 0 sigmoid, 1 tanh. */
EXPORT void pointwise(i64 which, i64 count, const REAL *from, REAL *to)
{
    for (i64 i = 0; i < count; i += LANES) {
        vec x = load_some(from + i, count - i);
        store_some(to + i, which ? hyperbolic_tangent(x) : sigmoid(x), count - i);
    }
}
