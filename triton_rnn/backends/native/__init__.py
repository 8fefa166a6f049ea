"""The CPU backend: one C file, compiled by the machine's compiler at first use.

`recurrence.c` does one layer, all its directions, the whole sequence, in one call, forward or
backward; here its arguments are put together. The call lets go of the GIL. No compiler, or one that
fails: `supports` says why, and TorchScript runs instead.

`rules.py` says how many of torch's threads share the work, and where others are faster.
"""

import ctypes
import functools
import importlib
import operator
import struct
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from triton_rnn.backends.native import build, rules
from triton_rnn.cells import OwnCell
from triton_rnn.profiling import ranges
from triton_rnn.request import Request

# The one phase that holds all of a layer, in profiles.
WHOLE = "native"
# States that are zeros need not be there.
TAKES_NO_STATE = True
# Which module has the `ExtendedLayer` of this backend.
TAKES_EXTRAS = f"{__name__}.extended"

_SOURCE = Path(__file__).with_name("recurrence.c")
_NORMALIZED = Path(__file__).with_name("normalized.h")
_CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3, "lstm_projected": 4}
_CELLS |= {"gru_normalized": 2, "lstm_normalized": 3}
_USERS = 5
_TYPES = {torch.float32: "float", torch.float64: "double"}
# One library serves the cells whose arithmetic is one: ONLY of recurrence.c, and NORMALIZED.
_KINDS = {
    "rnn_tanh": "RNN_TANH",
    "rnn_relu": "RNN_TANH",
    "gru": "GRU",
    "lstm": "LSTM",
    "lstm_projected": "LSTM",
    "gru_normalized": "GRU_NORMALIZED",
    "lstm_normalized": "LSTM_NORMALIZED",
}

# `struct Call` of recurrence.c, field by field; a pointer is a number of eight bytes. What all
# calls of one request share comes first, and is packed once; what only a backward has comes last.
_SHARED = struct.Struct("9q")
_OWN = struct.Struct("24q")
_BACKWARD = struct.Struct("17q")
_NO_BACKWARD = bytes(_BACKWARD.size)


class Library:
    """The compiled functions for one type of numbers and one kind of cell.

    Args:
        extra, headers: as `build.library`; what a user's cell is, or layer normalization.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        kind: str,
        extra: Sequence[str] = (),
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        flags = (f"-DREAL={_TYPES[dtype]}", f"-DONLY={kind}", *extra)
        found = build.library(_SOURCE, flags, headers)
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
def _built(dtype: torch.dtype, kind: str) -> Library | str:
    only, normalized, _ = kind.partition("_NORMALIZED")
    try:
        if normalized:
            headers = {_NORMALIZED.name: _NORMALIZED.read_text("ascii")}
            return Library(dtype, only, ("-DNORMALIZED",), headers)
        return Library(dtype, kind)
    except build.BuildError as error:
        return str(error)


def library(dtype: torch.dtype, cell: str) -> Library | str:
    """The compiled functions for float32 or float64 and a cell, or why there are none; tried once.

    Args:
        cell: its name.
    """
    with _building:
        return _built(dtype, _KINDS[cell])


def _own() -> ModuleType:
    return importlib.import_module("triton_rnn.backends.native.own")


def _library_of(request: Request) -> Library | str:
    if isinstance(request.cell, OwnCell):
        return _own().library(request.cell, request.dtype)
    return library(request.dtype, request.cell.name)


def supports(request: Request) -> str | None:
    """Why this backend cannot serve a request; None when it can."""
    if request.device.type != "cpu":
        return f"the C loops run on the CPU, the input is on {request.device}"
    if request.dtype not in _TYPES:
        return f"dtype {request.dtype} is not float32 or float64"
    if struct.calcsize("P") != 8:
        return "pointers are not of eight bytes here"
    found = _library_of(request)
    return found if isinstance(found, str) else None


def declines(request: Request) -> str | None:
    """Why `auto` leaves a request to others."""
    # The rule first: no compiler is started for what it would not be used for.
    plain = not isinstance(request.cell, OwnCell)
    if plain and request.device.type == "cpu" and request.dtype in _TYPES:
        reason = rules.slower(request)
        if reason is not None:
            return reason
    return supports(request)


def describe(request: Request, rows: int) -> str:
    """How this backend would go about a request, in a line."""
    found = _library_of(request)
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
    numbers = _functions(request).saved_numbers
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


def _all_dense(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    for weight in weights:
        if not weight.is_contiguous() or weight.is_neg():
            return [_dense(one) for one in weights]
    return weights


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


class _Frame(NamedTuple):
    """What all calls of one request have in common.

    Attributes:
        shared: the first bytes of a Call.
        in_slots: from the pointers of all weights and a 0 at their end to the five places that each
            direction has in a Call.
        per_row: numbers saved for every row; at_end: numbers saved beyond them.
        others: how wide a row of all states besides h is.
    """

    functions: Library
    shared: bytes
    in_slots: Callable[[Sequence[int]], tuple[int, ...]]
    per_row: int
    at_end: int
    others: int


@functools.lru_cache(maxsize=4096)
def _frame(request: Request) -> _Frame:
    functions = _functions(request)
    hidden, output = request.hidden_size, request.output_size
    cell = _USERS if isinstance(request.cell, OwnCell) else _CELLS[request.cell.name]
    others = (request.cell.states - 1) * hidden
    places = [0, 1]
    count = 2
    if request.biased:
        places += [2, 3]
        count = 4
    none = -1
    places += [none] * (4 - count)
    places += [count] if request.cell.fifth else [none]
    count += request.cell.fifth
    slots = [none if at == none else at + d * count for d in range(2) for at in places]
    if request.directions == 1:
        slots[5:] = [none] * 5
    at_end = functions.saved_numbers(cell, 0, hidden, output, request.directions)
    saved = functions.saved_numbers(cell, 1, hidden, output, request.directions)
    shared = _SHARED.pack(
        cell,
        request.seq_len,
        request.batch,
        request.input_size,
        hidden,
        output,
        request.directions,
        request.biased,
        request.needs_grad,
    )
    in_slots = operator.itemgetter(*slots)
    return _Frame(functions, shared, in_slots, saved - at_end, at_end, others)


def _functions(request: Request) -> Library:
    if isinstance(request.cell, OwnCell):
        found = _library_of(request)
    else:
        found = _built(request.dtype, _KINDS[request.cell.name])
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pointers(tensors: Sequence[Tensor | None]) -> list[int]:
    """Of tensors, and a 0 at the end, which stands for what is not there."""
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    pointers.append(0)
    return pointers


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
    frame = _frame(request)
    directions, batch, size = request.directions, request.batch, request.output_size
    # Names keep alive what the pointers point to.
    input = _by_rows(input)
    weights = _all_dense(weights)
    if h_0 is not None:
        h_0 = _dense(h_0)
    if c_0 is not None:
        c_0 = _dense(c_0)
    sizes = None
    # Sizes one by one: a tuple of them takes torch longer.
    if request.packed:
        sizes = array("q", batch_sizes)
        rows = len(input)
        output = input.new_empty(rows, directions * size)
    else:
        rows = request.seq_len * batch
        output = input.new_empty(request.seq_len, batch, directions * size)
    h_n = input.new_empty(directions, batch, size)
    c_n = saved = None
    if frame.others:
        c_n = input.new_empty(directions, batch, frame.others)
    if request.needs_grad:
        saved = input.new_empty(rows * frame.per_row + frame.at_end)
    call = (
        frame.shared
        + _OWN.pack(
            0 if sizes is None else sizes.buffer_info()[0],
            input.data_ptr(),
            *_strides(request, input),
            _pointer(h_0),
            _pointer(c_0),
            *frame.in_slots(_pointers(weights)),
            output.data_ptr(),
            h_n.data_ptr(),
            _pointer(c_n),
            _pointer(saved),
            *_threads(request, rows),
        )
        + _NO_BACKWARD
    )
    _run(frame.functions.forward, request, WHOLE, call)
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
    frame = _frame(request)
    input = _by_rows(input)
    weights = _all_dense(weights)
    sizes = array("q", batch_sizes) if batch_sizes else None
    grad_output = None if grads[0] is None else _by_rows(grads[0])
    grad_h_n = None if grads[1] is None else _dense(grads[1])
    grad_c_n = None if len(grads) < 3 or grads[2] is None else _dense(grads[2])
    rows = len(input) if request.packed else request.seq_len * request.batch
    found: list[Tensor | None] = [
        input.new_empty(rows, request.input_size) if needs[0] else None,
        # Dense, whatever the strides of the states.
        input.new_empty(h_0.shape) if h_0 is not None and needs[1] else None,
        input.new_empty(c_0.shape) if c_0 is not None and needs[2] else None,
    ]
    found += [
        torch.empty_like(weight) if need else None
        for weight, need in zip(weights, needs[3:], strict=True)
    ]
    pointers = _pointers(found)
    call = (
        frame.shared
        + _OWN.pack(
            0 if sizes is None else sizes.buffer_info()[0],
            input.data_ptr(),
            *_strides(request, input),
            # The states before the first step are among what the forward saved.
            0,
            0,
            *frame.in_slots(_pointers(weights)),
            0,
            0,
            0,
            saved[0].data_ptr(),
            *_threads(request, rows),
        )
        + _BACKWARD.pack(
            _pointer(grad_output),
            _pointer(grad_h_n),
            _pointer(grad_c_n),
            0 if grad_output is None else grad_output.stride(0),
            *pointers[:3],
            *frame.in_slots(pointers[3:]),
        )
    )
    _run(frame.functions.backward, request, f"backward.{WHOLE}", call)
    return found
