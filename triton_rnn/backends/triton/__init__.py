"""The GPU backend: Triton kernels for the input's projection and the recurrence.

A user's cell runs on the same ones, by functions that are generated from its step (`own`), and so
does one of torch's with a module's options (`extended`).
`triton` is imported at the first call that this backend serves. Under Triton's interpreter
(TRITON_INTERPRET=1) the kernels run on CPU tensors, very slowly; for that they must be asked for by
name.
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from triton_rnn import environment
from triton_rnn.cells import OwnCell
from triton_rnn.request import Request

# Which module has the `ExtendedLayer` of a `RegularizedCell`.
REGULARIZES = f"{__name__}.extended"

# For states that are not given nothing is made: see `launch.zeros`.
TAKES_NO_STATE = True
# Of the input and W_ih, see `layer._order`.
READS = "as wanted"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _interpreter() -> bool:
    return environment.is_on("TRITON_INTERPRET", default=False)


@functools.cache
def _missing() -> str | None:
    """Why Triton is not there at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def _layer() -> ModuleType:
    """What needs triton, which is imported late."""
    return importlib.import_module("triton_rnn.backends.triton.layer")


def cannot(request: Request) -> str | None:
    """Why the kernels cannot serve a request, as far as that is known without the device."""
    if isinstance(request.cell, OwnCell) and request.cell.states > 2:
        return f"the Triton kernels carry one or two states, {request.cell.name} has more"
    device = request.device.type
    if device == "cpu" and not _interpreter():
        return "the Triton kernels run on a GPU, the input is on the CPU"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels run on CUDA and ROCm devices, the input is on {device}"
    if request.dtype not in _DTYPES:
        return f"dtype {request.dtype} is not one of float16, bfloat16, float32"
    if device == "cpu" and request.dtype == torch.bfloat16:
        return "Triton's interpreter computes wrong bfloat16 numbers"
    if request.batch == 0:
        return "the batch is empty"
    return _missing()


def supports(request: Request) -> str | None:
    """Why the kernels cannot serve a request; None when they can.

    The first request of its kind on a device is tried out on a few short sequences (`check`).
    """
    reason = cannot(request)
    if reason is not None:
        return reason
    from triton_rnn.backends.triton import check

    return check.obstacle(request)


def slower_than_torch(request: Request) -> str | None:
    """Why `auto` leaves a request that the kernels could serve to others."""
    if request.device.type == "cpu":
        return "the interpreter is for tests"
    from triton_rnn.backends.triton import rules

    return rules.slower_than_torch(request)


def declines(request: Request) -> str | None:
    """Why `auto` does not take the kernels for a request, or None; nothing is tried out in vain."""
    return cannot(request) or slower_than_torch(request) or supports(request)


def describe(request: Request, rows: int) -> str:
    """How the kernels would go about a request."""
    from triton_rnn.backends.triton import launch

    kernels = ("forward", "backward") if request.needs_grad else ("forward",)
    return "; ".join(str(launch.plan_of(request, kernel)) for kernel in kernels)


def saved_shapes(request: Request, seq_len: int, batch: int) -> list[tuple[int, ...]]:
    """Shapes of what forward saves besides its results, for a padded request with a backward."""
    cell, directions, size = request.cell, request.directions, request.hidden_size
    rows = seq_len * batch
    shapes: list[tuple[int, ...]] = []
    if cell.projected:
        shapes.append((seq_len, batch, directions * size))
    if cell.gates > 1:
        # Four numbers a unit: the gates of an LSTM, those of a GRU and what its reset multiplies.
        shapes.append((rows, directions, 4 * size))
    if cell.states == 2:
        shapes.append((rows, directions, size))
    return shapes


def saved_of(request: Request, results: Sequence[Tensor], shown: Sequence[Tensor]) -> list[Tensor]:
    """What forward has saved, from its results and the tensors of `saved_shapes`."""
    return list(shown) if request.cell.projected else [results[0], *shown]


def forward(
    request: Request,
    input: Tensor,
    batch_sizes: Sequence[int],
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """One layer, all its directions, the whole sequence. Nothing waits for the device.

    Args:
        input: (T, N, I) or, packed, (sum of lengths, I), any strides.
        batch_sizes: rows of every step of a packed batch, empty for a padded one.
        h_0: (D, N, H_out). c_0: (D, N, H), or None for a cell without. Both None for zeros.
        weights: weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr] of each direction in turn; of
            a user's cell (unit_weights, H) behind them, whichever are empty.

    Returns:
        (output (T, N, D * H_out) or, packed, (sum of lengths, D * H_out), h_n[, c_n]), and what the
        backward needs besides the arguments.

    Raises:
        RuntimeError: if a program of an earlier launch on the device waited in vain.
    """
    return _layer().forward(request, input, batch_sizes, h_0, c_0, weights)


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
    """Gradients of the input, h_0, c_0 and every weight, by the gradients of forward's results.

    Args:
        grads: of output (as rows), h_n[, c_n]; None for zeros.
        needs: whether the gradient of the input, of h_0, of c_0 and of each weight is wanted.

    Returns:
        grad_input, the rows one after the other, grad_h_0, grad_c_0, then each weight's.
    """
    return _layer().backward(request, input, batch_sizes, h_0, c_0, weights, saved, grads, needs)
