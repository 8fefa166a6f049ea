"""Drop-in ``torch.nn.RNN``, ``GRU``, ``LSTM`` and their cells that run faster."""

import importlib
from typing import TYPE_CHECKING, Any

from triton_rnn.compiled import allow_compile
from triton_rnn.dispatch import BackendError, use_backend
from triton_rnn.extended import AllStates
from triton_rnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from triton_rnn.profiling.session import profile
from triton_rnn.replace import replace, restore
from triton_rnn.version import __version__

if TYPE_CHECKING:
    from triton_rnn.explanation import Explanation, explain
    from triton_rnn.own.module import Recurrent
    from triton_rnn.own.ready import CoupledLSTM, IndRNN
    from triton_rnn.streaming import Stream, tbptt

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AllStates",
    "BackendError",
    "CoupledLSTM",
    "Explanation",
    "GRUCell",
    "IndRNN",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "Stream",
    "__version__",
    "allow_compile",
    "explain",
    "profile",
    "replace",
    "restore",
    "tbptt",
    "use_backend",
]

# Imported when somebody first asks for one: a third of the time of an import.
_LATE = {
    "Explanation": "explanation",
    "explain": "explanation",
    "Recurrent": "own.module",
    "CoupledLSTM": "own.ready",
    "IndRNN": "own.ready",
    "Stream": "streaming",
    "tbptt": "streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    # From now on it is found without this function.
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
