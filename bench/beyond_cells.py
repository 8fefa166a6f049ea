"""Cells that torch does not have, beside the loop that a user would write for each today."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import triton_rnn

T, H = 100, 128


class PeepholeLSTM(triton_rnn.Recurrent, gates=4, states=2, unit_weights=3):
    """Gers & Schmidhuber 2000: the gates see the cell state, each unit's its own."""

    @staticmethod
    def step(input, hidden, state, peephole):
        i, f, g, o = (a + b for a, b in zip(input, hidden, strict=True))
        _, c = state
        i = torch.sigmoid(i + peephole[0] * c)
        f = torch.sigmoid(f + peephole[1] * c)
        c = f * c + i * torch.tanh(g)
        o = torch.sigmoid(o + peephole[2] * c)
        return o * torch.tanh(c), c


class MinimalGatedUnit(triton_rnn.Recurrent, gates=2):
    """Zhou et al. 2016, with the gate after the recurrent product, as in cuDNN's GRU."""

    @staticmethod
    def step(input, hidden, state):
        (h,) = state
        f = torch.sigmoid(input[0] + hidden[0])
        n = torch.tanh(input[1] + f * hidden[1])
        return (1 - f) * h + f * n


def loop_of_peephole_lstm(module: PeepholeLSTM, x: Tensor) -> Tensor:
    """The input's product for all steps at once, as a careful user would."""
    h = c = x.new_zeros(x.size(1), module.hidden_size)
    w_i, w_f, w_o = module.weight_unit_l0
    outputs = []
    for preact in linear(x, module.weight_ih_l0, module.bias_ih_l0):
        gates = preact + linear(h, module.weight_hh_l0, module.bias_hh_l0)
        i, f, g, o = gates.chunk(4, 1)
        i, f = torch.sigmoid(i + w_i * c), torch.sigmoid(f + w_f * c)
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o + w_o * c) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs)


def loop_of_minimal_gated_unit(module: MinimalGatedUnit, x: Tensor) -> Tensor:
    h = x.new_zeros(x.size(1), module.hidden_size)
    outputs = []
    for preact in linear(x, module.weight_ih_l0, module.bias_ih_l0):
        input_f, input_n = preact.chunk(2, 1)
        hidden_f, hidden_n = linear(h, module.weight_hh_l0, module.bias_hh_l0).chunk(2, 1)
        f = torch.sigmoid(input_f + hidden_f)
        h = torch.lerp(h, torch.tanh(input_n + f * hidden_n), f)
        outputs.append(h)
    return torch.stack(outputs)


def loop_of_coupled_lstm(module: triton_rnn.CoupledLSTM, x: Tensor) -> Tensor:
    h = c = x.new_zeros(x.size(1), module.hidden_size)
    outputs = []
    for preact in linear(x, module.weight_ih_l0, module.bias_ih_l0):
        gates = preact + linear(h, module.weight_hh_l0, module.bias_hh_l0)
        i, g, o = gates.chunk(3, 1)
        c = torch.lerp(c, torch.tanh(g), torch.sigmoid(i))
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs)


def loop_of_ind_rnn(module: triton_rnn.IndRNN, x: Tensor) -> Tensor:
    h = x.new_zeros(x.size(1), module.hidden_size)
    (u,) = module.weight_unit_l0
    outputs = []
    for preact in linear(x, module.weight_ih_l0, module.bias_ih_l0):
        h = torch.relu(preact + u * h)
        outputs.append(h)
    return torch.stack(outputs)


LOOPS: dict[type[triton_rnn.Recurrent], Callable[..., Tensor]] = {
    PeepholeLSTM: loop_of_peephole_lstm,
    MinimalGatedUnit: loop_of_minimal_gated_unit,
    triton_rnn.CoupledLSTM: loop_of_coupled_lstm,
    triton_rnn.IndRNN: loop_of_ind_rnn,
}


class Pair(NamedTuple):
    """What to time beside each other: a training step, forward and backward, of each."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]


def trained(name: str, module: torch.nn.Module, loop: Callable[..., Tensor], batch: int) -> Pair:
    """Training steps of a module and of a loop over its weights; both return all gradients."""
    x = torch.randn(T, batch, H, requires_grad=True)
    grad = torch.randn(T, batch, H)
    inputs = [x, *module.parameters()]
    return Pair(
        name,
        lambda: torch.autograd.grad(module(x)[0], inputs, grad),
        lambda: torch.autograd.grad(loop(module, x), inputs, grad),
    )


def pairs(batch: int = 8) -> Iterator[Pair]:
    """A training step of every cell: T=100, I=H=128, float32, one layer."""
    for kind, loop in LOOPS.items():
        torch.manual_seed(0)
        yield trained(kind.__name__, kind(H, H), loop, batch)
