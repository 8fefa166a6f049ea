"""The CPU backend: loops in C, compiled by the machine's compiler at first use.

`recurrence.c` does one layer, all its directions, the whole sequence, in one call, forward or
backward; here its arguments are put together, by `calls.c` where that can be. The call lets go
of the GIL. No compiler, or one that fails: `supports` says why, and TorchScript runs instead.

`rules.py` says how many of torch's threads share the work, and where others are faster.
"""

import contextlib
import ctypes
import functools
import importlib
import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_rnn.backends import locks
from triton_rnn.backends.native import calls, rules
from triton_rnn.backends.native.parts import TYPES, Function, Library, parts_of
from triton_rnn.cells import OwnCell
from triton_rnn.profiling import ranges
from triton_rnn.request import Request

# The one phase that holds all of a layer, in profiles.
WHOLE = "native"
# States that are zeros need not be there.
TAKES_NO_STATE = True
# Of the input and W_ih, see `layer._order`.
READS = "as wanted"
# A backward reads none of the results, see `op`.
SAVES_ALL = True
# Which module has the `ExtendedLayer` of this backend.
TAKES_EXTRAS = f"{__name__}.extended"

# What `call` of calls.c answers where it leaves a call to `_call`; no place, among `places`.
_UNUSUAL = 2
_NOWHERE = 127
_CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3, "lstm_projected": 4}
_CELLS |= {"gru_normalized": 2, "lstm_normalized": 3}
_USERS = 5
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

# `Call` of call.h, field by field; a pointer is a number of eight bytes. What all calls of one
# request share comes first, and is packed once; what only a backward has comes last.
_SHARED = struct.Struct("10q")
_OWN = struct.Struct("20q")
_TEAM = struct.Struct("3q")
_BACKWARD = struct.Struct("17q")
_NO_BACKWARD = bytes(_BACKWARD.size)

_UNWATCHED = contextlib.nullcontext()


@functools.cache
def _team_functions() -> tuple[int, ...]:
    """Where libgomp's functions lie that open a team of threads and tell its size.

    Empty where they are not all there. torch brings its OpenMP runtime and makes its symbols
    global. Its threads are the ones to use: a second team beside them would fight them for the
    cores.
    """
    everything = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_num_threads")
    found = [getattr(everything, name, None) for name in names]
    if None in found:
        return ()
    return tuple(
        ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found if function
    )


_ALONE = _TEAM.pack(1, 0, 0)


def _team(request: Request, teams: dict[tuple[int, int], bytes], rows: int) -> bytes:
    """The fields of a Call that say how many threads, and by what they are had."""
    # What the rule reads.
    key = (rules.available(), rows // request.seq_len)
    found = teams.get(key)
    if found is None:
        threads = rules.threads(request, rows)
        functions = _team_functions() if threads > 1 else ()
        found = teams[key] = _TEAM.pack(threads, *functions) if functions else _ALONE
    return found


def _quick() -> Callable[..., int] | None:
    """`call` of `calls.c`, or None where there is none: `_call` does the same."""
    found = calls.functions()
    return None if found is None else found.call


def known() -> Callable[..., Any] | None:
    """`known` of `calls.c`, or None where there is none."""
    found = calls.functions()
    return None if found is None else found.known


_making = locks.Once()


@functools.cache
def _made(dtype: torch.dtype, kind: str) -> Library:
    only, normalized, _ = kind.partition("_NORMALIZED")
    return Library(dtype, only, ("-DNORMALIZED",) if normalized else ())


def library(dtype: torch.dtype, cell: str) -> Library | str:
    """The functions for float32 or float64 and a cell, or why there are none.

    Args:
        cell: its name.
    """
    with _making.held():
        found = _made(dtype, _KINDS[cell])
    return found.need(("FORWARD",)) or found


def _own() -> ModuleType:
    return importlib.import_module("triton_rnn.backends.native.own")


def _library_of(request: Request) -> Library:
    if isinstance(request.cell, OwnCell):
        found: Library = _own().library(request.cell, request.dtype)
        return found
    with _making.held():
        return _made(request.dtype, _KINDS[request.cell.name])


def supports(request: Request) -> str | None:
    """Why this backend cannot serve a request; None when it can."""
    if request.device.type != "cpu":
        return f"the C loops run on the CPU, the input is on {request.device}"
    if request.dtype not in TYPES:
        return f"dtype {request.dtype} is not float32 or float64"
    if struct.calcsize("P") != 8:
        return "pointers are not of eight bytes here"
    return _library_of(request).need(parts_of(request))


def declines(request: Request) -> str | None:
    """Why `auto` leaves a request to others."""
    # The rule first: no compiler is started for what it would not be used for.
    plain = not isinstance(request.cell, OwnCell)
    if plain and request.device.type == "cpu" and request.dtype in TYPES:
        reason = rules.slower(request)
        if reason is not None:
            return reason
    return supports(request)


def slower_than_torchs_cell(request: Request) -> bool:
    """Whether `auto` leaves the call of a cell to torch's own cells."""
    # What makes a call without a backward cheap is what calls.c has learned.
    alone = not request.needs_grad and known() is None
    return alone or rules.slower_than_torchs_cell(request)


def describe(request: Request, rows: int) -> str:
    """How this backend would go about a request, in a line."""
    found = _library_of(request)
    reason = found.need(parts_of(request))
    if reason is not None:
        return reason
    threads = rules.threads(request, rows)
    directions = "1 direction"
    if request.directions == 2:
        side_by_side = threads > 1 and rules.apart(request)
        directions = "2 directions " + ("side by side" if side_by_side else "in turn")
    return ", ".join(
        (
            f"one C call, vectors of {found.lanes()}",
            f"{threads} thread{'s' if threads > 1 else ''}",
            directions,
        )
    )


def saved_shapes(request: Request, seq_len: int, batch: int) -> list[tuple[int, ...]]:
    """Shapes of what forward saves, for a padded request; T and N may be torch's symbols."""
    numbers = _library_of(request).saved_numbers
    fixed = (int(request.hidden_size), int(request.output_size), int(request.directions))
    cell = _CELLS[request.cell.name]
    none, one = numbers(cell, 0, *fixed), numbers(cell, 1, *fixed)
    return [(none + (one - none) * seq_len * batch,)]


def saved_of(request: Request, results: Sequence[Tensor], shown: Sequence[Tensor]) -> list[Tensor]:
    """What forward has saved, from its results and the tensors of `saved_shapes`."""
    return list(shown)


def _lies_somewhere(tensor: Tensor) -> bool:
    """Whether its numbers are in memory as they are: no minus to do, none of autograd's zeros.

    Raises:
        RuntimeError: in torch's words, if there is no memory: its storage was freed.
    """
    if tensor.is_neg() or tensor._is_zerotensor():
        return False
    if not tensor.data_ptr() and tensor.numel():
        raise RuntimeError(
            "The tensor has a non-zero number of elements, but its data is not allocated yet."
        )
    return True


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and _lies_somewhere(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _by_rows(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension is dense; the others may have any stride."""
    if (tensor.stride(-1) == 1 or tensor.size(-1) == 1) and _lies_somewhere(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


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
        places: which weight is at each of the five places that each direction has in a Call.
        teams: bytes of a Call that were made already; see `_team`.
        per_row: numbers saved for every row; at_end: numbers saved beyond them.
        others: how wide a row of all states besides h is.
    """

    functions: Library
    shared: bytes
    places: bytes
    teams: dict[tuple[int, int], bytes]
    per_row: int
    at_end: int
    others: int


@functools.lru_cache(maxsize=4096)
def _frame(request: Request) -> _Frame:
    functions = _library_of(request)
    hidden, output = request.hidden_size, request.output_size
    cell = _USERS if isinstance(request.cell, OwnCell) else _CELLS[request.cell.name]
    others = (request.cell.states - 1) * hidden
    places = [0, 1]
    count = 2
    if request.biased:
        places += [2, 3]
        count = 4
    places += [_NOWHERE] * (4 - count)
    places += [count] if request.cell.fifth else [_NOWHERE]
    count += request.cell.fifth
    second = [at if at == _NOWHERE else at + count for at in places]
    places += second if request.directions == 2 else [_NOWHERE] * 5
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
        rules.apart(request),
    )
    return _Frame(functions, shared, bytes(places), {}, saved - at_end, at_end, others)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _in_places(tensors: Sequence[Tensor | None], places: bytes) -> list[int]:
    """The pointers of weights, or of their gradients, at the places that they have in a Call."""
    pointers = list(map(_pointer, tensors))
    return [pointers[at] if at < len(pointers) else 0 for at in places]


def _call(
    function: Function,
    request: Request,
    team: bytes,
    sizes: int,
    tensors: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    results: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    found: Sequence[Tensor | None] | None,
    extras: bytes | None,
) -> int:
    """What `call` of calls.c does, for any tensors: 0, or another number without memory."""
    frame = _frame(request)
    # Names keep alive what the pointers point to.
    input, h_0, c_0 = tensors
    assert input is not None
    input = _by_rows(input)
    h_0 = None if h_0 is None else _dense(h_0)
    c_0 = None if c_0 is None else _dense(c_0)
    weights = [_dense(weight) for weight in weights]
    grad_output, *others = grads
    grad_output = None if grad_output is None else _by_rows(grad_output)
    others = [None if grad is None else _dense(grad) for grad in others]
    own = _OWN.pack(
        sizes,
        input.data_ptr(),
        *_strides(request, input),
        _pointer(h_0),
        _pointer(c_0),
        *_in_places(weights, frame.places),
        *map(_pointer, results),
    )
    backward = _NO_BACKWARD
    if found is not None:
        backward = _BACKWARD.pack(
            _pointer(grad_output),
            *map(_pointer, others),
            0 if grad_output is None else grad_output.stride(0),
            *map(_pointer, found[:3]),
            *_in_places(found[3:], frame.places),
        )
    call = frame.shared + own + team + backward
    return function.run(call) if extras is None else function.run(call, extras)


def run(
    function: Function,
    phase: str,
    request: Request,
    sizes: "array[int] | None",
    rows: int,
    tensors: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    results: Sequence[Tensor | None],
    grads: Sequence[Tensor | None] = (None, None, None),
    found: Sequence[Tensor | None] | None = None,
    extras: bytes | None = None,
) -> None:
    """Call a function of `recurrence.c`'s.

    Args:
        phase: its name in profiles.
        sizes: rows of every step of a packed batch.
        rows: of all steps together.
        tensors: input, h_0 and c_0.
        results: output, h_n, c_n and saved, which a forward writes; a backward reads the last.
        grads: of output, as rows, of h_n and of c_n.
        found: what a backward writes, dense: gradients of input, h_0, c_0 and the weights.
        extras: the bytes of an Extras, for a function that takes them.

    Raises:
        MemoryError: there is no memory for the call's buffers.
    """
    frame = _frame(request)
    team = _team(request, frame.teams, rows)
    at = 0 if sizes is None else sizes.buffer_info()[0]
    quick, outcome = _quick(), _UNUSUAL
    with ranges.phase(request.cell, phase, "both") if ranges.on() else _UNWATCHED:
        if quick is not None:
            outcome = quick(
                function.address,
                frame.shared,
                frame.places,
                team,
                at,
                *tensors,
                weights,
                *results,
                *grads,
                found,
                extras,
            )
        if outcome == _UNUSUAL:
            outcome = _call(
                function, request, team, at, tensors, weights, results, grads, found, extras
            )
    if outcome:
        raise MemoryError("triton_rnn: no memory for the buffers of a recurrent layer")


def wanted(
    request: Request,
    rows: int,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Room for the gradients of input, h_0, c_0 and every weight, as far as `needs` says, dense."""
    found: list[Tensor | None] = [
        # Sizes one by one: a tuple of them takes torch longer.
        input.new_empty(rows, request.input_size) if needs[0] else None,
        input.new_empty(h_0.shape) if h_0 is not None and needs[1] else None,
        input.new_empty(c_0.shape) if c_0 is not None and needs[2] else None,
    ]
    found += [
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need else None
        for weight, need in zip(weights, needs[3:], strict=True)
    ]
    return found


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
    sizes = None
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
    run(
        frame.functions.forward,
        WHOLE,
        request,
        sizes,
        rows,
        (input, h_0, c_0),
        weights,
        (output, h_n, c_n, saved),
    )
    results = (output, h_n) if c_n is None else (output, h_n, c_n)
    return results, [] if saved is None else [saved]


_FORMS = {
    "padded": calls.PADDED,
    "batch_first": calls.BATCH_FIRST,
    "unbatched": calls.UNBATCHED,
    "cell": calls.CELL,
    "unbatched cell": calls.UNBATCHED_CELL,
    "packed": calls.PACKED,
}


# Has `known` answer that a call is torch's own.
leave = calls.leave


def _places_without_empty(request: Request, places: bytes) -> bytes:
    """Which weight is at each place, if a user's cell has no tensors for those that are empty."""
    cell = request.cell
    if not isinstance(cell, OwnCell):
        return places
    rows = (cell.gates, cell.products, cell.gates, cell.products, cell.unit_weights)
    there = [at != _NOWHERE and rows[place % 5] > 0 for place, at in enumerate(places)]
    return bytes(sum(there[:place]) if one else _NOWHERE for place, one in enumerate(there))


def remember(key: bytes, decided: Any, rows: int) -> None:
    """Have `known` tell how calls of a kind are done; it does them, if that is all in C.

    Args:
        key: what the call is known by.
        decided: a `known.Decided`.
        rows: of all its steps together; other calls of the kind have as many in a step on average.
    """
    request, layers, form = decided.request, decided.layers, _FORMS.get(decided.form)
    elsewhere = decided.backend is not sys.modules[__name__]
    drops = decided.drop > 0 and layers > 1
    if elsewhere or form is None or request.needs_grad or drops or layers > calls.MOST_LAYERS:
        calls.learn(key, decided)
        return
    if form != calls.PACKED:
        # A cell is a layer of one step, whose rows it calls packed.
        request = request._replace(packed=False)
    width = request.directions * request.output_size
    parts = []
    for number in range(layers):
        if number == 1:
            request = request._replace(input_size=width)
        frame = _frame(request)
        team = _team(request, frame.teams, rows)
        places = _places_without_empty(request, frame.places)
        parts.append((frame.functions.forward.address, team, frame.shared, places))
    calls.learn(
        key,
        calls.record(
            form,
            request.directions,
            sum(at != _NOWHERE for at in places),
            request.seq_len,
            request.batch,
            (width, request.output_size, frame.others),
            parts,
        ),
    )


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
    rows = len(input) if request.packed else request.seq_len * request.batch
    found = wanted(request, rows, input, h_0, c_0, weights, needs)
    run(
        _frame(request).functions.backward,
        f"backward.{WHOLE}",
        request,
        array("q", batch_sizes) if batch_sizes else None,
        rows,
        # The states before the first step are among what the forward saved, but of these cells.
        (input, h_0 if request.cell.name in ("rnn_tanh", "rnn_relu") else None, None),
        weights,
        (None, None, None, saved[0]),
        grads if len(grads) == 3 else (*grads, None),
        found,
    )
    return found
