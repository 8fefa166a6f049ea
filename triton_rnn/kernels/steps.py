"""What both recurrence kernels ask of a time step: its rows, and blocks of numbers from them."""

import triton
import triton.language as tl

from triton_rnn.kernels.pieces import prefetch, store_as_it_lies


@triton.jit
def step_rows(t, T, N, batch_sizes_ptr, offsets_ptr, PACKED: tl.constexpr):
    """How many sequences take part in step t, and its first row; none outside 0 <= t < T."""
    inside = (t >= 0) & (t < T)
    if PACKED:
        active = tl.load(batch_sizes_ptr + t, mask=inside, other=0)
        row = tl.load(offsets_ptr + t, mask=inside, other=0)
    else:
        active = tl.where(inside, N, 0)
        row = t.to(tl.int64) * N
    return active, row


# Blocks side by side in memory are loaded and stored four at a time, as one block with one more
# dimension: where the layout of memory is not that of the product, Triton then converts all four at
# once, through shared memory with a barrier before and one behind.


@triton.jit
def load_blocks(ptrs, mask, stride, COUNT: tl.constexpr, MOST: tl.constexpr):
    """COUNT blocks `stride` elements apart, as they are in memory, in groups of MOST (4 or 1).

    `apart` takes them apart later: a conversion would wait for them.
    """
    groups = ()
    for first in tl.static_range(0, COUNT, MOST):
        groups = groups + (_load_group(ptrs, mask, stride, first, min(MOST, COUNT - first)),)
    return groups


@triton.jit
def prefetch_blocks(ptrs, mask, stride, COUNT: tl.constexpr):
    """Ask memory to bring COUNT blocks to the L2 cache; nobody waits for it."""
    for j in tl.static_range(COUNT):
        prefetch(ptrs + j * stride, mask)


@triton.constexpr_function
def _power_of_two(number):
    return 1 << max(0, number - 1).bit_length()


@triton.jit
def prefetch_sectors(
    ptr, n, taken, stride, first, COUNT: tl.constexpr, BLOCK_H: tl.constexpr, H: tl.constexpr
):
    """Ask memory to bring units from `first` on of COUNT blocks to the L2 cache, in 32 bytes each.

    Where a program's threads hold many numbers each, an instruction for each number would be many.

    Args:
        n, taken: sequences, and whether they are there. stride: from one to the next.
    """
    EACH: tl.constexpr = 256 // ptr.dtype.element_ty.primitive_bitwidth
    block = tl.arange(0, _power_of_two(COUNT))[None, :, None]
    unit = first + (tl.arange(0, max(1, BLOCK_H // EACH)) * EACH)[None, None, :]
    mask = taken[:, None, None] & (block < COUNT) & (unit < H)
    prefetch(ptr + (n[:, None, None] * stride + block * H + unit), mask)


@triton.jit
def _load_group(ptrs, mask, stride, FIRST: tl.constexpr, LEFT: tl.constexpr):
    if LEFT == 1:
        group = tl.load(ptrs + FIRST * stride, mask=mask, other=0.0)
    else:
        WIDTH: tl.constexpr = 2 if LEFT == 2 else 4
        j = tl.arange(0, WIDTH)[None, None, :]
        every = mask[:, :, None] & (j < LEFT)
        group = tl.load(ptrs[:, :, None] + (FIRST + j) * stride, mask=every, other=0.0)
    return group


@triton.jit
def of_four(pairs):
    """(BLOCK_H, BLOCK_N, 2, 2) as four blocks."""
    even, odd = tl.split(pairs)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (first, second, third, fourth)


@triton.jit
def apart(groups, COUNT: tl.constexpr, MOST: tl.constexpr):
    """The blocks that `load_blocks` has loaded, in float32, and perhaps one more."""
    blocks = ()
    for k in tl.static_range(len(groups)):
        parts = _parts(groups[k], min(MOST, COUNT - MOST * k))
        for j in tl.static_range(len(parts)):
            # Converted one by one: shared memory takes them as they were loaded.
            blocks = blocks + (parts[j].to(tl.float32),)
    return blocks


@triton.jit
def _parts(group, LEFT: tl.constexpr):
    if LEFT == 1:
        parts = (group,)
    elif LEFT == 2:
        first, second = tl.split(group)
        parts = (first, second)
    else:
        parts = of_four(tl.reshape(group, (group.shape[0], group.shape[1], 2, 2)))
    return parts


@triton.jit
def joined(blocks, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Blocks FIRST, FIRST + 1, ... as one with WIDTH (2 or 4) for its third dimension.

    Of what the tuple lacks the last one stands in.
    """
    LAST: tl.constexpr = len(blocks) - 1
    even = blocks[FIRST]
    odd = blocks[min(FIRST + 1, LAST)]
    if WIDTH == 4:
        even = tl.join(even, blocks[min(FIRST + 2, LAST)])
        odd = tl.join(odd, blocks[min(FIRST + 3, LAST)])
    pairs = tl.join(even, odd)
    return tl.reshape(pairs, (pairs.shape[0], pairs.shape[1], WIDTH))


@triton.jit
def store_blocks(
    ptrs,
    blocks,
    mask,
    stride,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    MOST: tl.constexpr,
    EXCHANGE: tl.constexpr,
):
    """Store blocks FIRST, FIRST + 1, ... of a tuple, `stride` elements apart.

    With EXCHANGE "flag" and "cluster" from where they lie: a step has no time for shared memory and
    its barriers.
    """
    narrow = ()
    for j in tl.static_range(COUNT):
        narrow = narrow + (blocks[j].to(ptrs.dtype.element_ty),)
    for first in tl.static_range(FIRST, COUNT, MOST):
        if EXCHANGE == "flag" or EXCHANGE == "cluster":
            store_as_it_lies(ptrs + first * stride, narrow[first], mask)
        else:
            _store_group(ptrs, narrow, mask, stride, first, min(MOST, COUNT - first))


@triton.jit
def _store_group(ptrs, blocks, mask, stride, FIRST: tl.constexpr, LEFT: tl.constexpr):
    if LEFT == 1:
        tl.store(ptrs + FIRST * stride, blocks[FIRST], mask=mask)
    else:
        WIDTH: tl.constexpr = 2 if LEFT == 2 else 4
        j = tl.arange(0, WIDTH)[None, None, :]
        group = joined(blocks, FIRST, WIDTH)
        every = mask[:, :, None] & (j < LEFT)
        tl.store(ptrs[:, :, None] + (FIRST + j) * stride, group, mask=every)


@triton.jit
def note_failure(error_ptr, alive, complete, step):
    """Note the first step at which a wait ran out; whether all waits so far were in time."""
    if alive & (complete == 0):
        tl.store(error_ptr, step + 1)
    return alive & complete


@triton.jit
def along(vector, AXIS: tl.constexpr):
    """A vector as a block that extends along one axis."""
    return vector[:, None] if AXIS == 0 else vector[None, :]


@triton.jit
def unit_vectors(ptr, unit, H: tl.constexpr, COUNT: tl.constexpr, ABSENT: tl.constexpr):
    """COUNT numbers of each unit in float32: zeros for the first ABSENT, the others from memory."""
    vectors = ()
    for j in tl.static_range(COUNT):
        if j < ABSENT:
            vectors = vectors + (tl.zeros(unit.shape, tl.float32),)
        else:
            vector = tl.load(ptr + (j - ABSENT) * H + unit, mask=unit < H, other=0.0)
            vectors = vectors + (vector.to(tl.float32),)
    return vectors
