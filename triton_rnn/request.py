"""What a backend is asked for."""

from typing import NamedTuple

import torch

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
