"""A recurrent cell's call: that of a layer with one time step."""

from typing import Any

import torch
from torch import Tensor

from triton_rnn import compiled, dispatch, known
from triton_rnn.functional import PLAIN, asked_here, is_plain, plan_of, stack, weight_of
from triton_rnn.obstacles import is_compiling
from triton_rnn.profiling import ranges
from triton_rnn.request import Call, Request

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
# Attributes that decide how a call is done, of each kind.
_DECIDING = {
    "RNN": ("nonlinearity", "input_size", "hidden_size", "bias"),
    "GRU": ("input_size", "hidden_size", "bias"),
    "LSTM": ("input_size", "hidden_size", "bias"),
}
_is_grad_enabled = torch.is_grad_enabled


def _kind_of(module: torch.nn.RNNCellBase) -> str:
    if isinstance(module, torch.nn.RNNCell):
        return "RNN"
    return "LSTM" if isinstance(module, torch.nn.LSTMCell) else "GRU"


def prepare(module: torch.nn.RNNCellBase, input: Any, hx: Any) -> Call | None:
    """A cell's call as that of a layer with one time step; None if it is malformed.

    A packed batch of one step is what it is: rows, without a dimension for time.
    """
    mode = _kind_of(module)
    if isinstance(module, torch.nn.RNNCell):
        # Compared, as torch does: a cell's constructor takes anything for it.
        kind = module.nonlinearity
        mode = "RNN_RELU" if kind == "relu" else "RNN_TANH" if kind == "tanh" else ""
    input_size, hidden_size = module.input_size, module.hidden_size
    if type(input) not in PLAIN or input.layout is not torch.strided:
        return None
    shape = input.shape
    if len(shape) not in (1, 2) or shape[-1] != input_size or 0 in (input_size, hidden_size):
        return None
    batched = len(shape) == 2
    batch = shape[0] if batched else 1
    dtype, device = input.dtype, input.device
    # By what is there, as torch's own do: it asks for `bias` when a cell is made, and not again.
    given = [weight_of(module, name) for name in _WEIGHTS]
    biased = given[2] is not None
    if biased != (given[3] is not None):
        # torch adds the one that is there.
        return None
    if not biased and not all(hasattr(module, name) for name in _WEIGHTS[2:]):
        # It raises where they were deleted.
        return None
    plan = plan_of(
        mode, input_size, hidden_size, 0, 1, biased, False, 1, batch, "packed", dtype, device
    )
    if plan is None:
        return None
    grad_enabled = _is_grad_enabled()
    needs_grad = grad_enabled and input.requires_grad
    weights: list[Tensor] = []
    for weight, expected in zip(given[: 4 if biased else 2], plan.shapes, strict=True):
        if not is_plain(weight, expected, dtype, device):
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
            if not is_plain(state, expected, dtype, device):
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


def choose(request: Request, wanted: str) -> dispatch.Choice | None:
    """The backend of a cell's call; None where `auto` leaves it to torch's own cells.

    A step of these is a few operators in one C++ call, so only a backend whose own call costs less
    has anything to gain.
    """
    choice = dispatch.choose(request, wanted)
    if wanted != "auto":
        return choice
    slower = getattr(dispatch.backend_module(choice.backend), "slower_than_torchs_cell", None)
    return None if slower is None or slower(request) else choice


def forward(module: torch.nn.RNNCellBase, input: Any, hx: Any) -> tuple[Tensor, ...] | None:
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
        kind = _kind_of(module)
        seen = known.seen_before(module, input, hx, kind, _DECIDING[kind], _WEIGHTS)
        if type(seen) is tuple:
            return seen
        if seen is False:
            return None
    call: Call | None
    if type(seen) is list:
        decided = seen.pop()
        call = known.again(decided, input, hx, seen)
    else:
        wanted = asked_here()
        if wanted is None or wanted == "aten":
            return None
        if wanted == "auto" and is_trained and not is_gru:
            # As `choose` would say in the end.
            return None
        call = prepare(module, input, hx)
        if call is None:
            return None
        choice = choose(call.request, wanted)
        if choice is None:
            if seen is not None:
                dispatch.backend_module("native").leave(seen)
            return None
        form = "cell" if input.dim() == 2 else "unbatched cell"
        decided = known.Decided(call.request, dispatch.backend_module(choice.backend), form, 1, 0.0)
        known.remember(seen, decided, call)
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
