"""What a backend is asked for."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_rnn.cells import Cell


class Request(NamedTuple):
    """One layer over one sequence, as the dispatcher and the backends see it. Hashable.

    Attributes:
        cell: the cell.
        device: of input, states and weights.
        dtype: of input, states and weights.
        seq_len, batch: T, N (of a packed batch: the longest sequence, the number of sequences).
        input_size, hidden_size, output_size: I, H, H_out; H_out is H unless the cell is projected.
        directions: D.
        biased: whether the layer has biases.
        packed: whether the sequences have lengths of their own.
        needs_grad: whether a backward will follow.
        extras: what the steps are given beside the weights, by name; see `triton_rnn.extras`.
    """

    cell: Cell
    device: torch.device
    dtype: torch.dtype
    seq_len: int
    batch: int
    input_size: int
    hidden_size: int
    output_size: int
    directions: int
    biased: bool
    packed: bool
    needs_grad: bool
    extras: tuple[str, ...] = ()


class Call(NamedTuple):
    """A well-formed call of a recurrent module, in the form that the layer op takes.

    Attributes:
        request: the first layer's.
        input: (T, N, I) or, packed, (sum of lengths, I).
        batch_sizes: rows of every step of a packed batch, empty for a padded one.
        h_0: (L * D, N, H_out), or None for zeros.
        c_0: (L * D, N, H), or None for zeros or where the cell has none.
        weights: of all layers and directions, in torch's order.
    """

    request: Request
    input: Tensor
    batch_sizes: list[int]
    h_0: Tensor | None
    c_0: Tensor | None
    weights: list[Tensor]


@functools.lru_cache(maxsize=1024)
def weight_shapes(
    gate_rows: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    layers: int,
    directions: int,
    bias: bool,
) -> tuple[tuple[int, ...], ...]:
    """The shapes of all weights of a module, in torch's order; `gate_rows` is G * hidden_size."""
    output_size = proj_size or hidden_size
    shapes: list[tuple[int, ...]] = []
    for number in range(layers):
        size = input_size if number == 0 else directions * output_size
        one: list[tuple[int, ...]] = [(gate_rows, size), (gate_rows, output_size)]
        if bias:
            one += [(gate_rows,), (gate_rows,)]
        if proj_size:
            one.append((proj_size, hidden_size))
        shapes += one * directions
    return tuple(shapes)


def zero_states(request: Request, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """h_0 and, if the cell has it, c_0: zeros, one block for both where they have one shape."""
    h_0 = like.new_zeros((request.directions, request.batch, request.output_size))
    if request.cell.states == 1:
        return h_0, None
    if request.cell.states > 2:
        others = (request.cell.states - 1) * request.hidden_size
        return h_0, like.new_zeros((request.directions, request.batch, others))
    if request.output_size == request.hidden_size:
        return h_0, h_0
    return h_0, like.new_zeros((request.directions, request.batch, request.hidden_size))


def with_zeros(
    request: Request,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """The gradients of output (as rows), h_n[, c_n], zeros in the place of those not given."""
    rows = math.prod(input.shape[:-1])
    shapes = [(rows, request.directions * request.output_size), h_0.shape]
    if c_0 is not None:
        shapes.append(c_0.shape)
    return [
        input.new_zeros(shape) if grad is None else grad
        for grad, shape in zip(grads, shapes, strict=True)
    ]
