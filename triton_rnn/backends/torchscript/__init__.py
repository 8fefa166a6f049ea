"""The CPU backend: TorchScript loops with a hand-written backward.

The only folder of the package that names `torch.jit`. TorchScript is deprecated: it still compiles
and runs, with a warning that is silenced here, where it arises. Where it refuses (PYTORCH_JIT=0, a
torch to come) the very same functions run as plain Python: slower, with the same numbers.

Nothing is compiled on import; a cell is compiled when it is first called.

The two directions of a layer run in turn. Two threads at once look better in a benchmark and are
not: the second thread brings a second OpenMP team, and with more threads than cores OpenMP stops
spinning, which slows every parallel operation of the process, torch.nn's too, about threefold.
"""

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_rnn.backends import locks
from triton_rnn.backends.torchscript import rules
from triton_rnn.backends.torchscript.cells import SCRIPT_CELLS
from triton_rnn.backends.torchscript.recurrence import Run, recurrence
from triton_rnn.cells import OwnCell
from triton_rnn.profiling import ranges
from triton_rnn.request import Request, with_zeros

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_compiling = locks.Once()

# Of the input and W_ih, see `layer._order`.
READS = "as wanted"

# Below autograd's dispatch keys a small operation costs a third less. The context manager is
# private to torch, so its absence is survived.
_below_autograd: Callable[[], Any] = getattr(
    torch._C, "_AutoDispatchBelowADInplaceOrView", contextlib.nullcontext
)


def supports(request: Request) -> str | None:
    """Why this backend cannot serve a request; None when it can."""
    if request.device.type != "cpu":
        return f"TorchScript loops run on the CPU, the input is on {request.device}"
    if request.dtype not in _DTYPES:
        return f"dtype {request.dtype} is not one of float32, float64, bfloat16, float16"
    if isinstance(request.cell, OwnCell):
        return "a user's cell has no TorchScript loop"
    return None


def _script(function: Callable[..., Any]) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit", category=DeprecationWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit", category=FutureWarning)
        return torch.jit.script(function)


@functools.cache
def _compiled(cell: str) -> tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]], str]:
    """Forward and backward of a cell, and why they are not compiled ("" when they are)."""
    functions = recurrence(SCRIPT_CELLS[cell])
    try:
        forward, backward = (_script(function) for function in functions)
    except RuntimeError as error:
        return (*functions, str(error).strip().splitlines()[0])
    return forward, backward, ""


def _functions(cell: str) -> tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]], str]:
    with _compiling.held():
        return _compiled(cell)


def compile_check() -> tuple[bool, str]:
    """Whether TorchScript compiles here, and a sentence that says so."""
    start = time.perf_counter()
    forward, _, error = _functions("rnn_tanh")
    if error:
        return False, f"TorchScript refuses ({error}); the loops run as plain Python"
    if not isinstance(forward, torch.jit.ScriptFunction):
        return False, "TorchScript is switched off (PYTORCH_JIT=0); the loops run as plain Python"
    return True, f"TorchScript compiles (RNN in {1e3 * (time.perf_counter() - start):.0f} ms)"


@functools.lru_cache(maxsize=1024)
def _plan(request: Request, rows: int, onednn: bool) -> Run:
    """All of `Run` but the batch sizes."""
    gate_rows = request.cell.gates * request.hidden_size
    width = request.hidden_size * (1 if request.cell.gates == 1 else 4)
    per_step = max(1, rows // request.seq_len)
    block_rows = rules.block_rows(width, request.dtype.itemsize)
    block = min(rows, max(block_rows, per_step))
    return Run(
        batch_sizes=[],
        seq_len=request.seq_len,
        batch=request.batch,
        width=width,
        biased=request.biased,
        keep=request.needs_grad,
        block_rows=block_rows,
        onednn_input=onednn
        and rules.takes_onednn(request.dtype, block, request.input_size, gate_rows),
        onednn_step=onednn
        and rules.takes_onednn(request.dtype, per_step, request.output_size, gate_rows),
        copy_weight=rules.copies_weight(request.seq_len),
        prefix="",
        suffix="",
    )


def _run(request: Request, rows: int, batch_sizes: Sequence[int]) -> Run:
    run = _plan(request, rows, bool(torch.backends.mkldnn.enabled))
    if request.batch == 0:
        # A packed batch may have steps without rows; a padded one is cut by its batch size.
        batch_sizes = [0] * request.seq_len
    return run._replace(batch_sizes=list(batch_sizes)) if batch_sizes else run


def describe(request: Request, rows: int) -> str:
    """How this backend would go about a request, in a line."""
    run = _run(request, rows, [])
    compiled = isinstance(_functions(request.cell.name)[0], torch.jit.ScriptFunction)
    return ", ".join(
        (
            "compiled" if compiled else "plain Python",
            f"blocks of {min(run.block_rows, rows)} rows of {run.width} gates",
            f"projection by {'oneDNN' if run.onednn_input else 'BLAS'}",
            f"steps by {'oneDNN' if run.onednn_step else 'BLAS'}",
            f"{request.directions} direction{'s in turn' if request.directions == 2 else ''}",
        )
    )


def _named(run: Run, request: Request) -> list[Run]:
    """`run` for each direction, with the names of its ranges if a profiler is on."""
    if not ranges.on():
        return [run] * request.directions
    prefix = ranges.PREFIX + request.cell.name
    directions = ("forward", "reverse")[: request.directions]
    return [run._replace(prefix=prefix, suffix=ranges.suffix(name)) for name in directions]


def _call(function: Callable[..., list[Tensor]], *args: Any) -> list[Tensor]:
    with _below_autograd(), torch.jit.optimized_execution(False):
        return function(*args)


def _shaped(states: Tensor, request: Request) -> Tensor:
    """States (rows, H_out) in the shape of the output."""
    if request.packed:
        return states
    return states.view(request.seq_len, request.batch, states.size(1))


def forward(
    request: Request,
    input: Tensor,
    batch_sizes: Sequence[int],
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """One layer, all its directions, the whole sequence.

    Args:
        input: (T, N, I) or, packed, (sum of lengths, I).
        batch_sizes: rows of every step of a packed batch, empty for a padded one.
        h_0: (D, N, H_out). c_0: (D, N, H) or None.
        weights: weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr] of each direction in turn.

    Returns:
        (output (T, N, D * H_out) or, packed, (sum of lengths, D * H_out), h_n[, c_n]), and what the
        backward needs besides the arguments. Where a backward will follow no result is a view of
        another tensor: autograd would forbid to change it in place.
    """
    rows = input.reshape(-1, request.input_size)
    run = _run(request, rows.size(0), batch_sizes)
    runs = _named(run, request)
    function = _functions(request.cell.name)[0]
    count = 1 + request.cell.states
    if request.directions == 1:
        h = h_0[0]
        c = h_0.new_empty(0) if c_0 is None else c_0[0]
        states, *others = _call(function, rows, h, c, list(weights), runs[0], False)
        # The states are saved for the backward, and a caller may change the output in place.
        output = _shaped(states, request)
        finals = [state.unsqueeze(0).clone() for state in others[: count - 1]]
        return (output.clone() if run.keep else output, *finals), [states, *others[2:]]
    half = len(weights) // 2
    initial = (h_0, (h_0.new_empty(0),) * 2 if c_0 is None else c_0)
    h, c = (state[0] for state in initial)
    ahead = _call(function, rows, h, c, list(weights[:half]), runs[0], False)
    h, c = (state[1] for state in initial)
    back = _call(function, rows, h, c, list(weights[half:]), runs[1], True)
    finals = [torch.stack(pair) for pair in zip(ahead[1:count], back[1:count], strict=True)]
    saved = [ahead[0], *ahead[3:], back[0], *back[3:]]
    output = torch.cat((_shaped(ahead[0], request), _shaped(back[0], request)), -1)
    return (output, *finals), saved


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
    """Gradients of the input, h_0, c_0 and every weight, by the gradients of forward's results.

    Args:
        grads: of output (as rows), h_n[, c_n]; None for zeros.
        needs: whether the gradient of the input, of h_0, of c_0 and of each weight is wanted.

    Returns:
        grad_input, the rows one after the other, grad_h_0, grad_c_0, then each weight's; those of
        the states may be there unwanted.
    """
    grads = with_zeros(request, input, h_0, c_0, grads)
    rows = input.reshape(-1, request.input_size)
    run = _run(request, rows.size(0), batch_sizes)
    runs = _named(run, request)
    function = _functions(request.cell.name)[1]
    directions = request.directions
    empty = (h_0.new_empty(0),) * directions
    cell_state = empty if c_0 is None else c_0
    grad_c_n = empty if c_0 is None else grads[2]
    grad_output = grads[0].chunk(directions, 1)
    share = len(weights) // directions
    results: list[list[Tensor]] = []
    for d in range(directions):
        own = slice(d * share, (d + 1) * share)
        results.append(
            _call(
                function,
                rows,
                h_0[d],
                cell_state[d],
                list(weights[own]),
                list(saved[3 * d : 3 * d + 3]),
                grad_output[d],
                grads[1][d],
                grad_c_n[d],
                results[0][0] if d == 1 else empty[0],
                [needs[0], *needs[3:][own]],
                runs[d],
                d == 1,
            )
        )
    found: list[Tensor | None] = [results[0][0] if needs[0] else None]
    for k in (1, 2):
        parts = [result[k] for result in results]
        whole = parts[0].unsqueeze(0) if directions == 1 else torch.stack(parts)
        found.append(None if k == 2 and c_0 is None else whole)
    grad_weights = [grad for result in results for grad in result[3:]]
    wanted = zip(grad_weights, needs[3:], strict=True)
    return found + [grad if want else None for grad, want in wanted]
