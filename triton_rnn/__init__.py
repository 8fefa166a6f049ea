"""Drop-in ``torch.nn.RNN``, ``GRU``, ``LSTM`` and their cells that run faster."""

from triton_rnn.compiled import allow_compile
from triton_rnn.dispatch import BackendError, use_backend
from triton_rnn.explain import Explanation, explain
from triton_rnn.extended import AllStates
from triton_rnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from triton_rnn.own.module import Recurrent
from triton_rnn.own.ready import CoupledLSTM, IndRNN
from triton_rnn.profiling.session import profile
from triton_rnn.replace import replace, restore
from triton_rnn.streaming import Stream, tbptt
from triton_rnn.version import __version__

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
