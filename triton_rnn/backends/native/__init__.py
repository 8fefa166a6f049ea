"""The CPU backend: one C file, compiled by the machine's compiler at first use.

`recurrence.c` does one layer, all its directions, the whole sequence, in one call, forward or
backward; here its arguments are put together. The call lets go of the GIL. No compiler, or one that
fails: `supports` says why, and TorchScript runs instead.

`rules.py` says how many of torch's threads share the work, and where others are faster.
"""

import ctypes
import functools
import struct
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from triton_rnn.backends.native import build, rules
from triton_rnn.profiling import ranges
from triton_rnn.request import Request

# The one phase that holds all of a layer, in profiles.
WHOLE = "native"
# States that are zeros need not be there.
TAKES_NO_STATE = True
# Which module has the `ExtendedLayer` of this backend.
TAKES_EXTRAS = f"{__name__}.extended"

_SOURCE = Path(__file__).with_name("recurrence.c")
_CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3, "lstm_projected": 4}
_TYPES = {torch.float32: "float", torch.float64: "double"}

# `struct Call` of recurrence.c, field by field; a pointer is a number of eight bytes.
_CALL = struct.Struct("50q")
_NO_BACKWARD = (0,) * (7 + 10)


class Library:
    """The compiled functions for one type of numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        found = build.library(_SOURCE, (f"-DREAL={_TYPES[dtype]}",))
        # Each takes the bytes of a Call. ctypes lets go of the GIL while a CDLL's function runs.
        self.forward = found.forward
        self.backward = found.backward
        for function in (self.forward, self.backward):
            function.argtypes = (ctypes.c_char_p,)
            function.restype = ctypes.c_int64
        # And these those of an Extras too.
        self.forward_extended = found.forward_extended
        self.backward_extended = found.backward_extended
        for function in (self.forward_extended, self.backward_extended):
            function.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
            function.restype = ctypes.c_int64
        self.saved_numbers_extended = found.saved_numbers_extended
        self.saved_numbers_extended.argtypes = (ctypes.c_int64,) * 7
        self.saved_numbers_extended.restype = ctypes.c_int64
        self.saved_numbers = found.saved_numbers
        self.saved_numbers.argtypes = (ctypes.c_int64,) * 5
        self.saved_numbers.restype = ctypes.c_int64
        self.lanes = found.lanes
        self.lanes.argtypes = ()
        self.lanes.restype = ctypes.c_int64
        self.pointwise = found.pointwise
        self.pointwise.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        self.pointwise.restype = None


@functools.cache
def _team_functions() -> tuple[int, ...]:
    """Where libgomp's functions lie that open a team of threads, wait for it, and tell its size.

    Empty where they are not all there. torch brings its OpenMP runtime and makes its symbols
    global. Its threads are the ones to use: a second team beside them would fight them for the
    cores.
    """
    everything = ctypes.CDLL(None)
    names = ("GOMP_parallel", "GOMP_barrier", "omp_get_num_threads")
    found = [getattr(everything, name, None) for name in names]
    if None in found:
        return ()
    return tuple(
        ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found if function
    )


def _threads(request: Request, rows: int) -> tuple[int, ...]:
    """The last fields of a Call: how many threads, and by what they are had."""
    threads = rules.threads(request, rows)
    functions = _team_functions() if threads > 1 else ()
    return (threads, *functions) if functions else (1, 0, 0, 0)


_building = threading.Lock()


@functools.cache
def _built(dtype: torch.dtype) -> Library | str:
    try:
        return Library(dtype)
    except build.BuildError as error:
        return str(error)


def library(dtype: torch.dtype) -> Library | str:
    """The compiled functions for float32 or float64, or why there are none; tried once."""
    with _building:
        return _built(dtype)


def supports(request: Request) -> str | None:
    """Why this backend cannot serve a request; None when it can."""
    if request.device.type != "cpu":
        return f"the C loops run on the CPU, the input is on {request.device}"
    if request.dtype not in _TYPES:
        return f"dtype {request.dtype} is not float32 or float64"
    if struct.calcsize("P") != 8:
        return "pointers are not of eight bytes here"
    found = library(request.dtype)
    return found if isinstance(found, str) else None


def declines(request: Request) -> str | None:
    """Why `auto` leaves a request to others."""
    # The rule first: no compiler is started for what it would not be used for.
    if request.device.type == "cpu" and request.dtype in _TYPES:
        reason = rules.slower(request)
        if reason is not None:
            return reason
    return supports(request)


def describe(request: Request, rows: int) -> str:
    """How this backend would go about a request, in a line."""
    found = library(request.dtype)
    if isinstance(found, str):
        return found
    threads = rules.threads(request, rows)
    return ", ".join(
        (
            f"one C call, vectors of {found.lanes()}",
            f"{threads} thread{'s' if threads > 1 else ''}",
            f"{request.directions} direction{'s in turn' if request.directions == 2 else ''}",
        )
    )


def saved_shapes(request: Request, seq_len: int, batch: int) -> list[tuple[int, ...]]:
    """Shapes of what forward saves, for a padded request; T and N may be torch's symbols."""
    numbers = _functions(request.dtype).saved_numbers
    fixed = (int(request.hidden_size), int(request.output_size), int(request.directions))
    cell = _CELLS[request.cell.name]
    none, one = numbers(cell, 0, *fixed), numbers(cell, 1, *fixed)
    return [(none + (one - none) * seq_len * batch,)]


def saved_of(request: Request, results: Sequence[Tensor], shown: Sequence[Tensor]) -> list[Tensor]:
    """What forward has saved, from its results and the tensors of `saved_shapes`."""
    return list(shown)


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().contiguous()


def _by_rows(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension is dense; the others may have any stride."""
    if (tensor.stride(-1) == 1 or tensor.size(-1) == 1) and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().contiguous()


def _strides(request: Request, input: Tensor) -> tuple[int, int]:
    """From a step to the next and from a row to the next, so that rows lie in order if they can."""
    if request.packed:
        return 0, input.stride(0)
    step, row, _ = input.stride()
    if request.seq_len == 1:
        step = request.batch * row
    return step, step if request.batch == 1 else row


def _in_slots(request: Request, pointers: Sequence[int]) -> list[int]:
    """Weights of both directions in the five places that each has in a Call."""
    count = len(pointers) // request.directions
    slots = [0] * 10
    for d in range(request.directions):
        own = pointers[d * count : (d + 1) * count]
        slots[5 * d : 5 * d + 2] = own[:2]
        if request.biased:
            slots[5 * d + 2 : 5 * d + 4] = own[2:4]
        if request.cell.projected:
            slots[5 * d + 4] = own[-1]
    return slots


def _functions(dtype: torch.dtype) -> Library:
    found = _built(dtype)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _head(
    request: Request,
    input: Tensor,
    sizes: "array[int] | None",
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[int, ...]:
    """The fields of a Call up to the weights."""
    pointers = [weight.data_ptr() for weight in weights]
    return (
        _CELLS[request.cell.name],
        request.seq_len,
        request.batch,
        request.input_size,
        request.hidden_size,
        request.output_size,
        request.directions,
        request.biased,
        request.needs_grad,
        0 if sizes is None else sizes.buffer_info()[0],
        input.data_ptr(),
        *_strides(request, input),
        _pointer(h_0),
        _pointer(c_0),
        *_in_slots(request, pointers),
    )


def _run(function: "ctypes._NamedFuncPointer", request: Request, phase: str, call: bytes) -> None:
    if ranges.on():
        with ranges.phase(request.cell, phase, "both"):
            failed = function(call)
    else:
        failed = function(call)
    if failed:
        raise MemoryError("triton_rnn: no memory for the buffers of a recurrent layer")


def forward(
    request: Request,
    input: Tensor,
    batch_sizes: Sequence[int],
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """One layer, all its directions, the whole sequence; as `backends.torchscript.forward`.

    Args:
        h_0, c_0: or both None for zeros.

    Raises:
        MemoryError: there is no memory for the call's buffers.
    """
    functions = _functions(request.dtype)
    directions, size = request.directions, request.output_size
    # Names keep alive what the pointers point to.
    input = _by_rows(input)
    h_0 = None if h_0 is None else _dense(h_0)
    c_0 = None if c_0 is None else _dense(c_0)
    weights = [_dense(weight) for weight in weights]
    sizes = array("q", batch_sizes) if batch_sizes else None
    output = input.new_empty((*input.shape[:-1], directions * size))
    h_n = input.new_empty((directions, request.batch, size))
    c_n = None
    if request.cell.states == 2:
        c_n = input.new_empty((directions, request.batch, request.hidden_size))
    saved = None
    rows = len(input) if request.packed else request.seq_len * request.batch
    if request.needs_grad:
        cell = _CELLS[request.cell.name]
        count = functions.saved_numbers(cell, rows, request.hidden_size, size, directions)
        saved = input.new_empty(count)
    call = _CALL.pack(
        *_head(request, input, sizes, h_0, c_0, weights),
        output.data_ptr(),
        h_n.data_ptr(),
        _pointer(c_n),
        _pointer(saved),
        *_NO_BACKWARD,
        *_threads(request, rows),
    )
    _run(functions.forward, request, WHOLE, call)
    results = (output, h_n) if c_n is None else (output, h_n, c_n)
    return results, [] if saved is None else [saved]


def backward(
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
    """Gradients of the input, h_0, c_0 and every weight; as `backends.torchscript.backward`.

    Raises:
        MemoryError: there is no memory for the call's buffers.
    """
    functions = _functions(request.dtype)
    input = _by_rows(input)
    weights = [_dense(weight) for weight in weights]
    sizes = array("q", batch_sizes) if batch_sizes else None
    grad_output = None if grads[0] is None else _by_rows(grads[0])
    grad_h_n = None if grads[1] is None else _dense(grads[1])
    grad_c_n = None if len(grads) < 3 or grads[2] is None else _dense(grads[2])
    rows = len(input) if request.packed else request.seq_len * request.batch
    found: list[Tensor | None] = [
        input.new_empty((rows, request.input_size)) if needs[0] else None,
        # Dense, whatever the strides of the states.
        input.new_empty(h_0.shape) if h_0 is not None and needs[1] else None,
        input.new_empty(c_0.shape) if c_0 is not None and needs[2] else None,
    ]
    found += [
        torch.empty_like(weight) if need else None
        for weight, need in zip(weights, needs[3:], strict=True)
    ]
    pointers = [_pointer(tensor) for tensor in found]
    call = _CALL.pack(
        # The states before the first step are among what the forward saved.
        *_head(request, input, sizes, None, None, weights),
        0,
        0,
        0,
        saved[0].data_ptr(),
        _pointer(grad_output),
        _pointer(grad_h_n),
        _pointer(grad_c_n),
        0 if grad_output is None else grad_output.stride(0),
        *pointers[:3],
        *_in_slots(request, pointers[3:]),
        *_threads(request, rows),
    )
    _run(functions.backward, request, f"backward.{WHOLE}", call)
    return found
