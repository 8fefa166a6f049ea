"""Layer normalization of LSTM and GRU, beside the loop that a user would write for each today.

Pairs for a table of cases: a name, a training step of ours, one of the plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

import triton_rnn
from bench.beyond_cells import H, Pair, trained


def loop_of_lstm(module: triton_rnn.LSTM, x: Tensor) -> Tensor:
    """What does not depend on time for all steps at once, as a careful user would."""
    h = c = x.new_zeros(x.size(1), H)
    w_hh, gain, bias = module.weight_hh_l0, module.weight_norm_hh_l0, module.bias_hh_l0
    gain_c, bias_c = module.weight_norm_c_l0, module.bias_norm_c_l0
    preacts = layer_norm(linear(x, module.weight_ih_l0), (4 * H,), module.weight_norm_ih_l0)
    outputs = []
    for preact in preacts + module.bias_ih_l0:
        gates = preact + layer_norm(linear(h, w_hh), (4 * H,), gain, bias)
        i, f, g, o = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(layer_norm(c, (H,), gain_c, bias_c))
        outputs.append(h)
    return torch.stack(outputs)


def loop_of_gru(module: triton_rnn.GRU, x: Tensor) -> Tensor:
    h = x.new_zeros(x.size(1), H)
    both = 2 * H
    gain_ih, bias_ih = module.weight_norm_ih_l0, module.bias_ih_l0
    preacts = linear(x, module.weight_ih_l0)
    input_rz = layer_norm(preacts[..., :both], (both,), gain_ih[:both], bias_ih[:both])
    input_n = layer_norm(preacts[..., both:], (H,), gain_ih[both:], bias_ih[both:])
    w_hh = module.weight_hh_l0
    gain_rz, gain_n = module.weight_norm_hh_l0.split([both, H])
    bias_rz, bias_n = module.bias_hh_l0.split([both, H])
    outputs = []
    for rz, n in zip(input_rz, input_n, strict=True):
        hidden_rz, hidden_n = linear(h, w_hh).split([both, H], 1)
        rz = torch.sigmoid(rz + layer_norm(hidden_rz, (both,), gain_rz, bias_rz))
        r, z = rz.chunk(2, 1)
        n = torch.tanh(n + r * layer_norm(hidden_n, (H,), gain_n, bias_n))
        h = torch.lerp(n, h, z)
        outputs.append(h)
    return torch.stack(outputs)


LOOPS: dict[type[torch.nn.RNNBase], Callable[..., Tensor]] = {
    triton_rnn.LSTM: loop_of_lstm,
    triton_rnn.GRU: loop_of_gru,
}


def pairs(batch: int = 8) -> Iterator[Pair]:
    """A training step (forward, backward to input and weights), T=100 H=128, float32."""
    for kind, loop in LOOPS.items():
        torch.manual_seed(0)
        module = kind(H, H, layer_norm=True)  # type: ignore[call-arg]
        # With gains of 1 a hundred steps are chaotic: what is rounded differently ends up apart.
        torch.nn.init.constant_(module.weight_norm_hh_l0, 0.2)
        yield trained(f"{kind.__name__} layer_norm", module, loop, batch)
