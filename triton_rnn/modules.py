"""The modules: torch.nn's, with a forward of ours. They hold no arithmetic and no state of their own.

Everything but `forward` is inherited, so construction, state_dict, repr and errors are torch's. A call
that this package does not take goes to torch.nn's own forward (`triton_rnn.functional`).
"""

from typing import Any

import torch
from torch import Tensor

from triton_rnn import functional


class RNN(torch.nn.RNN):
    """`torch.nn.RNN`, faster. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        result = functional.forward(self, input, hx)
        return super().forward(input, hx) if result is None else result


class GRU(torch.nn.GRU):
    """`torch.nn.GRU`, faster. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        result = functional.forward(self, input, hx)
        return super().forward(input, hx) if result is None else result


class LSTM(torch.nn.LSTM):
    """`torch.nn.LSTM`, faster. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        result = functional.forward(self, input, hx)
        return super().forward(input, hx) if result is None else result


class RNNCell(torch.nn.RNNCell): ...


class GRUCell(torch.nn.GRUCell): ...


class LSTMCell(torch.nn.LSTMCell): ...
