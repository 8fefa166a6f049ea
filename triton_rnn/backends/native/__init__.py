"""The CPU backend for small sizes: one C file, compiled by the machine's compiler at first use.

`recurrence.c` does one layer, all its directions, the whole sequence, in one call, forward or
backward; here its arguments are put together. The call lets go of the GIL. No compiler, or one that
fails: `supports` says why, and TorchScript runs instead.

One thread. Where several threads and a library's matrix product win, `rules.py` says so and `auto`
takes TorchScript.
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

_SOURCE = Path(__file__).with_name("recurrence.c")
_CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3, "lstm_projected": 4}
_TYPES = {torch.float32: "float", torch.float64: "double"}

# `struct Call` of recurrence.c, field by field; a pointer is a number of eight bytes.
_CALL = struct.Struct("49q")
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
def _team_functions() -> tuple[int, int]:
    """Where libgomp's functions lie that open a team of threads and wait for all of it; or zeros.

    torch brings its OpenMP runtime and makes its symbols global. Its threads are the ones to use: a
    second team beside them would fight them for the cores.
    """
    everything = ctypes.CDLL(None)
    found = (getattr(everything, name, None) for name in ("GOMP_parallel", "GOMP_barrier"))
    addresses = [
        ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found if function
    ]
    return (addresses[0], addresses[1]) if len(addresses) == 2 else (0, 0)


def _threads(request: Request, rows: int) -> tuple[int, int, int]:
    """The last fields of a Call: how many threads, and by what they are had."""
    threads = rules.threads(request, rows)
    if threads == 1:
        return 1, 0, 0
    functions = _team_functions()
    return (threads, *functions) if functions[0] else (1, 0, 0)


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
    if request.batch == 0 or request.hidden_size == 0:
        return "an empty batch"
    if struct.calcsize("P") != 8:
        return "pointers are not of eight bytes here"
    found = library(request.dtype)
    return found if isinstance(found, str) else None


def declines(request: Request) -> str | None:
    """Why `auto` leaves a request to others."""
    # The rule first: a compiler need not be started for a call that is too large anyway.
    if request.device.type == "cpu" and request.batch and request.dtype in _TYPES:
        reason = rules.too_large(request)
        if reason is not None:
            return reason
    return supports(request)


def describe(request: Request, rows: int) -> str:
    """How this backend would go about a request, in a line."""
    found = library(request.dtype)
    if isinstance(found, str):
        return found
    lanes = found.lanes()
    directions = " in turn" if request.directions == 2 else ""
    return (
        f"one C call, vectors of {lanes}, {rows} rows, "
        f"{request.directions} direction{'s' if directions else ''}{directions}"
    )


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


def _head(
    request: Request,
    input: Tensor,
    sizes: "array[int] | None",
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[int, ...]:
    """The fields of a Call up to the weights."""
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
        h_0.data_ptr(),
        0 if c_0 is None else c_0.data_ptr(),
        *_in_slots(request, [weight.data_ptr() for weight in weights]),
    )


def _functions(dtype: torch.dtype) -> Library:
    found = library(dtype)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def forward(
    request: Request,
    input: Tensor,
    batch_sizes: Sequence[int],
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """One layer, all its directions, the whole sequence; as `backends.torchscript.forward`.

    Raises:
        MemoryError: there is no memory for the call's buffers.
    """
    functions = _functions(request.dtype)
    # Names keep alive what the pointers point to.
    input, h_0 = _by_rows(input), _dense(h_0)
    c_0 = None if c_0 is None else _dense(c_0)
    weights = [_dense(weight) for weight in weights]
    sizes = array("q", batch_sizes) if batch_sizes else None
    output = input.new_empty((*input.shape[:-1], request.directions * request.output_size))
    results = [output, torch.empty_like(h_0)]
    if c_0 is not None:
        results.append(torch.empty_like(c_0))
    saved = []
    rows = len(input) if request.packed else request.seq_len * request.batch
    if request.needs_grad:
        cell, hidden, size = _CELLS[request.cell.name], request.hidden_size, request.output_size
        count = functions.saved_numbers(cell, rows, hidden, size, request.directions)
        saved.append(input.new_empty(count))
    call = _CALL.pack(
        *_head(request, input, sizes, h_0, c_0, weights),
        output.data_ptr(),
        results[1].data_ptr(),
        0 if c_0 is None else results[2].data_ptr(),
        saved[0].data_ptr() if saved else 0,
        *_NO_BACKWARD,
        *_threads(request, rows),
    )
    if ranges.on():
        with ranges.phase(request.cell, WHOLE, "both"):
            failed = functions.forward(call)
    else:
        failed = functions.forward(call)
    if failed:
        raise MemoryError("triton_rnn: no memory for the buffers of a recurrent layer")
    return tuple(results), saved


def backward(
    request: Request,
    input: Tensor,
    batch_sizes: Sequence[int],
    h_0: Tensor,
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
    input, h_0 = _by_rows(input), _dense(h_0)
    c_0 = None if c_0 is None else _dense(c_0)
    weights = [_dense(weight) for weight in weights]
    sizes = array("q", batch_sizes) if batch_sizes else None
    grad_output = None if grads[0] is None else _by_rows(grads[0])
    grad_h_n = None if grads[1] is None else _dense(grads[1])
    grad_c_n = None if c_0 is None or grads[2] is None else _dense(grads[2])
    rows = len(input) if request.packed else request.seq_len * request.batch
    found: list[Tensor | None] = [
        input.new_empty((rows, request.input_size)) if needs[0] else None,
        torch.empty_like(h_0) if needs[1] else None,
        torch.empty_like(c_0) if c_0 is not None and needs[2] else None,
    ]
    found += [
        torch.empty_like(weight) if need else None
        for weight, need in zip(weights, needs[3:], strict=True)
    ]
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in found]
    call = _CALL.pack(
        *_head(request, input, sizes, h_0, c_0, weights),
        0,
        0,
        0,
        saved[0].data_ptr(),
        0 if grad_output is None else grad_output.data_ptr(),
        0 if grad_h_n is None else grad_h_n.data_ptr(),
        0 if grad_c_n is None else grad_c_n.data_ptr(),
        0 if grad_output is None else grad_output.stride(0),
        *pointers[:3],
        *_in_slots(request, pointers[3:]),
        *_threads(request, rows),
    )
    if ranges.on():
        with ranges.phase(request.cell, f"backward.{WHOLE}", "both"):
            failed = functions.backward(call)
    else:
        failed = functions.backward(call)
    if failed:
        raise MemoryError("triton_rnn: no memory for the buffers of a recurrent layer's backward")
    return found
