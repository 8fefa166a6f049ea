"""The plain, differentiable time loop of every cell: the definition that all backends are held to.

Formulas are those of torch.nn's documentation. Everything here is ordinary torch code, so it can be
differentiated any number of times; the second derivative of every backend comes from here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from triton_rnn.cells import Cell, OwnCell

State = tuple[Tensor, ...]


class Weights(NamedTuple):
    """The weights of one direction; None for what the layer does not have."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    unit: Tensor | None = None


def _split(weights: Sequence[Tensor], cell: Cell) -> Weights:
    weight_ih, weight_hh, *rest = weights
    unit = rest.pop() if isinstance(cell, OwnCell) else None
    weight_hr = rest.pop() if cell.projected else None
    bias_ih, bias_hh = rest if rest else (None, None)
    return Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, unit)


def rnn_step(input_preact: Tensor, state: State, weights: Weights, activation: Callable) -> State:
    return (activation(input_preact + linear(state[0], weights.weight_hh, weights.bias_hh)),)


def rnn_tanh_step(input_preact: Tensor, state: State, weights: Weights) -> State:
    """h = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return rnn_step(input_preact, state, weights, torch.tanh)


def rnn_relu_step(input_preact: Tensor, state: State, weights: Weights) -> State:
    """h = relu(W_ih x + b_ih + W_hh h + b_hh)."""
    return rnn_step(input_preact, state, weights, torch.relu)


def gru_step(input_preact: Tensor, state: State, weights: Weights) -> State:
    """r, z = sigmoid(..); n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h = (1 - z) n + z h."""
    (h,) = state
    input_r, input_z, input_n = input_preact.chunk(3, -1)
    hidden_r, hidden_z, hidden_n = linear(h, weights.weight_hh, weights.bias_hh).chunk(3, -1)
    r = torch.sigmoid(input_r + hidden_r)
    z = torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + r * hidden_n)
    return ((1 - z) * n + z * h,)


def lstm_step(input_preact: Tensor, state: State, weights: Weights) -> State:
    """i, f, o = sigmoid(..); g = tanh(..); c = f c + i g; h = o tanh(c), projected by W_hr."""
    h, c = state
    i, f, g, o = (input_preact + linear(h, weights.weight_hh, weights.bias_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if weights.weight_hr is None else linear(h, weights.weight_hr), c)


def _parts(tensor: Tensor, count: int) -> State:
    return tensor.chunk(count, -1) if count else ()


def own_step(cell: OwnCell) -> Callable[[Tensor, State, Weights], State]:
    """The step of a user's cell: the user's function."""

    def step(input_preact: Tensor, state: State, weights: Weights) -> State:
        h, *others = state
        hidden_preact = linear(h, weights.weight_hh, weights.bias_hh)
        arguments = [
            _parts(input_preact, cell.gates),
            _parts(hidden_preact, cell.products),
            (h, *(_parts(others[0], cell.states - 1) if others else ())),
        ]
        if weights.unit is not None and cell.unit_weights:
            arguments.append(weights.unit.unbind())
        returned = cell.step(*arguments)
        new = (returned,) if isinstance(returned, Tensor) else tuple(returned)
        return new if len(new) < 3 else (new[0], torch.cat(new[1:], -1))

    return step


STEPS: dict[str, Callable[[Tensor, State, Weights], State]] = {
    "rnn_tanh": rnn_tanh_step,
    "rnn_relu": rnn_relu_step,
    "gru": gru_step,
    "lstm": lstm_step,
    "lstm_projected": lstm_step,
}


def _direction(
    cell: Cell,
    rows: Tensor,
    batch_sizes: Sequence[int],
    state: State,
    weights: Sequence[Tensor],
    reverse: bool,
) -> tuple[Tensor, State]:
    """One direction over rows (sum of batch sizes, I): its outputs and its final state.

    A sequence takes part while its batch row exists; rows that are not there yet, or no more, keep
    the state they have. So reverse begins at each sequence's own end.
    """
    step = own_step(cell) if isinstance(cell, OwnCell) else STEPS[cell.name]
    split = _split(weights, cell)
    preacts = linear(rows, split.weight_ih, split.bias_ih).split(list(batch_sizes))
    outputs: list[Tensor] = [rows] * len(batch_sizes)
    order = range(len(batch_sizes))
    for t in reversed(order) if reverse else order:
        active = batch_sizes[t]
        new = step(preacts[t], tuple(s[:active] for s in state), split)
        outputs[t] = new[0]
        state = tuple(torch.cat([n, s[active:]]) for n, s in zip(new, state, strict=True))
    return torch.cat(outputs), state


def layer(
    cell: Cell,
    rows: Tensor,
    batch_sizes: Sequence[int],
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """One layer, all its directions, the whole sequence.

    Args:
        rows: (sum of batch sizes, I), time-major: the rows of step 0, then those of step 1, ...
        batch_sizes: how many rows each step has; never growing.
        h_0: (D, N, H_out). c_0: (D, N, H), or None for a cell without one.
        weights: weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr] of each direction in turn.

    Returns:
        output (rows, D * H_out), h_n (D, N, H_out) and, if the cell has it, c_n (D, N, H).
    """
    directions = h_0.size(0)
    count = len(weights) // directions
    outputs, finals = [], []
    for d in range(directions):
        initial = (h_0[d],) if c_0 is None else (h_0[d], c_0[d])
        own = weights[d * count : (d + 1) * count]
        output, final = _direction(cell, rows, batch_sizes, initial, own, reverse=d == 1)
        outputs.append(output)
        finals.append(final)
    return (torch.cat(outputs, -1), *(torch.stack(states) for states in zip(*finals, strict=True)))
