"""Products that do not depend on time: the input's projection, and the gradients after the loop.

One kernel, for both directions of a layer in one launch. It reads the input where it lies: rows of
a padded batch by their strides in time and batch, rows of a packed one as they are.
"""

import triton
import triton.language as tl

from triton_rnn.kernels.metadata import matmul_metadata


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The block of the result that a program computes.

    Programs walk down GROUP blocks of rows before they turn to the next columns, so that those
    which run at the same time share both operands in the L2 cache.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP * blocks_n
    first = pid // in_group * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    return first + pid % in_group % height, pid % in_group // height


@triton.jit(do_not_specialize=["M", "inner"], launch_metadata=matmul_metadata)
def matmul(
    a_ptr,
    b_0_ptr,
    b_1_ptr,
    bias_0_ptr,
    bias_1_ptr,
    folded_0_ptr,
    folded_1_ptr,
    c_ptr,
    M,
    N,
    K,
    inner,
    a_outer,
    a_inner,
    a_k,
    a_d,
    b_k,
    b_n,
    b_d,
    c_m,
    c_d,
    c_split,
    D: tl.constexpr,
    SUM: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C[d] = A[d] B[d] (+ bias[d]) for every direction d, or their sum.

    Row m of A begins at (m // inner) * a_outer + (m % inner) * a_inner.

    Args:
        b_0_ptr, b_1_ptr: B of either direction, where b_d is 0 or counts from each.
        bias_0_ptr, ...: (N,), added to every row; folded_0_ptr, ...: its first FOLDED elements too.
        a_d, b_d, c_d: from one direction to the next.
        c_split: from one part of K to the next: with SPLITS > 1 each part is a result of its own.
        SUM: add the directions up into one C.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    block_m, block_n = tile_of(pid % tiles, M, N, BLOCK_M, BLOCK_N, 8)
    # Directions and parts of K are the slowest: programs that run together share A and B.
    part = pid // tiles % SPLITS
    m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = (m // inner) * a_outer + (m % inner) * a_inner
    # Rounded up to whole blocks, so that parts do not overlap.
    per_part = tl.cdiv(K, SPLITS * BLOCK_K) * BLOCK_K
    begin = part * per_part
    end = tl.minimum(K, begin + per_part)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    d = pid // (tiles * SPLITS)
    for direction in tl.static_range(D if SUM else 1):
        if SUM:
            d = direction
        b_ptr = b_0_ptr
        if D == 2:
            if d == 1:
                b_ptr = b_1_ptr
        a_ptrs = a_ptr + d * a_d + row[:, None]
        b_ptrs = b_ptr + d * b_d + n[None, :].to(tl.int64) * b_n
        for start in range(begin, end, BLOCK_K):
            column = start + k
            a_block = tl.load(
                a_ptrs + column[None, :].to(tl.int64) * a_k,
                mask=(m < M)[:, None] & (column < end)[None, :],
                other=0.0,
            )
            b_block = tl.load(
                b_ptrs + column[:, None].to(tl.int64) * b_k,
                mask=(column < end)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            product = tl.dot(a_block, b_block, product, input_precision=PRECISION)

    if HAS_BIAS:
        bias_ptr = bias_0_ptr
        folded_ptr = folded_0_ptr
        if D == 2:
            if d == 1:
                bias_ptr = bias_1_ptr
                folded_ptr = folded_1_ptr
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        bias += tl.load(folded_ptr + n, mask=n < FOLDED, other=0.0).to(tl.float32)
        product += bias[None, :]
    c_ptrs = c_ptr + d * c_d + part * c_split + m[:, None] * c_m + n[None, :]
    tl.store(c_ptrs, product.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
