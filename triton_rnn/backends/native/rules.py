"""Up to which size the C loops are the fastest way, and how many threads they take.

Each rule is a function of sizes with its reason beside it; `bench/` measures them.
"""

import os

import torch

from triton_rnn.request import Request

# Multiply-adds of a step's recurrent product that keep a further thread busy for longer than it
# costs to wait for it: two threads break even at 16,000, and gain a third at 50,000.
STEP_WORK_PER_THREAD = 20_000


def too_large(request: Request) -> str | None:
    """Why `auto` leaves a request to libraries with threads; None where C is faster."""
    return None


# A process that was forked has no OpenMP team, and opening one waits for threads that are not there
# (torch's own operators do). One thread does the work then.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def threads(request: Request, rows: int) -> int:
    """How many threads share a step."""
    available = torch.get_num_threads()
    if available == 1 or _forked:
        return 1
    outputs = request.cell.gates * request.hidden_size
    work = rows // request.seq_len * outputs * request.output_size
    return min(available, 1 + work // STEP_WORK_PER_THREAD)
