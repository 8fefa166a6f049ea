"""Launching the kernels: what each is compiled for, and what a device must hold for them."""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from triton_rnn import health
from triton_rnn.backends.triton import own
from triton_rnn.backends.triton.launcher import Launcher
from triton_rnn.cells import Cell, OwnCell
from triton_rnn.kernels.backward import recurrence_backward
from triton_rnn.kernels.cells import KERNEL_CELLS, KernelCell
from triton_rnn.kernels.forward import recurrence_forward
from triton_rnn.kernels.plan import CHIPS, INTERPRETER, Chip, Plan, Shape, plan
from triton_rnn.request import Request

# A wait looks so often before it gives up: seconds, where a step takes microseconds.
POLLS = 1 << 21

# Of the compiler, for every kernel: a product and a sum are one instruction, which Triton 3.10 will
# no longer take for granted.
OPTIONS = {"enable_fp_fusion": True}


def kernel_cell(cell: Cell) -> KernelCell:
    """The cell of the recurrence; a projected LSTM is a plain one with W_hh W_hr for W_hh."""
    if isinstance(cell, OwnCell):
        return own.kernel_cell(cell)
    return KERNEL_CELLS["lstm" if cell.projected else cell.name]


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
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return Chip(
        properties.name,
        "hip" if hip else "cuda",
        architecture,
        properties.multi_processor_count,
        limits["max_shared_mem"],
        known[0].matrix_mflops if known else CHIPS["A100"].matrix_mflops,
        narrow_apart=properties.major == 10 and not hip and version >= (3, 8),
    )


def forced_variant() -> str | None:
    """The variant that TRITON_RNN_VARIANT names, for tests and comparisons."""
    return os.environ.get("TRITON_RNN_VARIANT") or None


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
    return plan(shape, chip, forced_variant())


def precision(dtype: torch.dtype, backend: str) -> str:
    """How products of float32 are made: as cuDNN's switch for recurrent layers says.

    Without TF32 each product is three of them, which keeps 22 bits: on tensor cores there is no
    other float32, and elsewhere W_hh would not stay on the chip.
    """
    if backend != "cuda" or dtype != torch.float32:
        return "ieee"
    switch = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if switch == "tf32" else "tf32x3"


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
        "SAVE_C": save and cell.keeps_c,
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
        ready: recorded when they were copied to the device; None on the CPU.
    """

    batch_sizes: Tensor
    offsets: Tensor
    earlier: Tensor
    last: Tensor
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
    if torch.cuda.is_current_stream_capturing():
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
    assert packing.ready is not None
    # It may have been copied on another stream.
    torch.cuda.current_stream(device).wait_event(packing.ready)
    return packing


@functools.lru_cache(maxsize=32)
def _packing(batch_sizes: tuple[int, ...], device: torch.device) -> Packing:
    sizes = torch.tensor(batch_sizes)
    offsets = sizes.cumsum(0) - sizes
    batch, rows = batch_sizes[0], sum(batch_sizes)
    earlier = torch.arange(batch, rows) - sizes[:-1].repeat_interleave(sizes[1:])
    lengths = (sizes.unsqueeze(1) > torch.arange(batch)).sum(0)
    last = offsets[lengths - 1] + torch.arange(batch)
    tensors = [sizes.int(), offsets, earlier, last]
    ready = None
    if device.type == "cuda":
        # From pinned memory the copy does not wait for what the device is busy with.
        tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))
    return Packing(tensors[0], tensors[1], tensors[2], tensors[3], ready)


# Failed waits -------------------------------------------------------------------------------------

_KERNELS = ("forward", "backward")


@functools.cache
def _error_words(device: torch.device) -> Tensor:
    """(2,) int64: the first step + 1 at which a wait of each kernel ran out, zero if none did.

    Pinned memory, which the device writes and the host reads without waiting for the device.
    """
    return torch.zeros(len(_KERNELS), dtype=torch.int64, pin_memory=device.type == "cuda")


@functools.cache
def _seen_errors(device: torch.device) -> ctypes.Array[ctypes.c_int64]:
    """The same memory, for a look that costs no operator."""
    return (ctypes.c_int64 * len(_KERNELS)).from_address(_error_words(device).data_ptr())


def raise_failed_wait(device: torch.device) -> None:
    """Raise what an earlier launch on the device has left behind.

    Raises:
        RuntimeError: if one of its programs waited in vain; names kernel and step.
    """
    if not any(_seen_errors(device)):
        return
    words = _error_words(device)
    failed = [
        f"{name} recurrence at step {int(word) - 1}"
        for name, word in zip(_KERNELS, words.tolist(), strict=True)
        if word
    ]
    words.zero_()
    message = (
        f"a Triton program waited in vain for the others: {', '.join(failed)}. The results of that "
        "call are NaN. Its programs did not all run at the same time, or one of them died"
    )
    health.report("triton", device, message)
    raise RuntimeError(message)


# Launches -----------------------------------------------------------------------------------------


@functools.cache
def nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What stands for an argument that a kernel does not read."""
    return torch.empty(1, dtype=dtype, device=device)


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


class Ready(NamedTuple):
    """A recurrence of one request, all decided.

    Attributes:
        cell: as the kernels see it.
        plan: how it is launched; launcher: by what.
        error: where it notes a wait that ran out, one of `_error_words`.
    """

    cell: KernelCell
    plan: Plan
    launcher: Launcher
    error: Tensor


def ready(request: Request, kernel: str) -> Ready:
    """The forward or backward recurrence of a request that `supports` has found a plan for."""
    asked = precision(request.dtype, chip_of(request.device).backend)
    return _ready(plan_of, request, kernel, asked, forced_variant())


@functools.lru_cache(maxsize=4096)
def _ready(
    planner: Callable[[Request, str], Plan | None],
    request: Request,
    kernel: str,
    precision: str,
    variant: str | None,
) -> Ready:
    """All that decides is among the arguments: also whose plans these are, and of which variant."""
    plan = planner(request, kernel)
    assert plan is not None, "supports() has found one"
    cell = kernel_cell(request.cell)
    size, directions = request.hidden_size, request.directions
    exactness = ptx(request.dtype, chip_of(request.device).backend)
    function: Any = recurrence_backward
    if kernel == "forward":
        function = recurrence_forward
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
    launcher = Launcher(function, constants, recurrence_options(plan))
    return Ready(cell, plan, launcher, _error_words(request.device)[_KERNELS.index(kernel) :])


def _launch_all(
    ready: Ready,
    request: Request,
    tensors: Sequence[Tensor],
    states: Sequence[Tensor | None],
    packing: Packing | None,
    last_step: int,
) -> None:
    """Launch a recurrence: once, once per direction, or once per step.

    Args:
        tensors: the arguments before the states. states: h and c before, h and c after.
    """
    device, plan = request.device, ready.plan
    missing = nothing(device, request.dtype)
    if packing is None:
        sizes, offsets = nothing(device, torch.int32), nothing(device, torch.int64)
    else:
        sizes, offsets = packing.batch_sizes, packing.offsets
    counters = nothing(device, torch.int32)
    h_in, c_in, h_out, c_out = (missing if state is None else state for state in states)
    spans = [(0, last_step)]
    stepwise = plan.exchange == "launch"
    if stepwise:
        # The states between the launches, in float32.
        h_in = h_in.to(torch.float32, copy=True)
        c_in = c_in.to(torch.float32, copy=True)
        spans = [(step, step + 1) for step in range(last_step)]
    after = (h_in, c_in) if stepwise else (h_out, c_out)
    for first in range(0, request.directions, plan.at_once):
        if plan.exchange == "barrier":
            counters = torch.zeros(plan.slots * plan.at_once, dtype=torch.int32, device=device)
        everything = [*tensors, h_in, c_in, *after, sizes, offsets, counters]
        for begin, end in spans:
            # The word for errors is pinned memory: Triton asks where the device sees it.
            ready.launcher(
                device,
                plan.programs,
                everything,
                (
                    ready.error,
                    request.seq_len,
                    request.batch,
                    first,
                    begin,
                    end,
                    plan.slots,
                    POLLS,
                ),
            )
    if stepwise:
        h_out.copy_(h_in)
        if states[3] is not None:
            c_out.copy_(c_in)


def forward(
    request: Request,
    output: Tensor,
    gates: Tensor,
    w_hh: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    h_0: Tensor,
    c_0: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Launch `recurrence_forward`: cells (R, D, H) or None, h_n, c_n or None.

    Args:
        output: (R, D * H) in any shape, contiguous; written.
        gates: (R, D, ROW * H), replaced by what a backward needs if one is to follow.
        w_hh: (P * H, H) of each direction. vectors: what `unit_vectors` loads, of each, or None.
        h_0, c_0: (D, N, H).
    """
    found = ready(request, "forward")
    h_n = torch.empty_like(h_0, memory_format=torch.contiguous_format)
    c_n = None if c_0 is None else torch.empty_like(c_0, memory_format=torch.contiguous_format)
    cells = None
    if request.needs_grad and found.cell.keeps_c:
        cells = gates.new_empty(gates.size(0), request.directions, request.hidden_size)
    if found.plan.exchange == "flag":
        _unwritten(output)
        # It is read as what the others write is.
        h_0, w_hh = _in_pieces(h_0), [_in_pieces(tensor) for tensor in w_hh]
    missing = nothing(request.device, request.dtype)
    _launch_all(
        found,
        request,
        (
            gates,
            *pair(w_hh, missing),
            *pair(vectors, missing),
            h_0,
            output,
            missing if cells is None else cells,
        ),
        (h_0, c_0, h_n, c_n),
        packing,
        request.seq_len,
    )
    return cells, h_n, c_n


def backward(
    request: Request,
    grad_output: Tensor,
    gates: Tensor,
    states: Tensor,
    initial: Tensor,
    w_hh: Sequence[Tensor],
    units: Sequence[Tensor | None],
    grad_h_n: Tensor,
    grad_c_n: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch `recurrence_backward`: grad_gates (R, D, WIDTH * H), grad_h_0, grad_c_0 or None.

    Args:
        gates: what forward saved. states, initial: cells and c_0, or output and h_0.
        units: the unit weights (U, H) of each direction, or None.
    """
    found = ready(request, "backward")
    grad_gates = grad_output.new_empty(
        grad_output.size(0), request.directions, found.cell.width * request.hidden_size
    )
    grad_h_0 = torch.empty_like(grad_h_n)
    grad_c_0 = None if grad_c_n is None else torch.empty_like(grad_c_n)
    if found.plan.exchange == "flag":
        _unwritten(grad_gates)
    missing = nothing(request.device, request.dtype)
    _launch_all(
        found,
        request,
        (
            grad_output,
            gates,
            states,
            initial,
            grad_gates,
            *pair(w_hh, missing),
            *pair(units, missing),
        ),
        (grad_h_n, grad_c_n, grad_h_0, grad_c_0),
        packing,
        request.seq_len + 1,
    )
    return grad_gates, grad_h_0, grad_c_0
