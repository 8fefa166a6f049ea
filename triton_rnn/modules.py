"""The modules: torch.nn's, with a forward of ours. They hold no arithmetic and no state.

Everything but `forward` is inherited, so construction, state_dict, repr and errors are torch's.
Where `triton_rnn.functional` returns None, torch.nn's own forward is called: for input that is
malformed, so that the error is torch's, and for calls that only torch.nn can serve.
"""

from typing import Any

import torch
from torch import Tensor

from triton_rnn import functional, stacking
from triton_rnn.stacking import Stacking


def _torch_twin(module: torch.nn.Module, ours: type, theirs: type) -> torch.nn.Module:
    """The torch.nn module that shares all of a module's attributes, for TorchScript to compile.

    A user's subclass is left to itself: what it adds cannot be carried over.

    Raises:
        RuntimeError: if torch.nn has no module with the layers of this one.
    """
    stacking.refuse_to_leave(module, "torch.jit.script compiles torch.nn's module")
    if type(module) is not ours:
        return module
    twin: torch.nn.Module = object.__new__(theirs)
    twin.__dict__.update(module.__dict__)
    return twin


class RNN(Stacking, torch.nn.RNN):
    """`torch.nn.RNN`, faster. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        call = stacking.forward if self._stacking else functional.forward
        result = call(self, input, hx)
        return super().forward(input, hx) if result is None else result

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, RNN, torch.nn.RNN)


class GRU(Stacking, torch.nn.GRU):
    """`torch.nn.GRU`, faster. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        call = stacking.forward if self._stacking else functional.forward
        result = call(self, input, hx)
        return super().forward(input, hx) if result is None else result

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, GRU, torch.nn.GRU)


class LSTM(Stacking, torch.nn.LSTM):
    """`torch.nn.LSTM`, faster. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        call = stacking.forward if self._stacking else functional.forward
        result = call(self, input, hx)
        return super().forward(input, hx) if result is None else result

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, LSTM, torch.nn.LSTM)


class RNNCell(torch.nn.RNNCell):
    """`torch.nn.RNNCell`: one step of an RNN. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        result = functional.cell_forward(self, input, hx)
        return super().forward(input, hx) if result is None else result[0]

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, RNNCell, torch.nn.RNNCell)


class GRUCell(torch.nn.GRUCell):
    """`torch.nn.GRUCell`: one step of a GRU. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        result = functional.cell_forward(self, input, hx)
        return super().forward(input, hx) if result is None else result[0]

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, GRUCell, torch.nn.GRUCell)


class LSTMCell(torch.nn.LSTMCell):
    """`torch.nn.LSTMCell`: one step of an LSTM. Arguments, shapes, errors, state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        result = functional.cell_forward(self, input, hx)
        return super().forward(input, hx) if result is None else (result[0], result[1])

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, LSTMCell, torch.nn.LSTMCell)
