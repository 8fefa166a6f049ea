"""torch's own kernels: cuDNN, oneDNN, ATen.

torch runs a whole stack of layers in one call, so this backend is a `stack`, not a layer: it makes
the call that torch.nn's forward makes, after our checks in place of torch.nn's.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import _VF, Tensor

from triton_rnn.cells import OwnCell
from triton_rnn.profiling import ranges, session
from triton_rnn.request import Call, Request

_FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "rnn_tanh": _VF.rnn_tanh,
    "rnn_relu": _VF.rnn_relu,
    "gru": _VF.gru,
    "lstm": _VF.lstm,
    "lstm_projected": _VF.lstm,
}


def supports(request: Request) -> str | None:
    """None: torch can do whatever reaches the dispatcher, but for cells that it does not have."""
    if isinstance(request.cell, OwnCell):
        return "torch has no kernels for a user's cell"
    return None


def stack(call: Call, backend: ModuleType, layers: int, drop: float) -> tuple[Tensor, ...]:
    """All layers at once: output, h_n and, if the cell has it, c_n, time-major."""
    request, x, _, h_0, c_0, weights = call
    directions = request.directions
    if h_0 is None:
        h_0 = x.new_zeros((layers * directions, request.batch, request.output_size))
        if request.cell.states == 2:
            c_0 = h_0
            if request.output_size != request.hidden_size:
                c_0 = x.new_zeros((layers * directions, request.batch, request.hidden_size))
    hx = h_0 if c_0 is None else (h_0, c_0)
    function = _FUNCTIONS[request.cell.name]
    # cuDNN keeps what a backward needs only when told to train; without dropout, eval differs in
    # nothing.
    train = request.needs_grad or drop > 0
    options = (request.biased, layers, drop, train, directions == 2)
    arguments: tuple[object, ...] = (x, hx, weights, *options, False)
    if request.packed:
        arguments = (x, torch.tensor(call.batch_sizes, device="cpu"), hx, weights, *options)
    if ranges.on():
        session.note_stack(request, x.numel() // request.input_size, layers)
        name = f"{ranges.PREFIX}{request.cell.name}.torch[all]"
        return ranges.inside(name, function, *arguments)
    return function(*arguments)
