"""Calls that torch.nn does not have: who runs one, and what is said of one that is malformed."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from triton_rnn import dispatch, obstacles
from triton_rnn.request import Request

# Any, as a module's mode says which of their forwards it has.
TORCHS: dict[str, Any] = {"RNN_TANH": torch.nn.RNN, "RNN_RELU": torch.nn.RNN}
TORCHS |= {"GRU": torch.nn.GRU, "LSTM": torch.nn.LSTM}


def choose(request: Request) -> dispatch.Choice:
    """The backend that knows all extras of a request here and now, and why each other one does not.

    Raises:
        BackendError: if the one that was asked for cannot, or none can.
    """
    wanted = dispatch.requested()
    reason = obstacles.obstacle()
    if reason is None:
        return dispatch.choose(request, wanted)
    what = ", ".join(request.extras)
    if torch._C._is_any_autocast_enabled() or torch._C._get_tracing_state() is not None:
        raise dispatch.BackendError(f"no backend can run a call with {what}: {reason}")
    if wanted not in ("auto", "reference"):
        raise dispatch.BackendError(f"backend {wanted!r} cannot run this call: {reason}")
    # Plain torch code, which transforms and modes understand.
    others = {name: reason for name in dispatch.BACKENDS if name != "reference"}
    return dispatch.Choice("reference", others)


def refuse_malformed(module: Any, input: Any, hx: Any, names: Sequence[str]) -> NoReturn:
    """Raise what is wrong with a call that cannot be taken apart.

    Raises:
        RuntimeError: what torch.nn's own forward says.
        BackendError: if it has nothing to say.
    """
    TORCHS[module.mode].forward(module, input, hx)
    raise dispatch.BackendError(
        f"no backend can run a call with {', '.join(names)} on tensors out of the ordinary"
    )
