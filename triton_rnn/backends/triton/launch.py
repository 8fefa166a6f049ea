"""Launching the kernels: what each is compiled for, and what a device must hold for them."""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from triton_rnn import dispatch, health
from triton_rnn.backends.triton import own
from triton_rnn.backends.triton.launcher import Launcher
from triton_rnn.cells import Cell, OwnCell, RegularizedCell
from triton_rnn.kernels.backward import recurrence_backward
from triton_rnn.kernels.cells import KERNEL_CELLS, KernelCell
from triton_rnn.kernels.chips import CHIPS, INTERPRETER, Chip
from triton_rnn.kernels.compiler import NARROW_PRODUCTS_APART
from triton_rnn.kernels.forward import recurrence_forward
from triton_rnn.kernels.plan import Plan, Shape, room_bytes
from triton_rnn.kernels.planner import plan
from triton_rnn.request import Request

# A wait looks so often before it gives up: seconds, where a step takes microseconds.
POLLS = 1 << 21

# The one variant that plans may be of, for tests and comparisons.
variant: str | None = os.environ.get("TRITON_RNN_VARIANT") or None

# Of the compiler, for every kernel: a product and a sum are one instruction, which Triton 3.10 will
# no longer take for granted.
OPTIONS = {"enable_fp_fusion": True}


def kernel_cell(cell: Cell) -> KernelCell:
    """The cell of the recurrence; a projected LSTM is a plain one with W_hh W_hr for W_hh."""
    if isinstance(cell, OwnCell):
        return own.kernel_cell(cell)
    if isinstance(cell, RegularizedCell):
        return _regularized(cell)
    return KERNEL_CELLS["lstm" if cell.projected else cell.name]


@functools.cache
def _regularized(cell: RegularizedCell) -> KernelCell:
    assert cell.plain is not None
    found = KERNEL_CELLS[cell.plain.name] if cell.program is None else own.kernel_cell(cell)
    return replace(found, locked=cell.locked, shows_c=cell.shows_c)


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The device as the planner sees it."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    limits = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    hip = torch.version.hip is not None
    architecture: int | str = 10 * properties.major + properties.minor
    if hip:
        architecture = properties.gcnArchName.split(":")[0]
    known = [c for c in CHIPS.values() if c.architecture == architecture]
    return Chip(
        properties.name,
        "hip" if hip else "cuda",
        architecture,
        properties.multi_processor_count,
        limits["max_shared_mem"],
        known[0].matrix_mflops if known else CHIPS["A100"].matrix_mflops,
        narrow_apart=properties.major == 10 and not hip and NARROW_PRODUCTS_APART,
    )


def shape_of(
    cell: KernelCell, kernel: str, hidden_size: int, directions: int, batch: int, itemsize: int,
    copies: int,
) -> Shape:  # fmt: skip
    """One kernel over one layer, as the planner sees it."""
    numbers = cell.products + 2 * cell.inputs + cell.saved
    if kernel == "backward":
        numbers = cell.saved + cell.carried + cell.width
    return Shape(
        kernel, cell.products, hidden_size, directions, batch, itemsize, copies, numbers
    )  # fmt: skip


def plan_of(request: Request, kernel: str) -> Plan | None:
    """The plan of a request's forward or backward; None if nothing fits the chip."""
    chip = chip_of(request.device)
    shape = shape_of(
        kernel_cell(request.cell),
        kernel,
        request.hidden_size,
        request.directions,
        request.batch,
        request.dtype.itemsize,
        copies(precision(request.dtype, chip.backend)),
    )
    return plan(shape, chip, variant)


def precision(dtype: torch.dtype, backend: str) -> str:
    """How products of float32 are made: as cuDNN's switch for recurrent layers says.

    Without TF32 each product is three of them, which keeps 22 bits: on tensor cores there is no
    other float32, and elsewhere W_hh would not stay on the chip.
    """
    if backend != "cuda" or dtype != torch.float32:
        return "ieee"
    return "tf32" if dispatch.float32_precision() == "tf32" else "tf32x3"


def copies(precision: str) -> int:
    """How many of W_hh a precision keeps on the chip."""
    return 2 if precision == "tf32x3" else 1


def ptx(dtype: torch.dtype, backend: str) -> str:
    """What `functions` are compiled for; the interpreter follows the formulas of NVIDIA's."""
    return "" if backend == "hip" else str(dtype).removeprefix("torch.")


def _constants(
    cell: KernelCell, plan: Plan, hidden_size: int, directions: int, packed: bool, precision: str,
    ptx: str,
) -> dict[str, Any]:  # fmt: skip
    """What both recurrences are compiled for."""
    return {
        "GATES": cell.products,
        "H": hidden_size,
        "D": directions,
        "AT_ONCE": plan.at_once,
        "BLOCK_H": plan.block_h,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "SPLITS": plan.splits,
        "TOGETHER": plan.together,
        "EXCHANGE": plan.exchange,
        "ON_CHIP": plan.on_chip,
        "IN_REGISTERS": plan.in_registers,
        "STREAMED": plan.streamed,
        "PAUSE": plan.pause,
        "SUMS": plan.sums,
        "HAS_C": cell.has_c,
        "PACKED": packed,
        "PRECISION": precision,
        "PTX": ptx,
    }


def forward_constants(
    cell: KernelCell, plan: Plan, hidden_size: int, directions: int, save: bool, biased: bool,
    packed: bool, precision: str, ptx: str,
) -> dict[str, Any]:  # fmt: skip
    """What `recurrence_forward` is compiled for."""
    return {
        **_constants(cell, plan, hidden_size, directions, packed, precision, ptx),
        "CELL": cell.forward,
        "INPUTS": cell.inputs,
        "ROW": cell.row if save else cell.inputs,
        "VECTORS": cell.biases + cell.units,
        "ABSENT": 0 if biased else cell.biases,
        "SAVED": cell.saved if save else 0,
        "SAVE_C": cell.shows_c or (save and cell.keeps_c),
        "LOCKED": cell.locked,
    }


def backward_constants(
    cell: KernelCell, plan: Plan, hidden_size: int, directions: int, packed: bool, precision: str,
    ptx: str,
) -> dict[str, Any]:  # fmt: skip
    """What `recurrence_backward` is compiled for."""
    return {
        **_constants(cell, plan, hidden_size, directions, packed, precision, ptx),
        "FACTORS": cell.factors,
        "CELL": cell.backward,
        "TURN": cell.turn,
        "WIDTH": cell.width,
        "SAVED": cell.saved,
        "ROW": cell.row,
        "UNITS": cell.units,
        "GRAD_C": cell.shows_c,
        "LOCKED": cell.locked,
    }


def recurrence_options(plan: Plan) -> dict[str, Any]:
    """Options of the compiler for a recurrence."""
    options: dict[str, Any] = {**OPTIONS, "num_warps": plan.warps, "num_stages": 3}
    if torch.version.hip is None:
        # ptxas would rather spill a little than take all registers; one program runs at a time.
        options["maxnreg"] = 255
    if plan.exchange in ("flag", "barrier"):
        options["launch_cooperative_grid"] = True
    return options


# The batch ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """Where the rows of a packed batch lie, on the device.

    Attributes:
        batch_sizes: (T,) int32, rows of every step. offsets: (T,) int64, their first row.
        earlier: (R - N,) int64: for every row after the first N, the one a step before it.
        last: (N,) int64: the last row of every sequence.
        stream: on which they were copied to the device, and ready: recorded behind that; None on
            the CPU.
    """

    batch_sizes: Tensor
    offsets: Tensor
    earlier: Tensor
    last: Tensor
    stream: torch.cuda.Stream | None
    ready: torch.cuda.Event | None


# What a captured graph reads must never be freed; that of other calls is kept for the next ones.
_captured: list[Packing] = []


def packing_of(batch_sizes: Sequence[int], device: torch.device) -> Packing:
    """The packing of a batch, from the last few that were asked for if it is among them.

    Raises:
        RuntimeError: while a CUDA graph is captured, if it is not among them: the copy would be
            captured, and what it copies from would be gone when the graph is replayed.
    """
    key = tuple(batch_sizes)
    if device.type == "cpu":
        return _packing(key, device)
    if dispatch.capturing(device):
        misses = _packing.cache_info().misses
        packing = _packing(key, device)
        if _packing.cache_info().misses > misses:
            _packing.cache_clear()
            raise RuntimeError(
                "a packed batch is captured in a CUDA graph that was not run before: run the "
                "module on it once outside the graph"
            )
        _captured.append(packing)
        return packing
    packing = _packing(key, device)
    stream = torch.cuda.current_stream(device)
    if stream != packing.stream:
        assert packing.ready is not None
        stream.wait_event(packing.ready)
        # Once it is no longer among the last few, its memory is free to the stream it was made on,
        # where nobody knows that this one still reads it.
        for tensor in (packing.batch_sizes, packing.offsets, packing.earlier, packing.last):
            tensor.record_stream(stream)
    return packing


@functools.lru_cache(maxsize=32)
def _packing(batch_sizes: tuple[int, ...], device: torch.device) -> Packing:
    sizes = torch.tensor(batch_sizes, device="cpu")
    offsets = sizes.cumsum(0) - sizes
    batch, rows = batch_sizes[0], sum(batch_sizes)
    before = sizes[:-1].repeat_interleave(sizes[1:], output_size=rows - batch)
    earlier = torch.arange(batch, rows, device="cpu") - before
    # Of sequence n as many steps as have more than n sequences.
    numbers = torch.arange(batch, device="cpu")
    lengths = len(sizes) - torch.searchsorted(sizes.flip(0), numbers, right=True)
    last = offsets[lengths - 1] + numbers
    tensors = [sizes.int(), offsets, earlier, last]
    stream = ready = None
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        # From pinned memory the copy does not wait for what the device is busy with.
        tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
        ready = torch.cuda.Event()
        ready.record(stream)
    return Packing(tensors[0], tensors[1], tensors[2], tensors[3], stream, ready)


# Failed waits -------------------------------------------------------------------------------------

_KERNELS = ("forward", "backward")


class _Errors(NamedTuple):
    """The first step + 1 at which a wait of each kernel ran out on a device, zero if none did.

    Attributes:
        words: (2,) int64, pinned memory, which the device writes and the host reads without
            waiting for the device.
        seen: the same memory, for a look that costs no operator.
    """

    words: Tensor
    seen: ctypes.Array[ctypes.c_int64]


_errors: dict[torch.device, _Errors] = {}
# What one thread's launches write is what all look at.
_making_errors = threading.Lock()


def _errors_of(device: torch.device) -> _Errors:
    found = _errors.get(device)
    if found is not None:
        return found
    with _making_errors:
        if device not in _errors:
            pinned = device.type == "cuda"
            words = torch.zeros(len(_KERNELS), dtype=torch.int64, device="cpu", pin_memory=pinned)
            seen = (ctypes.c_int64 * len(_KERNELS)).from_address(words.data_ptr())
            _errors[device] = _Errors(words, seen)
    return _errors[device]


def _error_words(device: torch.device) -> Tensor:
    return _errors_of(device).words


def raise_failed_wait(device: torch.device) -> None:
    """Raise what an earlier launch on the device has left behind.

    Raises:
        RuntimeError: if one of its programs waited in vain; names kernel and step.
    """
    forward, backward = _errors_of(device).seen
    if not (forward or backward):
        return
    words = _error_words(device)
    failed = [
        f"{name} recurrence at step {int(word) - 1}"
        for name, word in zip(_KERNELS, words.tolist(), strict=True)
        if word
    ]
    # Not by an operator: the words may have been made in inference mode.
    for place in range(len(_KERNELS)):
        _errors_of(device).seen[place] = 0
    message = (
        f"a Triton program waited in vain for the others: {', '.join(failed)}. The results of that "
        "call are NaN. Its programs did not all run at the same time, or one of them died"
    )
    health.report("triton", device, message)
    raise RuntimeError(message)


# Launches -----------------------------------------------------------------------------------------


@functools.cache
def nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What stands for an argument that a kernel does not read.

    It is kept, so it is not of the device's memory: the first call may be one that warms up a CUDA
    graph, whose memory nothing may stay in but results.
    """
    if device.type == "cuda":
        return torch.empty(1, dtype=dtype, device="cpu", pin_memory=True)
    return torch.empty(1, dtype=dtype, device=device)


# Of each device and dtype the blocks that `zeros` has made. None is ever freed: a launch on another
# stream than the block's may still be reading it.
_zeros: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}


def zeros(device: torch.device, dtype: torch.dtype, count: int) -> Tensor:
    """At least `count` zeros to be read, in the place of states that are not given.

    Calls share one block, so that there is nothing to launch for them.
    """
    blocks = _zeros.setdefault((device, dtype), [])
    if blocks and blocks[-1].numel() >= count:
        return blocks[-1]
    if dispatch.capturing(device):
        # Its memory is the graph's, and it is filled when the graph runs.
        return torch.zeros(count, dtype=dtype, device=device)
    block = torch.zeros(1 << (count - 1).bit_length(), dtype=dtype, device=device)
    if device.type == "cuda":
        # The next call that reads it may be on another stream.
        torch.cuda.current_stream(device).synchronize()
    blocks.append(block)
    return block


def _unwritten(buffer: Tensor) -> None:
    """Fill a buffer with the pattern that says: not written yet (`exchange.UNWRITTEN`)."""
    buffer.view(torch.int32).fill_(-1)


def _in_pieces(tensor: Tensor) -> Tensor:
    """A tensor that can be read 16 bytes at a time: itself, as a rule."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def pair(tensors: Sequence[Tensor | None], missing: Tensor) -> tuple[Tensor, Tensor]:
    first = missing if tensors[0] is None else tensors[0]
    second = tensors[-1]
    return first, missing if second is None else second


@dataclass(frozen=True)
class Ready:
    """A recurrence of one request, all decided.

    Attributes:
        cell: as the kernels see it.
        plan: how it is launched; launcher: by what.
        states: the shape of a state, (D, N, H).
        missing: stands for a tensor that the kernel does not read.
        unpacked: stand for the batch sizes, their offsets, and counters.
        launches: of every launch the arguments behind the tensors; of one per step, all steps'.
    """

    cell: KernelCell
    plan: Plan
    launcher: Launcher
    states: tuple[int, int, int]
    missing: Tensor
    unpacked: tuple[Tensor, Tensor, Tensor]
    launches: tuple[tuple[Any, ...], ...]


def ready(request: Request, kernel: str) -> Ready:
    """The forward or backward recurrence of a request that `supports` has found a plan for."""
    asked = precision(request.dtype, chip_of(request.device).backend)
    return _ready(plan_of, request, kernel, asked, variant, POLLS)


@functools.lru_cache(maxsize=4096)
def _ready(
    planner: Callable[[Request, str], Plan | None],
    request: Request,
    kernel: str,
    precision: str,
    variant: str | None,
    polls: int,
) -> Ready:
    """All that decides is among the arguments: also whose plans these are, and of which variant."""
    plan = planner(request, kernel)
    assert plan is not None, "supports() has found one"
    cell, device = kernel_cell(request.cell), request.device
    size, directions = request.hidden_size, request.directions
    exactness = ptx(request.dtype, chip_of(device).backend)
    function: Any = recurrence_backward
    last_step = request.seq_len + 1
    if kernel == "forward":
        function = recurrence_forward
        last_step = request.seq_len
        constants = forward_constants(
            cell,
            plan,
            size,
            directions,
            request.needs_grad,
            request.biased,
            request.packed,
            precision,
            exactness,
        )
    else:
        constants = backward_constants(
            cell, plan, size, directions, request.packed, precision, exactness
        )
    # Of a wait that ran out; pinned memory: Triton asks where the device sees it.
    error = _error_words(device)[_KERNELS.index(kernel) :]
    counters = nothing(device, torch.int32)
    return Ready(
        cell,
        plan,
        _launcher(
            device,
            request.dtype,
            function,
            tuple(constants.items()),
            tuple(recurrence_options(plan).items()),
            1 if chip_of(device) == INTERPRETER else plan.cluster,
        ),
        (directions, request.batch, size),
        nothing(device, request.dtype),
        (counters, nothing(device, torch.int64), counters),
        tuple(
            (error, request.seq_len, request.batch, first, 0, last_step, plan.slots, polls)
            for first in range(0, directions, plan.at_once)
        ),
    )


@functools.lru_cache(maxsize=1024)
def _launcher(
    device: torch.device,
    dtype: torch.dtype,
    kernel: Any,
    constants: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    cluster: int,
) -> Launcher:
    """One for all lengths and batches: a launcher's first launch is slow."""
    return Launcher(kernel, dict(constants), dict(options), cluster)


def _each_step(launches: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Launches of one step each in the place of launches of all."""
    for error, seq_len, batch, first, begin, end, *others in launches:
        for step in range(begin, end):
            yield error, seq_len, batch, first, step, step + 1, *others


def _float32_copy(state: Tensor, like: Tensor) -> Tensor:
    """A state, or the first of a block of zeros, in the shape of another."""
    return state.flatten()[: like.numel()].view_as(like).to(torch.float32, copy=True)


def _rooms(ready: Ready, request: Request) -> Tensor:
    """The interpreter's stand-in for the rooms of all programs (see `kernels.cluster`)."""
    plan = ready.plan
    shape = shape_of(
        ready.cell, plan.kernel, request.hidden_size, request.directions, request.batch,
        request.dtype.itemsize, 1,
    )  # fmt: skip
    words = plan.programs * room_bytes(shape, plan) // 4
    return torch.full((words,), -1, dtype=torch.int32, device="cpu")


def _launch_all(
    ready: Ready,
    request: Request,
    tensors: tuple[Tensor, ...],
    states: tuple[Tensor, Tensor, Tensor, Tensor],
    packing: Packing | None,
) -> None:
    """Launch a recurrence: once, once per direction, or once per step.

    Args:
        tensors: the arguments before the states. states: h and c, or their gradients, before and
            after; what is missing for the c of a cell without.
    """
    device, exchange = request.device, ready.plan.exchange
    sizes, offsets, counters = ready.unpacked
    if packing is not None:
        sizes, offsets = packing.batch_sizes, packing.offsets
    given, launches = states, iter(ready.launches)
    if exchange == "launch":
        launches = _each_step(launches)
        # The states between the launches.
        h, c = (_float32_copy(states[i], states[i + 2]) for i in range(2))
        states = (h, c, h, c)
    if exchange == "cluster" and chip_of(device) == INTERPRETER:
        counters = _rooms(ready, request)
    everything = (*tensors, *states, sizes, offsets, counters)
    for numbers in launches:
        if exchange == "barrier":
            count = ready.plan.slots * ready.plan.at_once
            counters = torch.zeros(count, dtype=torch.int32, device=device)
            everything = (*everything[:-1], counters)
        ready.launcher(device, ready.plan.programs, everything, numbers)
    if exchange == "launch":
        given[2].copy_(states[0])
        if ready.cell.has_c:
            given[3].copy_(states[1])


def forward(
    request: Request,
    output: Tensor,
    gates: Tensor,
    w_hh: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    h_0: Tensor | None,
    c_0: Tensor | None,
    packing: Packing | None,
    locked: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """Launch `recurrence_forward`: cells (R, D, H) or None, h_n, c_n or None, and what is sent.

    That is what W_hh has multiplied, of the shape of the output: the output itself, but for a cell
    that is locked.

    Args:
        output: (R, D * H) in any shape, contiguous; written.
        gates: (R, D, ROW * H), replaced by what a backward needs if one is to follow.
        w_hh: (P * H, H) of each direction. vectors: what `unit_vectors` loads, of each, or None.
        h_0, c_0: (D, N, H), or None for zeros. locked: (D, N, H), of a cell that is.
    """
    found = ready(request, "forward")
    cell, missing = found.cell, found.missing
    sent, first_sent, shown = output, h_0, missing
    if cell.locked:
        assert locked is not None
        sent, shown = torch.empty_like(output), output
        first_sent = None if h_0 is None else h_0 * locked
    if found.plan.exchange == "flag":
        _unwritten(sent)
        # It is read as what the others write is.
        first_sent = None if first_sent is None else _in_pieces(first_sent)
    if found.plan.exchange in ("flag", "cluster"):
        w_hh = [_in_pieces(tensor) for tensor in w_hh]
    h_n = gates.new_empty(found.states)
    c_n = gates.new_empty(found.states) if cell.has_c else None
    cells = None
    if cell.shows_c or (request.needs_grad and cell.keeps_c):
        shape = (gates.size(0), request.directions, request.hidden_size)
        cells = gates.new_empty(output.shape if cell.shows_c else shape)
    nought = missing
    if h_0 is None or (c_0 is None and cell.has_c):
        nought = zeros(request.device, request.dtype, h_n.numel())
    h_0 = nought if h_0 is None else h_0
    _launch_all(
        found,
        request,
        (
            gates,
            w_hh[0],
            w_hh[-1],
            *pair(vectors, missing),
            nought if first_sent is None else first_sent,
            sent,
            missing if cells is None else cells,
            missing if locked is None else locked,
            shown,
        ),
        (h_0, nought if c_0 is None else c_0, h_n, missing if c_n is None else c_n),
        packing,
    )
    return cells, h_n, c_n, sent


def backward(
    request: Request,
    grad_output: Tensor,
    gates: Tensor,
    states: Tensor,
    initial: Tensor | None,
    w_hh: Sequence[Tensor],
    units: Sequence[Tensor | None],
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    packing: Packing | None,
    locked: Tensor | None = None,
    grad_cells: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch `recurrence_backward`: grad_gates (R, D, WIDTH * H), grad_h_0, grad_c_0 or None.

    Args:
        gates: what forward saved. states: cells, or output.
        initial: c_0 or h_0; grad_h_n, grad_c_n: as they. None for zeros.
        units: the unit weights (U, H) of each direction, or None.
        locked: as of `forward`. grad_cells: (R, D * H), of a cell that shows c.
    """
    found = ready(request, "backward")
    cell, missing = found.cell, found.missing
    grad_gates = grad_output.new_empty(
        (grad_output.size(0), request.directions, cell.width * request.hidden_size)
    )
    if found.plan.exchange == "flag":
        _unwritten(grad_gates)
    if found.plan.streamed:
        # Every step reads it again: transposed, the products in their order in `grad_gates`.
        turned = cell.turn * request.hidden_size
        w_hh = [weight.roll(-turned, 0).t().contiguous() for weight in w_hh]
    grad_h_0 = grad_output.new_empty(found.states)
    grad_c_0 = grad_output.new_empty(found.states) if cell.has_c else None
    nought = missing
    if initial is None or grad_h_n is None or (grad_c_n is None and cell.has_c):
        nought = zeros(request.device, request.dtype, grad_h_0.numel())
    _launch_all(
        found,
        request,
        (
            grad_output,
            gates,
            states,
            nought if initial is None else initial,
            grad_gates,
            w_hh[0],
            w_hh[-1],
            *pair(units, missing),
            missing if locked is None else locked,
            missing if grad_cells is None else grad_cells,
        ),
        (
            nought if grad_h_n is None else grad_h_n,
            nought if grad_c_n is None else grad_c_n,
            grad_h_0,
            missing if grad_c_0 is None else grad_c_0,
        ),
        packing,
    )
    return grad_gates, grad_h_0, grad_c_0
