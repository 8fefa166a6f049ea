"""A recurrent module's call: layers, directions and dropout over the layer op, padded or packed."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import compiled, dispatch
from triton_rnn.cells import LSTM_PROJECTED, MODES, RNN_RELU, RNN_TANH
from triton_rnn.layer import layer
from triton_rnn.profiling import ranges
from triton_rnn.request import Request, weight_shapes, zero_states

_PLAIN = (Tensor, torch.nn.Parameter)
_peek_functorch = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_forward_ad = torch.autograd.forward_ad
# As `torch.is_autocast_enabled`, for any kind of device in one question.
_autocast_anywhere = torch._C._is_any_autocast_enabled


def obstacle() -> str | None:
    """Why only torch.nn's own forward can serve a call here and now, or None."""
    if _autocast_anywhere():
        return "autocast is on"
    if _peek_functorch() is not None:
        return "a torch.func transform is at work"
    if _dispatch_modes() > 0:
        return "a torch dispatch mode is at work"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing the call"
    if _tracing_state() is not None:
        return "torch.jit.trace is tracing the call"
    if _forward_ad._current_level >= 0:
        return "forward-mode differentiation is at work"
    return None


def _under_vmap() -> bool:
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def refused(wanted: str) -> bool:
    """Whether an obstacle sends the call to torch.nn's own forward.

    Raises:
        BackendError: if it does, but another backend was asked for.
    """
    reason = obstacle()
    if reason is None:
        return False
    if wanted not in ("auto", "aten"):
        raise dispatch.BackendError(f"backend {wanted!r} cannot run this call: {reason}")
    return True


def _route() -> str | None:
    """The backend that is asked for here and now, or None where only torch.nn's forward will do."""
    if torch.compiler.is_compiling():
        # After a graph break Dynamo begins anew with this function; what follows it cannot trace.
        return None
    wanted = dispatch.requested()
    if _peek_functorch() is not None and wanted in ("auto", "reference") and _under_vmap():
        # torch's kernels have no batching rule, the plain loops need none.
        return "reference"
    return None if refused(wanted) else wanted


class Call(NamedTuple):
    """A well-formed call of a recurrent module, in the form that the layer op takes.

    Attributes:
        request: the first layer's.
        input: (T, N, I) or, packed, (sum of lengths, I).
        batch_sizes: rows of every step of a packed batch, empty for a padded one.
        h_0: (L * D, N, H_out), or None for zeros.
        c_0: (L * D, N, H), or None for zeros or where the cell has none.
        weights: of all layers and directions, in torch's order.
    """

    request: Request
    input: Tensor
    batch_sizes: list[int]
    h_0: Tensor | None
    c_0: Tensor | None
    weights: list[Tensor]


def _weights(module: torch.nn.RNNBase) -> list[Tensor] | None:
    """The module's weights as they are now, in torch's order; None if one is missing."""
    weights = []
    for name in module._flat_weights_names:
        weight = module._parameters.get(name)
        if weight is None:
            # Parametrized, pruned or replicated weights are attributes of another kind, or are
            # gone.
            weight = getattr(module, name, None)
            if weight is None:
                return None
        weights.append(weight)
    return weights


def _fits(state: Any, shape: tuple[int, ...], like: Tensor) -> bool:
    return (
        type(state) in _PLAIN
        and state.shape == shape
        and state.dtype == like.dtype
        and state.device == like.device
    )


def prepare(module: torch.nn.RNNBase, input: Any, hx: Any) -> Call | None:
    """Take a call apart; None if it is malformed, so that torch.nn's forward shall say how.

    Tensor subclasses are out of the ordinary too: they may be on no device, or on many.
    """
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    if not isinstance(data, Tensor) or data.layout != torch.strided:
        return None
    shape = data.shape
    unbatched = not packed and len(shape) == 2
    if len(shape) != (2 if packed or unbatched else 3) or shape[-1] != module.input_size:
        return None
    batch_sizes: list[int] = []
    if packed:
        if input.batch_sizes.dtype != torch.int64:
            return None
        batch_sizes = input.batch_sizes.tolist()
        if batch_sizes != sorted(batch_sizes, reverse=True) or sum(batch_sizes) != shape[0]:
            return None
        seq_len, batch = len(batch_sizes), max(batch_sizes, default=0)
        if seq_len and batch_sizes[-1] < 1:
            return None
        if seq_len and batch_sizes[-1] == batch:
            # Sequences of one length are as good as padded, and some kernels want it so.
            data = data.reshape(seq_len, batch, shape[-1])
            batch_sizes = []
    elif unbatched:
        data = data.unsqueeze(1)
        seq_len, batch = shape[0], 1
    elif module.batch_first:
        data = data.transpose(0, 1)
        batch, seq_len = shape[0], shape[1]
    else:
        seq_len, batch = shape[0], shape[1]
    if seq_len == 0:
        return None

    hidden_size, proj_size = module.hidden_size, module.proj_size
    cell = LSTM_PROJECTED if proj_size else MODES.get(module.mode)
    drop = module.dropout
    if cell is None or not isinstance(drop, (int, float)) or not 0 <= drop <= 1:
        return None
    if (
        type(module.bidirectional) is not bool
        or type(module.bias) is not bool
        or type(module.num_layers) is not int
        or type(drop) is bool
    ):
        # torch builds a module of 0 for False, and of True for 1, and refuses its calls.
        return None
    output_size = proj_size or hidden_size
    directions = 2 if module.bidirectional else 1
    weights = _weights(module)
    shapes = weight_shapes(
        cell.gates * hidden_size,
        module.input_size,
        hidden_size,
        proj_size,
        module.num_layers,
        directions,
        module.bias,
    )
    if weights is None or len(weights) != len(shapes):
        return None
    device, dtype = data.device, data.dtype
    if type(data) not in _PLAIN:
        return None
    needs_grad = data.requires_grad
    for weight, expected in zip(weights, shapes, strict=True):
        if weight.shape != expected or weight.dtype != dtype or weight.device != device:
            return None
        if type(weight) not in _PLAIN:
            return None
        needs_grad = needs_grad or weight.requires_grad

    h_0 = c_0 = None
    if hx is not None:
        stack_shape = (module.num_layers * directions,) + (() if unbatched else (batch,))
        if cell.states == 2:
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                return None
            h_0, c_0 = hx
            if not _fits(c_0, (*stack_shape, hidden_size), data):
                return None
        else:
            h_0 = hx
        if not _fits(h_0, (*stack_shape, output_size), data):
            return None
        for state in (h_0,) if c_0 is None else (h_0, c_0):
            needs_grad = needs_grad or state.requires_grad
        if unbatched:
            h_0 = h_0.unsqueeze(1)
            c_0 = None if c_0 is None else c_0.unsqueeze(1)
        elif packed and input.sorted_indices is not None:
            h_0 = h_0.index_select(1, input.sorted_indices)
            c_0 = None if c_0 is None else c_0.index_select(1, input.sorted_indices)

    request = Request(
        cell,
        device,
        dtype,
        seq_len,
        batch,
        module.input_size,
        hidden_size,
        output_size,
        directions,
        module.bias,
        bool(batch_sizes),
        needs_grad and torch.is_grad_enabled(),
    )
    return Call(request, data, batch_sizes, h_0, c_0, weights)


def stack(call: Call, backend: ModuleType, layers: int, drop: float) -> tuple[Tensor, ...]:
    """Run all layers: output, h_n and, if the cell has it, c_n, time-major.

    Args:
        drop: probability of the dropout between layers, 0 when not training. It is drawn as torch
            draws it: on the time-major output of a layer, both directions together.
    """
    request, x, batch_sizes, h_0, c_0, weights = call
    directions = request.directions
    given = h_0 is not None
    profiled = ranges.on()
    if profiled:
        ranges.here.layer = 0
    if not given and not hasattr(backend, "TAKES_NO_STATE"):
        # One block of zeros serves all layers: no backend writes to an initial state.
        h_0, c_0 = zero_states(request, x)
    if layers == 1:
        return layer(backend, request, batch_sizes, x, h_0, c_0, weights)
    count = len(weights) // layers
    finals: list[list[Tensor]] = []
    for number in range(layers):
        h, c = h_0, c_0
        if given:
            own = slice(number * directions, (number + 1) * directions)
            assert h_0 is not None
            h, c = h_0[own], None if c_0 is None else c_0[own]
        if number == 1:
            request = request._replace(input_size=directions * request.output_size)
        if profiled:
            ranges.here.layer = number
        x, *states = layer(
            backend, request, batch_sizes, x, h, c, weights[number * count : (number + 1) * count]
        )
        finals.append(states)
        if drop > 0 and number + 1 < layers:
            x = dropout(x, drop, True)
    return (x, *(torch.cat(states) for states in zip(*finals, strict=True)))


def _check_packed_cell_state(module: torch.nn.RNNBase, input: PackedSequence, hx: Any) -> None:
    """Refuse a c_0 of the wrong shape, in torch's words for a padded input.

    For a packed one torch checks h_0 alone, and reads beyond c_0.
    """
    if not isinstance(hx, (tuple, list)) or len(hx) != 2 or not input.batch_sizes.numel():
        return
    h_0, c_0 = hx
    if not isinstance(h_0, Tensor) or not isinstance(c_0, Tensor):
        return
    rows = module.num_layers * (2 if module.bidirectional else 1)
    expected = (rows, int(input.batch_sizes[0]), module.hidden_size)
    checked = (*expected[:2], module.proj_size or module.hidden_size)
    if h_0.shape == checked and c_0.shape != expected:
        raise RuntimeError(f"Expected hidden[1] size {expected}, got {list(c_0.size())}")


def refuse_unsafe_state(module: torch.nn.RNNBase, input: Any, hx: Any) -> None:
    """Refuse what ends the process in torch's own LSTM.

    Raises:
        RuntimeError: in torch's words for a padded input.
    """
    if hx is not None and module.mode == "LSTM" and isinstance(input, PackedSequence):
        _check_packed_cell_state(module, input, hx)


def forward(module: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any] | None:
    """What `module(input, hx)` returns; None if torch.nn's own forward is to be called instead.

    Raises:
        RuntimeError: for a state that ends the process in torch's own LSTM.
    """
    if torch.compiler.is_compiling():
        # Before anything else: Dynamo would trace what follows, and cannot.
        return compiled.forward(module, input, hx)
    if hx is not None and module.mode == "LSTM" and isinstance(input, PackedSequence):
        _check_packed_cell_state(module, input, hx)
    wanted = _route()
    if wanted is None:
        return None
    call = prepare(module, input, hx)
    if call is None:
        return None
    request = call.request
    name = dispatch.choose(request, wanted).backend
    backend = dispatch.backend_module(name)
    drop = module.dropout if module.training else 0.0
    run = getattr(backend, "stack", stack)
    if ranges.on():
        with ranges.call(request.cell):
            output, *states = run(call, backend, module.num_layers, drop)
    else:
        output, *states = run(call, backend, module.num_layers, drop)
    if isinstance(input, PackedSequence):
        if input.unsorted_indices is not None:
            states = [state.index_select(1, input.unsorted_indices) for state in states]
        output = PackedSequence(
            output.reshape(-1, output.size(-1)),
            input.batch_sizes,
            input.sorted_indices,
            input.unsorted_indices,
        )
    elif input.dim() == 2:
        output = output.squeeze(1)
        states = [state.squeeze(1) for state in states]
    elif module.batch_first:
        output = output.transpose(0, 1)
    return output, (states[0] if len(states) == 1 else tuple(states))


def prepare_cell(module: torch.nn.RNNCellBase, input: Any, hx: Any) -> Call | None:
    """A cell's call as that of a layer with one time step; None if it is malformed."""
    if isinstance(module, torch.nn.RNNCell):
        # Compared, as torch does: a cell's constructor takes anything for it.
        relu = module.nonlinearity == "relu"
        cell = RNN_RELU if relu else RNN_TANH if module.nonlinearity == "tanh" else None
    else:
        cell = MODES["LSTM" if isinstance(module, torch.nn.LSTMCell) else "GRU"]
    hidden_size = module.hidden_size
    if cell is None or 0 in (module.input_size, hidden_size) or not isinstance(input, Tensor):
        return None
    if input.dim() not in (1, 2) or input.size(-1) != module.input_size:
        return None
    data = input.view(1, -1, module.input_size) if input.dim() == 1 else input.unsqueeze(0)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if module.bias else 2]
    weights: list[Any] = [getattr(module, name, None) for name in names]
    shapes = weight_shapes(
        cell.gates * hidden_size, module.input_size, hidden_size, 0, 1, 1, bool(module.bias)
    )
    if not all(_fits(weight, shape, data) for weight, shape in zip(weights, shapes, strict=True)):
        return None
    states: tuple[Any, ...] = ()
    if hx is not None:
        if cell.states == 2 and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            return None
        states = tuple(hx) if cell.states == 2 else (hx,)
        for state in states:
            if not _fits(state, (*input.shape[:-1], hidden_size), data):
                return None
        states = tuple(state.view(1, -1, hidden_size) for state in states)
    tensors = [data, *weights, *states]
    request = Request(
        cell,
        data.device,
        data.dtype,
        1,
        data.size(1),
        module.input_size,
        hidden_size,
        hidden_size,
        1,
        bool(module.bias),
        False,
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    )
    h_0 = states[0] if states else None
    c_0 = states[1] if len(states) > 1 else None
    return Call(request, data, [], h_0, c_0, weights)


def _check_unbatched_state(module: torch.nn.RNNCellBase, hx: Any) -> None:
    """Refuse a square matrix as the state of an unbatched input, where torch's checks miss it.

    torch splits it into fewer parts than there are gates, and reads beyond the parts.
    """
    state = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
    hidden_size, name = module.hidden_size, type(module).__name__
    gates = 3 if isinstance(module, torch.nn.GRUCell) else 4
    if isinstance(module, torch.nn.RNNCell) or not isinstance(state, Tensor):
        return
    if state.shape == (hidden_size, hidden_size) and hidden_size < gates:
        raise RuntimeError(f"{name}: Expected hx to be 1D for a 1D input, got 2D instead")


def cell_forward(module: torch.nn.RNNCellBase, input: Any, hx: Any) -> tuple[Tensor, ...] | None:
    """The next state, as a tuple; None if torch.nn's own forward is to be called.

    A single step is where torch's own cell is hard to beat, so `auto` does not even look.

    Raises:
        RuntimeError: for a state that ends the process in torch's own cells.
    """
    if hx is not None and isinstance(input, Tensor) and input.dim() == 1:
        _check_unbatched_state(module, hx)
    wanted = _route()
    if wanted is None or wanted in ("auto", "aten"):
        return None
    call = prepare_cell(module, input, hx)
    if call is None:
        return None
    name = dispatch.choose(call.request, wanted).backend
    with ranges.call(call.request.cell):
        _, *states = stack(call, dispatch.backend_module(name), 1, 0.0)
    return tuple(state.view(*input.shape[:-1], module.hidden_size) for state in states)


compiled.leave_to_python(forward)
compiled.leave_to_python(cell_forward)
