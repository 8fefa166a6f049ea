"""Up to which size the C loops are the fastest way, and how many threads they take.

Each rule is a function of sizes with its reason beside it; `bench/` measures them.
"""

import torch

from triton_rnn.request import Request

# Multiply-adds of a step's recurrent product that keep a further thread busy for longer than it
# costs to wait for it: two threads break even at 16,000, and gain a third at 50,000.
STEP_WORK_PER_THREAD = 20_000


def too_large(request: Request) -> str | None:
    """Why `auto` leaves a request to libraries with threads; None where C is faster."""
    return None


def threads(request: Request, rows: int) -> int:
    """How many threads share a step."""
    available = torch.get_num_threads()
    if available == 1:
        return 1
    outputs = request.cell.gates * request.hidden_size
    work = rows // request.seq_len * outputs * request.output_size
    return min(available, 1 + work // STEP_WORK_PER_THREAD)
