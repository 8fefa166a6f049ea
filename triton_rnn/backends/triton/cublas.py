"""cuBLAS' products of float32 in TF32, whatever torch's switch for cuBLAS says.

Whether products may be TF32 is one switch for recurrent layers, which allows it unless somebody
objects, and another one for everything else that torch asks of cuBLAS, which forbids it. To change
the second one for a moment would change it for other threads. So cuBLAS is called here as torch
itself calls it, with torch's handle, stream and workspace, but told the precision with the product
(`cublasGemmEx`, cuBLAS' documentation, 2.8.12).
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

# From cublas_api.h and library_types.h.
_NOT_TRANSPOSED, _TRANSPOSED = 0, 1
_FLOAT32, _FAST_TF32, _DEFAULT_ALGORITHM = 0, 77, -1
_SUCCESS = 0
_LARGEST = 2**31 - 1


@functools.cache
def _gemm() -> Callable[..., int] | None:
    """`cublasGemmEx` of the cuBLAS that torch has loaded; None where torch has none."""
    if torch.version.cuda is None:
        return None
    try:
        # By its name alone: the one that is in the process already.
        library = ctypes.CDLL(f"libcublas.so.{torch.version.cuda.split('.')[0]}")
    except OSError:
        return None
    gemm = library.cublasGemmEx
    gemm.restype = integer = ctypes.c_int
    pointer = ctypes.c_void_p
    gemm.argtypes = (
        pointer, integer, integer, integer, integer, integer, pointer, pointer, integer, integer,
        pointer, integer, integer, pointer, pointer, integer, integer, integer, integer,
    )  # fmt: skip
    return gemm


def _order(matrix: Tensor) -> tuple[int, int] | None:
    """Whether rows or columns lie side by side in memory, and how far apart; None if neither."""
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    if column == 1 and max(columns, 1) <= row <= _LARGEST:
        return _NOT_TRANSPOSED, row
    if row == 1 and max(rows, 1) <= column <= _LARGEST:
        return _TRANSPOSED, column
    return None


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> bool:
    """Write a @ b to `out`, or with `add` add it, in TF32; whether it could be done.

    Args:
        a: (M, K); b: (K, N); out: (M, N), contiguous. Of float32, on the current device.
    """
    gemm, first, second = _gemm(), _order(a), _order(b)
    if gemm is None or first is None or second is None or not out.numel() or not a.size(1):
        return False
    if max(*a.shape, *b.shape) > _LARGEST:
        return False
    one, beta = ctypes.c_float(1.0), ctypes.c_float(float(add))
    # cuBLAS thinks in columns: the transposes of all three, in the other order.
    status = gemm(
        torch.cuda.current_blas_handle(), second[0], first[0], b.size(1), a.size(0), a.size(1),
        ctypes.byref(one), b.data_ptr(), _FLOAT32, second[1], a.data_ptr(), _FLOAT32, first[1],
        ctypes.byref(beta), out.data_ptr(), _FLOAT32, out.size(1), _FAST_TF32, _DEFAULT_ALGORITHM,
    )  # fmt: skip
    return status == _SUCCESS
