"""The plain, differentiable time loop of every cell: the definition that all backends are held to.

Formulas are those of torch.nn's documentation. Everything here is ordinary torch code, so it can be
differentiated any number of times; the second derivative of every backend comes from here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from triton_rnn.cells import Cell, OwnCell
from triton_rnn.extras import Extras

State = tuple[Tensor, ...]


class Norm(NamedTuple):
    """Layer normalization of one direction: `Cell.together` and the rows of the fifth weight."""

    together: tuple[int, ...]
    gain_ih: Tensor
    gain_hh: Tensor
    affine_c: Tensor


class Weights(NamedTuple):
    """The weights of one direction; None for what the layer does not have."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    unit: Tensor | None = None
    norm: Norm | None = None


def _split(weights: Sequence[Tensor], cell: Cell) -> Weights:
    weight_ih, weight_hh, *rest = weights
    unit = rest.pop() if isinstance(cell, OwnCell) else None
    weight_hr = rest.pop() if cell.projected else None
    norm = None
    if cell.together:
        gains = rest.pop()
        norm = Norm(cell.together, *gains.tensor_split((cell.gates, 2 * cell.gates)))
    bias_ih, bias_hh = rest if rest else (None, None)
    return Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, unit, norm)


def _normalized(preact: Tensor, together: Sequence[int], gain: Tensor) -> Tensor:
    """Layer normalization of each group of gates by itself; gain (G, H)."""
    gains = gain.split(list(together))
    parts = preact.split([part.numel() for part in gains], -1)
    return torch.cat(
        [
            layer_norm(part, part.shape[-1:], own.flatten())
            for part, own in zip(parts, gains, strict=True)
        ],
        -1,
    )


def _input_preact(x: Tensor, weights: Weights) -> Tensor:
    if weights.norm is None:
        return linear(x, weights.weight_ih, weights.bias_ih)
    preact = linear(x, weights.weight_ih)
    preact = _normalized(preact, weights.norm.together, weights.norm.gain_ih)
    return preact if weights.bias_ih is None else preact + weights.bias_ih


def _hidden_preact(state: State, weights: Weights, mask: Tensor | None) -> Tensor:
    h = state[0] if mask is None else state[0] * mask
    if weights.norm is None:
        return linear(h, weights.weight_hh, weights.bias_hh)
    preact = linear(h, weights.weight_hh)
    preact = _normalized(preact, weights.norm.together, weights.norm.gain_hh)
    return preact if weights.bias_hh is None else preact + weights.bias_hh


def rnn_tanh_step(
    input_preact: Tensor, state: State, weights: Weights, mask: Tensor | None = None
) -> State:
    """h = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return (torch.tanh(input_preact + _hidden_preact(state, weights, mask)),)


def rnn_relu_step(
    input_preact: Tensor, state: State, weights: Weights, mask: Tensor | None = None
) -> State:
    """h = relu(W_ih x + b_ih + W_hh h + b_hh)."""
    return (torch.relu(input_preact + _hidden_preact(state, weights, mask)),)


def gru_step(
    input_preact: Tensor, state: State, weights: Weights, mask: Tensor | None = None
) -> State:
    """r, z = sigmoid(..); n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h = (1 - z) n + z h."""
    (h,) = state
    input_r, input_z, input_n = input_preact.chunk(3, -1)
    hidden_r, hidden_z, hidden_n = _hidden_preact(state, weights, mask).chunk(3, -1)
    r = torch.sigmoid(input_r + hidden_r)
    z = torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + r * hidden_n)
    return ((1 - z) * n + z * h,)


def lstm_step(
    input_preact: Tensor,
    state: State,
    weights: Weights,
    mask: Tensor | None = None,
    clip_cell: float = 0.0,
) -> State:
    """i, f, o = sigmoid(..); g = tanh(..); c = f c + i g; h = o tanh(c), projected by W_hr.

    With layer normalization h is made of the normalized c, and c is carried as it is.
    """
    c = state[1]
    i, f, g, o = (input_preact + _hidden_preact(state, weights, mask)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    if clip_cell:
        c = c.clamp(-clip_cell, clip_cell)
    shown = c
    if weights.norm is not None:
        shown = layer_norm(c, c.shape[-1:], *weights.norm.affine_c)
    h = torch.sigmoid(o) * torch.tanh(shown)
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


STEPS: dict[str, Callable[..., State]] = {
    "rnn_tanh": rnn_tanh_step,
    "rnn_relu": rnn_relu_step,
    "gru": gru_step,
    "lstm": lstm_step,
    "lstm_projected": lstm_step,
    "gru_normalized": gru_step,
    "lstm_normalized": lstm_step,
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
    preacts = _input_preact(rows, split).split(list(batch_sizes))
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
        weights: weight_ih, weight_hh[, bias_ih, bias_hh][, a fifth] of each direction in turn; see
            `Cell`.

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


def _rows_that_run(extras: Extras, batch_sizes: Sequence[int], like: Tensor) -> Tensor | None:
    """(T, N) bool, which sequences a step is for; None if every step is for all."""
    steps = torch.arange(len(batch_sizes) or like.size(0), device=like.device)
    if extras.lengths is not None:
        return steps.unsqueeze(1) < extras.lengths.to(like.device)
    if not batch_sizes:
        return None
    sizes = torch.tensor(batch_sizes, device=like.device)
    return torch.arange(batch_sizes[0], device=like.device) < sizes.unsqueeze(1)


def _zoned_out(zoneout: Tensor | float, t: int, before: Tensor, now: Tensor) -> Tensor:
    """Krueger et al. (2017), arXiv:1606.01305: by a mask of every step, or its expectation."""
    if isinstance(zoneout, Tensor):
        return torch.where(zoneout[t], before, now)
    return now.lerp(before, zoneout) if zoneout else now


def _extended_direction(
    cell: Cell,
    input: Tensor,
    runs: Tensor | None,
    initial: State,
    weights: Sequence[Tensor],
    extras: Extras,
    d: int,
) -> tuple[Tensor, State, Tensor | None]:
    """One direction over a padded batch: its outputs, its final state, and c after every step.

    A step in turn: does an episode begin, so that the state starts anew; the cell, whose W_hh
    multiplies the masked h; clipping; zoneout; and all of that only for the sequences that have not
    ended.
    """
    step = STEPS[cell.name]
    split = _split(weights, cell)
    if runs is not None:
        # No number beyond an end has a part in anything: zero times a NaN would be one.
        input = torch.where(runs.unsqueeze(-1), input, input.new_zeros(()))
    preacts = linear(input, split.weight_ih, split.bias_ih)
    mask = None if extras.recurrent_mask is None else extras.recurrent_mask[d]
    starts = extras.reset_mask
    fresh = initial if extras.reset_to_initial else tuple(map(torch.zeros_like, initial))
    options = {"clip_cell": extras.clip_cell} if extras.clip_cell else {}
    zoneouts = [extras.zoneout_h, extras.zoneout_c][: cell.states]
    own = [
        z.unflatten(-1, (-1, s.size(-1)))[:, :, d] if isinstance(z, Tensor) else z
        for z, s in zip(zoneouts, initial, strict=True)
    ]
    state = initial
    steps = len(input)
    outputs: list[Tensor] = [input] * steps
    cells: list[Tensor] = [input] * steps
    for t in range(steps - 1, -1, -1) if d else range(steps):
        # Going back in time, an episode's last step is the one before the next one's mark.
        marked = t + 1 if d else t
        if starts is not None and marked < steps:
            again = starts[marked] if runs is None else starts[marked] & runs[marked]
            state = tuple(
                torch.where(again.unsqueeze(1), new, old)
                for new, old in zip(fresh, state, strict=True)
            )
        new = step(preacts[t], state, split, mask, **options)
        if extras.clip_hidden:
            new = (new[0].clamp(-extras.clip_hidden, extras.clip_hidden), *new[1:])
        new = tuple(
            _zoned_out(zoneout, t, before, now)
            for zoneout, before, now in zip(own, state, new, strict=True)
        )
        shown = new
        if runs is not None:
            here = runs[t].unsqueeze(1)
            shown = tuple(torch.where(here, now, torch.zeros_like(now)) for now in new)
            new = tuple(
                torch.where(here, now, before) for now, before in zip(new, state, strict=True)
            )
        state = new
        outputs[t], cells[t] = shown[0], shown[-1]
    every_c = torch.stack(cells) if extras.all_cells else None
    return torch.stack(outputs), state, every_c


def extended_layer(
    cell: Cell,
    input: Tensor,
    batch_sizes: Sequence[int],
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    extras: Extras,
) -> tuple[Tensor, ...]:
    """One layer as `layer`, whose steps are given more than weights.

    Args:
        input: (T, N, I) or, packed, (sum of batch sizes, I).
        batch_sizes: rows of every step of a packed batch, empty for a padded one.
        h_0: (D, N, H_out). c_0: (D, N, H), or None for a cell without one.
        weights: as for `layer`.
        extras: masks per row of a packed batch lie as its rows do.

    Returns:
        output (T, N, D * H_out) or packed, h_n, c_n if the cell has it, and if `all_cells` the c
        of every step (T, N, D * H) or packed.
    """
    runs = _rows_that_run(extras, batch_sizes, input)
    if batch_sizes:
        assert runs is not None

        def pad(rows: Tensor) -> Tensor:
            return rows.new_zeros((*runs.shape, rows.size(-1))).index_put((runs,), rows)

        input = pad(input)
        extras = extras._replace(
            zoneout_h=pad(z) if isinstance(z := extras.zoneout_h, Tensor) else z,
            zoneout_c=pad(z) if isinstance(z := extras.zoneout_c, Tensor) else z,
        )
    count = len(weights) // h_0.size(0)
    outputs, finals = [], []
    cells: list[Tensor] = []
    for d in range(h_0.size(0)):
        initial = (h_0[d],) if c_0 is None else (h_0[d], c_0[d])
        own = weights[d * count : (d + 1) * count]
        output, final, every_c = _extended_direction(cell, input, runs, initial, own, extras, d)
        outputs.append(output)
        finals.append(final)
        if every_c is not None:
            cells.append(every_c)
    shown = [torch.cat(outputs, -1)]
    if extras.all_cells:
        shown.append(torch.cat(cells, -1))
    if batch_sizes:
        shown = [steps[runs] for steps in shown]
    states = [torch.stack(each) for each in zip(*finals, strict=True)]
    return (shown[0], *states, *shown[1:])
