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

# Two directions go side by side where W_hh of one stays in the second-level cache of a processor;
# and have a thread each for as many multiply-adds of a direction as are worth opening a team.
APART_BYTES = 512 << 10
TEAM_WORK = 200_000

# With a backward to follow, the steps from which on the C loops are faster than torch's operators
# where W_ih and W_hh are more than FEW_WEIGHTS numbers (fewer steps are 0.4 to 1.3 times as fast,
# these 1.1 to 2.5 times). Beside oneDNN they are from the first step on (1.0 to 5.4), and so they
# are without a backward (1.2 to 9.7), where one step lays out no weights.
FEWEST_STEPS = 4
FEW_WEIGHTS = 40_000

# A padded float32 LSTM is oneDNN's primitive in torch. Beside its AVX2 code the C loops take less
# time without a backward (1.07 to 10), and with one (1.1 to 3.2) but where a step has many rows and
# hundreds of units, where both take as long (0.91 to 1.2); beside its AVX-512 code with a backward
# (0.92 to 2.8). Without one, oneDNN's AVX-512 code is up to 9 % faster where a step
# has more than LSTM_STATE rows times hidden units (from half as fast at 128 to as fast there), but
# not from LSTM_STREAMED hidden units on, whose weights come from memory at every step (1.0 to 2.5).
LSTM_STATE = 4096
LSTM_STREAMED = 768
# On processors where neither was measured: those of the first C loops beside AVX2.
LSTM_HIDDEN = 512
# Likewise for all cells beside TorchScript, whose products are a library's, without and with a
# backward to follow: beyond, the layout of the weights costs what it gains.
HIDDEN = {False: 1536, True: 2048}

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
    most = HIDDEN[request.needs_grad]
    if request.hidden_size > most:
        return f"with more than {most} hidden units a library's matrix product is faster"
    capability = torch.backends.cpu.get_cpu_capability()
    onednn = (
        request.cell.name == "lstm"
        and request.dtype == torch.float32
        and not request.packed
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )
    if onednn and _onednn_is_faster(request, capability):
        return "torch runs an LSTM of this size as one oneDNN primitive, which is faster"
    weights = _weights(request)
    if (
        request.needs_grad
        and request.seq_len < FEWEST_STEPS
        and weights > FEW_WEIGHTS
        and not (onednn and capability in ("AVX2", "AVX512"))
    ):
        return f"a backward of fewer than {FEWEST_STEPS} steps and {weights} weights takes longer"
    return None


def _onednn_is_faster(request: Request, capability: str) -> bool:
    many = request.batch * request.hidden_size > LSTM_STATE
    if capability == "AVX2":
        return False
    if capability == "AVX512":
        return many and not request.needs_grad and request.hidden_size < LSTM_STREAMED
    return many or request.hidden_size > LSTM_HIDDEN


def slower_than_torchs_cell(request: Request) -> bool:
    """Whether `auto` leaves the call of a cell to torch's own, of those that `slower` does not.

    Beside torch's a node of the autograd graph of ours costs more than a step saves, but for a GRU,
    which has the most operators, and each costs again in the backward.
    """
    return request.needs_grad and request.cell is not GRU


def _products(request: Request) -> int:
    """Numbers of W_hh h."""
    cell = request.cell
    return request.hidden_size * (cell.products if isinstance(cell, OwnCell) else cell.gates)


def apart(request: Request) -> bool:
    """Whether two directions go side by side, each with a team of its own."""
    bytes_ = _products(request) * request.output_size * request.dtype.itemsize
    return request.directions == 2 and bytes_ <= APART_BYTES


def threads(request: Request, rows: int) -> int:
    """How many threads work on a call."""
    most = available()
    if most == 1:
        return 1
    products, inner = _products(request), request.output_size
    input_work = rows * request.cell.gates * request.hidden_size * request.input_size
    if products:
        work = rows // request.seq_len * products * inner
    else:
        # Nobody waits at a step, so what counts is the input's product, a step's share of it.
        work = input_work // request.seq_len
    share_a_step = 1 + work // STEP_WORK_PER_THREAD
    if apart(request) and (share_a_step > 1 or rows * products * inner + input_work > TEAM_WORK):
        return min(most, 2 * share_a_step)
    return min(most, share_a_step)
