"""A step's product: the weights that a program keeps by what all programs computed before.

The inner dimension is long and the rows are few, so it is cut in SPLITS parts, one for each warp or
two, which are multiplied side by side and then added. Within a part it is taken BLOCK_K at a time;
a block's number runs through all parts at once.
"""

import triton
import triton.language as tl

from triton_rnn.kernels.exchange import load_exchanged
from triton_rnn.kernels.steps import note_failure


@triton.jit
def inner_columns(block, INNER: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """Which elements of the inner dimension make up a block: (SPLITS, BLOCK_K)."""
    PER_PART: tl.constexpr = (INNER + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    part = tl.arange(0, SPLITS) * PER_PART
    return part[:, None] + (block * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]


@triton.jit
def _multiply(weights, block, product, SPLITS: tl.constexpr, PRECISION: tl.constexpr):
    if SPLITS == 1:
        # Two dimensions, so that Hopper's own matrix instructions may be taken.
        weights = tl.reshape(weights, (weights.shape[1], weights.shape[2]))
        block = tl.reshape(block, (block.shape[1], block.shape[2]))
    return tl.dot(weights, block, product, input_precision=PRECISION)


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
    ON_CHIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The product (ROWS, BLOCK_N) of a program's weights with INNER numbers of every sequence.

    Args:
        weights: its blocks of weights if ON_CHIP; else LOAD gets each from `w_hh_ptr`.
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
        for group in tl.static_range(0, NUM_K, TOGETHER):
            column = inner_columns(group, INNER, BLOCK_K, SPLITS)[:, :, None]
            blocks, complete = load_exchanged(
                source[None, None, :] + column,
                column,
                taken[None, None, :],
                written[None, None, :],
                polls * alive,
                INNER,
                BLOCK_K,
                min(TOGETHER, NUM_K - group),
                EXCHANGE,
            )
            if EXCHANGE == "flag":
                alive = note_failure(error_ptr, alive, complete, step)
            for k in tl.static_range(min(TOGETHER, NUM_K - group)):
                product = _multiply(weights[group + k], blocks[k], product, SPLITS, PRECISION)
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
