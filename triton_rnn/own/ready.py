"""Two cells that are only another pointwise step, made as a user would make them."""

import torch
from torch import Tensor

from triton_rnn.own.module import Recurrent

_Tensors = tuple[Tensor, ...]


class CoupledLSTM(Recurrent, gates=3, states=2):
    """LSTM whose forget gate is what its input gate leaves: f = 1 - i, a quarter fewer weights.

    i, o = sigmoid(..); g = tanh(..); c = (1 - i) c + i g; h = o tanh(c). The weights' rows are
    those of i, g, o. Greff et al. 2017, "LSTM: A Search Space Odyssey" (arXiv:1503.04069), where it
    is called CIFG. Arguments, shapes and errors as `Recurrent`.
    """

    @staticmethod
    def step(input: _Tensors, hidden: _Tensors, state: _Tensors) -> _Tensors:
        i, g, o = (a + b for a, b in zip(input, hidden, strict=True))
        _, c = state
        i = torch.sigmoid(i)
        c = (1 - i) * c + i * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class IndRNN(Recurrent, gates=1, products=0, unit_weights=1):
    """RNN whose units only see themselves: h = relu(W_ih x + b_ih + u h), u a vector.

    There is no weight_hh; ``weight_unit_l[k]`` is u, (1, H). Units meet in the next layer. Li et
    al. 2018, "Independently Recurrent Neural Network (IndRNN)" (arXiv:1803.04831). The paper keeps
    abs(u) below 2 ** (1 / T) for sequences of T steps, and starts with larger u than the common
    draw where a layer is to remember for long: ``torch.nn.init.uniform_(m.weight_unit_l0, 0, 1)``.
    Arguments, shapes and errors as `Recurrent`.
    """

    @staticmethod
    def step(input: _Tensors, hidden: _Tensors, state: _Tensors, unit: _Tensors) -> Tensor:
        return torch.relu(input[0] + unit[0] * state[0])
