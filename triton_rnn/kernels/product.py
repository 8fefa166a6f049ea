"""A step's product: the weights that a program keeps by what all programs computed before.

The inner dimension is long and the rows are few, so it is cut in SPLITS parts, one for each warp or
two, which are multiplied side by side and then added. Within a part it is taken BLOCK_K at a time;
a block's number runs through all parts at once.
"""

import triton
import triton.language as tl

from triton_rnn.kernels.compiler import FLOAT32_IN_PAIRS
from triton_rnn.kernels.pieces import load_when_written, place_in_room
from triton_rnn.kernels.steps import joined


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
):
    """All blocks of a program's weights, for `exchanged_product`."""
    NUM_K: tl.constexpr = (INNER + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    weights = ()
    for k in tl.static_range(NUM_K):
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


# Fragments ----------------------------------------------------------------------------------------
#
# Of a matrix instruction's operands each thread holds fragments, of a row or column of its own and
# of a few inner numbers. Which inner numbers is all the same if it is so for both operands. So let
# a thread hold 16 bytes that lie side by side, and it can load them itself (`pieces`): nothing is
# handed from thread to thread, neither the weights, once, nor what the others send, at every step.
#
# Of the lanes of a warp four share a row or a column; eight rows or columns make a tile. So a
# tensor (SPLITS, 8, 4) has one element for each thread: warp, row, quarter. Tuples of such tensors
# of words are made one operand without moving anything, for its layout is the one that Triton asks
# for. (Of what comes from a join it asks for wider fragments, as if it came from eight bits.)


@triton.jit
def _counted(blocks, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT blocks (S, 8, 4) of a tuple, STEP apart, as one (S, 8, 4, COUNT)."""
    level = ()
    for i in tl.static_range(COUNT):
        level = level + (blocks[FIRST + i * STEP],)
    for _ in tl.static_range(5):
        if len(level) > 1:
            level = _joined_halves(level)
    whole = level[0]
    return tl.reshape(whole, (whole.shape[0], 8, 4, COUNT))


@triton.jit
def _joined_halves(level):
    HALF: tl.constexpr = len(level) // 2
    joined = ()
    for i in tl.static_range(HALF):
        joined = joined + (tl.join(level[i], level[i + HALF]),)
    return joined


@triton.jit
def _numbers(
    words, FIRST: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr
):
    """The numbers in a piece's words, of tiles STEP words apart: (S, 8, 4, TILES, 2, ...).

    The last dimensions count them: two of two words, of which each may have two halves.
    """
    first = _counted(words, FIRST, STEP, TILES)
    second = _counted(words, FIRST + 1, STEP, TILES)
    third = _counted(words, FIRST + 2, STEP, TILES)
    fourth = _counted(words, FIRST + 3, STEP, TILES)
    every = tl.join(tl.join(first, third), tl.join(second, fourth))
    if DTYPE.primitive_bitwidth == 16:
        every = tl.join(every.to(tl.int16), (every >> 16).to(tl.int16))
    return every.to(DTYPE, bitcast=True)


# Where a thread's float32 belong in the inner dimension, as this Triton has it: else it would move
# them there through shared memory, with barriers.
if FLOAT32_IN_PAIRS:

    @triton.jit
    def _float32_left(every):
        return tl.permute(every, (0, 3, 1, 4, 2, 5))

    @triton.jit
    def _float32_right(every):
        return tl.permute(every, (0, 4, 2, 5, 3, 1))

else:

    @triton.jit
    def _float32_left(every):
        return tl.permute(every, (0, 3, 1, 4, 5, 2))

    @triton.jit
    def _float32_right(every):
        return tl.permute(every, (0, 4, 5, 2, 3, 1))


@triton.jit
def left_operand(
    words, FIRST: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr
):
    """(S, 8 * TILES, 64 bytes) of pieces, a tile's STEP words behind the last one's."""
    every = _numbers(words, FIRST, STEP, TILES, DTYPE)
    if DTYPE.primitive_bitwidth == 16:
        every = tl.permute(every, (0, 3, 1, 4, 2, 5, 6))
    else:
        every = _float32_left(every)
    return tl.reshape(every, (every.shape[0], 8 * TILES, 512 // DTYPE.primitive_bitwidth))


@triton.jit
def right_operand(
    words, FIRST: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr
):
    """(S, 64 bytes, 8 * TILES), as `left_operand`."""
    every = _numbers(words, FIRST, STEP, TILES, DTYPE)
    if DTYPE.primitive_bitwidth == 16:
        every = tl.permute(every, (0, 4, 2, 5, 6, 3, 1))
    else:
        every = _float32_right(every)
    return tl.reshape(every, (every.shape[0], 512 // DTYPE.primitive_bitwidth, 8 * TILES))


@triton.jit
def first_columns(INNER: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """(SPLITS, 1, 4): the inner number that each thread's first piece begins with."""
    PER_PART: tl.constexpr = (INNER + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    part = tl.arange(0, SPLITS) * PER_PART
    return part[:, None, None] + (tl.arange(0, 4) * (BLOCK_K // 4))[None, None, :]


@triton.jit
def held_weights(
    w_hh_ptr,
    first,
    PIECE: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STREAMED: tl.constexpr,
):
    """A program's weights in registers, as the left operands of `held_product`.

    PIECE(w_hh_ptr, first, row, column, H, GATES, TURN, BLOCK_H) loads what each thread holds of a
    row from an inner number on. BLOCK_K numbers are 64 bytes. The last STREAMED blocks are not
    among them.
    """
    NUM_K: tl.constexpr = (INNER + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    column = first_columns(INNER, BLOCK_K, SPLITS)
    weights = ()
    for k in tl.static_range(NUM_K - STREAMED):
        block = _weight_block(
            w_hh_ptr, first, column + k * BLOCK_K, PIECE, H, GATES, TURN, ROWS, BLOCK_H
        )
        weights = weights + (block,)
    return weights


@triton.jit
def _weight_block(
    w_hh_ptr,
    first,
    column,
    PIECE: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    TILES: tl.constexpr = ROWS // 8
    words = ()
    for tile in tl.static_range(TILES):
        row = (8 * tile + tl.arange(0, 8))[None, :, None]
        words = words + PIECE(w_hh_ptr, first, row, column, H, GATES, TURN, BLOCK_H)
    return left_operand(words, 0, 4, TILES, w_hh_ptr.dtype.element_ty)


@triton.jit
def held_product(
    weights,
    w_hh_ptr,
    first,
    sources,
    polls,
    error_ptr,
    step,
    PIECE: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TURN: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
    NEAR: tl.constexpr,
    PAUSE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """The parts (SPLITS, ROWS, 8 * tiles) of the product of W_hh with what others send.

    Args:
        weights: what `held_weights` holds; the other blocks are loaded from `w_hh_ptr`, which must
            be another value, to the compiler, at every step: it would hold them too.
        sources: for each tile of eight sequences, (1, 8, 1) pointers to the inner number 0; NEAR
            places in a room of `cluster`.
        polls: for each, how often is looked whether it has come; 0 where it is there.
        TOGETHER: blocks that are waited for together. PAUSE: cycles before the first look.
        SUMS: how many are made side by side.
    """
    NUM_K: tl.constexpr = (INNER + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    TILES: tl.constexpr = len(sources)
    PADDED: tl.constexpr = INNER < NUM_K * SPLITS * BLOCK_K
    dtype: tl.constexpr = w_hh_ptr.dtype.element_ty
    column = first_columns(INNER, BLOCK_K, SPLITS)
    left = (INNER - column + BLOCK_K - 1) // BLOCK_K
    place, STEP = column, BLOCK_K
    if NEAR:
        place = place_in_room(column, 0, NUM_K * SPLITS, BLOCK_K)
        STEP = 512
    # A matrix instruction that adds to the last one's result waits for it, and of few rows and
    # sequences there are few results: so several sums, each of every so many-th block.
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros((SPLITS, ROWS, 8 * TILES), tl.float32),)
    for group in tl.static_range(0, NUM_K, TOGETHER):
        ptrs = ()
        for tile in tl.static_range(TILES):
            ptrs = ptrs + (sources[tile] + (place + group * STEP),)
        words = load_when_written(
            ptrs,
            polls,
            left - group,
            error_ptr,
            step,
            min(TOGETHER, NUM_K - group),
            PADDED,
            dtype.primitive_bitwidth,
            NEAR,
            PAUSE if group == 0 else 0,
        )
        for k in tl.static_range(min(TOGETHER, NUM_K - group)):
            block = right_operand(words, 4 * k, 4 * min(TOGETHER, NUM_K - group), TILES, dtype)
            if group + k < len(weights):
                w_block = weights[group + k]
            else:
                start = column + (group + k) * BLOCK_K
                w_block = _weight_block(
                    w_hh_ptr, first, start, PIECE, H, GATES, TURN, ROWS, BLOCK_H
                )
            added = tl.dot(w_block, block, sums[(group + k) % SUMS], input_precision=PRECISION)
            sums = _with(sums, (group + k) % SUMS, added)
    product = sums[0]
    for k in tl.static_range(1, SUMS):
        product += sums[k]
    return product


@triton.jit
def _with(values, PLACE: tl.constexpr, value):
    """A tuple with another value at one place."""
    changed = ()
    for k in tl.static_range(len(values)):
        changed = changed + (value if k == PLACE else values[k],)
    return changed


@triton.jit
def parts_added(product, BLOCK_H: tl.constexpr):
    """(S, G * BLOCK_H, N), rows unit by unit, summed over the parts: (N, BLOCK_H, G).

    Every thread adds what it needs; all of it passes through shared memory once.
    """
    S: tl.constexpr = product.shape[0]
    G: tl.constexpr = product.shape[1] // BLOCK_H
    N: tl.constexpr = product.shape[2]
    left = tl.permute(tl.reshape(product, (S, BLOCK_H, G, N)), (3, 1, 2, 0))
    for _ in tl.static_range(5):
        if left.shape[3] > 1:
            pairs = tl.reshape(left, (N, BLOCK_H, G, left.shape[3] // 2, 2))
            even, odd = tl.split(pairs)
            left = even + odd
    return tl.reshape(left, (N, BLOCK_H, G))


@triton.jit
def exchanged_product(
    weights,
    w_hh_ptr,
    first,
    source,
    taken,
    polls,
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
    ON_CHIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The product (ROWS, BLOCK_N) of a program's weights with INNER numbers of every sequence.

    Args:
        weights: those of `kept_weights` if ON_CHIP; else LOAD gets each block from `w_hh_ptr`.
        source: (BLOCK_N,) where the numbers of each sequence begin.
        taken: (BLOCK_N,) which sequences take part.
    """
    NUM_K: tl.constexpr = (INNER + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    if SPLITS == 1:
        product = tl.zeros((ROWS, BLOCK_N), tl.float32)
    else:
        product = tl.zeros((SPLITS, ROWS, BLOCK_N), tl.float32)
    if ON_CHIP:
        # All at once, past the L1 cache, which nobody keeps coherent.
        column = inner_columns(0, INNER, BLOCK_K, SPLITS)[:, :, None]
        blocks = ()
        for k in tl.static_range(NUM_K):
            block = tl.load(
                source[None, None, :] + (column + k * BLOCK_K),
                mask=(column + k * BLOCK_K < INNER) & taken[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            blocks = blocks + (block,)
        for k in tl.static_range(NUM_K):
            product = _multiply(weights[k], blocks[k], product, SPLITS, PRECISION)
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
    return product
