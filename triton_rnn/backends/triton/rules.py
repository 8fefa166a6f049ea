"""When `auto` takes the kernels, and when it leaves a call to cuDNN.

Both sides are estimated: ours by the plan, cuDNN by the way that torch makes it choose an algorithm
(aten/src/ATen/native/cudnn/RNN.cpp, get_algo) and by what that took on an H200 with cuDNN 9.19
(bench/results/gpu.md).
"""

import torch

from triton_rnn.backends.triton import launch
from triton_rnn.cells import OwnCell
from triton_rnn.request import Request

# cuDNN in microseconds per step: its kernels that keep the weights on the chip, for small and large
# hidden sizes, and a product and a pointwise kernel per step.
_SMALL_US, _PERSISTENT_US, _STANDARD_US = 0.6, 2.0, 13.0
# A call without gradients in microseconds of the host: ours, and torch's.
_CALL_US, _CUDNN_CALL_US = 130.0, 86.0
# Operations per microsecond that its products reach with so few rows.
_MFLOPS = {2: 300.0, 4: 150.0}


def cudnn_is_persistent(request: Request) -> bool:
    """Whether torch asks cuDNN for one of its persistent algorithms.

    It does so for small hidden sizes of bfloat16 too, but what runs then is as slow as the other.
    """
    if request.packed or request.cell.projected or request.dtype == torch.bfloat16:
        return False
    hidden, gates = request.hidden_size, request.cell.gates
    small = 384 if gates == 1 else 192
    if request.needs_grad:
        small = 256 if gates == 1 else 128
    if hidden <= small:
        return True
    return (
        request.dtype == torch.float16
        and request.directions == 1
        and gates != 3
        and hidden <= 1024
        and hidden % 128 == 0
        and request.input_size % 128 == 0
        and request.batch % 8 == 0
        and request.batch <= 128
    )


def cudnn_step_us(request: Request, kernel: str) -> float:
    """About how long cuDNN takes for a step, all sequences and directions."""
    gate_rows = request.cell.gates * request.hidden_size
    flops = 2 * gate_rows * request.hidden_size * request.batch * request.directions
    product = flops / 1e6 / _MFLOPS[request.dtype.itemsize]
    if cudnn_is_persistent(request):
        return max(_SMALL_US if request.hidden_size <= 128 else _PERSISTENT_US, product)
    return max(_STANDARD_US, product) * request.directions


def slower_than_torch(request: Request) -> str | None:
    """Why `auto` leaves a request to cuDNN, or None."""
    if isinstance(request.cell, OwnCell):
        # The alternative is the plain loop, which launches dozens of kernels for a step.
        return None
    kernels = ("forward", "backward") if request.needs_grad else ("forward",)
    ours = theirs = 0.0
    for kernel in kernels:
        plan = launch.plan_of(request, kernel)
        if plan is None:
            return f"no plan of the {kernel} recurrence fits this device"
        if plan.variant == "stepwise":
            return f"W_hh does not fit the chip in the {kernel}: a launch per step is too slow"
        ours += plan.floor_us
        theirs += cudnn_step_us(request, kernel)
    if ours > theirs:
        return f"cuDNN is expected to take {theirs:.1f} us a step, the kernels {ours:.1f}"
    if not request.needs_grad:
        # Of few steps the host decides.
        call = max(_CALL_US, request.seq_len * ours)
        cudnn_call = max(_CUDNN_CALL_US, request.seq_len * theirs)
        if call > cudnn_call:
            return f"cuDNN is expected to take {cudnn_call:.0f} us, the kernels {call:.0f}"
    return None
