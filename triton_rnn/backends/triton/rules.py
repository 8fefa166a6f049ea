"""When `auto` takes the kernels, and when it leaves a call to cuDNN.

Both sides are estimated: ours by the plan, cuDNN by the way that torch makes it choose an algorithm
(aten/src/ATen/native/cudnn/RNN.cpp, get_algo) and by what that took on an H200 with cuDNN 9.19
(bench/results/gpu.md).
"""

import torch

from triton_rnn.backends.triton import launch
from triton_rnn.cells import OwnCell
from triton_rnn.request import Request

# By cuDNN's standard algorithm, a product and a pointwise kernel for a step, in microseconds, and
# what a call takes besides, without and with gradients.
_STANDARD_US, _STANDARD_CALL_US = 13.0, (400.0, 1500.0)
# Operations per microsecond that its products reach, in 1e6, by bytes of an element; and bytes that
# the L2 cache keeps, beyond which W_hh comes from memory, at so many per microsecond.
_MFLOPS = {2: 200.0, 4: 100.0}
_L2_BYTES, _MEMORY_BYTES_PER_US = 60e6, 4e6
# Its small persistent kernels, by the rows of W_hh up to so many; and what each sequence adds.
_SMALL_US = ((256, 0.5), (400, 0.8), (512, 2.0), (1 << 30, 5.0))
_SMALL_SEQUENCE_US = 0.003
# Its large ones, forward and backward: for a step, and for a sequence.
_PERSISTENT_US = {"forward": (1.7, 0.03), "backward": (4.0, 0.05)}
# A call of a layer on the host, without and with gradients: cuDNN's persistent kernels, and ours.
_PERSISTENT_CALL_US, _CALL_US = (90.0, 950.0), (140.0, 1250.0)
# Beside a recurrence stand products over all steps, at so many operations per microsecond in 1e6
# (bfloat16); those of float32 without TF32 are our own, and slow. A tie goes to cuDNN.
_PRODUCT_MFLOPS, _TF32X3_TRAINING, _MARGIN = 500.0, 1.5, 1.1


def _small_hidden(request: Request) -> int:
    """Up to which hidden size torch asks for the small persistent algorithm, in all of a call."""
    if request.cell.gates == 1:
        return 256 if request.needs_grad else 384
    return 128 if request.needs_grad else 192


def cudnn_is_persistent(request: Request) -> bool:
    """Whether torch asks cuDNN for one of its persistent algorithms.

    It does so for small hidden sizes of bfloat16 too, but what runs then is as slow as the other.
    """
    if request.packed or request.cell.projected or request.dtype == torch.bfloat16:
        return False
    hidden, gates = request.hidden_size, request.cell.gates
    if hidden <= _small_hidden(request):
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
    rows = request.cell.gates * request.hidden_size
    if cudnn_is_persistent(request):
        if request.hidden_size <= _small_hidden(request):
            small = next(us for most, us in _SMALL_US if rows <= most)
            step = small + _SMALL_SEQUENCE_US * request.batch
            step *= 2 if kernel == "backward" else 1
        else:
            once, sequence = _PERSISTENT_US[kernel]
            step = once + sequence * request.batch
    else:
        itemsize = request.dtype.itemsize
        weights = rows * request.hidden_size
        step = _STANDARD_US + 2 * weights * request.batch / 1e6 / _MFLOPS[itemsize]
        if weights * itemsize > _L2_BYTES:
            step += weights * itemsize / _MEMORY_BYTES_PER_US
    return step * request.directions


def slower_than_torch(request: Request) -> str | None:
    """Why `auto` leaves a request to cuDNN, or None."""
    if isinstance(request.cell, OwnCell):
        # The alternative is the plain loop, which launches dozens of kernels for a step.
        return None
    training = request.needs_grad
    ours = theirs = 0.0
    for kernel in ("forward", "backward") if training else ("forward",):
        plan = launch.plan_of(request, kernel)
        if plan is None:
            return f"no plan of the {kernel} recurrence fits this device"
        if plan.variant == "stepwise":
            return f"W_hh does not fit the chip in the {kernel}: a launch per step is too slow"
        ours += plan.floor_us
        theirs += cudnn_step_us(request, kernel)
    numbers = request.input_size * (3 if training else 1) + request.hidden_size * training
    rows = request.cell.gates * request.hidden_size * request.directions
    ours += request.dtype.itemsize * request.batch * rows * numbers / 1e6 / _PRODUCT_MFLOPS
    ours *= _MARGIN
    if training and launch.precision(request.dtype, "cuda") == "tf32x3":
        ours *= _TF32X3_TRAINING
    # Of few steps the host decides.
    call = max(_CALL_US[training], request.seq_len * ours)
    if cudnn_is_persistent(request):
        cudnn_call = max(_PERSISTENT_CALL_US[training], request.seq_len * theirs)
    else:
        cudnn_call = _STANDARD_CALL_US[training] + request.seq_len * theirs
    if call > cudnn_call:
        return f"cuDNN is expected to take {cudnn_call:.0f} us, the kernels {call:.0f}"
    return None
