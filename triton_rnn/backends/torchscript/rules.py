"""How a call is run on the CPU: block length, which matrix product, which layout.

Each rule is a function of sizes with its reason beside it; `bench/` measures them.
"""

import functools
from pathlib import Path

import torch

from triton_rnn.backends.torchscript.products import HAS_ONEDNN_LINEAR

# A block's gates should stay in a core's second-level cache (1-2 MiB) until its steps are done.
BLOCK_BYTES = 1 << 20
# Fewer rows than this make a slow matrix product.
BLOCK_MIN_ROWS = 256
# Where oneDNN's faster product has earned back its 12 us of overhead over BLAS, at an inner
# dimension of 256. The longer the inner dimension, the further BLAS falls behind: it pays sooner.
ONEDNN_MIN_FLOPS = 4e6
# From here on a W_hh laid out for the product, which every step reads, has earned back its copy.
COPY_MIN_STEPS = 32


@functools.cache
def blas_is_slow_here() -> bool:
    """Whether torch's BLAS is MKL on a processor that MKL holds back (any but Intel's)."""
    if not torch.backends.mkl.is_available() or not HAS_ONEDNN_LINEAR:
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" not in cpuinfo.read_text()


def takes_onednn(dtype: torch.dtype, rows: int, inner: int, columns: int) -> bool:
    """Whether oneDNN, if it is switched on, is to do a product (rows, inner) @ (inner, columns)."""
    return (
        dtype == torch.float32
        and 2.0 * rows * inner * columns * inner / 256 >= ONEDNN_MIN_FLOPS
        and blas_is_slow_here()
    )


def block_rows(width: int, itemsize: int) -> int:
    return max(BLOCK_MIN_ROWS, BLOCK_BYTES // max(1, width * itemsize))


def copies_weight(seq_len: int) -> bool:
    return seq_len >= COPY_MIN_STEPS
