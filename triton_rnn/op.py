"""The layer op as `torch.ops.triton_rnn.layer`: what torch.compile and torch.export see of a layer.

One opaque operator with shapes of its own and a backward, another operator; for padded batches. A
backend that can tell before it runs what it saves (`saved_shapes`) has it handed to its backward.
The others, and "auto", which chooses when it runs, save nothing: their backward goes forward again.

Eager calls do not go this way: `layer.LayerFunction` is the same thing with less around it.
"""

import contextlib
import importlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from triton_rnn import dispatch
from triton_rnn.cells import CELLS
from triton_rnn.obstacles import autocast_anywhere
from triton_rnn.request import Call, Request, weight_shapes
from triton_rnn.version import __version__

# What backends save differs between versions of this package, and a compiler that keeps graphs on
# disk knows them by what an operator is called with: so it is called with this.
_LOOPS = Path(__file__).parent / "backends" / "native"
_SOURCES = (_LOOPS / "recurrence.c", *sorted(_LOOPS.glob("*.h")))
LAYOUT = f"{__version__}:{zlib.crc32(b''.join(file.read_bytes() for file in _SOURCES)):08x}"

# Of the backends for the CPU together.
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _request(
    input: Tensor,
    h_0: Tensor,
    weights: Sequence[Tensor],
    cell: str,
    biased: bool,
    save: bool,
) -> Request:
    if input.dim() != 3 or h_0.dim() != 3 or not weights or weights[0].dim() != 2:
        raise RuntimeError(
            "triton_rnn::layer: expected input (T, N, I), h_0 (D, N, H_out) and weights of every "
            f"direction, got {tuple(input.shape)}, {tuple(h_0.shape)} and {len(weights)} weights"
        )
    if cell not in CELLS:
        raise RuntimeError(f"triton_rnn::layer: no cell {cell!r}; choose from {', '.join(CELLS)}")
    record = CELLS[cell]
    return Request(
        record,
        input.device,
        input.dtype,
        input.size(0),
        h_0.size(1),
        input.size(-1),
        weights[0].size(0) // record.gates,
        h_0.size(2),
        h_0.size(0),
        biased,
        False,
        save,
    )


def _check(
    request: Request,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> None:
    """Raise torch's errors for what a compiled graph cannot know before it runs, and for misuse."""
    if request.seq_len == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    directions, batch = request.directions, request.batch
    if directions not in (1, 2):
        raise RuntimeError(f"triton_rnn::layer: expected 1 or 2 directions, got {directions}")
    if request.output_size != request.hidden_size and not request.cell.projected:
        raise RuntimeError(
            f"triton_rnn::layer: expected h_0 ({directions}, {batch}, {request.hidden_size}), "
            f"got {tuple(h_0.shape)}"
        )
    expected = weight_shapes(
        request.cell.gates * request.hidden_size,
        request.input_size,
        request.hidden_size,
        request.output_size if request.cell.projected else 0,
        1,
        directions,
        request.biased,
    )
    if tuple(tuple(weight.shape) for weight in weights) != expected:
        raise RuntimeError(f"triton_rnn::layer: expected weights of shapes {expected}")
    if input.size(1) != batch:
        raise RuntimeError(
            f"triton_rnn::layer: expected input (T, {batch}, I), got {tuple(input.shape)}"
        )
    if (c_0 is None) != (request.cell.states == 1):
        raise RuntimeError(
            "triton_rnn::layer: c_0 is for the cells that have it, and for them only"
        )
    if c_0 is not None and c_0.shape != (directions, batch, request.hidden_size):
        raise RuntimeError(f"triton_rnn::layer: c_0 does not fit, got {tuple(c_0.shape)}")
    for tensor in (h_0, *weights) if c_0 is None else (h_0, c_0, *weights):
        if tensor.dtype != request.dtype or tensor.device != request.device:
            raise RuntimeError(
                f"triton_rnn::layer: expected {request.dtype} on {request.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _check_results(
    request: Request,
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
    saved: Sequence[tuple[int, ...]],
) -> None:
    """Raise if these are not a layer's results, or not gradients of them."""
    rows, directions = (request.seq_len, request.batch), request.directions
    shapes = [(*rows, directions * request.output_size)]
    shapes += [(directions, request.batch, request.output_size)]
    shapes += [(directions, request.batch, request.hidden_size)] * (request.cell.states - 1)
    shown, kept = [tuple(result.shape) for result in results], [tuple(s) for s in saved]
    if (
        [tuple(grad.shape) for grad in grads] != shapes
        or shown not in ([], shapes, [*shapes, *kept], kept)
        or any(t.dtype != request.dtype or t.device != request.device for t in (*grads, *results))
    ):
        raise RuntimeError(
            f"triton_rnn::layer_backward: expected gradients of {shapes}, and those results"
        )


# Ahead of the name of a backend that nobody asked for: the one that `auto` had in the graph.
BY_AUTO = "auto/"


def _module(request: Request, backend: str, differentiable: bool) -> Any:
    """The backend's module, or what has its functions.

    For "auto" it is the fastest one's, or of those with a backward if one is needed.

    Raises:
        BackendError: if the backend cannot serve the request.
    """
    named = backend.removeprefix(BY_AUTO)
    try:
        name = dispatch.choose(request, named).backend
    except dispatch.BackendError:
        if named == backend:
            raise
        name = dispatch.choose(request, "auto").backend
    module = dispatch.backend_module(name)
    if not differentiable or hasattr(module, "backward"):
        return module
    # torch's own kernels keep to themselves what they save.
    for name in ("native", "torchscript"):
        module = dispatch.backend_module(name)
        if module.supports(request) is None:
            return module
    # Imported late, for it imports this file.
    return importlib.import_module("triton_rnn.recompute").Reference


_NOTHING = contextlib.nullcontext()


def _without_autocast(input: Tensor) -> contextlib.AbstractContextManager[object]:
    """What an operator is given has been cast; its products shall not be, to another dtype."""
    if not autocast_anywhere():
        return _NOTHING
    return torch.autocast(input.device.type, enabled=False)


def _saves(request: Request, backend: str) -> ModuleType | None:
    """The backend that says what the graph's operator saves, and hands it to its backward."""
    named = backend.removeprefix(BY_AUTO)
    if not request.needs_grad or named == "auto":
        return None
    module = dispatch.backend_module(dispatch.check_name(named))
    return module if hasattr(module, "saved_shapes") else None


def _asked(backend: str) -> str:
    """What an operator is told of a backend, with what is asked for now.

    Raises:
        BackendError: if that is another one than the graph's, which has room for what its own
            saves.
    """
    wanted, named = dispatch.requested(), backend.removeprefix(BY_AUTO)
    if named == "auto":
        return wanted
    if wanted not in ("auto", named):
        raise dispatch.BackendError(
            f"backend {wanted!r} cannot run this call: its graph was made for {named!r}, and keeps "
            "to it. Make it anew inside of use_backend, after torch.compiler.reset()"
        )
    return backend


@torch.library.custom_op("triton_rnn::layer", mutates_args=())
def layer(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    biased: bool,
    save: bool,
    backend: str,
    layout: str,
) -> list[Tensor]:
    """One layer, all its directions, the whole sequence.

    Args:
        input: (T, N, I). h_0, c_0, weights: as in `triton_rnn.layer.layer`.
        cell: its name in `CELLS`. biased: whether it has biases.
        save: whether a backward will follow.
        backend: its name; "auto" for the one asked for by `use_backend`, else the fastest one,
            chosen anew at every run; "auto/" and a name for that one, and the fastest one where it
            cannot.
        layout: any text; `LAYOUT`, where the call is in a graph that may be kept.

    Returns:
        output, h_n[, c_n] and, if `save` and the backend can, what the backward needs.

    Raises:
        RuntimeError: for no steps, as torch; for tensors that do not fit together.
        BackendError: if the backend cannot do that.
    """
    request = _request(input, h_0, weights, cell, biased, save)
    _check(request, input, h_0, c_0, weights)
    asked, saves = _asked(backend), _saves(request, backend)
    if saves is None:
        request = request._replace(needs_grad=False)
    module = _module(request, asked, saves is not None)
    with _without_autocast(input):
        if not hasattr(module, "forward"):
            # Imported late, for it imports this file.
            from triton_rnn.functional import stack

            call = Call(request, input, [], h_0, c_0, list(weights))
            return list(getattr(module, "stack", stack)(call, module, 1, 0.0))
        results, saved = module.forward(request, input, [], h_0, c_0, weights)
    if saves is None:
        return list(results)
    if saves is not module:
        # The graph has room for what its backend saves; the backward will find it unable again.
        shapes = saves.saved_shapes(request, *input.shape[:2])
        return [*results, *(input.new_zeros(shape) for shape in shapes)]
    # No two results of an operator may be the same tensor.
    shown = [t for t in saved if all(t.data_ptr() != r.data_ptr() for r in results)]
    return [*results, *shown]


@layer.register_fake
def _(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    biased: bool,
    save: bool,
    backend: str,
    layout: str,
) -> list[Tensor]:
    request = _request(input, h_0, weights, cell, biased, save)
    width = request.directions * request.output_size
    results = [input.new_empty((*input.shape[:-1], width)), h_0.new_empty(h_0.shape)]
    if c_0 is not None:
        results.append(c_0.new_empty(c_0.shape))
    saves = _saves(request, backend)
    if saves is not None:
        shapes = saves.saved_shapes(request, *input.shape[:2])
        results += [input.new_empty(shape) for shape in shapes]
    return results


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: no two results of an operator may share any."""
    tensor = tensor.contiguous()
    shared = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone() if shared else tensor


@torch.library.custom_op("triton_rnn::layer_backward", mutates_args=())
def layer_backward(
    grads: Sequence[Tensor],
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    cell: str,
    biased: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of input, h_0[, c_0] and every weight.

    Args:
        grads: of output, h_n[, c_n].
        results: all that the forward returned; of a backend that `SAVES_ALL` what it saved is
            enough. Without what was saved, it goes forward again.

    Raises:
        RuntimeError: for tensors that do not fit together.
        BackendError: if the backend cannot do that.
    """
    request = _request(input, h_0, weights, cell, biased, True)
    _check(request, input, h_0, c_0, weights)
    count = 1 + request.cell.states
    saves, module = _saves(request, backend), _module(request, backend, True)
    shapes = [] if saves is None else saves.saved_shapes(request, *input.shape[:2])
    _check_results(request, grads, results, shapes)
    arguments: Any = (request, input, [], h_0, c_0, weights)
    rows = grads[0].reshape(-1, grads[0].size(-1))
    needs = [True] * (3 + len(weights))
    with _without_autocast(input):
        first = len(results) - len(shapes)
        if saves is module and (first == count or (first == 0 and hasattr(module, "SAVES_ALL"))):
            saved = module.saved_of(request, results[:first], results[first:])
        else:
            _, saved = module.forward(*arguments)
        found = module.backward(*arguments, saved, [rows, *grads[1:]], needs)
    found[0] = found[0].view(input.shape)
    return [_alone(grad) for grad in found if grad is not None]


@layer_backward.register_fake
def _(
    grads: Sequence[Tensor],
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    cell: str,
    biased: bool,
    backend: str,
) -> list[Tensor]:
    of = [input, h_0, *([] if c_0 is None else [c_0]), *weights]
    return [t.new_empty(t.shape) for t in of]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, h_0, c_0, weights, cell, biased, _, backend, _ = inputs
    request = _request(input, h_0, weights, cell, biased, True)
    saves = _saves(request, backend)
    if saves is None or hasattr(saves, "SAVES_ALL"):
        # Not read again, and so they may be changed in place.
        output = output[1 + CELLS[cell].states :]
    ctx.save_for_backward(input, h_0, c_0, *weights, *output)
    ctx.cell, ctx.biased, ctx.backend = cell, biased, backend
    ctx.weights = len(weights)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    input, h_0, c_0, *others = ctx.saved_tensors
    weights, results = others[: ctx.weights], others[ctx.weights :]
    width = h_0.size(0) * h_0.size(2)
    shapes = [(*input.shape[:-1], width), h_0.shape, *([] if c_0 is None else [c_0.shape])]
    dense = [
        input.new_zeros(shape) if grad is None else grad
        for grad, shape in zip(grads, shapes, strict=False)
    ]
    found = layer_backward(
        dense, input, h_0, c_0, weights, results, ctx.cell, ctx.biased, ctx.backend
    )
    grad_input, grad_h_0, *rest = found
    grad_c_0 = rest.pop(0) if c_0 is not None else None
    return grad_input, grad_h_0, grad_c_0, rest, None, None, None, None, None


layer.register_autograd(_backward, setup_context=_setup_context)
