"""The layer op: one layer, all its directions, the whole sequence, differentiable."""

import functools
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_rnn import reference
from triton_rnn.profiling import ranges, session
from triton_rnn.request import Request, zero_states

# vmap comes in two makes: torch.func's, and the older one behind `is_grads_batched=True`.
_of_vmap = torch._C._functorch.is_batchedtensor
_of_older_vmap = torch._C._functorch.is_legacy_batchedtensor


def _is_batched(grad: Tensor | None) -> bool:
    """Whether vmap is at work on a gradient."""
    return grad is not None and (_of_vmap(grad) or _of_older_vmap(grad))


class LayerFunction(torch.autograd.Function):
    """A backend's forward and backward as one node of the autograd graph.

    The first derivative is the backend's; the second goes through the reference, so it works for
    every backend on every device.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        request: Request,
        batch_sizes: Sequence[int],
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        results, saved = backend.forward(request, input, batch_sizes, h_0, c_0, weights)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.request, ctx.batch_sizes = backend, request, batch_sizes
        ctx.layer = ranges.here.layer
        # What only the second derivative reads may change in place, as with torch.nn; should it be
        # read after all, its version tells.
        single = request.seq_len == 1 and not ctx.needs_input_grad[4]
        order = _order(request.biased, request.cell.fifth, request.directions, single)
        ctx.order, ctx.unread = order, order.unread(weights)
        ctx.versions = [weight._version for weight in ctx.unread]
        ctx.save_for_backward(input, h_0, c_0, *order.read(weights), *saved)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        request: Request = ctx.request
        input, h_0, c_0, *others = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        count = len(needs) - 3 - len(ctx.unread)
        weights, saved = ctx.order.together((*others[:count], *ctx.unread)), others[count:]
        if torch.is_grad_enabled() or any(map(_is_batched, grads)):
            found = _differentiable_backward(ctx, input, h_0, c_0, weights, grads)
            return None, None, None, *found

        # Those of the states have their shape already.
        given = list(grads)
        if given[0] is not None and not request.packed:
            given[0] = given[0].flatten(0, 1)
        if ranges.on():
            # Perhaps another thread than the forward's.
            ranges.here.layer = ctx.layer
            rows = math.prod(input.shape[:-1])
            session.note_backward(request, rows, getattr(ctx.backend, "WHOLE", ""))
        grad_rows, *others = ctx.backend.backward(
            request, input, ctx.batch_sizes, h_0, c_0, weights, saved, given, needs
        )
        if grad_rows is not None and not request.packed:
            grad_rows = grad_rows.view(input.shape)
        return None, None, None, grad_rows, *others


# `LayerFunction.apply` without what is around it for functions that meet transforms, as ours does
# not; a call of a few steps takes a quarter less.
_apply = super(torch.autograd.Function, LayerFunction).apply
_unwrapped = torch._C._functorch.unwrap_if_dead

_Picker = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class _Order(NamedTuple):
    """The weights of a layer in torch's order: those that the backward reads, the others; both."""

    read: _Picker
    unread: _Picker
    together: _Picker


def _picker(places: Sequence[int]) -> _Picker:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda weights: [weights[place] for place in places]


@functools.lru_cache(maxsize=32)
def _order(biased: bool, fifth: bool, directions: int, single: bool) -> _Order:
    """How to pick from weight_ih, weight_hh[, bias_ih, bias_hh][, a fifth] of each direction.

    Args:
        single: whether there is one step, and nobody wants the gradient of the state before it.
    """
    kinds = ("ru" if single else "rr") + "uu" * biased + "r" * fifth
    kinds *= directions
    read = [place for place, kind in enumerate(kinds) if kind == "r"]
    unread = [place for place, kind in enumerate(kinds) if kind == "u"]
    apart = read + unread
    together = [apart.index(place) for place in range(len(kinds))]
    return _Order(_picker(read), _picker(unread), _picker(together))


def _differentiable_backward(
    ctx: Any,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The same gradients as functions that can be differentiated again (`create_graph=True`)."""
    if [weight._version for weight in ctx.unread] != ctx.versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: a weight of a recurrent layer"
        )
    create_graph = torch.is_grad_enabled()
    needs = ctx.needs_input_grad[3:]
    with torch.enable_grad():
        # Aliases: where one argument is a function of another, or the same tensor twice, the
        # gradient of each is wanted by itself, not by way of the other.
        own_input = input.view_as(input)
        own_h_0 = None if h_0 is None else h_0.view_as(h_0)
        own_c_0 = None if c_0 is None else c_0.view_as(c_0)
        own_weights = [weight.view_as(weight) for weight in weights]
        # An extended layer has a definition of its own.
        definition = getattr(ctx.backend, "definition", _reference)
        results = definition(ctx.request, ctx.batch_sizes, own_input, own_h_0, own_c_0, own_weights)
    arguments = (own_input, own_h_0, own_c_0, *own_weights)
    pairs = [
        (result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None
    ]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            [a for a, need in zip(arguments, needs, strict=True) if need and a is not None],
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if need else None for need in needs]


def _reference(
    request: Request,
    batch_sizes: Sequence[int],
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    rows = input.reshape(-1, request.input_size)
    if h_0 is None:
        h_0, c_0 = zero_states(request, input)
    sizes = batch_sizes or [request.batch] * request.seq_len
    with ranges.phase(request.cell, "reference", "both"):
        output, *states = reference.layer(request.cell, rows, sizes, h_0, c_0, weights)
    return (output.view(*input.shape[:-1], output.size(1)), *states)


def layer(
    backend: Any,
    request: Request,
    batch_sizes: Sequence[int],
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Run one layer on a backend.

    Args:
        backend: its module, or an `ExtendedLayer` of one.
        input: (T, N, I) or, packed, (sum of lengths, I).
        batch_sizes: rows of every step of a packed batch, empty for a padded one.
        h_0: (D, N, H_out). c_0: (D, N, H), or None for a cell without one. Both None for zeros,
            if the backend says that it `TAKES_NO_STATE`.
        weights: weight_ih, weight_hh[, bias_ih, bias_hh][, a fifth] of each direction in turn; see
            `Cell`.

    Returns:
        output (T, N, D * H_out) or (sum of lengths, D * H_out), h_n and, if the cell has it, c_n.
    """
    if ranges.on():
        session.note_forward(request, math.prod(input.shape[:-1]), getattr(backend, "WHOLE", ""))
    if not hasattr(backend, "forward"):
        definition = getattr(backend, "definition", _reference)
        return definition(request, batch_sizes, input, h_0, c_0, weights)
    # Tensors that a torch.func transform has left behind, as every operator of torch's sees them.
    input = _unwrapped(input)
    h_0 = None if h_0 is None else _unwrapped(h_0)
    c_0 = None if c_0 is None else _unwrapped(c_0)
    weights = [_unwrapped(weight) for weight in weights]
    if request.needs_grad:
        results: tuple[Tensor, ...] = _apply(
            backend, request, batch_sizes, input, h_0, c_0, *weights
        )
        return results
    return backend.forward(request, input, batch_sizes, h_0, c_0, weights)[0]
