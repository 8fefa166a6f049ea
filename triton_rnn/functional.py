"""A recurrent module's call: layers, directions and dropout over the layer op, padded or packed."""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import compiled, dispatch
from triton_rnn.cells import LSTM_PROJECTED, MODES
from triton_rnn.layer import layer
from triton_rnn.obstacles import autocast_anywhere, is_compiling, obstacle, peek_functorch
from triton_rnn.profiling import ranges
from triton_rnn.request import Request, weight_shapes, zero_states

_PLAIN = (Tensor, torch.nn.Parameter)
_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_is_grad_enabled = torch.is_grad_enabled
# Attributes that decide how a call is done: a layer's (a user's too), torch's beside, and a cell's
# of each kind.
DECIDING = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "training",
)
_TORCHS_DECIDING = (*DECIDING, "mode", "proj_size")
_CELL_DECIDING = {
    "RNN": ("nonlinearity", "input_size", "hidden_size", "bias"),
    "GRU": ("input_size", "hidden_size", "bias"),
    "LSTM": ("input_size", "hidden_size", "bias"),
}

# Does a call like one before it; None until a backend that can do so has run one. See
# `backends.native.calls`.
_known: Callable[..., Any] | None = None


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
    if is_compiling():
        # After a graph break Dynamo begins anew with this function; what follows it cannot trace.
        return None
    wanted = dispatch.requested()
    if peek_functorch() is not None and wanted in ("auto", "reference") and _under_vmap():
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


class _Plan(NamedTuple):
    """What is true of every call of one form, worked out once.

    Attributes:
        inference, training: the first layer's request, without and with a backward to follow.
        shapes: of the weights, in torch's order.
        h_shape, c_shape: of the initial states in torch's form; c_shape None without one.
    """

    inference: Request
    training: Request
    shapes: tuple[tuple[int, ...], ...]
    h_shape: tuple[int, ...]
    c_shape: tuple[int, ...] | None


# typed: True is not 1. torch builds a module of 0 for False, and of True for 1, and refuses its
# calls.
@functools.lru_cache(maxsize=4096, typed=True)
def _plan(
    mode: str,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    layers: int,
    bias: bool,
    bidirectional: bool,
    seq_len: int,
    batch: int,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
) -> _Plan | None:
    """The plan of a form of call, or None if no call of this form is well-formed.

    Args:
        form: "padded", "unbatched" or "packed".
    """
    cell = LSTM_PROJECTED if proj_size else MODES.get(mode)
    if cell is None or type(bidirectional) is not bool or type(bias) is not bool:
        return None
    if type(layers) is not int:
        return None
    output_size = proj_size or hidden_size
    directions = 2 if bidirectional else 1
    shapes = weight_shapes(
        cell.gates * hidden_size, input_size, hidden_size, proj_size, layers, directions, bias
    )
    request = Request(
        cell,
        device,
        dtype,
        seq_len,
        batch,
        input_size,
        hidden_size,
        output_size,
        directions,
        bias,
        form == "packed",
        False,
    )
    stacked = (layers * directions,) if form == "unbatched" else (layers * directions, batch)
    return _Plan(
        request,
        request._replace(needs_grad=True),
        shapes,
        (*stacked, output_size),
        (*stacked, hidden_size) if cell.states == 2 else None,
    )


def _is_plain(
    tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether it is a tensor of that kind; no subclass, which may be on no device, or on many."""
    return (
        type(tensor) in _PLAIN
        and tensor.shape == shape
        and tensor.dtype is dtype
        and tensor.device == device
    )


def prepare(module: torch.nn.RNNBase, input: Any, hx: Any) -> Call | None:
    """Take a call apart; None if it is malformed, so that torch.nn's forward shall say how."""
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    if type(data) not in _PLAIN or data.layout is not torch.strided:
        return None
    shape = data.shape
    form = "packed" if packed else "padded"
    if len(shape) != (2 if packed else 3):
        if packed or len(shape) != 2:
            return None
        form = "unbatched"
    if shape[-1] != module.input_size:
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
            form = "padded"
    elif form == "unbatched":
        data = data.unsqueeze(1)
        seq_len, batch = shape[0], 1
    elif module.batch_first:
        data = data.transpose(0, 1)
        batch, seq_len = shape[0], shape[1]
    else:
        seq_len, batch = shape[0], shape[1]
    if seq_len == 0:
        return None

    drop = module.dropout
    if type(drop) is bool or not isinstance(drop, (int, float)) or not 0 <= drop <= 1:
        return None
    dtype, device = data.dtype, data.device
    plan = _plan(
        module.mode,
        module.input_size,
        module.hidden_size,
        module.proj_size,
        module.num_layers,
        module.bias,
        module.bidirectional,
        seq_len,
        batch,
        form,
        dtype,
        device,
    )
    if plan is None:
        return None
    names = module._flat_weights_names
    if len(names) != len(plan.shapes):
        return None

    grad_enabled = _is_grad_enabled()
    needs_grad = grad_enabled and data.requires_grad
    weights: list[Tensor] = []
    parameters = module._parameters
    for name, expected in zip(names, plan.shapes, strict=True):
        weight: Any = parameters.get(name)
        if weight is None:
            # Parametrized, pruned or replicated weights are attributes of another kind, or are
            # gone.
            weight = getattr(module, name, None)
        # As _is_plain, without a call for each.
        if (
            type(weight) not in _PLAIN
            or weight.shape != expected
            or weight.dtype is not dtype
            or weight.device != device
        ):
            return None
        if grad_enabled and not needs_grad:
            needs_grad = weight.requires_grad
        weights.append(weight)

    h_0 = c_0 = None
    if hx is not None:
        if plan.c_shape is not None:
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                return None
            h_0, c_0 = hx
            if not _is_plain(c_0, plan.c_shape, dtype, device):
                return None
        else:
            h_0 = hx
        if not _is_plain(h_0, plan.h_shape, dtype, device):
            return None
        if grad_enabled and not needs_grad:
            needs_grad = h_0.requires_grad or (c_0 is not None and c_0.requires_grad)
        if form == "unbatched":
            h_0 = h_0.unsqueeze(1)
            c_0 = None if c_0 is None else c_0.unsqueeze(1)
        elif packed and input.sorted_indices is not None:
            h_0 = h_0.index_select(1, input.sorted_indices)
            c_0 = None if c_0 is None else c_0.index_select(1, input.sorted_indices)

    request = plan.training if needs_grad else plan.inference
    return Call(request, data, batch_sizes, h_0, c_0, weights)


def stack(call: Call, backend: Any, layers: int, drop: float) -> tuple[Tensor, ...]:
    """Run all layers: output, h_n and, if the cell has it, c_n, time-major.

    Args:
        backend: its module, or one made of another.
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


def in_callers_form(
    module: Any, input: Any, output: Tensor, states: list[Tensor]
) -> tuple[Any, Any]:
    """What a module returns for an input, from the results of `stack`."""
    if isinstance(input, PackedSequence):
        unsorted = input.unsorted_indices
        if unsorted is not None:
            states = [state.index_select(1, unsorted) for state in states]
        rows: Any = output.reshape(-1, output.size(-1))
        packed = PackedSequence(rows, input.batch_sizes, input.sorted_indices, unsorted)
        return packed, (states[0] if len(states) == 1 else tuple(states))
    if input.dim() == 2:
        output = output.squeeze(1)
        states = [state.squeeze(1) for state in states]
    elif module.batch_first:
        output = output.transpose(0, 1)
    return output, (states[0] if len(states) == 1 else tuple(states))


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


class Decided(NamedTuple):
    """How a call is done, which is the same for every call of its kind.

    Attributes:
        request: the first layer's.
        form: what input and results look like: "padded", "batch_first", "unbatched", "packed",
            "cell", "unbatched cell".
        layers: how many.
        drop: probability of the dropout between layers, 0 when not training.
    """

    request: Request
    backend: ModuleType
    form: str
    layers: int
    drop: float


def form_of(module: Any, input: Any) -> str:
    """The form of a layer's call: see `Decided`."""
    if isinstance(input, PackedSequence):
        return "packed"
    if input.dim() == 2:
        return "unbatched"
    return "batch_first" if module.batch_first else "padded"


def seen_before(
    module: Any, input: Any, hx: Any, kind: str, deciding: Sequence[str], names: Sequence[str]
) -> Any:
    """What is known of a call, as `known` of calls.c answers; None where nothing can be known.

    Args:
        kind: tells the module from others with the same attributes.
        deciding: its attributes that decide how the call is done.
        names: those of its weights.
    """
    if _known is None:
        return None
    return _known(module, input, hx, dispatch.requested(), kind, deciding, names)


def remember(key: bytes | None, decided: Decided, call: Call) -> None:
    """Spare the next call of this kind the deciding.

    Args:
        key: what the call is known by, if that was asked and can be said.
        call: one of the kind.
    """
    global _known
    if dispatch.capturing(decided.request.device):
        # No kernel is tried out meanwhile: the next call shall be decided about anew.
        return
    native = dispatch.backend_module("native")
    if key is not None:
        native.remember(key, decided, math.prod(call.input.shape[:-1]))
    elif decided.backend in (native, dispatch.backend_module("triton")) or (
        decided.request.device.type != "cpu"
    ):
        _known = native.known()


def again(decided: Decided, input: Any, hx: Any, weights: list[Tensor]) -> Call:
    """A call of a kind that was decided about, as `prepare` and `prepare_cell` would have it."""
    h_0, c_0 = hx if isinstance(hx, (tuple, list)) else (hx, None)
    form = decided.form
    batch_sizes: list[int] = []
    if form == "batch_first":
        input = input.transpose(0, 1)
    elif form == "unbatched":
        input = input.unsqueeze(1)
        h_0 = None if h_0 is None else h_0.unsqueeze(1)
        c_0 = None if c_0 is None else c_0.unsqueeze(1)
    elif form == "packed":
        sizes, order, input = input.batch_sizes, input.sorted_indices, input.data
        if decided.request.packed:
            batch_sizes = sizes.tolist()
        else:
            # Sequences of one length.
            input = input.reshape(decided.request.seq_len, decided.request.batch, -1)
        if order is not None:
            h_0 = None if h_0 is None else h_0.index_select(1, order)
            c_0 = None if c_0 is None else c_0.index_select(1, order)
    elif form != "padded":
        batch_sizes = [decided.request.batch]
        shape = (1, *batch_sizes, decided.request.hidden_size)
        input = input.unsqueeze(0) if form == "unbatched cell" else input
        h_0 = None if h_0 is None else h_0.view(shape)
        c_0 = None if c_0 is None else c_0.view(shape)
    return Call(decided.request, input, batch_sizes, h_0, c_0, weights)


def forward(module: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any] | None:
    """What `module(input, hx)` returns; None if torch.nn's own forward is to be called instead.

    Raises:
        RuntimeError: for a state that ends the process in torch's own LSTM.
    """
    if is_compiling():
        # Before anything else: Dynamo would trace what follows, and cannot.
        return compiled.forward(module, input, hx)
    seen = seen_before(module, input, hx, "layer", _TORCHS_DECIDING, module._flat_weights_names)
    if type(seen) is tuple:
        return seen
    call: Call | None
    if type(seen) is list:
        decided = seen.pop()
        call = again(decided, input, hx, seen)
    else:
        if hx is not None and module.mode == "LSTM" and isinstance(input, PackedSequence):
            _check_packed_cell_state(module, input, hx)
        if autocast_anywhere():
            # Late, and for few: it is made of what is here.
            half = importlib.import_module("triton_rnn.autocast").forward(module, input, hx)
            if half is not None:
                return half
        wanted = _route()
        if wanted is None:
            return None
        call = prepare(module, input, hx)
        if call is None:
            return None
        backend = dispatch.backend_module(dispatch.choose(call.request, wanted).backend)
        drop = module.dropout if module.training else 0.0
        form = form_of(module, input)
        decided = Decided(call.request, backend, form, module.num_layers, drop)
        remember(seen, decided, call)
    backend = decided.backend
    run = vars(backend).get("stack", stack)
    if ranges.on():
        with ranges.call(call.request.cell):
            output, *states = run(call, backend, decided.layers, decided.drop)
    else:
        output, *states = run(call, backend, decided.layers, decided.drop)
    return in_callers_form(module, input, output, states)


def _kind_of_cell(module: torch.nn.RNNCellBase) -> str:
    if isinstance(module, torch.nn.RNNCell):
        return "RNN"
    return "LSTM" if isinstance(module, torch.nn.LSTMCell) else "GRU"


def prepare_cell(module: torch.nn.RNNCellBase, input: Any, hx: Any) -> Call | None:
    """A cell's call as that of a layer with one time step; None if it is malformed.

    A packed batch of one step is what it is: rows, without a dimension for time.
    """
    mode = _kind_of_cell(module)
    if isinstance(module, torch.nn.RNNCell):
        # Compared, as torch does: a cell's constructor takes anything for it.
        kind = module.nonlinearity
        mode = "RNN_RELU" if kind == "relu" else "RNN_TANH" if kind == "tanh" else ""
    input_size, hidden_size = module.input_size, module.hidden_size
    if type(input) not in _PLAIN or input.layout is not torch.strided:
        return None
    shape = input.shape
    if len(shape) not in (1, 2) or shape[-1] != input_size or 0 in (input_size, hidden_size):
        return None
    batched = len(shape) == 2
    batch = shape[0] if batched else 1
    dtype, device = input.dtype, input.device
    biased = bool(module.bias)
    plan = _plan(
        mode, input_size, hidden_size, 0, 1, biased, False, 1, batch, "packed", dtype, device
    )
    if plan is None:
        return None
    grad_enabled = _is_grad_enabled()
    needs_grad = grad_enabled and input.requires_grad
    weights: list[Tensor] = []
    parameters = module._parameters
    for name, expected in zip(_CELL_WEIGHTS[: 4 if biased else 2], plan.shapes, strict=True):
        weight: Any = parameters.get(name)
        if weight is None:
            weight = getattr(module, name, None)
        if not _is_plain(weight, expected, dtype, device):
            return None
        if grad_enabled and not needs_grad:
            needs_grad = weight.requires_grad
        weights.append(weight)
    states: list[Tensor | None] = [None, None]
    if hx is not None:
        if plan.c_shape is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            return None
        for number, state in enumerate(hx if plan.c_shape is not None else (hx,)):
            expected = (batch, hidden_size) if batched else (hidden_size,)
            if not _is_plain(state, expected, dtype, device):
                return None
            if grad_enabled and not needs_grad:
                needs_grad = state.requires_grad
            states[number] = state.unsqueeze(0) if batched else state.view(1, 1, hidden_size)
    request = plan.training if needs_grad else plan.inference
    data = input if batched else input.unsqueeze(0)
    return Call(request, data, [batch], states[0], states[1], weights)


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


def choose_for_cell(request: Request, wanted: str) -> dispatch.Choice | None:
    """The backend of a cell's call; None where `auto` leaves it to torch's own cells.

    A step of these is a few operators in one C++ call, so only a backend whose own call costs less
    has anything to gain.
    """
    choice = dispatch.choose(request, wanted)
    if wanted != "auto":
        return choice
    slower = getattr(dispatch.backend_module(choice.backend), "slower_than_torchs_cell", None)
    return None if slower is None or slower(request) else choice


def cell_forward(module: torch.nn.RNNCellBase, input: Any, hx: Any) -> tuple[Tensor, ...] | None:
    """The next state, as a tuple; None if torch.nn's own forward is to be called.

    Raises:
        RuntimeError: for a state that ends the process in torch's own cells.
    """
    if hx is not None and isinstance(input, Tensor) and input.dim() == 1:
        _check_unbatched_state(module, hx)
    if is_compiling():
        return None
    seen = None
    first = module._parameters.get("weight_ih")
    is_trained = first is not None and first.requires_grad and _is_grad_enabled()
    is_gru = isinstance(module, torch.nn.GRUCell)
    if is_gru or not is_trained:
        kind = _kind_of_cell(module)
        seen = seen_before(module, input, hx, kind, _CELL_DECIDING[kind], _CELL_WEIGHTS)
        if type(seen) is tuple:
            return seen
        if seen is False:
            return None
    call: Call | None
    if type(seen) is list:
        decided = seen.pop()
        call = again(decided, input, hx, seen)
    else:
        wanted = _route()
        if wanted is None or wanted == "aten":
            return None
        if wanted == "auto" and is_trained and not is_gru:
            # As `choose_for_cell` would say in the end.
            return None
        call = prepare_cell(module, input, hx)
        if call is None:
            return None
        choice = choose_for_cell(call.request, wanted)
        if choice is None:
            if seen is not None:
                dispatch.backend_module("native").leave(seen)
            return None
        form = "cell" if input.dim() == 2 else "unbatched cell"
        decided = Decided(call.request, dispatch.backend_module(choice.backend), form, 1, 0.0)
        remember(seen, decided, call)
    if ranges.on():
        with ranges.call(call.request.cell):
            h, *states = stack(call, decided.backend, 1, 0.0)
    else:
        h, *states = stack(call, decided.backend, 1, 0.0)
    # The output of a single step is h; the first of the states says so again.
    if input.dim() == 1:
        return tuple(state.view(-1) for state in (h, *states[1:]))
    return (h, *(state.squeeze(0) for state in states[1:]))


compiled.leave_to_python(forward)
compiled.leave_to_python(cell_forward)
