"""torch's cells with clipping and zoneout, as pointwise steps of which kernels are generated.

What a step is given besides is the same as in `reference.extended_layer`; here it is traced as a
user's cell is, so its backward is derived and not written. The mask of a zoneout comes as one more
part of the input, which no weight makes and no gradient is wanted of.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from triton_rnn.cells import Cell, RegularizedCell
from triton_rnn.own.program import derive
from triton_rnn.own.trace import trace

_State = tuple[Tensor, ...]
_Parts = Sequence[Tensor]


def _rnn_tanh(input: _Parts, hidden: _Parts, state: _State, clip_cell: float) -> _State:
    return (torch.tanh(input[0] + hidden[0]),)


def _rnn_relu(input: _Parts, hidden: _Parts, state: _State, clip_cell: float) -> _State:
    return (torch.relu(input[0] + hidden[0]),)


def _gru(input: _Parts, hidden: _Parts, state: _State, clip_cell: float) -> _State:
    r = torch.sigmoid(input[0] + hidden[0])
    z = torch.sigmoid(input[1] + hidden[1])
    n = torch.tanh(input[2] + r * hidden[2])
    return ((1 - z) * n + z * state[0],)


def _lstm(input: _Parts, hidden: _Parts, state: _State, clip_cell: float) -> _State:
    i, f, g, o = (a + b for a, b in zip(input, hidden, strict=True))
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    if clip_cell:
        c = c.clamp(-clip_cell, clip_cell)
    return torch.sigmoid(o) * torch.tanh(c), c


_STEPS: dict[str, Callable[[_Parts, _Parts, _State, float], _State]] = {
    "rnn_tanh": _rnn_tanh,
    "rnn_relu": _rnn_relu,
    "gru": _gru,
    "lstm": _lstm,
}


@functools.cache
def regularized(
    cell: Cell,
    clip_hidden: float,
    clip_cell: float,
    zoneout: tuple[float | None, ...],
    locked: bool,
    shows_c: bool,
) -> RegularizedCell:
    """A cell of torch's as it is with some of what a module's options make of it; made once."""
    name, program, masks = f"{cell.name}_regularized", None, zoneout.count(None)
    if clip_hidden or clip_cell or any(part != 0.0 for part in zoneout):

        def step(input: _Parts, hidden: _Parts, state: _State) -> _State:
            new = _STEPS[cell.name](input[: cell.gates], hidden, state, clip_cell)
            if clip_hidden:
                new = (new[0].clamp(-clip_hidden, clip_hidden), *new[1:])
            kept = iter(input[cell.gates :])
            found = []
            for part, before, now in zip(zoneout, state, new, strict=True):
                if part is None:
                    found.append(torch.where(next(kept) > 0.5, before, now))
                else:
                    found.append(now.lerp(before, part) if part else now)
            return tuple(found)

        graph, results = trace(step, name, cell.gates + masks, cell.gates, cell.states, 0)
        program = derive(graph, results, cell.gates, cell.gates, cell.states, 0, masks)
    return RegularizedCell(
        name,
        gates=cell.gates,
        states=cell.states,
        plain=cell,
        program=program,
        clip_hidden=clip_hidden,
        clip_cell=clip_cell,
        zoneout=zoneout,
        locked=locked,
        shows_c=shows_c,
    )
