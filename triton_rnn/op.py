"""The layer op as `torch.ops.triton_rnn.layer`: what torch.compile and torch.export see of a layer.

One opaque operator with shapes of its own and a backward, another operator. It is for padded
batches, and for backends that can tell what they save before they run (`saved_shapes`); of those
there is one, Triton's.

Eager calls do not go this way: `layer.LayerFunction` is the same thing with less around it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_rnn import dispatch
from triton_rnn.cells import CELLS
from triton_rnn.request import Request


def _request(
    input: Tensor,
    h_0: Tensor,
    weights: Sequence[Tensor],
    cell: str,
    biased: bool,
    save: bool,
) -> Request:
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
) -> list[Tensor]:
    """One layer, all its directions, the whole sequence.

    Args:
        input: (T, N, I). h_0, c_0, weights: as in `triton_rnn.layer.layer`.
        cell: its name in `CELLS`. biased: whether it has biases.
        save: whether a backward will follow.
        backend: its name.

    Returns:
        output, h_n[, c_n] and, if `save`, what the backward needs.

    Raises:
        BackendError: if the backend cannot do that.
    """
    request = _request(input, h_0, weights, cell, biased, save)
    dispatch.choose(request, backend)
    module = dispatch.backend_module(backend)
    results, saved = module.forward(request, input, [], h_0, c_0, weights)
    # No two results of an operator may be the same tensor.
    shown = [t for t in saved if all(t.data_ptr() != r.data_ptr() for r in results)] if save else []
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
) -> list[Tensor]:
    request = _request(input, h_0, weights, cell, biased, save)
    width = request.directions * request.output_size
    results = [input.new_empty((*input.shape[:-1], width)), h_0.new_empty(h_0.shape)]
    if c_0 is not None:
        results.append(c_0.new_empty(c_0.shape))
    if save:
        shapes = dispatch.backend_module(backend).saved_shapes(request, *input.shape[:2])
        results += [input.new_empty(shape) for shape in shapes]
    return results


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
        grads: of output, h_n[, c_n]. results: all that the forward returned.
    """
    request = _request(input, h_0, weights, cell, biased, True)
    module = dispatch.backend_module(backend)
    count = 1 + request.cell.states
    saved = module.saved_of(request, results[:count], results[count:])
    rows = grads[0].reshape(-1, grads[0].size(-1))
    needs = [True] * (3 + len(weights))
    found = module.backward(request, input, [], h_0, c_0, weights, saved, [rows, *grads[1:]], needs)
    found[0] = found[0].view(input.shape)
    return [grad.contiguous() for grad in found if grad is not None]


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
    input, h_0, c_0, weights, cell, biased, _, backend = inputs
    ctx.save_for_backward(input, h_0, c_0, *weights, *output)
    ctx.cell, ctx.biased, ctx.backend = cell, biased, backend
    ctx.weights = len(weights)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    input, h_0, c_0, *others = ctx.saved_tensors
    weights, results = others[: ctx.weights], others[ctx.weights :]
    count = 1 + CELLS[ctx.cell].states
    dense = [
        torch.zeros_like(result) if grad is None else grad
        for grad, result in zip(grads[:count], results, strict=False)
    ]
    found = layer_backward(
        dense, input, h_0, c_0, weights, results, ctx.cell, ctx.biased, ctx.backend
    )
    grad_input, grad_h_0, *rest = found
    grad_c_0 = rest.pop(0) if c_0 is not None else None
    return grad_input, grad_h_0, grad_c_0, rest, None, None, None, None


layer.register_autograd(_backward, setup_context=_setup_context)
