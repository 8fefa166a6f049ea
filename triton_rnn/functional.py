"""A recurrent module's call: layers, directions and dropout over the layer op, padded or packed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import dispatch
from triton_rnn.cells import LSTM_PROJECTED, MODES
from triton_rnn.layer import layer
from triton_rnn.request import Request

_PLAIN = (Tensor, torch.nn.Parameter)
_peek_functorch = torch._C._functorch.peek_interpreter_stack


def obstacle(device: str, tensors: Sequence[Tensor]) -> str | None:
    """Why only torch's own kernels can serve a call with these tensors here and now, or None."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return f"{type(tensor).__name__} is a tensor subclass"
    if torch.is_autocast_enabled(device):
        return "autocast is on"
    if _peek_functorch() is not None:
        return "a torch.func transform is at work"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing the call"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is tracing the call"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a torch dispatch mode is at work"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is at work"
    return None


class Call(NamedTuple):
    """A well-formed call of a recurrent module, in the form that the layer op takes.

    Attributes:
        request: the first layer's.
        input: (T, N, I) or, packed, (sum of lengths, I).
        batch_sizes: rows of every step of a packed batch, empty for a padded one.
        h_0: (L * D, N, H_out), or None for zeros. c_0: (L * D, N, H), or None for zeros or no cell state.
        weights: of all layers and directions, in torch's order.
    """

    request: Request
    input: Tensor
    batch_sizes: list[int]
    h_0: Tensor | None
    c_0: Tensor | None
    weights: list[Tensor]


@functools.lru_cache(maxsize=1024)
def _weight_shapes(
    gate_rows: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    layers: int,
    directions: int,
    bias: bool,
) -> tuple[tuple[int, ...], ...]:
    """The shapes of all weights of a module, in torch's order."""
    output_size = proj_size or hidden_size
    shapes: list[tuple[int, ...]] = []
    for number in range(layers):
        size = input_size if number == 0 else directions * output_size
        one = [(gate_rows, size), (gate_rows, output_size)]
        if bias:
            one += [(gate_rows,), (gate_rows,)]
        if proj_size:
            one.append((proj_size, hidden_size))
        shapes += one * directions
    return tuple(shapes)


def _weights(module: torch.nn.RNNBase) -> list[Tensor] | None:
    """The module's weights as they are now, in torch's order; None if one is missing."""
    weights = []
    for name in module._flat_weights_names:
        weight = module._parameters.get(name)
        if weight is None:
            # Parametrized, pruned or replicated weights are attributes of another kind, or are gone.
            weight = getattr(module, name, None)
            if weight is None:
                return None
        weights.append(weight)
    return weights


def _matches(tensor: Any, shape: tuple[int, ...], like: Tensor) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.dtype == like.dtype
        and tensor.device == like.device
    )


def prepare(module: torch.nn.RNNBase, input: Any, hx: Any) -> Call | None:
    """Take a call apart; None if it is malformed, so that torch.nn's forward shall say how."""
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    if not isinstance(data, Tensor) or data.layout != torch.strided:
        return None
    dims = data.dim()
    if dims != 2 and (packed or dims != 3):
        return None
    if data.size(-1) != module.input_size:
        return None
    batch_sizes: list[int] = []
    if packed:
        batch_sizes = input.batch_sizes.tolist()
        seq_len, batch = len(batch_sizes), batch_sizes[0] if batch_sizes else 0
        if sum(batch_sizes) != data.size(0) or batch_sizes != sorted(batch_sizes, reverse=True):
            return None
        if seq_len and batch_sizes[-1] < 1:
            return None
    else:
        if dims == 2:
            data = data.unsqueeze(1)
        elif module.batch_first:
            data = data.transpose(0, 1)
        seq_len, batch = data.size(0), data.size(1)
    if seq_len == 0:
        return None

    cell = MODES[module.mode]
    if module.proj_size:
        cell = LSTM_PROJECTED
    hidden_size = module.hidden_size
    output_size = module.proj_size or hidden_size
    directions = 2 if module.bidirectional else 1
    weights = _weights(module)
    shapes = _weight_shapes(
        cell.gates * hidden_size,
        module.input_size,
        hidden_size,
        module.proj_size,
        module.num_layers,
        directions,
        module.bias,
    )
    if weights is None or len(weights) != len(shapes):
        return None
    for weight, shape in zip(weights, shapes, strict=True):
        if not _matches(weight, shape, data):
            return None

    h_0, c_0 = None, None
    if hx is not None:
        rows = module.num_layers * directions
        if cell.states == 2:
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                return None
            h_0, c_0 = hx
        else:
            h_0 = hx
        middle = (batch,) if packed or dims == 3 else ()
        if not _matches(h_0, (rows, *middle, output_size), data):
            return None
        if c_0 is not None and not _matches(c_0, (rows, *middle, hidden_size), data):
            return None
        if packed and input.sorted_indices is not None:
            h_0 = h_0.index_select(1, input.sorted_indices)
            c_0 = None if c_0 is None else c_0.index_select(1, input.sorted_indices)
        elif not middle:
            h_0 = h_0.unsqueeze(1)
            c_0 = None if c_0 is None else c_0.unsqueeze(1)

    tensors = [data, *weights]
    if h_0 is not None:
        tensors.append(h_0)
    if c_0 is not None:
        tensors.append(c_0)
    device = data.device.type
    request = Request(
        cell=cell,
        device=device,
        dtype=data.dtype,
        seq_len=seq_len,
        batch=batch,
        input_size=module.input_size,
        hidden_size=hidden_size,
        output_size=output_size,
        directions=directions,
        biased=module.bias,
        packed=packed,
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        obstacle=obstacle(device, tensors),
    )
    return Call(request, data, batch_sizes, h_0, c_0, weights)


def stack(call: Call, backend: str, layers: int, drop: float) -> tuple[Tensor, ...]:
    """Run all layers: output, h_n and, if the cell has it, c_n, time-major.

    Args:
        drop: probability of the dropout between layers, 0 when not training. It is drawn as torch
            draws it: on the time-major output of a layer, both directions together.
    """
    request, x, batch_sizes, h_0, c_0, weights = call
    module = dispatch.backend_module(backend)
    directions = request.directions
    has_c = request.cell.states == 2
    if h_0 is None:
        # One block of zeros serves all layers: no backend writes to an initial state.
        shape = (directions, request.batch, request.output_size)
        h_0 = x.new_zeros(shape)
        if has_c:
            c_0 = h_0
            if request.output_size != request.hidden_size:
                c_0 = x.new_zeros((directions, request.batch, request.hidden_size))
        given = False
    else:
        given = True
    if layers == 1:
        return layer(module, request, batch_sizes, x, h_0, c_0, weights)
    count = len(weights) // layers
    finals: list[tuple[Tensor, ...]] = []
    for number in range(layers):
        h, c = h_0, c_0
        if given:
            own = slice(number * directions, (number + 1) * directions)
            h, c = h_0[own], None if c_0 is None else c_0[own]
        if number == 1:
            request = request._replace(
                input_size=directions * request.output_size,
                needs_grad=request.needs_grad,
            )
        x, *states = layer(
            module, request, batch_sizes, x, h, c, weights[number * count : (number + 1) * count]
        )
        finals.append(tuple(states))
        if drop > 0 and number + 1 < layers:
            x = dropout(x, drop, True)
    return (x, *(torch.cat(states) for states in zip(*finals, strict=True)))


def forward(
    module: torch.nn.RNNBase,
    input: Tensor | PackedSequence,
    hx: Any,
    torch_forward: Callable[..., Any],
) -> Any:
    """What `module(input, hx)` returns; `torch_forward` is the forward of its torch.nn parent."""
    call = prepare(module, input, hx)
    if call is None:
        return torch_forward(input, hx)
    backend = dispatch.choose(call.request, dispatch.requested()).backend
    if backend == "aten":
        return torch_forward(input, hx)
    drop = module.dropout if module.training else 0.0
    output, *states = stack(call, backend, module.num_layers, drop)
    if call.request.packed:
        if input.unsorted_indices is not None:
            states = [state.index_select(1, input.unsorted_indices) for state in states]
        result: Any = PackedSequence(
            output, input.batch_sizes, input.sorted_indices, input.unsorted_indices
        )
    elif input.dim() == 2:
        result = output.squeeze(1)
        states = [state.squeeze(1) for state in states]
    else:
        result = output.transpose(0, 1) if module.batch_first else output
    return result, (states[0] if len(states) == 1 else tuple(states))
