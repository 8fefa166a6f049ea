"""A step's product: the weights that a program keeps by what all programs computed before.

The inner dimension is long and the rows are few, so it is cut in SPLITS parts, one for each warp or
two, which are multiplied side by side and then added. Within a part it is taken BLOCK_K at a time;
a block's number runs through all parts at once.
"""

import triton
import triton.language as tl

from triton_rnn.kernels.exchange import load_exchanged
from triton_rnn.kernels.steps import joined, note_failure


@triton.jit
def inner_columns(block, INNER: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """Which elements of the inner dimension make up a block: (SPLITS, BLOCK_K)."""
    PER_PART: tl.constexpr = (INNER + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    part = tl.arange(0, SPLITS) * PER_PART
    return part[:, None] + (block * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]


@triton.jit
def kept_weights(
    w_hh_ptr,
    first,
    LOAD: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """All blocks of a program's weights, for `exchanged_product`.

    With PAIRS each block as two, of every other column: a pair of numbers is taken apart into one
    for either.
    """
    NUM_K: tl.constexpr = (INNER + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    weights = ()
    for k in tl.static_range(NUM_K):
        if PAIRS:
            column = 2 * inner_columns(k, INNER // 2, BLOCK_K // 2, SPLITS)
            weights = weights + (LOAD(w_hh_ptr, first, column, H, GATES, TURN, BLOCK_H),)
            weights = weights + (LOAD(w_hh_ptr, first, column + 1, H, GATES, TURN, BLOCK_H),)
        else:
            column = inner_columns(k, INNER, BLOCK_K, SPLITS)
            weights = weights + (LOAD(w_hh_ptr, first, column, H, GATES, TURN, BLOCK_H),)
    return weights


@triton.jit
def _multiply(weights, block, product, SPLITS: tl.constexpr, PRECISION: tl.constexpr):
    if SPLITS == 1:
        # Two dimensions, so that Hopper's own matrix instructions may be taken.
        weights = tl.reshape(weights, (weights.shape[1], weights.shape[2]))
        block = tl.reshape(block, (block.shape[1], block.shape[2]))
    return tl.dot(weights, block, product, input_precision=PRECISION)


@triton.jit
def product_zeros(
    polls, M: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """Zeros (M, N) in the layout of a product's result; what they are added to takes it too.

    Of two layouts that meet in a value Triton may keep that of the later one, so this comes after
    what it is to act on.
    """
    # Zero because `polls >= 0`, which the compiler cannot know.
    zero = tl.where(polls < 0, 1.0, 0.0).to(DTYPE)
    left = tl.zeros((M, 16), DTYPE) + zero
    right = tl.zeros((16, N), DTYPE) + zero
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def into_registers(weights, zeros, COUNT: tl.constexpr):
    """The first COUNT blocks (M, K) of 16-bit weights, where matrix instructions need no load.

    What is loaded before a loop Triton leaves in shared memory and reads again for every product:
    at 128 bytes a cycle no step could be shorter than that. But what has the layout of a product's
    result becomes the left operand of another one as it is, from registers. So the bits of a block
    are combined with `zeros` (M, N) of `product_zeros`, as often as they fill a row.
    """
    blocks = ()
    for k in tl.static_range(len(weights)):
        if k < COUNT:
            blocks = blocks + (_like_result(weights[k], zeros),)
        else:
            blocks = blocks + (weights[k],)
    return blocks


@triton.jit
def _like_result(block, zeros):
    M: tl.constexpr = block.shape[0]
    N: tl.constexpr = zeros.shape[1]
    TIMES: tl.constexpr = block.shape[1] // N
    once = tl.reshape(zeros.to(tl.float16).to(tl.int16, bitcast=True), (M, 1, N))
    nothing = tl.reshape(tl.broadcast_to(once, (M, TIMES, N)), block.shape)
    bits = block.to(tl.int16, bitcast=True) | nothing
    return bits.to(block.dtype, bitcast=True)


@triton.jit
def on_top(blocks, FIRST: tl.constexpr, COUNT: tl.constexpr, MOST: tl.constexpr):
    """COUNT blocks (M, N) from FIRST on as few higher ones: of MOST (4, 2 or 1), and the rest."""
    high = ()
    for k in tl.static_range(COUNT // MOST):
        high = high + (_rows(blocks, FIRST + k * MOST, MOST),)
    if MOST == 4 and COUNT % 4 >= 2:
        high = high + (_rows(blocks, FIRST + COUNT // 4 * 4, 2),)
    if MOST > 1 and COUNT % 2 == 1:
        high = high + (blocks[FIRST + COUNT - 1],)
    return high


@triton.jit
def _rows(blocks, FIRST: tl.constexpr, COUNT: tl.constexpr):
    if COUNT == 1:
        high = blocks[FIRST]
    else:
        turned = tl.permute(joined(blocks, FIRST, COUNT), (2, 0, 1))
        high = tl.reshape(turned, (turned.shape[0] * turned.shape[1], turned.shape[2]))
    return high


@triton.jit
def exchanged_product(
    weights,
    w_hh_ptr,
    first,
    source,
    taken,
    written,
    step,
    alive,
    polls,
    error_ptr,
    LOAD: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
    EXCHANGE: tl.constexpr,
    PAIRS: tl.constexpr,
    ON_CHIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The product (ROWS, BLOCK_N) of a program's weights with INNER numbers of every sequence.

    Args:
        weights: those of `kept_weights` if ON_CHIP; else LOAD gets each block from `w_hh_ptr`.
        source: (BLOCK_N,) where the numbers of each sequence begin.
        taken, written: (BLOCK_N,) which sequences take part, and whose numbers come from others.
        TOGETHER: blocks that are waited for together.

    Returns:
        The product, and whether all waits up to now were in time.
    """
    NUM_K: tl.constexpr = (INNER + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    if SPLITS == 1:
        product = tl.zeros((ROWS, BLOCK_N), tl.float32)
    else:
        product = tl.zeros((SPLITS, ROWS, BLOCK_N), tl.float32)
    if ON_CHIP:
        # What is looked at as one number is one or two of the dimension's.
        EACH: tl.constexpr = 2 if PAIRS else 1
        dtype: tl.constexpr = source.dtype.element_ty
        numbers = source
        if EXCHANGE == "flag":
            WIDTH: tl.constexpr = dtype.primitive_bitwidth * EACH
            numbers = source.to(tl.pointer_type(tl.int16 if WIDTH == 16 else tl.int32))
        for group in tl.static_range(0, NUM_K, TOGETHER):
            column = inner_columns(group, INNER // EACH, BLOCK_K // EACH, SPLITS)[:, :, None]
            blocks, complete = load_exchanged(
                numbers[None, None, :] + column,
                column,
                taken[None, None, :],
                written[None, None, :],
                polls * alive,
                INNER // EACH,
                BLOCK_K // EACH,
                min(TOGETHER, NUM_K - group),
                EXCHANGE,
                PAIRS,
            )
            if EXCHANGE == "flag":
                alive = note_failure(error_ptr, alive, complete, step)
            for k in tl.static_range(min(TOGETHER, NUM_K - group)):
                if PAIRS:
                    low = blocks[k].to(tl.int16).to(dtype, bitcast=True)
                    high = (blocks[k] >> 16).to(tl.int16).to(dtype, bitcast=True)
                    even, odd = weights[2 * (group + k)], weights[2 * (group + k) + 1]
                    product = _multiply(even, low, product, SPLITS, PRECISION)
                    product = _multiply(odd, high, product, SPLITS, PRECISION)
                else:
                    block = blocks[k]
                    if EXCHANGE == "flag":
                        block = block.to(dtype, bitcast=True)
                    product = _multiply(weights[group + k], block, product, SPLITS, PRECISION)
    else:
        # A number that the compiler cannot know: it would unroll the loop, and keep the addresses
        # of every block in registers.
        blocks_now = tl.where(polls < 0, 0, NUM_K)
        for k in range(blocks_now):
            column = inner_columns(k, INNER, BLOCK_K, SPLITS)
            block = tl.load(
                source[None, None, :] + column[:, :, None],
                mask=(column < INNER)[:, :, None] & taken[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            w_block = LOAD(w_hh_ptr, first, column, H, GATES, TURN, BLOCK_H)
            product = _multiply(w_block, block, product, SPLITS, PRECISION)
    if SPLITS > 1:
        product = tl.sum(product, 0)
    return product, alive
