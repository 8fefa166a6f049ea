"""What this machine can do at best, measured: arithmetic, memory, and the least of an operation."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_MATRIX = 1024
_COPY_BYTES = 64 * 2**20
_SECONDS = 0.25
_FEWEST_RUNS = 3


class Ceilings(NamedTuple):
    """Operations and bytes per second, and seconds per operation on one element."""

    operations_per_second: float
    bytes_per_second: float
    seconds_per_operation: float


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings of a device, with as many threads as torch uses now. Takes under a second."""
    return _measured(device, dtype, torch.get_num_threads())


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> Ceilings:
    with torch.no_grad():
        left = torch.randn(_MATRIX, _MATRIX, device=device).to(dtype)
        product = torch.empty_like(left)
        if device.type == "cpu" and dtype.itemsize == 2:
            # As the layers have it. Without instructions for these dtypes torch.mm takes ten times
            # as long, unless the second operand is a transposed one.
            matrix = _least(lambda: torch.mm(left, left.t(), out=product), device)
        else:
            matrix = _least(lambda: torch.mm(left, left, out=product), device)
        if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # BLAS may be far from what the processor can do; the layers use oneDNN where it pays.
            onednn = torch.ops.mkldnn._linear_pointwise
            matrix = min(matrix, _least(lambda: onednn(left, left, None, "none", [], ""), device))
        source = torch.ones(_COPY_BYTES // dtype.itemsize, device=device, dtype=dtype)
        target = torch.empty_like(source)
        copy = _least(lambda: target.copy_(source), device)
        one = torch.ones(1, device=device, dtype=dtype)
        small = _least(lambda: one.add_(1), device, calls=200)
    return Ceilings(2 * _MATRIX**3 / matrix, 2 * _COPY_BYTES / copy, small)


def _least(function: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """The least seconds that a call took."""
    best, runs, end = float("inf"), 0, time.perf_counter() + _SECONDS
    function()
    # On a busy machine the time may be up before the first run.
    while runs < _FEWEST_RUNS or time.perf_counter() < end:
        runs += 1
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        _wait(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
