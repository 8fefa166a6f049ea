"""How long a step of a plan takes, by a model: what it counts is in the blocks.

What each costs was measured once. The order of two plans is what counts; nothing is measured at run
time.
"""

from triton_rnn.kernels.chips import Chip
from triton_rnn.kernels.plan import Plan, Shape, block_bytes, ceil, rounds_of, rows_of, turns_of

# How long a step takes, in microseconds. Of programs that hold W_hh in registers: for a step, for
# 1000 bytes that a program loads, for the root of 1e6 that all do, for a matrix instruction of each
# scheduler, for 1000 bytes through shared memory and for 1e5 of W_hh that a program reads again.
# `bench/gpu_fit.py` fitted these to what plans of many shapes took on an H200 without a pause.
HELD_US = (0.5396, 0.0068, 0.6631, 0.0024, 0.0032, 0.7799)
# Whoever looks before the others have sent looks in vain, in the way of those who store, and looks
# again a whole trip later. The more programs there are the later the last one sends: cycles for
# each, at most so many, from so many programs on; and the part of a step that this saves for each.
# On the H200 the best of 14 recurrences' pauses was 100 of 16 programs, 300 of 48, 400 of 64.
_PAUSE, _LONGEST_PAUSE, _FEW_PROGRAMS = 6, 350, 12
_PAUSE_GAIN = 0.0028
# Of programs of a cluster: for a step, for 1000 bytes that a program is sent, so many times what
# the above makes of matrix instructions and shared memory, for an element of a thread, and for a
# backward; fitted likewise.
CLUSTER_US = (0.0488, 0.0629, 1.0632, 0.2399, 0.1037)
# The others by published latencies and by instructions, from the machine code; so many times that
# was measured there, by warps, and of a resident program of float32 more. The order of two plans is
# what counts.
_RESIDENT_OVER = {
    "forward": {1: 1.0, 2: 1.0, 4: 0.9, 8: 1.35},
    "backward": {1: 1.2, 2: 1.2, 4: 1.25, 8: 1.65},
}
_RESIDENT_FLOAT32_OVER = 1.3
_SPREAD_OVER = {4: 1.3, 8: 2.6}
_WITHIN_US = 0.25  # latencies of a product and of the pointwise part within a multiprocessor
_BARRIER_US = 1.0
_LOAD_US = 0.4  # to load what a barrier has let through
_LAUNCH_US = 5.0
_L2_BYTES_PER_US = 80e3  # into one multiprocessor, all of them reading
_SHARED_BYTES_PER_US = 200e3  # from shared memory into the matrix units: 128 bytes a cycle
_CYCLES_PER_US = 1700.0  # each of a multiprocessor's four schedulers starts an instruction in one
# Instructions of the pointwise part for an element and a product, forward and backward alike: from
# the machine code of torch's cells in float16; float32 has twice as many.
_INSTRUCTIONS = 16
# And for a number of 16 bits that other programs have computed, to bring it to the matrix unit.
_MOVED = 3
# `matrix_mflops` that a warp's own matrix instructions reach, which take operands from registers.
# Later chips have faster ones of several warps, for which a program's few columns are too narrow.
_WARP_MFLOPS = 4.5


def _waves(programs: int, chip: Chip) -> int:
    """How often the chip is filled by programs that wait for nobody."""
    return ceil(programs, chip.multiprocessors)


def independent_us(shape: Shape, chip: Chip, found: Plan) -> float:
    """Of programs without a product."""
    elements = found.block_h * found.block_n
    waves = _waves(found.units * found.slots * shape.directions, chip)
    return waves * (_WITHIN_US + _pointwise_us(shape, elements, found.warps))


def resident_us(shape: Shape, chip: Chip, found: Plan, weight: int) -> float:
    """Of programs that have all units, and so many bytes of W_hh in shared memory."""
    block, block_n = found.block_h, found.block_n
    flops = 2 * shape.products * block * block * block_n
    step = (
        _WITHIN_US
        + _pointwise_us(shape, block * block_n, found.warps)
        + _product_us(chip, shape, weight, flops, block_n == 8)
    )
    over = _RESIDENT_OVER[shape.kernel][found.warps]
    over *= _RESIDENT_FLOAT32_OVER if shape.itemsize == 4 else 1
    return _waves(found.slots * shape.directions, chip) * over * step


def held_us(shape: Shape, found: Plan) -> float:
    """Of programs that hold W_hh in registers and exchange through the L2 cache, by turns."""
    step = paused_part(found) * _step_us(HELD_US, held_counts(shape, found))
    return turns_of(shape, found) * step


def cluster_us(shape: Shape, found: Plan) -> float:
    """Of programs of a cluster, by turns."""
    return turns_of(shape, found) * _step_us(CLUSTER_US, cluster_counts(shape, found))


def spread_us(shape: Shape, chip: Chip, found: Plan, inner: int, weight: int, kept: int) -> float:
    """Of the other programs that share the units, by turns.

    Args:
        inner: of their product, padded. weight, kept: bytes of a program's W_hh, and so many of
            them that stay on the chip.
    """
    latency = _LAUNCH_US if found.exchange == "launch" else _BARRIER_US + _LOAD_US
    passing = inner * found.block_n * shape.itemsize + (weight - kept)
    handling = _MOVED * shape.itemsize / 2 * inner * found.block_n / 128 / _CYCLES_PER_US
    flops = 2 * max(16, rows_of(shape, found.block_h)) * inner * found.block_n
    product = _product_us(chip, shape, weight, flops)
    pointwise = _pointwise_us(shape, found.block_h * found.block_n, found.warps)
    step = _WITHIN_US + latency + passing / _L2_BYTES_PER_US + handling + product + pointwise
    return turns_of(shape, found) * _SPREAD_OVER[found.warps] * step


def _pointwise_us(shape: Shape, elements: int, warps: int) -> float:
    """The cell's arithmetic for so many elements of a program."""
    each = _INSTRUCTIONS * max(1, shape.products) * shape.itemsize / 2
    return each * elements / (32 * min(warps, 4)) / _CYCLES_PER_US


def _product_us(
    chip: Chip, shape: Shape, weight_bytes: int, flops: int, narrow: bool = False
) -> float:
    """A program's part of a product: its weights must reach the matrix units, and be multiplied."""
    mflops = min(chip.matrix_mflops, _WARP_MFLOPS) if narrow else chip.matrix_mflops
    rate = mflops * 1e6 * (2 / shape.itemsize)
    return max(weight_bytes / _SHARED_BYTES_PER_US, flops / rate)


def pause_of(found: Plan) -> int:
    """Cycles before a step looks for what the others send."""
    if found.units < _FEW_PROGRAMS or (found.streamed and found.kernel == "backward"):
        # A streaming backward has much of W_hh to read before.
        return 0
    return min(_PAUSE * found.units, _LONGEST_PAUSE)


def paused_part(found: Plan) -> float:
    """Which part of a step is left with its pause."""
    return 1 - _PAUSE_GAIN * found.pause / _PAUSE


def held_counts(shape: Shape, found: Plan) -> tuple[float, ...]:
    """What a step of a plan with W_hh in registers takes, in the units of `HELD_US`."""
    warps, block_n = found.warps, found.block_n
    rows = rows_of(shape, found.block_h)
    blocks = ceil(shape.inner, warps * found.block_k)
    loaded = blocks * warps * found.block_k * block_n * shape.itemsize / 1e3
    # All programs' loads come to the same few lines of the L2 cache.
    every = loaded * found.programs / 1e3
    products = max(16, rows) // 16 * blocks * 2 * block_n // 8 * warps // 4 * shape.itemsize // 2
    elements = max(found.block_h * block_n, 32 * warps)
    shared = 4 * warps * (rows * block_n + rows // found.block_h * elements) / 1e3
    again = found.streamed * block_bytes(shape, found.block_h, warps) / 1e5
    return 1.0, loaded, every**0.5, products, shared, again


def cluster_counts(shape: Shape, found: Plan) -> tuple[float, ...]:
    """What a step of a cluster's plan takes, in the units of `CLUSTER_US`."""
    if shape.kernel == "forward":
        _, sent, _, products, shared, _ = held_counts(shape, found)
    else:
        sent = 4 * found.cluster * found.block_h * found.block_n / 1e3
        blocks = ceil(shape.products * found.block_h, found.block_k)
        rounds = rounds_of(shape, found.warps)
        products = rounds * blocks * 2 * found.block_n // 8 * found.warps // 4
        products *= shape.itemsize // 2
        # What is added up, and what all warps read of what one has laid out.
        shared = sent + found.warps * blocks * found.block_n * 64 / 1e3
    product = products * HELD_US[3] + shared * HELD_US[4]
    elements = found.block_h * found.block_n / (32 * found.warps)
    return 1.0, sent, product, elements, float(shape.kernel == "backward")


def _step_us(constants: tuple[float, ...], counts: tuple[float, ...]) -> float:
    return sum(us * count for us, count in zip(constants, counts, strict=True))
