"""A call of a user's module: checked, and taken the same way as the calls of the package's own.

`Recurrent.forward` -> `forward` here -> `dispatch.choose` -> `functional.stack` -> `layer.layer` ->
`backends.native` or `backends.triton`, or `reference`. There is no torch.nn to ask, so what is
malformed is said here, in torch.nn's words; and what only torch.nn could serve there (autocast,
torch.func, tracing), the plain loop does here.
"""

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import dispatch, functional, known, obstacles
from triton_rnn.cells import OwnCell
from triton_rnn.episodes import Episodes, checked, episodes_of
from triton_rnn.obstacles import autocast_anywhere
from triton_rnn.profiling import ranges
from triton_rnn.request import Call, Request, zero_states
from triton_rnn.route import by_episodes

if TYPE_CHECKING:
    from triton_rnn.own.module import Recurrent

_PLAIN = (Tensor, torch.nn.Parameter)


@functools.lru_cache(maxsize=1024)
def _named_shapes(
    cell: OwnCell,
    input_size: int,
    hidden_size: int,
    layers: int,
    directions: int,
    bias: bool,
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of all weights in the layer op's order, those that are empty too."""
    found: list[tuple[str, tuple[int, ...]]] = []
    for number in range(layers):
        size = input_size if number == 0 else directions * hidden_size
        for end in ("", "_reverse")[:directions]:
            rows, hidden_rows = cell.gates * hidden_size, cell.products * hidden_size
            found += [
                (f"weight_ih_l{number}{end}", (rows, size)),
                (f"weight_hh_l{number}{end}", (hidden_rows, hidden_size)),
            ]
            if bias:
                found += [
                    (f"bias_ih_l{number}{end}", (rows,)),
                    (f"bias_hh_l{number}{end}", (hidden_rows,)),
                ]
            found.append((f"weight_unit_l{number}{end}", (cell.unit_weights, hidden_size)))
    return tuple(found)


def _shapes_of(module: "Recurrent") -> tuple[tuple[str, tuple[int, ...]], ...]:
    return _named_shapes(
        module.cell,
        module.input_size,
        module.hidden_size,
        module.num_layers,
        2 if module.bidirectional else 1,
        bool(module.bias),
    )


def parameter_shapes(module: "Recurrent") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's parameters, in torch's order, without those that are empty."""
    return {name: shape for name, shape in _shapes_of(module) if shape[0]}


def _names_of(module: "Recurrent") -> tuple[str, ...]:
    return _names(_shapes_of(module))


@functools.lru_cache(maxsize=1024)
def _names(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[str, ...]:
    return tuple(name for name, shape in shapes if shape[0])


def _with_empty(module: "Recurrent", weights: list[Tensor]) -> list[Tensor]:
    """All weights in the layer op's order, of those that are not empty."""
    given = iter(weights)
    return [
        next(given) if shape[0] else weights[0].new_empty(shape) for _, shape in _shapes_of(module)
    ]


def _weights(module: "Recurrent", autocast: bool) -> list[Tensor]:
    """All weights in the layer op's order; empty tensors for what the cell does without.

    Raises:
        RuntimeError: a weight is not there, or of another shape, dtype or device than the first.
    """
    found: list[Tensor] = []
    told = type(module).__name__
    for name, shape in _shapes_of(module):
        if not shape[0]:
            found.append(found[0].new_empty(shape))
            continue
        weight = functional.weight_of(module, name)
        if not isinstance(weight, Tensor) or weight.shape != shape:
            got = list(weight.shape) if isinstance(weight, Tensor) else weight
            raise RuntimeError(f"{told}: Expected {name} size {shape}, got {got}")
        first = found[0] if found else weight
        if weight.device != first.device or (weight.dtype != first.dtype and not autocast):
            raise RuntimeError(
                f"{told}: {name} is {weight.dtype} on {weight.device}, weight_ih_l0 is "
                f"{first.dtype} on {first.device}"
            )
        found.append(weight)
    return found


def _check_input(module: "Recurrent", data: Any, weight: Tensor, packed: bool) -> None:
    told = type(module).__name__
    if not isinstance(data, Tensor):
        raise TypeError(f"{told}: Expected input to be a tensor, got {type(data).__name__}")
    if not packed and data.dim() not in (2, 3):
        raise ValueError(f"{told}: Expected input to be 2D or 3D, got {data.dim()}D instead")
    if packed and data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    if data.layout != torch.strided:
        raise RuntimeError(f"{told}: Expected input to be strided, got {data.layout}")
    if data.dtype != weight.dtype and not autocast_anywhere():
        raise ValueError(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({weight.dtype}). Convert "
            f"input: input.to({weight.dtype}), or convert model: model.to({data.dtype})"
        )
    if data.device != weight.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{data.device} and parameter tensor at {weight.device}"
        )
    if data.size(-1) != module.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {module.input_size}, got "
            f"{data.size(-1)}"
        )


def _states(
    module: "Recurrent", hx: Any, data: Tensor, batch: int, unbatched: bool
) -> tuple[Tensor, ...]:
    """The states that the caller gave, each (L * D, N, H)."""
    count, told = module.cell.states, type(module).__name__
    if count == 1 and isinstance(hx, Tensor):
        hx = (hx,)
    elif count == 1 or not isinstance(hx, (tuple, list)) or len(hx) != count:
        wanted = "a tensor" if count == 1 else f"a tuple of {count} tensors"
        raise TypeError(f"{told}: Expected hx to be {wanted}, got {type(hx).__name__}")
    rows = module.num_layers * (2 if module.bidirectional else 1)
    expected = (rows, module.hidden_size) if unbatched else (rows, batch, module.hidden_size)
    for number, state in enumerate(hx):
        which = "hidden" if count == 1 else f"hidden[{number}]"
        if not isinstance(state, Tensor):
            raise TypeError(f"{told}: Expected {which} to be a tensor, got {type(state).__name__}")
        if state.dim() != len(expected):
            kind = "unbatched 2-D" if unbatched else "batched 3-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {len(expected)}-D but got {state.dim()}-D "
                "tensor"
            )
        if state.shape != expected:
            raise RuntimeError(f"Expected {which} size {expected}, got {list(state.shape)}")
        if state.device != data.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{data.device} and hidden tensor at {state.device}"
            )
        if state.dtype != data.dtype and not autocast_anywhere():
            raise RuntimeError(
                "Input and hidden tensors are not the same dtype, found input tensor with "
                f"{data.dtype} and hidden tensor with {state.dtype}"
            )
    return tuple(state.unsqueeze(1) for state in hx) if unbatched else tuple(hx)


def _batch_sizes(input: PackedSequence, rows: int) -> list[int]:
    sizes = input.batch_sizes
    found = sizes.tolist()
    falling = found == sorted(found, reverse=True) and (not found or found[-1] >= 1)
    if sizes.dtype != torch.int64 or not falling or sum(found) != rows:
        raise RuntimeError(
            "batch_sizes of a packed sequence should be int64, larger than 0, never growing, and "
            f"sum up to the rows of its data, {rows}"
        )
    return found


def prepare(module: "Recurrent", input: Any, hx: Any) -> Call:
    """Take a call apart.

    Raises:
        RuntimeError, ValueError, TypeError: it is malformed.
    """
    cell, hidden_size = module.cell, module.hidden_size
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    weights = _weights(module, autocast_anywhere())
    _check_input(module, data, weights[0], packed)
    unbatched = not packed and data.dim() == 2
    batch_sizes: list[int] = []
    if packed:
        batch_sizes = _batch_sizes(input, data.size(0))
        seq_len, batch = len(batch_sizes), max(batch_sizes, default=0)
        if seq_len and batch_sizes[-1] == batch:
            data = data.reshape(seq_len, batch, data.size(-1))
            batch_sizes = []
    elif unbatched:
        data = data.unsqueeze(1)
    elif module.batch_first:
        data = data.transpose(0, 1)
    if not packed:
        seq_len, batch = data.size(0), data.size(1)
    if seq_len == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    states = () if hx is None else _states(module, hx, data, batch, unbatched)
    if packed and input.sorted_indices is not None:
        states = tuple(state.index_select(1, input.sorted_indices) for state in states)
    # The layer op knows two: h, and all others beside each other.
    h_0 = states[0] if states else None
    c_0 = states[1] if len(states) == 2 else torch.cat(states[1:], -1) if states[1:] else None
    needs_grad = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (data, *weights, *states)
    )
    request = Request(
        cell,
        data.device,
        data.dtype,
        seq_len,
        batch,
        module.input_size,
        hidden_size,
        hidden_size,
        2 if module.bidirectional else 1,
        bool(module.bias),
        bool(batch_sizes),
        needs_grad,
    )
    return Call(request, data, batch_sizes, h_0, c_0, weights)


def obstacle(call: Call) -> str | None:
    """Why only the plain loop can serve a call here and now, or None."""
    tensors = [call.input, *call.weights]
    tensors += [state for state in (call.h_0, call.c_0) if state is not None]
    if not all(type(tensor) in _PLAIN for tensor in tensors):
        return "a tensor is of a subclass of torch.Tensor"
    return obstacles.obstacle()


def choose(call: Call) -> dispatch.Choice:
    """The backend of a call.

    Raises:
        BackendError: one was asked for by name that cannot run it.
    """
    wanted = dispatch.requested()
    reason = obstacle(call)
    if reason is None:
        return dispatch.choose(call.request, wanted)
    if wanted not in ("auto", "reference"):
        raise dispatch.BackendError(f"backend {wanted!r} cannot run this call: {reason}")
    others = {name: reason for name in dispatch.BACKENDS if name != "reference"}
    return dispatch.Choice("reference", others)


def in_episodes(
    module: "Recurrent", input: Any, call: Call, more: tuple[Any, Any, Any]
) -> tuple[Call, Episodes | None]:
    """A call with lengths and resets as one of a packed batch of episodes; None if it has no step.

    Args:
        more: lengths, reset_mask, reset_to.

    Raises:
        TypeError, ValueError: they are not those of this batch.
    """
    request = call.request
    given = checked(*more, module.batch_first, input, request)
    episodes = episodes_of(request.seq_len, request.batch, given, request.device)
    return call if episodes is None else by_episodes(call, episodes), episodes


def _forward_in_episodes(
    module: "Recurrent", input: Any, hx: Any, more: tuple[Any, Any, Any]
) -> tuple[Any, Any]:
    call = prepare(module, input, hx)
    packed, episodes = in_episodes(module, input, call, more)
    request = call.request
    backend = dispatch.backend_module(choose(packed).backend)
    if episodes is None:
        given = (call.h_0, call.c_0)
        if call.h_0 is None:
            rows = request.directions * module.num_layers
            given = zero_states(request._replace(directions=rows), call.input)
        # Of no weight, but a backward may follow.
        nothing = torch.where(call.input.new_zeros((), dtype=torch.bool), call.weights[0].sum(), 0)
        width = request.directions * request.output_size
        output = nothing.expand(*call.input.shape[:2], width).clone()
        states = [state.clone() for state in given if state is not None]
    else:
        drop = module.dropout if module.training else 0.0
        with ranges.call(module.cell):
            rows_of_output, *ends = functional.stack(packed, backend, module.num_layers, drop)
        output = episodes.put(rows_of_output)
        states = [
            episodes.put_states(state, initial, request.directions)
            for state, initial in zip(ends, (call.h_0, call.c_0), strict=False)
        ]
    return functional.in_callers_form(module, input, output, _apart(module, states))


def _apart(module: "Recurrent", states: list[Tensor]) -> list[Tensor]:
    """The states of which the layer op knows two: h, and all others beside each other."""
    h_n, *others = states
    found = [h_n]
    for state in others:
        found += state.chunk(module.cell.states - 1, -1) if module.cell.states > 2 else [state]
    return found


def forward(
    module: "Recurrent", input: Any, hx: Any, more: tuple[Any, Any, Any] | None = None
) -> tuple[Any, Any]:
    """What `module(input, hx)` returns.

    Args:
        more: lengths, reset_mask and reset_to, if any of them is given.

    Raises:
        RuntimeError, ValueError, TypeError: the call is malformed.
        BackendError: a backend was asked for by name that cannot run it.
    """
    if more is not None:
        return _forward_in_episodes(module, input, hx, more)
    kind, names = f"own{module.cell.number}", _names_of(module)
    seen = known.seen_before(module, input, hx, kind, known.DECIDING, names)
    if type(seen) is tuple:
        return seen
    if type(seen) is list:
        decided = seen.pop()
        call = known.again(decided, input, hx, _with_empty(module, seen))
    else:
        call = prepare(module, input, hx)
        backend = dispatch.backend_module(choose(call).backend)
        drop = module.dropout if module.training else 0.0
        form = known.form_of(module, input)
        decided = known.Decided(call.request, backend, form, module.num_layers, drop)
        if module.cell.states <= 2:
            known.remember(seen, decided, call)
    with ranges.call(module.cell):
        output, *states = functional.stack(call, decided.backend, decided.layers, decided.drop)
    return functional.in_callers_form(module, input, output, _apart(module, states))


# `forward` for calls that torch.compile meets: its graph breaks there, as at torch.nn's LSTM.
outside_of_graphs: Callable[..., tuple[Any, Any]] = forward


def break_graphs() -> None:
    """Hide `outside_of_graphs` from Dynamo. Called while tracing, not traced itself."""
    global outside_of_graphs
    if outside_of_graphs is forward:
        # Not when the file is loaded, because it imports all of Dynamo.
        outside_of_graphs = cast(Any, importlib.import_module("torch._dynamo")).disable(forward)


# What torch.compiler.assume_constant_result does, which would import all of Dynamo.
break_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]
