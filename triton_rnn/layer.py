"""The layer op: one layer, all its directions, the whole sequence, differentiable."""

import functools
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_rnn import reference
from triton_rnn.obstacles import VMAP, transforms
from triton_rnn.profiling import ranges, session
from triton_rnn.request import Request, zero_states

# Of torch.func's transforms; and of the older vmap, behind `is_grads_batched=True`.
_of_transforms = torch._C._functorch.is_functorch_wrapped_tensor
_of_older_vmap = torch._C._functorch.is_legacy_batchedtensor
_forward_ad = torch.autograd.forward_ad
# Of `torch.autograd.graph.saved_tensors_hooks`; whether a backward may come a second time.
_saved_tensors_hooks = functools.partial(torch._C._autograd._top_saved_tensors_default_hooks, False)
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def _is_more(grad: Tensor | None) -> bool:
    """Whether a gradient is more than numbers: a batch of them, or one to be differentiated."""
    return grad is not None and (_of_transforms(grad) or _of_older_vmap(grad))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        # Those that were made in inference mode have none, and cannot change here.
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class _Kind(NamedTuple):
    """What a backend's backward takes for granted of a tensor that it is given back."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor | None) -> "_Kind | None":
        if tensor is None:
            return None
        return cls(tensor.dtype, tensor.device, tensor.shape, tensor.stride())


def _as_saved(tensor: Tensor | None, kind: _Kind | None) -> Tensor | None:
    """A tensor that a user's hook has unpacked, laid out as the one that was saved.

    Raises:
        RuntimeError: if it is of another dtype, device or shape.
    """
    if tensor is None or kind is None:
        return None
    if (tensor.dtype, tensor.device, tensor.shape) != kind[:3]:
        raise RuntimeError(
            f"a hook of saved tensors returned {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device} for {kind.dtype} {list(kind.shape)} on {kind.device}"
        )
    if tensor.stride() == kind.stride:
        return tensor
    if 0 in kind.stride:
        return tensor.contiguous()
    dtype, device, shape, stride = kind
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(tensor)


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
        cell, reads = request.cell, getattr(backend, "READS", "")
        single = request.seq_len == 1
        needs = ctx.needs_input_grad
        order = _order(reads, request.biased, cell.fifth, request.directions, single, needs)
        given = (input, *weights)
        ctx.order, ctx.unread = order, order.unread(given)
        kept = (h_0, c_0, *order.read(given), *saved)
        ctx.save_for_backward(*kept)
        ctx.kinds = None if _saved_tensors_hooks() is None else [_Kind.of(each) for each in kept]
        ctx.versions = _versions(ctx.unread)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        request: Request = ctx.request
        kept = ctx.saved_tensors
        if ctx.kinds is not None:
            kept = [_as_saved(*each) for each in zip(kept, ctx.kinds, strict=True)]
        h_0, c_0, *others = kept
        needs = ctx.needs_input_grad[3:]
        count = len(needs) - 2 - len(ctx.unread)
        input, *weights = ctx.order.together((*others[:count], *ctx.unread))
        saved = others[count:]
        if torch.is_grad_enabled() or _forward_ad._current_level >= 0 or any(map(_is_more, grads)):
            found = _differentiable_backward(ctx, input, h_0, c_0, weights, grads)
            return None, None, None, *found

        if not _keeps_graph():
            # It is free from now on, as what was saved is.
            ctx.unread = ()
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
    """Input and weights of a layer in torch's order: what the backward reads, the others; both."""

    read: _Picker
    unread: _Picker
    together: _Picker


def _picker(places: Sequence[int]) -> _Picker:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda given: [given[place] for place in places]


@functools.lru_cache(maxsize=256)
def _order(
    reads: str,
    biased: bool,
    fifth: bool,
    directions: int,
    single: bool,
    needs: tuple[bool, ...],
) -> _Order:
    """How to pick from the input and each direction's weights, those that are read and the others.

    Args:
        reads: "everything" for a backend that goes forward again; "as wanted" for one that reads
            the input and W_ih for the gradient of the other one, where that is wanted.
        single: whether there is one step, where W_hh is read for the gradient of h_0 alone.
        needs: `needs_input_grad` of the node: from 3 on input, h_0, c_0 and every weight.
    """
    # weight_ih, weight_hh[, bias_ih, bias_hh][, a fifth].
    count = 2 + 2 * biased + fifth
    all_of_it = reads == "everything"
    input = weight_ih = True
    if reads == "as wanted":
        input, weight_ih = any(needs[6::count]), needs[3]
    weight_hh = all_of_it or not single or needs[4]
    which = [input]
    which += [weight_ih, weight_hh, *[all_of_it] * (2 * biased), *[True] * fifth] * directions
    read = [place for place, is_read in enumerate(which) if is_read]
    unread = [place for place, is_read in enumerate(which) if not is_read]
    apart = read + unread
    together = [apart.index(place) for place in range(len(which))]
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
    if _versions(ctx.unread) != ctx.versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: a weight of a recurrent layer"
        )
    create_graph = torch.is_grad_enabled()
    needs = ctx.needs_input_grad[3:]
    if any(kind != VMAP for kind in transforms()):
        # Autograd rests there.
        return _by_vjp(ctx, [input, h_0, c_0, *weights], grads, needs)
    with torch.enable_grad():
        # Aliases: where one argument is a function of another, or the same tensor twice, the
        # gradient of each is wanted by itself, not by way of the other.
        own_input = _alias(input, needs[0])
        own_h_0 = None if h_0 is None else _alias(h_0, needs[1])
        own_c_0 = None if c_0 is None else _alias(c_0, needs[2])
        own_weights = [_alias(*each) for each in zip(weights, needs[3:], strict=True)]
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


def _by_vjp(
    ctx: Any,
    arguments: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """As `_differentiable_backward`, by a transform, so that those around it see it."""
    wanted = [place for place, need in enumerate(needs) if need and arguments[place] is not None]
    given = [place for place, grad in enumerate(grads) if grad is not None]
    definition = getattr(ctx.backend, "definition", _reference)

    def results_of(*chosen: Any) -> tuple[Tensor, ...]:
        every: list[Any] = list(arguments)
        for place, argument in zip(wanted, chosen, strict=True):
            every[place] = argument
        input, h_0, c_0, *weights = every
        results = definition(ctx.request, ctx.batch_sizes, input, h_0, c_0, weights)
        return tuple(results[place] for place in given)

    chosen = [arguments[place] for place in wanted]
    pullback: Any = torch.func.vjp(results_of, *chosen)[1]
    found = dict(zip(wanted, pullback(tuple(grads[place] for place in given)), strict=True))
    return [found.get(place) for place in range(len(needs))]


def _alias(tensor: Tensor, wanted: bool) -> Tensor:
    """The tensor under another name, which a gradient can be asked for where one is wanted."""
    alias = tensor.view_as(tensor)
    if not wanted or alias.requires_grad:
        return alias
    # It was frozen after the forward: as to torch's own nodes, it is a constant from then on.
    return tensor.detach().requires_grad_()


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
