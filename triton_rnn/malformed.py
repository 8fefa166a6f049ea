"""What is said of a malformed call that torch.nn does not have."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from triton_rnn import dispatch

# Any, as a module's mode says which of their forwards it has.
TORCHS: dict[str, Any] = {"RNN_TANH": torch.nn.RNN, "RNN_RELU": torch.nn.RNN}
TORCHS |= {"GRU": torch.nn.GRU, "LSTM": torch.nn.LSTM}


def refuse(module: Any, input: Any, hx: Any, names: Sequence[str]) -> NoReturn:
    """Raise what is wrong with a call that cannot be taken apart.

    Raises:
        RuntimeError: what torch.nn's own forward says.
        BackendError: if it has nothing to say.
    """
    TORCHS[module.mode].forward(module, input, hx)
    # Where Dynamo is not at work, a graph cannot be broken.
    exporting = torch.compiler.is_compiling()
    why = "while torch.export traces it" if exporting else "on tensors out of the ordinary"
    raise dispatch.BackendError(f"no backend can run a call with {', '.join(names)} {why}")
