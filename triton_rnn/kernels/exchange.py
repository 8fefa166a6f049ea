"""How the programs of one launch hand each other what they computed in a step.

Four ways, by the constexpr EXCHANGE of the kernels:

- "launch": they do not. A step is a launch of its own, and the launch is the barrier.
- "barrier": each program adds one to a counter when its part is written, and waits until all
  parts of a step are counted. Counters only grow, so a step needs one counter and no reset.
- "flag": the data is its own flag. Before the launch, the buffer that the steps write is filled
  with a bit pattern that is never stored; a reader loads until the pattern is gone. One trip
  through the L2 cache instead of two, and no fence: no number is read but the one waited for. That
  a wider load never sees a part of a number is how the hardware works; PTX's memory model speaks of
  loads and stores of one size alone.
- "cluster": the same, but the buffer is in the shared memory of programs that run next to each
  other (`cluster`).

All waits need all programs on the chip at once (a cooperative launch, or a cluster), and all are
bounded: when one runs out, the program notes the step in `error` and goes on without waiting ever
again. So a launch always ends. After a failed barrier a program's states are NaN, and so are, in
the last two ways, the numbers that never came.
"""

import triton
import triton.language as tl

from triton_rnn.kernels.pieces import store_as_it_lies

# What is not written yet has all bits set, -1 as an integer: a NaN that no conversion yields.
# Should the arithmetic ever come to it, -2 is stored in its place, another NaN. The numbers stand
# in the code: with a module's constexpr the key that Triton keeps machine code by depends on the
# order in which kernels are asked for.


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
def bits_to_send(block, DTYPE: tl.constexpr):
    """The bits of numbers in a dtype, none of which says: not written yet."""
    INTEGERS: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
    bits = block.to(DTYPE).to(INTEGERS, bitcast=True)
    return tl.where(bits == -1, -2, bits)


@triton.jit
def send(ptrs, block, mask):
    """Store numbers for other programs."""
    dtype: tl.constexpr = ptrs.dtype.element_ty
    store_as_it_lies(ptrs, bits_to_send(block, dtype).to(dtype, bitcast=True), mask)
