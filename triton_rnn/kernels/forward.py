"""The recurrence, forward: hidden[t] = cell(input_preact[t], W_hh hidden[t-1]), t after t.

A program owns BLOCK_H hidden units (all their gates) of one direction for BLOCK_N sequences at a
time, keeps their states in registers in float32, and its rows of W_hh on the chip. What the other
programs compute reaches it through `output`, which every step reads and writes (`exchange`).

Blocks lie with hidden units along the rows and sequences along the columns: W_hh is the left
operand of the product, so its rows fill the matrix unit whatever the batch. With "flag" all but the
product is turned: there Triton gives neighbours in the last dimension to neighbouring threads, and
units are what lies side by side in memory.
"""

import triton
import triton.language as tl

from triton_rnn.kernels.cluster import (
    enter_cluster,
    leave_cluster,
    rooms_of_all,
    send_to_all,
)
from triton_rnn.kernels.exchange import arrive, send, wait_for_arrivals
from triton_rnn.kernels.metadata import forward_metadata
from triton_rnn.kernels.pieces import load_piece, place_in_room
from triton_rnn.kernels.product import (
    exchanged_product,
    held_product,
    held_weights,
    into_registers,
    kept_weights,
    parts_added,
    product_zeros,
)
from triton_rnn.kernels.steps import (
    along,
    apart,
    load_blocks,
    note_failure,
    of_four,
    prefetch_blocks,
    prefetch_sectors,
    step_rows,
    store_blocks,
    unit_vectors,
)


@triton.jit
def _weights(
    w_hh_ptr,
    first,
    column,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Columns (SPLITS, BLOCK_K) of W_hh, all gates of the units from `first` on.

    Rows are unit by unit, the gates of a unit side by side, padded to a power of two: so what one
    unit needs lies close together in the product.
    """
    PADDED: tl.constexpr = GATES if GATES < 3 else (4 if GATES < 5 else 8)
    row = tl.arange(0, PADDED * BLOCK_H)
    gate = row % PADDED
    unit = first + row // PADDED
    mask = ((gate < GATES) & (unit < H))[None, :, None] & (column < H)[:, None, :]
    row_ptrs = w_hh_ptr + (gate * H + unit)[None, :, None] * H
    return tl.load(row_ptrs + column[:, None, :], mask=mask, other=0.0)


@triton.jit
def _piece(
    w_hh_ptr,
    first,
    row,
    column,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """16 bytes of a row of W_hh from `column` on, the rows as those of `_weights`."""
    PADDED: tl.constexpr = GATES if GATES < 3 else (4 if GATES < 5 else 8)
    gate = row % PADDED
    unit = first + row // PADDED
    mask = (gate < GATES) & (unit < H) & (column < H)
    return load_piece(w_hh_ptr + (gate * H + unit) * H + column, mask, 1)


@triton.jit
def _gate_weights(w_hh_ptr, g: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """W_hh of one gate, all units: (BLOCK_H, BLOCK_H)."""
    unit = tl.arange(0, BLOCK_H)
    mask = (unit < H)[:, None] & (unit < H)[None, :]
    return tl.load(w_hh_ptr + (g * H + unit)[:, None] * H + unit[None, :], mask=mask, other=0.0)


@triton.jit
def _by_gate(product, GATES: tl.constexpr):
    """(BLOCK_H, BLOCK_N, gates) as one block per gate, and what is padding behind them."""
    H: tl.constexpr = product.shape[0]
    N: tl.constexpr = product.shape[1]
    if GATES == 1:
        blocks = (tl.reshape(product, (H, N)),)
    elif GATES == 2:
        first, second = tl.split(product)
        blocks = (first, second)
    elif GATES > 4:
        low, high = tl.split(tl.permute(tl.reshape(product, (H, N, 2, 2, 2)), (0, 1, 3, 4, 2)))
        blocks = of_four(low) + of_four(high)
    else:
        blocks = of_four(tl.reshape(product, (H, N, 2, 2)))
    return blocks


@triton.jit(
    do_not_specialize=["T", "N", "first_direction", "begin", "end", "slots", "polls"],
    launch_metadata=forward_metadata,
)
def recurrence_forward(
    gates_ptr,
    w_hh_0_ptr,
    w_hh_1_ptr,
    vectors_0_ptr,
    vectors_1_ptr,
    h_0_ptr,
    output_ptr,
    cells_ptr,
    locked_ptr,
    shown_ptr,
    h_in_ptr,
    c_in_ptr,
    h_out_ptr,
    c_out_ptr,
    batch_sizes_ptr,
    offsets_ptr,
    counters_ptr,
    error_ptr,
    T,
    N,
    first_direction,
    begin,
    end,
    slots,
    polls,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    INPUTS: tl.constexpr,
    ROW: tl.constexpr,
    VECTORS: tl.constexpr,
    ABSENT: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
    EXCHANGE: tl.constexpr,
    ON_CHIP: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    STREAMED: tl.constexpr,
    PAUSE: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_C: tl.constexpr,
    PACKED: tl.constexpr,
    SAVED: tl.constexpr,
    SAVE_C: tl.constexpr,
    LOCKED: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Steps begin <= s < end of AT_ONCE directions; layouts as in the package's docstring.

    Args:
        gates_ptr: (R, D, ROW * H), the input's preactivations in the last INPUTS blocks; the first
            SAVED are written for the backward.
        w_hh_0_ptr, w_hh_1_ptr: (P * H, H) of either direction.
        vectors_0_ptr, vectors_1_ptr: (VECTORS - ABSENT, H).
        h_0_ptr: h before a sequence's first step, in the dtype of `output`.
        cells_ptr: written with SAVE_C.
        locked_ptr: (D, N, H), with LOCKED what h is multiplied by before W_hh multiplies it. Then
            `output` and h_0 are these products, and h itself goes to shown_ptr, (R, D * H).
        h_in_ptr, c_in_ptr, h_out_ptr, c_out_ptr: the states before `begin` and after the last step.
        batch_sizes_ptr, offsets_ptr: (T,) int32, int64; read if PACKED.
        counters_ptr: (slots * AT_ONCE,) int32 zeros; of the interpreter with EXCHANGE "cluster" the
            rooms of all programs, unwritten. error_ptr: one int64, see `exchange`.
        first_direction: 1 if this launch is for the second alone, else 0.
        slots: programs side by side along the batch; each takes every slots-th block of it.
        polls: how often a wait looks before it gives up.
        CELL: the cell's `forward`. GATES: P, the parts of the product. INPUTS: those of the input.
        ROW: blocks in a row of `gates`. SAVED: how many of them are replaced for the backward.
        VECTORS: how many numbers of each unit the cell is given; the first ABSENT are zeros.
        EXCHANGE: "none" if a program owns all units, else one of those in `exchange`.
        ON_CHIP: keep the rows of W_hh on the chip for the whole launch; else they stream by.
        IN_REGISTERS: of how many gates, if a program owns all units, in registers.
        STREAMED: with EXCHANGE "flag", blocks of each part of the product that every step reads.
        PAUSE: with "flag", cycles before a step first looks for what the others send.
        SUMS: with "flag" and "cluster", sums of a product that are made side by side.
        PRECISION: of products of float32. PTX: see `functions`.
    """
    HELD: tl.constexpr = EXCHANGE == "none"
    # Small blocks, taken together, would be shared out among a few threads only.
    MOST: tl.constexpr = 4 if HELD else 1
    NEAR: tl.constexpr = EXCHANGE == "cluster"
    IN_PIECES: tl.constexpr = EXCHANGE == "flag" or NEAR
    UNITS_ALONG: tl.constexpr = 1 if IN_PIECES else 0
    NUM_H: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    # Of a state in pieces, 64 bytes each, and in a room of `cluster`.
    BLOCKS: tl.constexpr = (H + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * SPLITS
    STATE: tl.constexpr = BLOCK_N * BLOCKS * 64
    ROWS: tl.constexpr = (GATES if GATES < 3 else (4 if GATES < 5 else 8)) * BLOCK_H
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    # Rows that do not begin at 16 bytes are loaded in pieces, whose addresses leave no registers.
    AHEAD: tl.constexpr = HELD and PTX != "" and H * dtype.primitive_bitwidth % 128 == 0

    pid = tl.program_id(0)
    first = pid % NUM_H * BLOCK_H
    counter_ptr = counters_ptr + pid // NUM_H
    d = first_direction + pid // NUM_H % AT_ONCE
    slot = pid // NUM_H // AT_ONCE
    w_hh_ptr = w_hh_0_ptr
    vectors_ptr = vectors_0_ptr
    if D == 2:
        if d == 1:
            w_hh_ptr = w_hh_1_ptr
            vectors_ptr = vectors_1_ptr

    weights = ()
    if HELD:
        for g in tl.static_range(GATES):
            weights = weights + (_gate_weights(w_hh_ptr, g, H, BLOCK_H),)
        if GATES:
            zeros = product_zeros(polls, BLOCK_H, BLOCK_N, dtype, PRECISION)
        if IN_REGISTERS:
            weights = into_registers(weights, zeros, IN_REGISTERS)
    elif IN_PIECES:
        weights = held_weights(
            w_hh_ptr, first, _piece, H, GATES, 0, H, ROWS, BLOCK_H, BLOCK_K, SPLITS, STREAMED
        )
    elif ON_CHIP:
        weights = kept_weights(w_hh_ptr, first, _weights, H, GATES, 0, H, BLOCK_H, BLOCK_K, SPLITS)

    unit = first + tl.arange(0, BLOCK_H)
    rows = along(unit, UNITS_ALONG)
    vectors = unit_vectors(vectors_ptr, rows, H, VECTORS, ABSENT)

    alive = polls >= 0
    expected = 0
    if NEAR:
        room = enter_cluster(counters_ptr, polls, 2 * STATE)
        rooms = rooms_of_all(room, pid % NUM_H, NUM_H, 2 * STATE)
        here = 0
    for tile in range(slot, tl.cdiv(N, BLOCK_N), slots):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = along(n, 1 - UNITS_ALONG)
        inside = (rows < H) & (columns < N)
        # Within a step 32 bits are enough; the step's first row takes 64, once for all elements.
        own = columns * (D * H) + d * H + rows
        own_gates = columns * (D * ROW * H) + d * ROW * H + rows
        first_state = d.to(tl.int64) * N * H
        state_offsets = columns * H + rows
        h = tl.load(h_in_ptr + first_state + state_offsets, mask=inside, other=0.0).to(tl.float32)
        if HELD and GATES:
            # From here on all of a step has the layout of the product.
            h += zeros
        if LOCKED:
            factor = tl.load(locked_ptr + first_state + state_offsets, mask=inside, other=0.0).to(
                tl.float32
            )
            if HELD:
                factor += zeros
        c = h
        if HAS_C:
            c = tl.load(c_in_ptr + first_state + state_offsets, mask=inside, other=0.0).to(
                tl.float32
            )

        # t counts up in the first direction and down in the second.
        t = begin + d * (T - 1 - 2 * begin)
        ahead = 1 - 2 * d
        before_active, before_row = step_rows(t - ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED)
        active, row = step_rows(t, T, N, batch_sizes_ptr, offsets_ptr, PACKED)
        preact_ptr = gates_ptr + (ROW - INPUTS) * H
        x = load_blocks(
            preact_ptr + row * (D * ROW * H) + own_gates,
            inside & (columns < active),
            H,
            INPUTS,
            MOST,
        )

        if AHEAD:
            far_active, far_row = step_rows(
                t + 4 * ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED
            )
        if NEAR:
            own_place = place_in_room(rows, columns - tile * BLOCK_N, BLOCKS, BLOCK_K)
            first_sent = h * factor if LOCKED else h
            send_to_all(rooms, here + own_place, first_sent, inside, dtype)

        for s in range(begin, end):
            t += ahead
            next_active, next_row = step_rows(t, T, N, batch_sizes_ptr, offsets_ptr, PACKED)
            next_x_ptrs = preact_ptr + next_row * (D * ROW * H) + own_gates
            next_inside = inside & (columns < next_active)

            if not HELD:
                # Before the next one is asked for, which may then go where this one was: else it
                # is copied there, and the copy waits for memory, and what is to be sent for it.
                inputs = apart(x, INPUTS, MOST)

            if HELD:
                # One step before it is needed, so that memory has a step's time to answer.
                next_x = load_blocks(next_x_ptrs, next_inside, H, INPUTS, MOST)
                h_block = (h * factor if LOCKED else h).to(dtype)
                a = ()
                for g in tl.static_range(GATES):
                    a = a + (tl.dot(weights[g], h_block, input_precision=PRECISION),)
                inputs = apart(x, INPUTS, MOST)
            elif IN_PIECES:
                sources = ()
                looks = ()
                for block in tl.static_range(BLOCK_N // 8):
                    column = (8 * block + tl.arange(0, 8))[None, :, None]
                    if NEAR:
                        # The states of all sequences, also of those that take no part now.
                        source = room + here + place_in_room(0, column, BLOCKS, BLOCK_K)
                        look = tl.where(tile * BLOCK_N + column < N, polls, 0)
                    else:
                        column += tile * BLOCK_N
                        written = column < before_active
                        source = tl.where(
                            written,
                            output_ptr + before_row * (D * H) + (column * (D * H) + d * H),
                            h_0_ptr + first_state + tl.minimum(column, N - 1) * H,
                        )
                        look = tl.where(written & (column < active), polls, 0)
                    sources = sources + (source,)
                    looks = looks + (look,)
                product = held_product(
                    weights,
                    # Never else than itself, which the compiler cannot know.
                    w_hh_ptr + tl.where(polls < 0, s, 0),
                    first,
                    sources,
                    looks,
                    error_ptr,
                    s + 1,
                    _piece,
                    H,
                    GATES,
                    0,
                    H,
                    ROWS,
                    BLOCK_H,
                    BLOCK_K,
                    SPLITS,
                    TOGETHER,
                    PRECISION,
                    NEAR,
                    PAUSE,
                    SUMS,
                )
                a = _by_gate(parts_added(product, BLOCK_H), GATES)
            else:
                if EXCHANGE == "barrier":
                    complete = wait_for_arrivals(counter_ptr, expected, polls * alive)
                    alive = note_failure(error_ptr, alive, complete, s)
                source = tl.where(
                    n < before_active,
                    output_ptr + before_row * (D * H) + (n * (D * H) + d * H),
                    h_0_ptr + first_state + n * H,
                )
                product = exchanged_product(
                    weights,
                    w_hh_ptr,
                    first,
                    source,
                    n < active,
                    polls,
                    _weights,
                    H,
                    GATES,
                    0,
                    H,
                    ROWS,
                    BLOCK_H,
                    BLOCK_N,
                    BLOCK_K,
                    SPLITS,
                    ON_CHIP,
                    PRECISION,
                )
                gates = tl.reshape(product, (BLOCK_H, ROWS // BLOCK_H, BLOCK_N))
                a = _by_gate(tl.permute(gates, (0, 2, 1)), GATES)

            if not HELD:
                # What the others send comes behind all that was asked for before it. So the input
                # is asked for now, and has been brought to the L2 cache some steps ago.
                next_x = load_blocks(next_x_ptrs, next_inside, H, INPUTS, MOST)

            new_h, new_c, saved = CELL(a, inputs, vectors, h, c, PTX)
            now = inside & (columns < active)
            if NEAR:
                here = STATE - here
                kept = tl.where(now, new_h, h)
                if LOCKED:
                    kept *= factor
                send_to_all(rooms, here + own_place, kept, inside & (s + 1 < end), dtype)
            output_ptrs = output_ptr + row * (D * H) + own
            if EXCHANGE == "barrier":
                new_h = tl.where(alive, new_h, float("nan"))
            sent_h = new_h * factor if LOCKED else new_h
            if EXCHANGE == "flag":
                send(output_ptrs, sent_h, now)
            else:
                store_blocks(output_ptrs, (sent_h,), now, H, 0, 1, MOST, EXCHANGE)
            if EXCHANGE == "barrier":
                # What a program that gave up has stored is nothing to wait for.
                if alive:
                    arrive(counter_ptr)
                expected += NUM_H
            if SAVED:
                saved_ptrs = gates_ptr + row * (D * ROW * H) + own_gates
                store_blocks(saved_ptrs, saved, now, H, 0, SAVED, MOST, EXCHANGE)
            if LOCKED:
                shown_ptrs = shown_ptr + row * (D * H) + own
                store_blocks(shown_ptrs, (new_h,), now, H, 0, 1, MOST, EXCHANGE)
            if SAVE_C:
                cells_ptrs = cells_ptr + row * (D * H) + own
                store_blocks(cells_ptrs, (new_c,), now, H, 0, 1, MOST, EXCHANGE)
            if AHEAD:
                # One step ahead is enough for what is in the L2 cache: long sequences are not.
                prefetch_sectors(
                    preact_ptr + far_row * (D * ROW * H) + d * ROW * H,
                    n,
                    n < far_active,
                    D * ROW * H,
                    first,
                    INPUTS,
                    BLOCK_H,
                    H,
                )
                # For the next step: what is loaded now would be waited for.
                far_active, far_row = step_rows(
                    t + 4 * ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED
                )
            elif not HELD and PTX != "":
                far_active, far_row = step_rows(
                    t + 3 * ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED
                )
                far = inside & (columns < far_active)
                prefetch_blocks(preact_ptr + far_row * (D * ROW * H) + own_gates, far, H, INPUTS)
                if EXCHANGE == "flag":
                    # All look there before it is written.
                    prefetch_blocks(output_ptr + far_row * (D * H) + own, far, H, 1)
            # A sequence that has not begun, or is over, keeps its state.
            h = tl.where(now, new_h, h)
            if HAS_C:
                c = tl.where(now, new_c, c)
            x = next_x
            before_active, before_row = active, row
            active, row = next_active, next_row
            if IN_PIECES:
                # Before the next parts of a product go where these were. Triton would have all
                # warps wait for that when they have looked, and ptxas before they multiply.
                tl.debug_barrier()

        if EXCHANGE == "barrier":
            h = tl.where(alive, h, float("nan"))
            c = tl.where(alive, c, float("nan"))
        h_out_ptrs = h_out_ptr + first_state + state_offsets
        tl.store(h_out_ptrs, h.to(h_out_ptr.dtype.element_ty), mask=inside)
        if HAS_C:
            c_out_ptrs = c_out_ptr + first_state + state_offsets
            tl.store(c_out_ptrs, c.to(c_out_ptr.dtype.element_ty), mask=inside)
    if NEAR:
        leave_cluster(polls)
