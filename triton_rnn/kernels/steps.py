"""What both recurrence kernels ask of a time step: its rows, and blocks of numbers from them."""

import triton
import triton.language as tl


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


@triton.jit
def load_blocks(ptrs, mask, stride, COUNT: tl.constexpr):
    """Blocks `stride` elements apart, as they are in memory: a conversion would wait for them."""
    blocks = ()
    for j in tl.static_range(COUNT):
        blocks = blocks + (tl.load(ptrs + j * stride, mask=mask, other=0.0),)
    return blocks


@triton.jit
def store_blocks(ptrs, blocks, mask, stride, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Store blocks FIRST, FIRST + 1, ... of a tuple, `stride` elements apart."""
    for j in tl.static_range(FIRST, COUNT):
        tl.store(ptrs + j * stride, blocks[j].to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def note_failure(error_ptr, alive, complete, step):
    """Note the first step at which a wait ran out; whether all waits so far were in time."""
    if alive & (complete == 0):
        tl.store(error_ptr, step + 1)
    return alive & complete


@triton.jit
def to_float(blocks):
    """The same blocks in float32."""
    converted = ()
    for j in tl.static_range(len(blocks)):
        converted = converted + (blocks[j].to(tl.float32),)
    return converted


@triton.jit
def unit_vectors(
    ptr, unit, H: tl.constexpr, COUNT: tl.constexpr, ABSENT: tl.constexpr, BLOCK_H: tl.constexpr
):
    """COUNT columns (BLOCK_H, 1) in float32: zeros for the first ABSENT, the others from memory."""
    vectors = ()
    for j in tl.static_range(COUNT):
        if j < ABSENT:
            vectors = vectors + (tl.zeros((BLOCK_H, 1), tl.float32),)
        else:
            vector = tl.load(ptr + (j - ABSENT) * H + unit, mask=unit < H, other=0.0)
            vectors = vectors + (vector.to(tl.float32)[:, None],)
    return vectors
