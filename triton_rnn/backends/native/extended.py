"""The C loops with extras: the arguments of `forward_extended` and `backward_extended`.

Sequences with lengths of their own run as a packed batch does, the longest first, but stay where
they are: the loops are told which is which.
"""

import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from triton_rnn.backends import native, reference
from triton_rnn.extras import Extras
from triton_rnn.request import Request

# `Extras` of call.h, field by field.
_EXTRAS = struct.Struct("11q4d")


class Walk(NamedTuple):
    """In which order the loops go through the rows; the same for every layer of a call.

    Attributes:
        order: the sequences, the longest first; None for the order they have.
        sizes: how many of them each step is for; None if each is for all.
        rows: of all steps together.
    """

    order: "array[int] | None"
    sizes: "array[int] | None"
    rows: int


def order_of(lengths: Sequence[int], steps: int) -> "tuple[array[int], array[int]]":
    """The sequences, the longest first, and how many of them each of `steps` steps is for."""
    order = array("q", sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))
    ends = [0] * (steps + 1)
    for length in lengths:
        ends[length] += 1
    sizes, left = array("q"), len(lengths)
    for t in range(steps):
        left -= ends[t]
        sizes.append(left)
    return order, sizes


def walk(request: Request, batch_sizes: Sequence[int], extras: Extras) -> Walk:
    """What all layers of an extended call have in common."""
    if extras.lengths is not None:
        lengths = extras.lengths.tolist()
        return Walk(*order_of(lengths, request.seq_len), sum(lengths))
    if batch_sizes:
        return Walk(None, array("q", batch_sizes), sum(batch_sizes))
    return Walk(None, None, request.seq_len * request.batch)


def _mask_pointer(mask: Tensor | float) -> int:
    return mask.data_ptr() if isinstance(mask, Tensor) else 0


def _record(extras: Extras, walk: Walk, cells: Tensor | None, grad_cells: Tensor | None) -> bytes:
    """The bytes of an Extras."""
    order, resets = walk.order, extras.reset_mask
    steps = (0, 0, 0) if resets is None else (resets.data_ptr(), *resets.stride())
    keep_h, keep_c = (
        0.0 if isinstance(zoneout, Tensor) else zoneout
        for zoneout in (extras.zoneout_h, extras.zoneout_c)
    )
    return _EXTRAS.pack(
        0 if order is None else order.buffer_info()[0],
        *steps,
        extras.reset_to_initial,
        native._pointer(extras.recurrent_mask),
        _mask_pointer(extras.zoneout_h),
        _mask_pointer(extras.zoneout_c),
        native._pointer(cells),
        native._pointer(grad_cells),
        0 if grad_cells is None else grad_cells.stride(0),
        keep_h,
        keep_c,
        extras.clip_hidden,
        extras.clip_cell,
    )


class ExtendedLayer(reference.ExtendedLayer):
    """A layer with extras, in the place of this backend's module."""

    WHOLE = native.WHOLE

    def __init__(self, extras: Extras, walk: Walk) -> None:
        super().__init__(extras, walk)
        self.walk = walk

    def forward(
        self,
        request: Request,
        input: Tensor,
        batch_sizes: Sequence[int],
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """As `native.forward`; with `all_cells` every step's c is the last result.

        Raises:
            MemoryError: there is no memory for the call's buffers.
        """
        frame = native._frame(request)
        directions, hidden, size = request.directions, request.hidden_size, request.output_size
        output = input.new_empty((*input.shape[:-1], directions * size))
        h_n = input.new_empty((directions, request.batch, size))
        c_n = cells = saved = None
        if request.cell.states == 2:
            c_n = input.new_empty((directions, request.batch, hidden))
            if self.extras.all_cells:
                cells = input.new_empty((*input.shape[:-1], directions * hidden))
        if request.needs_grad:
            count = frame.functions.saved_numbers_extended(
                native._CELLS[request.cell.name],
                self.walk.rows,
                hidden,
                size,
                directions,
                self.extras.recurrent_mask is not None,
                self.extras.clip_hidden > 0,
            )
            saved = input.new_empty(count)
        native.run(
            frame.functions.forward_extended,
            native.WHOLE,
            request,
            self.walk.sizes,
            self.walk.rows,
            (input, h_0, c_0),
            weights,
            (output, h_n, c_n, saved),
            extras=_record(self.extras, self.walk, cells, None),
        )
        results = tuple(tensor for tensor in (output, h_n, c_n, cells) if tensor is not None)
        return results, [] if saved is None else [saved]

    def backward(
        self,
        request: Request,
        input: Tensor,
        batch_sizes: Sequence[int],
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """As `native.backward`; with `all_cells` the last of `grads` is that of every step's c.

        Raises:
            MemoryError: there is no memory for the call's buffers.
        """
        grad_cells = None
        if self.extras.all_cells and grads[-1] is not None:
            # As rows, which a padded batch's output has been made already.
            grad_cells = native._by_rows(grads[-1].reshape(-1, grads[-1].size(-1)))
        all_rows = input[..., 0].numel()
        found = native.wanted(request, all_rows, input, h_0, c_0, weights, needs)
        native.run(
            native._frame(request).functions.backward_extended,
            f"backward.{native.WHOLE}",
            request,
            self.walk.sizes,
            self.walk.rows,
            (input, None, None),
            weights,
            (None, None, None, saved[0]),
            (grads[0], grads[1], grads[2] if request.cell.states == 2 else None),
            found,
            _record(self.extras, self.walk, None, grad_cells),
        )
        return found
