"""Up to which size the C loops are the fastest way, and how many threads they take.

Each rule is a function of sizes with its reason beside it; `bench/` measures them.
"""

import os

import torch

from triton_rnn.cells import GRU, OwnCell
from triton_rnn.request import Request

# Multiply-adds of a step's recurrent product that keep a further thread busy for longer than it
# costs to wait for it: two threads lose at 16,000, break even at 30,000 and gain 1.3 at 50,000.
STEP_WORK_PER_THREAD = 32_000

# The weights are laid out anew at every call, which a few steps must earn back: numbers of W_ih and
# W_hh, and the steps from which on the C loops are faster than torch's operators on that many,
# without and with a backward to follow.
FEWEST_STEPS = {
    False: ((1_000_000, 16), (400_000, 4)),
    True: ((1_000_000, 16), (40_000, 4)),
}

# The largest float32 LSTM, in rows of a step times hidden units, and in hidden units, for which the
# C loops are not slower than oneDNN's primitive: from 3.5 times as fast at 32 to 1.0 at the limit.
LSTM_STATE = 4096
LSTM_HIDDEN = 512
# Likewise for the other cells beside TorchScript, whose products are a library's.
HIDDEN = 1024

# A process that was forked has no OpenMP team, and opening one waits for threads that are not there
# (torch's own operators do). One thread does the work then.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def available() -> int:
    """How many threads there are."""
    return 1 if _forked else torch.get_num_threads()


def _weights(request: Request) -> int:
    inputs = request.input_size + request.output_size
    return request.cell.gates * request.hidden_size * inputs


def slower(request: Request) -> str | None:
    """Why `auto` leaves a request to others; None where C is fastest."""
    weights = _weights(request)
    for numbers, steps in FEWEST_STEPS[request.needs_grad]:
        if weights > numbers and request.seq_len < steps:
            return f"with fewer than {steps} steps it costs too much to lay out {weights} weights"
    if request.hidden_size > HIDDEN:
        return f"with more than {HIDDEN} hidden units a library's matrix product is faster"
    if (
        request.cell.name == "lstm"
        and request.dtype == torch.float32
        and not request.packed
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and (request.batch * request.hidden_size > LSTM_STATE or request.hidden_size > LSTM_HIDDEN)
    ):
        return "torch runs an LSTM of this size as one oneDNN primitive, which is faster"
    return None


def slower_than_torchs_cell(request: Request) -> bool:
    """Whether `auto` leaves the call of a cell to torch's own, of those that `slower` does not.

    Beside torch's a node of the autograd graph of ours costs more than a step saves, but for a GRU,
    which has the most operators, and each costs again in the backward.
    """
    return request.needs_grad and request.cell is not GRU


def threads(request: Request, rows: int) -> int:
    """How many threads share a step."""
    most = available()
    if most == 1:
        return 1
    outputs = request.cell.gates * request.hidden_size
    inner = request.output_size
    if isinstance(request.cell, OwnCell):
        outputs = request.cell.products * request.hidden_size
        if not outputs:
            # Nobody waits at a step, so what counts is the input's product, a step's share of it.
            outputs, inner = request.cell.gates * request.hidden_size, request.input_size
    work = rows // request.seq_len * outputs * inner
    return min(most, 1 + work // STEP_WORK_PER_THREAD)
