"""Who makes the products that do not depend on time: the kernel of `kernels.matmul`, or cuBLAS.

The projection is the Triton kernel, which reads the input where it lies and writes both directions
at once; large ones that lie as cuBLAS likes them are cuBLAS'. The gradients are cuBLAS'. All that
holds where cuBLAS follows the same rules. For float32 it may not: whether TF32 is allowed is a
switch of its own for recurrent layers, and another one for cuBLAS. Where only the first allows it,
cuBLAS is asked for gradients in so many words (`cublas`); else the kernel does what the recurrent
layers' switch says.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from triton_rnn.backends.triton import cublas
from triton_rnn.backends.triton.launch import OPTIONS, chip_of, nothing, pair, precision
from triton_rnn.backends.triton.launcher import Launcher
from triton_rnn.kernels.chips import INTERPRETER, Chip
from triton_rnn.kernels.matmul import matmul


@dataclass(frozen=True)
class Blocks:
    """Blocks of a product: rows, columns and inner dimension, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def matmul_blocks(itemsize: int, columns: int, precision: str, chip: Chip) -> Blocks:
    """The blocks of a product, by its columns and the bytes of an element alone."""
    if chip == INTERPRETER:
        return Blocks(64, 64, 64, 4, 1)
    n = min(128, max(32, 1 << (columns - 1).bit_length()))
    stages = 2 if chip.backend == "hip" else 3
    if precision == "tf32x3":
        return Blocks(64, 32, 32, 4, stages)
    if itemsize == 4:
        return Blocks(128 if chip.backend == "cuda" else 64, n, 32, 8, stages)
    return Blocks(128, n, 64 if chip.backend == "cuda" else 32, 8, stages)


def matmul_constants(
    blocks: Blocks, directions: int, total: bool, splits: int, biased: bool, fold: int,
    precision: str,
) -> dict[str, Any]:  # fmt: skip
    """What `matmul` is compiled for."""
    return {
        "D": directions,
        "SUM": total,
        "SPLITS": splits,
        "HAS_BIAS": biased,
        "FOLDED": fold,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "PRECISION": precision,
    }


def matmul_options(blocks: Blocks) -> dict[str, Any]:
    """Options of the compiler for `matmul`."""
    return {**OPTIONS, "num_warps": blocks.warps, "num_stages": blocks.stages}


def _launch(
    a: Tensor,
    b: Sequence[Tensor],
    out: Tensor,
    sizes: tuple[int, int, int],
    inner: int,
    strides: tuple[int, ...],
    directions: int,
    *,
    bias: Sequence[Tensor | None] = (None,),
    folded: Sequence[Tensor | None] = (None,),
    fold: int = 0,
    total: bool = False,
    splits: int = 1,
) -> None:
    """Launch `matmul`; its docstring tells what the arguments are.

    Args:
        sizes: (M, N, K). strides: a_outer, a_inner, a_k, a_d, b_k, b_n, b_d, c_m, c_d, c_split.
        folded: added to the first `fold` columns. total: sum the directions.
    """
    m, n, k = sizes
    device, dtype = a.device, a.dtype
    ready = _ready(
        device,
        dtype,
        precision(dtype, chip_of(device).backend),
        directions,
        total,
        splits,
        bias[0] is not None,
        fold,
        # Rows may be more or fewer at the next launch: of them the kernel knows the width alone.
        m < 2**31,
        n,
        k,
        strides,
    )
    missing = nothing(device, dtype)
    tiles = -(-m // ready.blocks.m) * -(-n // ready.blocks.n)
    ready.launcher(
        device,
        tiles * splits * (1 if total else directions),
        (a, *pair(b, missing), *pair(bias, missing), *pair(folded, missing), out),
        (m, n, k, inner, *strides),
    )


class Ready(NamedTuple):
    """A product with all decided but its rows."""

    blocks: Blocks
    launcher: Launcher


@functools.lru_cache(maxsize=4096)
def _ready(
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    directions: int,
    total: bool,
    splits: int,
    biased: bool,
    fold: int,
    few: bool,
    columns: int,
    size: int,
    strides: tuple[int, ...],
) -> Ready:
    """All that the kernel is compiled for is among the arguments."""
    blocks = matmul_blocks(dtype.itemsize, columns, precision, chip_of(device))
    constants = matmul_constants(blocks, directions, total, splits, biased, fold, precision)
    return Ready(blocks, Launcher(matmul, constants, matmul_options(blocks)))


def _rows_of(input: Tensor) -> tuple[int, int, int]:
    """How to find row m of an input (T, N, I) or (R, I): (inner, outer stride, inner stride)."""
    strides = input.stride()
    if len(strides) == 2:
        return 1, strides[0], 0
    batch = input.size(1)
    if strides[0] == batch * strides[1]:
        return 1, strides[1], 0
    return batch, strides[0], strides[1]


def project(
    input: Tensor,
    weight_ih: Sequence[Tensor],
    bias_ih: Sequence[Tensor | None],
    bias_hh: Sequence[Tensor | None],
    fold: int,
    preacts: Tensor,
) -> None:
    """Write the input's preactivations, (R, D, G * H), of which each row of a direction is dense.

    Args:
        input: (T, N, I) or (R, I), any strides.
        weight_ih: (G * H, I) of each direction. bias_ih, bias_hh: (G * H,) or None.
        fold: so many elements of bias_hh are added here.
    """
    rows, directions, columns = preacts.shape
    size = weight_ih[0].size(1)
    if _is_for_cublas(input, rows * columns * size, directions == 1 and preacts.is_contiguous()):
        _by_cublas(input, weight_ih[0], bias_ih[0], bias_hh[0], fold, preacts.view(rows, columns))
        return
    inner, outer_stride, inner_stride = _rows_of(input)
    row, direction, _ = preacts.stride()
    _launch(
        input,
        weight_ih,
        preacts,
        (rows, columns, size),
        inner,
        (outer_stride, inner_stride, input.stride(-1), 0, 1, size, 0, row, direction, 0),
        directions,
        bias=bias_ih,
        folded=bias_hh,
        fold=fold,
    )


# From so many multiplications on: below, what it gains (H200: 11 us for 16) goes to the sum of the
# biases, which has to be launched besides.
_CUBLAS_PRODUCTS = 1 << 32


def _is_for_cublas(input: Tensor, products: int, in_rows: bool) -> bool:
    """Whether a projection is left to cuBLAS.

    H200, 16384 rows, H = I = 768, float16: 123 us for the kernel's 181; 32768 rows, H = I = 512,
    float32: 206 for 394.
    """
    return (
        products >= _CUBLAS_PRODUCTS
        and in_rows
        and input.device.type == "cuda"
        and input.is_contiguous()
        and cublas_agrees(input.device, input.dtype)
    )


def cublas_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuBLAS, as torch's switches stand, makes a product by the kernel's rules."""
    if dtype != torch.float32:
        return True
    if device.type != "cuda":
        # The kernels under the interpreter.
        return False
    ours = precision(dtype, chip_of(device).backend) == "tf32"
    matmul: Any = torch.backends.cuda.matmul
    return ours == (matmul.fp32_precision == "tf32")


def is_for_cublas_in_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether gradients of float32 are asked of cuBLAS in TF32.

    Not where algorithms must be deterministic: torch's own products raise there, or are told by the
    environment how to be, which is torch's to know.
    """
    return (
        device.type == "cuda"
        and precision(dtype, chip_of(device).backend) == "tf32"
        and not torch.are_deterministic_algorithms_enabled()
    )


@torch.no_grad()
def _by_cublas(
    input: Tensor,
    weight: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    fold: int,
    out: Tensor,
) -> None:
    rows = input.reshape(-1, input.size(-1))
    if bias_ih is None:
        torch.mm(rows, weight.t(), out=out)
        return
    bias = bias_ih
    if bias_hh is not None and fold:
        # Of a user's cell they may be of different lengths.
        bias = bias_ih.clone()
        bias[:fold] += bias_hh[:fold]
    torch.addmm(bias, rows, weight.t(), out=out)


# From so many multiplications on the kernel is given a transposed copy of the weights: products of
# TF32 want side by side what they add up. On an H200 34e9 of them took 865 us without, 394 where it
# is so; for as many as these the gain is as long as a launch.
_TURNED_PRODUCTS = 1 << 29


def grad_input(grad_preact: Tensor, weight_ih: Sequence[Tensor]) -> Tensor:
    """Gradient (R, I) of the input, from grad_preact (R, D, G * H), the directions added up."""
    rows, directions, columns = grad_preact.shape
    if cublas_agrees(grad_preact.device, grad_preact.dtype):
        result = grad_preact[:, 0] @ weight_ih[0]
        return result if directions == 1 else result.addmm_(grad_preact[:, 1], weight_ih[1])
    size = weight_ih[0].size(1)
    if is_for_cublas_in_tf32(grad_preact.device, grad_preact.dtype):
        result = grad_preact.new_empty(rows, size)
        parts = enumerate(weight_ih)
        if all(cublas.multiply(grad_preact[:, d], weight, result, d > 0) for d, weight in parts):
            return result
    weight_strides = size, 1
    if rows * columns * size >= _TURNED_PRODUCTS:
        weight_ih = [weight.t().contiguous() for weight in weight_ih]
        weight_strides = 1, columns
    result = grad_preact.new_empty(rows, size)
    row, direction, column = grad_preact.stride()
    _launch(
        grad_preact,
        weight_ih,
        result,
        (rows, size, columns),
        1,
        (row, 0, column, direction, *weight_strides, 0, size, 0, 0),
        directions,
        total=True,
    )
    return result


def grad_weight(grad: Tensor, operand: Tensor) -> Tensor:
    """Gradient (C, K) of a weight: grad^T operand, from grad (R, C) and operand (R, K)."""
    if cublas_agrees(grad.device, grad.dtype):
        return grad.t() @ operand
    rows, columns = grad.shape
    size = operand.size(1)
    if is_for_cublas_in_tf32(grad.device, grad.dtype):
        # H200, 32768 rows, 2048 x 512: 284 us for the kernel's 1040, whose products of TF32 would
        # have both operands turned.
        result = grad.new_empty(columns, size)
        if cublas.multiply(grad.t(), operand, result):
            return result
    chip = chip_of(grad.device)
    # Few blocks of result and very many rows: the rows are cut in parts that run side by side, and
    # their results are added in a fixed order.
    blocks = matmul_blocks(4, size, precision(grad.dtype, chip.backend), chip)
    tiles = triton.cdiv(columns, blocks.m) * triton.cdiv(size, blocks.n)
    splits = max(1, min(2 * chip.multiprocessors // tiles, rows // (16 * blocks.k), 64))
    parts = grad.new_empty(splits, columns, size)
    row, column = grad.stride()
    _launch(
        grad,
        (operand,),
        parts,
        (columns, size, rows),
        1,
        (column, 0, row, 0, *operand.stride(), 0, size, 0, columns * size),
        1,
        splits=splits,
    )
    return parts[0] if splits == 1 else parts.sum(0)
