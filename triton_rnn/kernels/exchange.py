"""How the programs of one launch hand each other what they computed in a step.

Three ways, by the constexpr EXCHANGE of the kernels:

- "launch": they do not. A step is a launch of its own, and the launch is the barrier.
- "barrier": each program adds one to a counter when its part is written, and waits until all
  parts of a step are counted. Counters only grow, so a step needs one counter and no reset.
- "flag": the data is its own flag. Before the launch, the buffer that the steps write is filled
  with a bit pattern that is never stored; a reader loads until the pattern is gone. One trip
  through the L2 cache instead of two, and no fence: no value is read but the one waited for. Every
  number must be looked at, so those of 16 bits are, where they can be, two at a time.

Both waits need all programs on the chip at once (a cooperative launch), and both are bounded: when
one runs out, the program notes the step in `error`, goes on without waiting ever again, and makes
its states NaN. So a launch always ends, and a wrong number is never a plausible one.
"""

import triton
import triton.language as tl

# Minus two as an integer of the element's width: a NaN that no conversion yields.
UNWRITTEN = tl.constexpr(-2)
# Two of them; and the highest bit of each of two numbers.
UNWRITTEN_PAIR = tl.constexpr(-0x00010002)
HIGHEST_BITS = tl.constexpr(-0x7FFF8000)
# Minus one: another NaN, stored in its place should the arithmetic ever come to it.
OTHER_NAN = tl.constexpr(-1)


@triton.jit
def arrive(counter_ptr):
    """Count this program in, after everything it has stored."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for_arrivals(counter_ptr, target, polls):
    """Wait until `target` arrivals are counted; whether they were within so many polls."""
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    poll = 0
    while (seen < target) & (poll < polls):
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        poll += 1
    tl.debug_barrier()
    return seen >= target


@triton.jit
def _unwritten(block, written, PAIRS: tl.constexpr):
    """Where numbers, as integers, are not written yet; of pairs not zero if either is not."""
    if PAIRS:
        # A half of `distance` is zero where it has the pattern; only then a one is borrowed from
        # its highest bit that was not there.
        distance = block ^ UNWRITTEN_PAIR
        found = tl.where(written, (distance - 0x00010001) & ~distance & HIGHEST_BITS, 0)
    else:
        found = (block == UNWRITTEN) & written
    return found


@triton.jit
def load_exchanged(
    ptrs,
    column,
    taken,
    written,
    polls,
    INNER: tl.constexpr,
    STRIDE: tl.constexpr,
    COUNT: tl.constexpr,
    EXCHANGE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Blocks that other programs write; and whether they were complete within so many polls.

    COUNT blocks, STRIDE elements apart; of block j the elements whose `column` + j * STRIDE is
    below INNER. `taken` masks what is read, `written` what others do write; the rest was there
    before the launch. Loads pass by the L1 cache, which nobody keeps coherent. With "flag" `ptrs`
    are those of integers as wide as a number, or with PAIRS as two of them.
    """
    blocks = ()
    complete = True
    if EXCHANGE == "flag":
        poll = 0
        missing = 1
        for _ in tl.static_range(COUNT):
            blocks = blocks + (tl.zeros(ptrs.shape, ptrs.dtype.element_ty),)
        # The first look and the others are one piece of code: it is large.
        while (missing > 0) & (poll <= polls):
            found = ()
            unwritten = tl.zeros(ptrs.shape, tl.int32 if PAIRS else tl.int1)
            for j in tl.static_range(COUNT):
                mask = (column + j * STRIDE < INNER) & taken
                block = tl.load(ptrs + j * STRIDE, mask=mask, other=0, volatile=True)
                unwritten = unwritten | _unwritten(block, written, PAIRS)
                found = found + (block,)
            blocks = found
            missing = tl.max((unwritten != 0).to(tl.int32))
            poll += 1
        complete = missing == 0
    else:
        for j in tl.static_range(COUNT):
            mask = (column + j * STRIDE < INNER) & taken
            block = tl.load(ptrs + j * STRIDE, mask=mask, other=0.0, cache_modifier=".cg")
            blocks = blocks + (block,)
    return blocks, complete


@triton.jit
def store_exchanged(ptrs, block, mask, EXCHANGE: tl.constexpr):
    """Store a block for other programs."""
    dtype: tl.constexpr = ptrs.dtype.element_ty
    block = block.to(dtype)
    if EXCHANGE == "flag":
        integers: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
        bits = block.to(integers, bitcast=True)
        block = tl.where(bits == UNWRITTEN, OTHER_NAN, bits).to(dtype, bitcast=True)
    tl.store(ptrs, block, mask=mask)
