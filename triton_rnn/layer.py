"""The layer op: one layer, all its directions, the whole sequence, differentiable."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from triton_rnn import reference
from triton_rnn.request import Request


class LayerFunction(torch.autograd.Function):
    """A backend's forward and backward as one node of the autograd graph.

    The first derivative is the backend's; the second goes through the reference, so it works for
    every backend on every device.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: ModuleType,
        request: Request,
        batch_sizes: Sequence[int],
        input: Tensor,
        h_0: Tensor,
        c_0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = input.reshape(-1, request.input_size)
        results, saved = backend.forward(request, rows, batch_sizes, h_0, c_0, weights)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.request, ctx.batch_sizes = backend, request, batch_sizes
        ctx.save_for_backward(input, h_0, c_0, *weights, *saved)
        output, *states = results
        return (output.view(*input.shape[:-1], output.size(1)), *states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        request: Request = ctx.request
        input, h_0, c_0, *others = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 6
        weights, saved = others[:count], others[count:]
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            return None, None, None, *_differentiable_backward(ctx, input, h_0, c_0, weights, grads)

        rows = input.reshape(-1, request.input_size)
        width = request.directions * request.output_size
        shapes = ((rows.size(0), width), h_0.shape, h_0.shape if c_0 is None else c_0.shape)
        dense = [
            rows.new_zeros(shape) if grad is None else grad.reshape(shape)
            for grad, shape in zip(grads, shapes, strict=False)
        ]
        needed = (needs[0], *needs[3:])
        grad_rows, grad_h_0, grad_c_0, *grad_weights = ctx.backend.backward(
            request, rows, ctx.batch_sizes, h_0, c_0, weights, saved, dense, needed
        )
        return (
            None,
            None,
            None,
            None if grad_rows is None else grad_rows.view(input.shape),
            grad_h_0 if needs[1] else None,
            grad_c_0 if needs[2] else None,
            *grad_weights,
        )


def _differentiable_backward(
    ctx: Any,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The same gradients as functions that can be differentiated again (`create_graph=True`)."""
    results = _reference(ctx.request, ctx.batch_sizes, input, h_0, c_0, weights)
    pairs = [
        (result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None
    ]
    arguments = (input, h_0, c_0, *weights)
    needs = ctx.needs_input_grad[3:]
    wanted = [argument for argument, need in zip(arguments, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if need else None for need in needs]


def _reference(
    request: Request,
    batch_sizes: Sequence[int],
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    rows = input.reshape(-1, request.input_size)
    sizes = batch_sizes or [request.batch] * request.seq_len
    output, *states = reference.layer(request.cell, rows, sizes, h_0, c_0, weights)
    return (output.view(*input.shape[:-1], output.size(1)), *states)


def layer(
    backend: ModuleType,
    request: Request,
    batch_sizes: Sequence[int],
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Run one layer on a backend.

    Args:
        input: (T, N, I) or, packed, (sum of lengths, I).
        batch_sizes: rows of every step of a packed batch, empty for a padded one.
        h_0: (D, N, H_out). c_0: (D, N, H), or None for a cell without one.
        weights: weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr] of each direction in turn.

    Returns:
        output (T, N, D * H_out) or (sum of lengths, D * H_out), h_n and, if the cell has it, c_n.
    """
    if not hasattr(backend, "forward"):
        return _reference(request, batch_sizes, input, h_0, c_0, weights)
    if request.needs_grad:
        return LayerFunction.apply(backend, request, batch_sizes, input, h_0, c_0, *weights)
    rows = input.reshape(-1, request.input_size)
    (output, *states), _ = backend.forward(request, rows, batch_sizes, h_0, c_0, weights)
    return (output.view(*input.shape[:-1], output.size(1)), *states)
