"""One direction of a layer over a whole sequence, forward and backward, once for every cell.

`recurrence(cell)` closes these loops over a cell's functions; TorchScript compiles the closures.
Rows are time-major and dense: padded input is (T * N, I), packed input (sum of lengths, I) with
`batch_sizes`; an empty `batch_sizes` means `batch` rows at every step.

A packed batch changes its size from step to step. Forward in time it shrinks, backward in time it
grows, and the gradients travel the other way round: `resize` is the one place for all four.

Steps are done in blocks of about `block_rows` rows. What can be computed for many steps at once
(the projection; backward, the factors before and the weights' gradients after the steps) is
computed for one block, so that it is in the cache when the steps come to it, and so that the gates
of a forward without gradients and the gradients of the gates take the room of one block, not of all
steps.

Buffers of one direction, all made here and none the caller's:
    gates (rows, width)       written by projection and steps; saved if the backward needs it
    states (rows, H_out)      h of every step; saved
    cells (rows, H)           c of every step (LSTM); saved
    grad_gates (block, width) backward: first the factors, then the gradients, in place
    grad_states (block, H_out) backward: the gradient of the output, then of h
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor

from triton_rnn.backends.torchscript.cells import ScriptCell, steps
from triton_rnn.backends.torchscript.products import (
    add_weight_gradient,
    input_gradient_into,
    project_into,
    step_weight,
)

if TYPE_CHECKING:
    RangeHandle = Any
else:
    # A class that TorchScript knows and Python's types do not.
    RangeHandle = torch.classes.profiler._RecordFunction


class Run(NamedTuple):
    """What one call is, and how it is to be done (`rules.py` decides).

    Attributes:
        batch_sizes: rows of every step of a packed batch; empty for a padded one.
        seq_len, batch: T, N.
        width: numbers a row of `gates` holds.
        biased: whether the layer has biases.
        keep: whether a backward will follow.
        block_rows: rows to a block of steps.
        onednn_input, onednn_step: whether oneDNN does the large products, the product of a step.
        copy_weight: whether the steps are enough to lay W_hh out for them.
        prefix, suffix: what the names of ranges begin and end with; empty when no profiler is on.
    """

    batch_sizes: list[int]
    seq_len: int
    batch: int
    width: int
    biased: bool
    keep: bool
    block_rows: int
    onednn_input: bool
    onednn_step: bool
    copy_weight: bool
    prefix: str
    suffix: str


def begin_range(run: Run, phase: str) -> RangeHandle:
    """A profiler's range from here to `end_range`."""
    return torch.ops.profiler._record_function_enter_new(run.prefix + phase + run.suffix, None)


def end_range(handle: Optional[RangeHandle]) -> None:  # noqa: UP045 - TorchScript's class knows no |
    """The end of what `begin_range` began."""
    if handle is not None:
        if torch.jit.is_scripting():
            torch.ops.profiler._record_function_exit(handle)
        else:
            # Only TorchScript tells the overloads apart by the argument's class.
            torch.ops.profiler._record_function_exit._RecordFunction(handle)


def resize(state: Tensor, batch: int, initial: Tensor, final: Tensor) -> Tensor:
    """Give state (n, H) `batch` rows: what leaves goes to `final`, what joins is from `initial`."""
    active = state.size(0)
    if batch < active:
        final[batch:active].copy_(state[batch:])
        return state[:batch]
    if batch > active:
        return torch.cat([state, initial[active:batch]])
    return state


def block_starts(run: Run) -> list[int]:
    """First step of every block, and T."""
    starts = [0]
    if len(run.batch_sizes) > 0:
        rows = 0
        for t in range(run.seq_len - 1):
            rows += run.batch_sizes[t]
            if rows >= run.block_rows:
                starts.append(t + 1)
                rows = 0
    else:
        length = (run.block_rows + run.batch - 1) // run.batch
        start = length
        while start < run.seq_len:
            starts.append(start)
            start += length
    starts.append(run.seq_len)
    return starts


def row_offsets(run: Run, starts: list[int]) -> list[int]:
    """First row of every block, and the number of rows."""
    if len(run.batch_sizes) == 0:
        return [start * run.batch for start in starts]
    offsets = [0]
    for k in range(len(starts) - 1):
        rows = offsets[-1]
        for t in range(starts[k], starts[k + 1]):
            rows += run.batch_sizes[t]
        offsets.append(rows)
    return offsets


def rows_between(rows: Tensor, begin: int, end: int) -> Tensor:
    """rows[begin:end], without a view where that is all of them."""
    if begin == 0 and end == rows.size(0):
        return rows
    return rows[begin:end]


def previous(
    states: Tensor, initial: Tensor, run: Run, begin: int, start: int, length: int, reverse: bool
) -> Tensor:
    """The states that `length` steps came from; the first is `start`, its first row `begin`."""
    if len(run.batch_sizes) == 0:
        batch = run.batch
        end = begin + length * batch
        if reverse:
            if end == states.size(0):
                return torch.cat([states[begin + batch :], initial])
            return states[begin + batch : end + batch]
        if begin == 0:
            return torch.cat([initial, states[: end - batch]])
        return states[begin - batch : end - batch]
    parts: list[Tensor] = []
    row = begin
    for t in range(start, start + length):
        active = run.batch_sizes[t]
        if reverse:
            after = run.batch_sizes[t + 1] if t + 1 < run.seq_len else 0
            parts.append(states[row + active : row + active + after])
            parts.append(initial[after:active])
        elif t == 0:
            parts.append(initial[:active])
        else:
            before = row - run.batch_sizes[t - 1]
            parts.append(states[before : before + active])
        row += active
    return torch.cat(parts)


def gate_bias(recurrent_bias: Tensor, bias_ih: Tensor, width: int) -> Tensor:
    """The bias of one row of gates: b_ih on the last columns plus b_hh on the first ones."""
    size = bias_ih.size(0)
    if size == width:
        return bias_ih + recurrent_bias
    bias = bias_ih.new_zeros([width])
    bias[:size].copy_(recurrent_bias)
    bias[width - size :].add_(bias_ih)
    return bias


def recurrence(cell: ScriptCell) -> tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]]]:
    """Forward and backward of one direction of a layer of this cell, for TorchScript to compile."""
    recurrent_order = cell.recurrent_order
    torch_order = cell.torch_order
    forward_views = cell.forward_views
    forward_step = cell.forward_step
    factors = cell.factors
    backward_views = cell.backward_views
    backward_step = cell.backward_step

    def forward_direction(
        x: Tensor, h_0: Tensor, c_0: Tensor, weights: list[Tensor], run: Run, reverse: bool
    ) -> list[Tensor]:
        """x (rows, I), h_0 (N, H_out), c_0 (N, H) or empty: states, h_n, c_n, gates, cells."""
        weight_ih = weights[0]
        weight_hh = weights[1]
        weight_hr = weights[-1]
        has_c = c_0.dim() == 2
        packed = len(run.batch_sizes) > 0
        profiled = len(run.prefix) > 0
        span: Optional[RangeHandle] = None  # noqa: UP045 - as in `end_range`
        batch = run.batch
        rows = x.size(0)
        first = run.width - weight_ih.size(0)
        hidden_size = run.width // 4 if run.width > weight_hh.size(1) else run.width

        recurrent = recurrent_order(weight_hh, hidden_size)
        weight = step_weight(recurrent, batch, run.onednn_step, run.copy_weight)
        if run.biased:
            bias = gate_bias(recurrent_order(weights[3], hidden_size), weights[2], run.width)
        else:
            bias = x.new_zeros([run.width if first > 0 else 0])

        starts = block_starts(run)
        offsets = row_offsets(run, starts)
        blocks = len(starts) - 1
        scratch_rows = rows
        if blocks > 1 and not run.keep:
            scratch_rows = 0
            for k in range(blocks):
                scratch_rows = max(scratch_rows, offsets[k + 1] - offsets[k])
        states = x.new_empty([rows, weight_hh.size(1)])
        # A cell of one gate needs no gates but the state: its preactivation becomes h in place.
        own_gates = has_c or first > 0
        gates = x.new_empty([scratch_rows, run.width]) if own_gates else states
        cells = x.new_empty([scratch_rows, hidden_size]) if has_c else states

        h = h_0
        c = c_0
        h_n = h_0
        c_n = c_0
        if packed:
            entering = run.batch_sizes[run.seq_len - 1 if reverse else 0]
            h = h_0[:entering]
            h_n = torch.empty_like(h_0)
            if has_c:
                c = c_0[:entering]
                c_n = torch.empty_like(c_0)

        for k in range(blocks):
            block = blocks - 1 - k if reverse else k
            length = starts[block + 1] - starts[block]
            begin = offsets[block]
            end = offsets[block + 1]
            sizes = run.batch_sizes[starts[block] : starts[block + 1]]
            states_block = rows_between(states, begin, end)
            gates_block = states_block
            if own_gates:
                gates_block = rows_between(
                    gates, begin if run.keep else 0, end if run.keep else end - begin
                )
            cells_block = states_block
            if has_c:
                cells_block = rows_between(
                    cells, begin if run.keep else 0, end if run.keep else end - begin
                )
                if not run.keep and k > 0:
                    # The block's buffer is about to be written again, and c still lies in it.
                    c = c.clone()
            x_block = rows_between(x, begin, end)
            if profiled:
                span = begin_range(run, ".projection")
            if first == 0:
                project_into(gates_block, x_block, weight_ih, bias, run.onednn_input)
            else:
                gate_columns = gates_block[:, first:]
                project_into(gate_columns, x_block, weight_ih, bias[first:], run.onednn_input)
                gates_block[:, :first].copy_(bias[:first])
            if profiled:
                end_range(span)
            if profiled:
                span = begin_range(run, ".recurrence")
            state_steps = steps(states_block, sizes, batch)
            views = [state_steps, steps(cells_block, sizes, batch) if has_c else state_steps]
            if own_gates:
                views.extend(forward_views(gates_block, hidden_size, sizes, batch))
            for i in range(length):
                t = length - 1 - i if reverse else i
                if packed:
                    h = resize(h, sizes[t], h_0, h_n)
                    if has_c:
                        c = resize(c, sizes[t], c_0, c_n)
                forward_step(t, views, h, c, weight, weight_hr, run.onednn_step)
                h = views[0][t]
                if has_c:
                    c = views[1][t]
            if profiled:
                end_range(span)
        if packed:
            h_n[: h.size(0)].copy_(h)
            if has_c:
                c_n[: c.size(0)].copy_(c)
        else:
            h_n = h
            c_n = c
        return [states, h_n, c_n, gates, cells]

    def backward_direction(
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        weights: list[Tensor],
        saved: list[Tensor],
        grad_output: Tensor,
        grad_h_n: Tensor,
        grad_c_n: Tensor,
        grad_x: Tensor,
        needs: list[bool],
        run: Run,
        reverse: bool,
    ) -> list[Tensor]:
        """Gradients of x, h_0, c_0 and every weight; `needs` says which, of x and the weights.

        saved: states, gates, cells. A gradient that is not needed is an empty tensor.
        grad_x: the other direction's, to be added to, or empty.
        """
        weight_ih = weights[0]
        weight_hh = weights[1]
        weight_hr = weights[-1]
        states = saved[0]
        gates = saved[1]
        cells = saved[2]
        has_c = c_0.dim() == 2
        packed = len(run.batch_sizes) > 0
        profiled = len(run.prefix) > 0
        span: Optional[RangeHandle] = None  # noqa: UP045 - as in `end_range`
        batch = run.batch
        projected = weight_ih.size(0)
        first = run.width - projected
        hidden_size = run.width // 4 if run.width > weight_hh.size(1) else run.width

        recurrent = recurrent_order(weight_hh, hidden_size)
        weight = step_weight(recurrent.t(), batch, run.onednn_step, run.copy_weight)
        has_hr = weight_hr.size(0) != projected and weight_hr.dim() == 2
        grad_h_0 = torch.empty_like(h_0) if packed else h_0
        grad_c_0 = torch.empty_like(c_0) if packed else c_0

        starts = block_starts(run)
        offsets = row_offsets(run, starts)
        blocks = len(starts) - 1
        now = 0 if reverse else run.seq_len - 1
        final = run.seq_len - 1 - now
        size = run.batch_sizes[now] if packed else batch
        dh = grad_h_n
        dc = grad_c_n
        if packed:
            dh = grad_h_n[:size]
            if has_c:
                dc = grad_c_n[:size]

        scratch_rows = 0
        for k in range(blocks):
            scratch_rows = max(scratch_rows, offsets[k + 1] - offsets[k])
        scratch = x.new_empty([scratch_rows, run.width])
        none = h_0[:0]
        add_to_grad_x = grad_x.numel() > 0
        if needs[0] and not add_to_grad_x:
            grad_x = torch.empty_like(x)
        grad_weight_ih = none
        grad_weight_hh = none
        grad_weight_hr = none
        grad_bias = none

        for k in range(blocks):
            block = k if reverse else blocks - 1 - k
            length = starts[block + 1] - starts[block]
            begin = offsets[block]
            end = offsets[block + 1]
            sizes = run.batch_sizes[starts[block] : starts[block + 1]]
            states_block = rows_between(states, begin, end)
            gates_block = rows_between(gates, begin, end)
            cells_block = rows_between(cells, begin, end)
            if profiled:
                span = begin_range(run, ".backward.recurrence")
            # A private copy, to which each step adds what comes from the step before it.
            grad_states = rows_between(grad_output, begin, end)
            grad_states = grad_states.clone(memory_format=torch.contiguous_format)
            grad_steps = steps(grad_states, sizes, batch)
            grad_gates = rows_between(scratch, 0, end - begin)
            h_prev = previous(states, h_0, run, begin, starts[block], length, reverse)
            c_prev = h_prev
            if has_c:
                c_prev = previous(cells, c_0, run, begin, starts[block], length, reverse)
            extra = factors(gates_block, states_block, h_prev, cells_block, c_prev, grad_gates)
            views = backward_views(
                gates_block, extra, grad_gates, grad_states, hidden_size, sizes, batch
            )
            dh = grad_steps[0 if reverse else length - 1].add_(dh)
            for i in range(length):
                t = i if reverse else length - 1 - i
                then = t + 1 if reverse else t - 1
                leaves_block = i + 1 == length
                resized = False
                if packed and starts[block] + t != final:
                    resized = run.batch_sizes[starts[block] + then] != size
                if leaves_block or resized:
                    addend = torch.zeros_like(dh)
                else:
                    addend = grad_steps[then]
                dh, dc = backward_step(t, views, dh, dc, addend, weight, weight_hr, run.onednn_step)
                if resized:
                    size = run.batch_sizes[starts[block] + then]
                    dh = resize(dh, size, grad_h_n, grad_h_0)
                    if has_c:
                        dc = resize(dc, size, grad_c_n, grad_c_0)
                    if not leaves_block:
                        dh = grad_steps[then].add_(dh)
            if profiled:
                end_range(span)
            if profiled:
                span = begin_range(run, ".backward.weights")
            x_block = rows_between(x, begin, end)
            grad_projected = grad_gates[:, first:] if first > 0 else grad_gates
            grad_recurrent = grad_gates[:, :projected] if first > 0 else grad_gates
            if needs[0]:
                grad_x_block = rows_between(grad_x, begin, end)
                input_gradient_into(
                    grad_x_block, grad_projected, weight_ih, add_to_grad_x, run.onednn_input
                )
            if needs[1]:
                grad_weight_ih = add_weight_gradient(
                    grad_weight_ih, grad_projected, x_block, run.onednn_input
                )
            if needs[2]:
                grad_weight_hh = add_weight_gradient(
                    grad_weight_hh, grad_recurrent, h_prev, run.onednn_input
                )
            if run.biased and (needs[3] or needs[4]):
                sums = grad_gates.sum(0)
                grad_bias = grad_bias.add_(sums) if grad_bias.numel() > 0 else sums
            if has_hr and needs[-1]:
                before_hr = torch.tanh(cells_block).mul_(gates_block[:, 3 * hidden_size :])
                grad_weight_hr = add_weight_gradient(grad_weight_hr, grad_states, before_hr, False)
            if profiled:
                end_range(span)
        if packed:
            grad_h_0[:size].copy_(dh)
            if has_c:
                grad_c_0[:size].copy_(dc)
        else:
            grad_h_0 = dh
            if has_c:
                grad_c_0 = dc
        result = [grad_x, grad_h_0, grad_c_0, grad_weight_ih]
        result.append(torch_order(grad_weight_hh, hidden_size) if needs[2] else none)
        if run.biased:
            result.append(grad_bias[first:] if needs[3] else none)
            result.append(
                torch_order(grad_bias[:projected], hidden_size).clone() if needs[4] else none
            )
        if has_hr:
            result.append(grad_weight_hr)
        return result

    return forward_direction, backward_direction
