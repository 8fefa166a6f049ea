"""A recurrent module's call: layers, directions and dropout over the layer op, padded or packed."""

import functools
import importlib
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import compiled, dispatch, known
from triton_rnn.cells import LSTM_PROJECTED, MODES
from triton_rnn.layer import layer
from triton_rnn.obstacles import (
    VMAP,
    autocast_anywhere,
    is_compiling,
    obstacle,
    peek_functorch,
    transforms,
)
from triton_rnn.profiling import ranges
from triton_rnn.request import Call, Request, weight_shapes, zero_states

PLAIN = (Tensor, torch.nn.Parameter)
_is_grad_enabled = torch.is_grad_enabled
# The attributes of torch's that decide how a call is done.
TORCHS_DECIDING = (*known.DECIDING, "mode", "proj_size")


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


def asked_here() -> str | None:
    """The backend that is asked for here and now, or None where only torch.nn's forward will do."""
    if is_compiling():
        # After a graph break Dynamo begins anew with this function; what follows it cannot trace.
        return None
    wanted = dispatch.requested()
    if peek_functorch() is not None and wanted in ("auto", "reference") and VMAP in transforms():
        # torch's kernels have no batching rule, the plain loops need none.
        return "reference"
    return None if refused(wanted) else wanted


class Plan(NamedTuple):
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
def plan_of(
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
) -> Plan | None:
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
    return Plan(
        request,
        request._replace(needs_grad=True),
        shapes,
        (*stacked, output_size),
        (*stacked, hidden_size) if cell.states == 2 else None,
    )


def is_plain(tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it is a tensor of that kind; no subclass, which may be on no device, or on many."""
    return (
        type(tensor) in PLAIN
        and tensor.shape == shape
        and tensor.dtype is dtype
        and tensor.device == device
    )


def weight_of(module: torch.nn.Module, name: str) -> Any:
    """What a module has under the name of a weight; None if nothing."""
    if name in module.__dict__:
        # It hides a parameter of that name.
        return module.__dict__[name]
    weight = module._parameters.get(name)
    # Parametrized, pruned or replicated weights are attributes of another kind, or are gone.
    return getattr(module, name, None) if weight is None else weight


def weights_of(module: torch.nn.RNNBase) -> Sequence[Any]:
    """A layer's weights as torch.nn's forward finds them, each None where there is nothing.

    What it multiplies by is the list `_flat_weights`, which users replace (DropConnect); if a
    parameter is another one than when the list was made, that of the parameters.
    """
    names, flat = module._flat_weights_names, module._flat_weights
    found = [weight_of(module, name) for name in names]
    if len(flat) == len(found) and all(map(operator.is_, flat, found)):
        return found
    if all(name in module._parameters or name in module.__dict__ for name in names):
        return found if module._weights_have_changed() else list(flat)
    # One that is computed at every call is another one every time.
    return found


def prepare(module: torch.nn.RNNBase, input: Any, hx: Any) -> Call | None:
    """Take a call apart; None if it is malformed, so that torch.nn's forward shall say how."""
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    if type(data) not in PLAIN or data.layout is not torch.strided or data.is_nested:
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
    plan = plan_of(
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
    given = weights_of(module)
    if len(given) != len(plan.shapes):
        return None

    grad_enabled = _is_grad_enabled()
    needs_grad = grad_enabled and data.requires_grad
    weights: list[Tensor] = []
    for weight, expected in zip(given, plan.shapes, strict=True):
        # As is_plain, without a call for each.
        if (
            type(weight) not in PLAIN
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
            if not is_plain(c_0, plan.c_shape, dtype, device):
                return None
        else:
            h_0 = hx
        if not is_plain(h_0, plan.h_shape, dtype, device):
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


def _check_packed_width(module: torch.nn.RNNBase, input: PackedSequence) -> None:
    """Refuse sequences of one length whose steps are not as wide as the module is for.

    torch checks the others where it multiplies; of these oneDNN reads beyond the weights.
    """
    data, sizes = input.data, input.batch_sizes
    if data.dim() == 2 and sizes.numel() and sizes[0] == sizes[-1]:
        width = data.size(-1)
        if width != module.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {module.input_size}, got {width}"
            )


def refuse_unsafe(module: torch.nn.RNNBase, input: Any, hx: Any) -> None:
    """Refuse what ends the process in torch's own LSTM.

    Raises:
        RuntimeError: in torch's words for a padded input.
    """
    if module.mode == "LSTM" and isinstance(input, PackedSequence):
        _check_packed_width(module, input)
        if hx is not None:
            _check_packed_cell_state(module, input, hx)


def forward(module: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any] | None:
    """What `module(input, hx)` returns; None if torch.nn's own forward is to be called instead.

    Raises:
        RuntimeError: for what ends the process in torch's own LSTM.
    """
    if is_compiling():
        # Before anything else: Dynamo would trace what follows, and cannot.
        return compiled.forward(module, input, hx)
    seen = known.seen_before(
        module, input, hx, "layer", TORCHS_DECIDING, module._flat_weights_names
    )
    if type(seen) is tuple:
        return seen
    call: Call | None
    if type(seen) is list:
        decided = seen.pop()
        call = known.again(decided, input, hx, seen)
    else:
        refuse_unsafe(module, input, hx)
        if autocast_anywhere():
            # Late, and for few: it is made of what is here.
            half = importlib.import_module("triton_rnn.autocast").forward(module, input, hx)
            if half is not None:
                return half
        wanted = asked_here()
        if wanted is None:
            return None
        call = prepare(module, input, hx)
        if call is None:
            return None
        backend = dispatch.backend_module(dispatch.choose(call.request, wanted).backend)
        drop = module.dropout if module.training else 0.0
        form = known.form_of(module, input)
        decided = known.Decided(call.request, backend, form, module.num_layers, drop)
        known.remember(seen, decided, call)
    backend = decided.backend
    run = vars(backend).get("stack", stack)
    if ranges.on():
        with ranges.call(call.request.cell):
            output, *states = run(call, backend, decided.layers, decided.drop)
    else:
        output, *states = run(call, backend, decided.layers, decided.drop)
    return in_callers_form(module, input, output, states)


compiled.leave_to_python(forward)
