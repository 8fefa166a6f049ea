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

from triton_rnn.kernels.exchange import arrive, store_exchanged, wait_for_arrivals
from triton_rnn.kernels.metadata import backward_metadata
from triton_rnn.kernels.product import exchanged_product, inner_columns
from triton_rnn.kernels.steps import (
    load_blocks,
    note_failure,
    step_rows,
    store_blocks,
    to_float,
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
def _gate_weights(
    w_hh_ptr,
    g: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """W_hh^T of the gate whose gradients are block g of `grad_gates`: (BLOCK_H, BLOCK_H)."""
    unit = tl.arange(0, BLOCK_H)
    row = (g + TURN) % GATES * H + unit
    mask = (unit < H)[:, None] & (unit < H)[None, :]
    return tl.load(w_hh_ptr + row[None, :] * H + unit[:, None], mask=mask, other=0.0)


@triton.jit
def _before(ptrs, initial_ptrs, has_before, inside):
    """The states before a step: those of another step, or the initial ones."""
    later = tl.load(ptrs, mask=inside & has_before, other=0.0)
    first = tl.load(initial_ptrs, mask=inside & (has_before == 0), other=0.0)
    return tl.where(has_before, later, first)


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
    HAS_C: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Steps begin <= s < end of AT_ONCE directions, s = 0 being the last step that forward made.

    Step s = T has no rows: it brings the gradient of step T - 1 through W_hh to h_0.

    Args:
        grad_output_ptr: (R, D * H). gates_ptr: (R, D, ROW * H), SAVED blocks of it by forward.
        states_ptr, initial_ptr: `cells` and c_0, or `output` and h_0 if the cell keeps no c.
        grad_gates_ptr: written. units_0_ptr, units_1_ptr: (UNITS, H) of either direction.
        grad_h_in_ptr, grad_c_in_ptr, grad_h_out_ptr, grad_c_out_ptr: the gradients of the states
            before and after these steps.
        FACTORS, CELL: the cell's `factors` and `backward`. WIDTH: blocks in a row of `grad_gates`.
        GATES: P, the parts of the product; TURN: the one whose gradients come first.
        The rest is as in `recurrence_forward`.
    """
    HELD: tl.constexpr = EXCHANGE == "none"
    NUM_H: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    INNER: tl.constexpr = GATES * H
    NUM_K: tl.constexpr = (INNER + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    dtype: tl.constexpr = grad_gates_ptr.dtype.element_ty

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
        for g in tl.static_range(GATES):
            weights = weights + (_gate_weights(w_hh_ptr, g, H, GATES, TURN, BLOCK_H),)
    elif ON_CHIP:
        for k in tl.static_range(NUM_K):
            column = inner_columns(k, INNER, BLOCK_K, SPLITS)
            weights = weights + (_weights(w_hh_ptr, first, column, H, GATES, TURN, BLOCK_H),)

    unit = first + tl.arange(0, BLOCK_H)
    units = unit_vectors(units_ptr, unit, H, UNITS, 0, BLOCK_H)
    alive = polls >= 0
    expected = 0
    for tile in range(slot, tl.cdiv(N, BLOCK_N), slots):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (unit < H)[:, None] & (n < N)[None, :]
        # Within a step 32 bits are enough; the step's first row takes 64, once for all elements.
        own = n[None, :] * (D * H) + d * H + unit[:, None]
        own_saved = n[None, :] * (D * ROW * H) + d * ROW * H + unit[:, None]
        own_grads = n[None, :] * (D * WIDTH * H) + d * WIDTH * H + unit[:, None]
        first_state = d.to(tl.int64) * N * H
        state_offsets = n[None, :] * H + unit[:, None]
        dh = tl.load(grad_h_in_ptr + first_state + state_offsets, mask=inside, other=0.0).to(
            tl.float32
        )
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
        now = inside & (n < active)[None, :]
        initial_ptrs = initial_ptr + first_state + state_offsets
        grad_output = tl.load(grad_output_ptr + row * (D * H) + own, mask=now, other=0.0)
        state = tl.load(states_ptr + row * (D * H) + own, mask=now, other=0.0).to(tl.float32)
        before = _before(
            states_ptr + before_row * (D * H) + own,
            initial_ptrs,
            (n < before_active)[None, :],
            inside,
        )
        before = before.to(tl.float32)
        saved = load_blocks(gates_ptr + row * (D * ROW * H) + own_saved, now, H, SAVED)
        factors = FACTORS(to_float(saved), state, before, units)

        grads = ()
        if HELD:
            for _ in tl.static_range(GATES):
                grads = grads + (tl.zeros((BLOCK_H, BLOCK_N), dtype),)

        for s in range(begin, end):
            # One step before they are needed, so that memory has a step's time to answer.
            t += ahead
            next_before_active, next_before_row = step_rows(
                t + ahead, T, N, batch_sizes_ptr, offsets_ptr, PACKED
            )
            next_now = inside & (n < before_active)[None, :]
            next_grad_output = tl.load(
                grad_output_ptr + before_row * (D * H) + own, mask=next_now, other=0.0
            )
            next_before = _before(
                states_ptr + next_before_row * (D * H) + own,
                initial_ptrs,
                (n < next_before_active)[None, :],
                inside,
            )
            next_saved = load_blocks(
                gates_ptr + before_row * (D * ROW * H) + own_saved, next_now, H, SAVED
            )

            if HELD:
                for g in tl.static_range(GATES):
                    dh = tl.dot(weights[g], grads[g], dh, input_precision=PRECISION)
            else:
                if EXCHANGE == "barrier":
                    complete = wait_for_arrivals(counter_ptr, expected, polls * alive)
                    alive = note_failure(error_ptr, alive, complete, s)
                # Rows that took no part in the step before this one send nothing.
                written = n < after_active
                source = (
                    grad_gates_ptr
                    + after_row * (D * WIDTH * H)
                    + (n * (D * WIDTH * H) + d * WIDTH * H)
                )
                product, alive = exchanged_product(
                    weights,
                    w_hh_ptr,
                    first,
                    source,
                    written,
                    written,
                    s,
                    alive,
                    polls,
                    error_ptr,
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
                    TOGETHER,
                    EXCHANGE,
                    ON_CHIP,
                    PRECISION,
                )
                dh += product

            whole_dh = dh + grad_output.to(tl.float32)
            blocks, direct_dh, before_dc = CELL(factors, whole_dh, dc, units)
            if HELD:
                grads = ()
                for g in tl.static_range(GATES):
                    # Out of a sequence's steps nothing flows on.
                    grads = grads + (tl.where(now, blocks[g], 0.0).to(dtype),)
            grad_ptrs = grad_gates_ptr + row * (D * WIDTH * H) + own_grads
            for g in tl.static_range(GATES):
                block = blocks[g]
                if EXCHANGE == "barrier" or EXCHANGE == "flag":
                    block = tl.where(alive, block, float("nan"))
                store_exchanged(grad_ptrs + g * H, block, now, EXCHANGE)
            if EXCHANGE == "barrier":
                # What a program that gave up has stored is nothing to wait for.
                if alive:
                    arrive(counter_ptr)
                expected += NUM_H
            store_blocks(grad_ptrs, blocks, now, H, GATES, WIDTH)

            dh = tl.where(now, direct_dh, dh)
            if HAS_C:
                dc = tl.where(now, before_dc, dc)
            factors = FACTORS(to_float(next_saved), before, next_before.to(tl.float32), units)
            before = next_before.to(tl.float32)
            grad_output = next_grad_output
            now = next_now
            after_active, after_row = active, row
            active, row = before_active, before_row
            before_active, before_row = next_before_active, next_before_row

        if EXCHANGE == "barrier" or EXCHANGE == "flag":
            dh = tl.where(alive, dh, float("nan"))
            dc = tl.where(alive, dc, float("nan"))
        dh_ptrs = grad_h_out_ptr + first_state + state_offsets
        tl.store(dh_ptrs, dh.to(grad_h_out_ptr.dtype.element_ty), mask=inside)
        if HAS_C:
            dc_ptrs = grad_c_out_ptr + first_state + state_offsets
            tl.store(dc_ptrs, dc.to(grad_c_out_ptr.dtype.element_ty), mask=inside)
