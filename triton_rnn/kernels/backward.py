"""The recurrence, backward: grad_gates[t] from grad_output[t] and W_hh^T grad_gates[t+1].

The plan of `forward`, with `grad_gates` in the place of h: a program owns BLOCK_H hidden units and
their columns of W_hh. What it reads of the others is G times as much, so the product's inner
dimension is long and its rows few; it is cut into SPLITS parts that warps add up at the same time.

A step's factors, all that no gradient enters, are loaded and computed one step ahead, while the
others' gradients are still on their way. Gradients of weights are left to a product over all steps
after the loop: nothing is accumulated here, so the order of additions is always the same.
"""

import triton
import triton.language as tl

from triton_rnn.kernels.cluster import (
    enter_cluster,
    lay_out,
    leave_cluster,
    no_parts,
    parts_of_all,
    rooms_of_rows,
    send_parts,
    sum_when_sent,
    weights_of_own,
    when_laid_out,
)
from triton_rnn.kernels.exchange import arrive, send, wait_for_arrivals
from triton_rnn.kernels.metadata import backward_metadata
from triton_rnn.kernels.pieces import load_piece, place_in_room
from triton_rnn.kernels.product import (
    exchanged_product,
    held_product,
    held_weights,
    into_registers,
    kept_weights,
    on_top,
    parts_added,
    product_zeros,
)
from triton_rnn.kernels.steps import (
    along,
    apart,
    load_blocks,
    note_failure,
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
    """W_hh^T for the units from `first` on and gradients `column` (SPLITS, BLOCK_K).

    TURN: the gate whose gradients come first in `grad_gates`.
    """
    unit = first + tl.arange(0, BLOCK_H)
    row = (column + TURN * H) % (GATES * H)
    mask = (unit < H)[None, :, None] & (column < GATES * H)[:, None, :]
    return tl.load(w_hh_ptr + row[:, None, :] * H + unit[None, :, None], mask=mask, other=0.0)


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
    """16 bytes of a row of W_hh^T from `column` on, in the order of `_weights`."""
    unit = first + row
    mask = (unit < H) & (column < GATES * H)
    return load_piece(w_hh_ptr + (column + TURN * H) % (GATES * H) * H + unit, mask, H)


@triton.jit
def _piece_of_copy(
    w_hh_ptr,
    first,
    row,
    column,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """As `_piece`, where W_hh^T lies in memory in that order, (H, P * H)."""
    unit = first + row
    mask = (unit < H) & (column < GATES * H)
    return load_piece(w_hh_ptr + unit * (GATES * H) + column, mask, 1)


@triton.jit
def _all_weights(
    w_hh_ptr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    MOST: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """W_hh^T of COUNT gates, in blocks as `on_top` makes of their gradients."""
    weights = ()
    for k in tl.static_range(COUNT // MOST):
        block = _wide_weights(w_hh_ptr, FIRST + k * MOST, MOST, H, GATES, TURN, BLOCK_H)
        weights = weights + (block,)
    if MOST == 4 and COUNT % 4 >= 2:
        block = _wide_weights(w_hh_ptr, FIRST + COUNT // 4 * 4, 2, H, GATES, TURN, BLOCK_H)
        weights = weights + (block,)
    if MOST > 1 and COUNT % 2 == 1:
        block = _wide_weights(w_hh_ptr, FIRST + COUNT - 1, 1, H, GATES, TURN, BLOCK_H)
        weights = weights + (block,)
    return weights


@triton.jit
def _wide_weights(
    w_hh_ptr,
    g: tl.constexpr,
    WIDTH: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Those of gates g, g + 1, ... in the order of `grad_gates`."""
    unit = tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, WIDTH * BLOCK_H)[None, :]
    sent = column % BLOCK_H
    row = (g + column // BLOCK_H + TURN) % GATES * H + sent
    return tl.load(w_hh_ptr + row * H + unit, mask=(unit < H) & (sent < H), other=0.0)


@triton.jit
def _gradient_and_before(
    grad_output_ptrs, states_ptrs, initial_ptrs, has_before, now, inside, MOST: tl.constexpr
):
    """Of a step the gradient of its output and the state before it: two blocks for `apart`.

    That state is another step's or the initial one.
    """
    before_ptrs = tl.where(has_before, states_ptrs, initial_ptrs)
    if MOST == 1:
        gradient = tl.load(grad_output_ptrs, mask=now, other=0.0)
        groups = (gradient, tl.load(before_ptrs, mask=inside, other=0.0))
    else:
        j = tl.arange(0, 2)[None, None, :]
        ptrs = tl.where(j == 0, grad_output_ptrs[:, :, None], before_ptrs[:, :, None])
        mask = tl.where(j == 0, now[:, :, None], inside[:, :, None])
        groups = (tl.load(ptrs, mask=mask, other=0.0),)
    return groups


@triton.jit(
    do_not_specialize=["T", "N", "first_direction", "begin", "end", "slots", "polls"],
    launch_metadata=backward_metadata,
)
def recurrence_backward(
    grad_output_ptr,
    gates_ptr,
    states_ptr,
    initial_ptr,
    grad_gates_ptr,
    w_hh_0_ptr,
    w_hh_1_ptr,
    units_0_ptr,
    units_1_ptr,
    locked_ptr,
    grad_cells_ptr,
    grad_h_in_ptr,
    grad_c_in_ptr,
    grad_h_out_ptr,
    grad_c_out_ptr,
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
    FACTORS: tl.constexpr,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    WIDTH: tl.constexpr,
    SAVED: tl.constexpr,
    ROW: tl.constexpr,
    UNITS: tl.constexpr,
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
    GRAD_C: tl.constexpr,
    LOCKED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):
    """Steps begin <= s < end of AT_ONCE directions, s = 0 being the last step that forward made.

    Step s = T has no rows: it brings the gradient of step T - 1 through W_hh to h_0.

    Args:
        grad_output_ptr: (R, D * H). gates_ptr: (R, D, ROW * H), SAVED blocks of it by forward.
        states_ptr, initial_ptr: `cells` and c_0, or `output` and h_0 if the cell keeps no c.
        grad_gates_ptr: written. units_0_ptr, units_1_ptr: (UNITS, H) of either direction.
        w_hh_0_ptr, w_hh_1_ptr: with STREAMED W_hh^T, (H, P * H), the products in the order of
            `grad_gates`.
        locked_ptr: with LOCKED as in `recurrence_forward`. grad_cells_ptr: with GRAD_C the gradient
            of every step's c, (R, D * H).
        grad_h_in_ptr, grad_c_in_ptr, grad_h_out_ptr, grad_c_out_ptr: the gradients of the states
            before and after these steps.
        FACTORS, CELL: the cell's `factors` and `backward`. WIDTH: blocks in a row of `grad_gates`.
        GATES: P, the parts of the product; TURN: the one whose gradients come first.
        The rest is as in `recurrence_forward`.
    """
    HELD: tl.constexpr = EXCHANGE == "none"
    # Small blocks, taken together, would be shared out among a few threads only.
    MOST: tl.constexpr = 4 if HELD else 1
    NEAR: tl.constexpr = EXCHANGE == "cluster"
    UNITS_ALONG: tl.constexpr = 1 if EXCHANGE == "flag" or NEAR else 0
    NUM_H: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    INNER: tl.constexpr = GATES * H
    # In a room of `cluster` the parts that a step sends, and the gradients that a program lays out:
    # so many blocks of 64 bytes of each sequence.
    PARTS: tl.constexpr = 4 * NUM_H * BLOCK_H * BLOCK_N
    BLOCKS: tl.constexpr = (GATES * BLOCK_H + BLOCK_K - 1) // BLOCK_K
    OWN: tl.constexpr = BLOCK_N * BLOCKS * 64
    PIECE: tl.constexpr = _piece_of_copy if STREAMED else _piece
    dtype: tl.constexpr = grad_gates_ptr.dtype.element_ty
    AHEAD: tl.constexpr = HELD and PTX != "" and H * dtype.primitive_bitwidth % 128 == 0

    pid = tl.program_id(0)
    first = pid % NUM_H * BLOCK_H
    counter_ptr = counters_ptr + pid // NUM_H
    d = first_direction + pid // NUM_H % AT_ONCE
    slot = pid // NUM_H // AT_ONCE
    w_hh_ptr = w_hh_0_ptr
    units_ptr = units_0_ptr
    if D == 2:
        if d == 1:
            w_hh_ptr = w_hh_1_ptr
            units_ptr = units_1_ptr

    weights = ()
    if HELD:
        weights = _all_weights(w_hh_ptr, 0, IN_REGISTERS, TOGETHER, H, GATES, TURN, BLOCK_H)
        if GATES:
            zeros = product_zeros(polls, BLOCK_H, BLOCK_N, dtype, PRECISION)
        if IN_REGISTERS:
            weights = into_registers(weights, zeros, len(weights))
        weights = weights + _all_weights(
            w_hh_ptr, IN_REGISTERS, GATES - IN_REGISTERS, TOGETHER, H, GATES, TURN, BLOCK_H
        )
    elif NEAR:
        weights = weights_of_own(w_hh_ptr, first, H, GATES, TURN, BLOCK_H, BLOCK_K, SPLITS)
    elif EXCHANGE == "flag":
        weights = held_weights(
            w_hh_ptr,
            first,
            PIECE,
            H,
            GATES,
            TURN,
            INNER,
            BLOCK_H,
            BLOCK_H,
            BLOCK_K,
            SPLITS,
            STREAMED,
        )
    elif ON_CHIP:
        weights = kept_weights(
            w_hh_ptr, first, _weights, H, GATES, TURN, INNER, BLOCK_H, BLOCK_K, SPLITS
        )

    unit = first + tl.arange(0, BLOCK_H)
    rows = along(unit, UNITS_ALONG)
    units = unit_vectors(units_ptr, rows, H, UNITS, 0)
    alive = polls >= 0
    expected = 0
    if NEAR:
        SIZE: tl.constexpr = 2 * PARTS + 2 * OWN
        room = enter_cluster(counters_ptr, polls, SIZE)
        rooms = rooms_of_rows(room, pid % NUM_H, H, BLOCK_H, BLOCK_N, SPLITS, SIZE)
        here = 0
        laid_out = room + 2 * PARTS
        other = OWN
    for tile in range(slot, tl.cdiv(N, BLOCK_N), slots):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = along(n, 1 - UNITS_ALONG)
        inside = (rows < H) & (columns < N)
        # Within a step 32 bits are enough; the step's first row takes 64, once for all elements.
        own = columns * (D * H) + d * H + rows
        own_saved = columns * (D * ROW * H) + d * ROW * H + rows
        own_grads = columns * (D * WIDTH * H) + d * WIDTH * H + rows
        first_state = d.to(tl.int64) * N * H
        state_offsets = columns * H + rows
        dh = tl.load(grad_h_in_ptr + first_state + state_offsets, mask=inside, other=0.0).to(
            tl.float32
        )
        if HELD and GATES:
            # From here on all of a step has the layout of the product.
            dh += zeros
        if LOCKED:
            factor = tl.load(locked_ptr + first_state + state_offsets, mask=inside, other=0.0).to(
                tl.float32
            )
            if HELD:
                factor += zeros
        dc = dh
        if HAS_C:
            dc = tl.load(grad_c_in_ptr + first_state + state_offsets, mask=inside, other=0.0).to(
                tl.float32
            )

        # Backward, t counts down in the first direction and up in the second.
        t = T - 1 - begin + d * (2 * begin - T + 1)
        ahead = 2 * d - 1
        after_active, after_row = step_rows(t - ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED)
        active, row = step_rows(t, T, N, batch_sizes_ptr, offsets_ptr, PACKED)
        before_active, before_row = step_rows(t + ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED)
        now = inside & (columns < active)
        initial_ptrs = initial_ptr + first_state + state_offsets
        state = tl.load(states_ptr + row * (D * H) + own, mask=now, other=0.0).to(tl.float32)
        if HELD and GATES:
            state += zeros
        pair = _gradient_and_before(
            grad_output_ptr + row * (D * H) + own,
            states_ptr + before_row * (D * H) + own,
            initial_ptrs,
            (columns < before_active),
            now,
            inside,
            MOST,
        )
        saved = load_blocks(gates_ptr + row * (D * ROW * H) + own_saved, now, H, SAVED, MOST)

        sent = ()
        if HELD:
            nothing = ()
            for _ in tl.static_range(GATES):
                nothing = nothing + (tl.zeros((BLOCK_H, BLOCK_N), dtype),)
            sent = on_top(nothing, 0, IN_REGISTERS, TOGETHER)
            sent = sent + on_top(nothing, IN_REGISTERS, GATES - IN_REGISTERS, TOGETHER)

        if AHEAD:
            far_active, far_row = step_rows(
                t + 4 * ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED
            )
        if NEAR:
            own_place = (columns - tile * BLOCK_N) * (4 * BLOCK_H) + (rows - first) * 4
            # So the first step is one as all others, and waits for who is still at the last block.
            sequences = N - tile * BLOCK_N
            send_parts(no_parts(H, BLOCK_N, SPLITS), rooms, here, sequences, H, BLOCK_H, SPLITS)

        for s in range(begin, end):
            t += ahead
            next_before_active, next_before_row = step_rows(
                t + ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED
            )
            next_now = inside & (columns < before_active)
            next_saved_ptrs = gates_ptr + before_row * (D * ROW * H) + own_saved
            next_gradient_ptrs = grad_output_ptr + before_row * (D * H) + own
            next_states_ptrs = states_ptr + next_before_row * (D * H) + own
            has_next = columns < next_before_active
            if HELD:
                # One step before they are needed, so that memory has a step's time to answer.
                next_pair = _gradient_and_before(
                    next_gradient_ptrs, next_states_ptrs, initial_ptrs, has_next, next_now, inside,
                    MOST,
                )  # fmt: skip
                next_saved = load_blocks(next_saved_ptrs, next_now, H, SAVED, MOST)

            # What no gradient enters, while the others' gradients are still on their way.
            grad_output, before = apart(pair, 2, MOST)
            if HELD and GATES:
                before += zeros
            factors = FACTORS(apart(saved, SAVED, MOST), state, before, units, PTX)

            if HELD:
                came = dh
                if LOCKED:
                    came = tl.zeros_like(dh)
                for k in tl.static_range(len(weights)):
                    came = tl.dot(weights[k], sent[k], came, input_precision=PRECISION)
                dh = dh + came * factor if LOCKED else came
            elif NEAR:
                # Nobody sends anything for units, or sequences, that there are not.
                looks = tl.where(inside, polls, 0)
                came = sum_when_sent(
                    room + here + own_place, looks, error_ptr, s + 1, NUM_H, 4 * BLOCK_H * BLOCK_N
                )
                came = tl.where(inside & (columns < after_active), came, 0.0)
                dh += came * factor if LOCKED else came
            elif EXCHANGE == "flag":
                sources = ()
                looks = ()
                for block in tl.static_range(BLOCK_N // 8):
                    column = (tile * BLOCK_N + 8 * block + tl.arange(0, 8))[None, :, None]
                    written = column < after_active
                    # What stands there of the others is left out below.
                    place = tl.where(written, after_row + column, 0)
                    source = grad_gates_ptr + place * (D * WIDTH * H) + d * WIDTH * H
                    sources = sources + (source,)
                    looks = looks + (tl.where(written, polls, 0),)
                product = held_product(
                    weights,
                    # Never else than itself, which the compiler cannot know.
                    w_hh_ptr + tl.where(polls < 0, s, 0),
                    first,
                    sources,
                    looks,
                    error_ptr,
                    s + 1,
                    PIECE,
                    H,
                    GATES,
                    TURN,
                    INNER,
                    BLOCK_H,
                    BLOCK_H,
                    BLOCK_K,
                    SPLITS,
                    TOGETHER,
                    PRECISION,
                    False,
                    PAUSE,
                    SUMS,
                )
                # Rows that took no part in the step before this one send nothing.
                came = tl.reshape(parts_added(product, BLOCK_H), (BLOCK_N, BLOCK_H))
                came = tl.where((columns < after_active), came, 0.0)
                dh += came * factor if LOCKED else came
            else:
                if EXCHANGE == "barrier":
                    complete = wait_for_arrivals(counter_ptr, expected, polls * alive)
                    alive = note_failure(error_ptr, alive, complete, s)
                # Rows that took no part in the step before this one send nothing.
                source = (
                    grad_gates_ptr
                    + after_row * (D * WIDTH * H)
                    + (n * (D * WIDTH * H) + d * WIDTH * H)
                )
                came = exchanged_product(
                    weights,
                    w_hh_ptr,
                    first,
                    source,
                    n < after_active,
                    polls,
                    _weights,
                    H,
                    GATES,
                    TURN,
                    INNER,
                    BLOCK_H,
                    BLOCK_H,
                    BLOCK_N,
                    BLOCK_K,
                    SPLITS,
                    ON_CHIP,
                    PRECISION,
                )
                dh += came * factor if LOCKED else came

            if not HELD:
                # Behind what the others send, and long since in the L2 cache: see `forward`.
                next_pair = _gradient_and_before(
                    next_gradient_ptrs, next_states_ptrs, initial_ptrs, has_next, next_now, inside,
                    MOST,
                )  # fmt: skip
                next_saved = load_blocks(next_saved_ptrs, next_now, H, SAVED, MOST)

            now = inside & (columns < active)
            whole_dh = dh + grad_output
            if GRAD_C:
                dc += tl.load(grad_cells_ptr + row * (D * H) + own, mask=now, other=0.0).to(
                    tl.float32
                )
            blocks, direct_dh, before_dc = CELL(factors, whole_dh, dc, units, PTX)
            if HELD:
                grads = ()
                for g in tl.static_range(GATES):
                    # Out of a sequence's steps nothing flows on.
                    grads = grads + (tl.where(now, blocks[g], 0.0).to(dtype),)
                # Joined here, not where they are multiplied: of an operand that comes from a join
                # Triton thinks that it was unpacked from 8 bits, and takes another layout.
                sent = on_top(grads, 0, IN_REGISTERS, TOGETHER)
                sent = sent + on_top(grads, IN_REGISTERS, GATES - IN_REGISTERS, TOGETHER)
            if NEAR:
                here = PARTS - here
                places = ()
                for g in tl.static_range(GATES):
                    place = place_in_room(
                        g * BLOCK_H + rows - first, columns - tile * BLOCK_N, BLOCKS, BLOCK_K
                    )
                    # Out of a sequence's steps nothing flows on.
                    lay_out(laid_out + place, tl.where(now, blocks[g], 0.0), dtype)
                first_place = when_laid_out(laid_out)
                for block in tl.static_range(BLOCK_N // 8):
                    places = places + (first_place + block * (BLOCKS * 512),)
                products = parts_of_all(
                    weights, places, dtype, GATES, BLOCK_H, BLOCK_K, SPLITS, PRECISION
                )
                sequences = tl.where(s + 1 < end, N - tile * BLOCK_N, 0)
                send_parts(products, rooms, here, sequences, H, BLOCK_H, SPLITS)
                laid_out += other
                other = -other
            grad_ptrs = grad_gates_ptr + row * (D * WIDTH * H) + own_grads
            if EXCHANGE == "flag":
                for g in tl.static_range(GATES):
                    send(grad_ptrs + g * H, blocks[g], now)
                store_blocks(grad_ptrs, blocks, now, H, GATES, WIDTH, MOST, EXCHANGE)
            elif EXCHANGE == "barrier":
                good = ()
                for g in tl.static_range(GATES):
                    good = good + (tl.where(alive, blocks[g], float("nan")),)
                store_blocks(grad_ptrs, good, now, H, 0, GATES, MOST, EXCHANGE)
                # What a program that gave up has stored is nothing to wait for.
                if alive:
                    arrive(counter_ptr)
                expected += NUM_H
                store_blocks(grad_ptrs, blocks, now, H, GATES, WIDTH, MOST, EXCHANGE)
            else:
                store_blocks(grad_ptrs, blocks, now, H, 0, WIDTH, MOST, EXCHANGE)

            if AHEAD:
                # See `forward`.
                taken = n < far_active
                prefetch_sectors(
                    gates_ptr + far_row * (D * ROW * H) + d * ROW * H,
                    n, taken, D * ROW * H, first, SAVED, BLOCK_H, H,
                )  # fmt: skip
                prefetch_sectors(
                    grad_output_ptr + far_row * (D * H) + d * H,
                    n, taken, D * H, first, 1, BLOCK_H, H,
                )  # fmt: skip
                prefetch_sectors(
                    states_ptr + far_row * (D * H) + d * H,
                    n, taken, D * H, first, 1, BLOCK_H, H,
                )  # fmt: skip
                far_active, far_row = step_rows(
                    t + 4 * ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED
                )
            elif not HELD and PTX != "":
                far_active, far_row = step_rows(
                    t + 3 * ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED
                )
                far = inside & (columns < far_active)
                prefetch_blocks(gates_ptr + far_row * (D * ROW * H) + own_saved, far, H, SAVED)
                prefetch_blocks(grad_output_ptr + far_row * (D * H) + own, far, H, 1)
                prefetch_blocks(states_ptr + far_row * (D * H) + own, far, H, 1)
                if EXCHANGE == "flag":
                    far_ptrs = grad_gates_ptr + far_row * (D * WIDTH * H) + own_grads
                    prefetch_blocks(far_ptrs, far, H, GATES)

            dh = tl.where(now, direct_dh, dh)
            if HAS_C:
                dc = tl.where(now, before_dc, dc)
            state = before
            pair = next_pair
            saved = next_saved
            after_active, after_row = active, row
            active, row = before_active, before_row
            before_active, before_row = next_before_active, next_before_row
            if EXCHANGE == "flag":
                # See `forward`.
                tl.debug_barrier()

        if EXCHANGE == "barrier":
            dh = tl.where(alive, dh, float("nan"))
            dc = tl.where(alive, dc, float("nan"))
        dh_ptrs = grad_h_out_ptr + first_state + state_offsets
        tl.store(dh_ptrs, dh.to(grad_h_out_ptr.dtype.element_ty), mask=inside)
        if HAS_C:
            dc_ptrs = grad_c_out_ptr + first_state + state_offsets
            tl.store(dc_ptrs, dc.to(grad_c_out_ptr.dtype.element_ty), mask=inside)
    if NEAR:
        leave_cluster(polls)
