"""How to launch a recurrence: which variant, which blocks, how many programs. Plain Python.

A plan is found by trying every shape of blocks that fits the chip and taking the one whose step
takes the least time by a model: what it counts is in the blocks, and what each costs was measured
once. Nothing is measured at run time and nothing depends on the length of the sequences, so a plan
can be read, tested and compiled ahead with no GPU at hand.

Variants:

- independent: there is no product (a user's cell without weight_hh), so units do not see each other
  and any program may own any of them; no other variant fits.
- resident: one program owns all hidden units of a direction; W_hh fits one multiprocessor, and the
  state never leaves it.
- cooperative: W_hh is spread over the programs and stays on the chip; they exchange the state at
  every step.
- cluster: as cooperative, by few programs that run next to each other and hand the state round in
  their shared memory.
- streaming: as cooperative, but W_hh is too large for the chip: every step reads it from L2. Only
  where none of the above fits.
- stepwise: a launch per step. For devices without cooperative launch, and the interpreter.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

# How long a step takes, in microseconds. Of programs that hold W_hh in registers: for a step, for
# 1000 bytes that a program loads, for the root of 1e6 that all do, for a matrix instruction of each
# scheduler, for 1000 bytes through shared memory and for 1e5 of W_hh that a program reads again.
# `bench/gpu_fit.py` fitted these to what plans of many shapes took on an H200 without a pause.
_HELD_US = (0.5396, 0.0068, 0.6631, 0.0024, 0.0032, 0.7799)
# Whoever looks before the others have sent looks in vain, in the way of those who store, and looks
# again a whole trip later. The more programs there are the later the last one sends: cycles for
# each, at most so many, from so many programs on; and the part of a step that this saves for each.
# On the H200 the best of 14 recurrences' pauses was 100 of 16 programs, 300 of 48, 400 of 64.
_PAUSE, _LONGEST_PAUSE, _FEW_PROGRAMS = 6, 350, 12
_PAUSE_GAIN = 0.0028
# Of programs of a cluster: for a step, for 1000 bytes that a program is sent, so many times what
# the above makes of matrix instructions and shared memory, for an element of a thread, and for a
# backward; fitted likewise.
_CLUSTER_US = (0.0488, 0.0629, 1.0632, 0.2399, 0.1037)
# How many programs make a cluster: up to eight on all devices, and sixteen, which is as many as run
# next to each other, in data centres. Multiprocessors lie in groups of about so many, each of which
# holds whole clusters: of an H200's 132 there is room for 7 clusters of sixteen and 15 of eight.
_CLUSTERS, _NEIGHBOURS, _GROUP = (2, 3, 4, 5, 6, 7, 8), 16, 18
# Shared memory of a program that asks for no more than every program gets.
_PLAIN_SHARED = 48 * 1024
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
# Registers of a thread for W_hh and what is multiplied or added with it, going by what the compiler
# made: fewer before Hopper.
_HELD_REGISTERS, _HELD_REGISTERS_BEFORE = 200, 160
# So few are left beside much of W_hh: there what is small counts.
_LITTLE_ROOM = 72
# So many less for a program that reads a part of W_hh again: addresses, and what does not fit with
# ease is better read than spilled.
_STREAM_REGISTERS = 40
# And for one of a cluster's on data-centre Blackwell, where one with less spilled.
_CLUSTER_REGISTERS = 12
# Bytes of W_hh that a program may read again at every step.
_MOST_STREAMED = 384 * 1024
# `matrix_mflops` that a warp's own matrix instructions reach, which take operands from registers.
# Later chips have faster ones of several warps, for which a program's few columns are too narrow.
_WARP_MFLOPS = 4.5


@dataclass(frozen=True)
class Chip:
    """What a plan must know of a device.

    Attributes:
        name: for the reader.
        backend, architecture: Triton's target, ("cuda", 90) or ("hip", "gfx942").
        multiprocessors: so many programs are sure to run at the same time.
        shared_memory: bytes that one program may take.
        matrix_mflops: dense 16-bit arithmetic of one multiprocessor in 1e6 operations per
            microsecond.
        cooperative: whether the device can guarantee that all programs of a launch run at once.
        narrow_apart: whether even products of eight columns are made in a memory of their own
            (data-centre Blackwell, by Triton 3.8 and later).
    """

    name: str
    backend: str
    architecture: int | str
    multiprocessors: int
    shared_memory: int
    matrix_mflops: float
    cooperative: bool = True
    narrow_apart: bool = False

    @property
    def weight_room(self) -> int:
        """Bytes of W_hh that a program can keep."""
        if self.backend == "hip":
            # Registers, half of which are left to everything else: what is loaded before a loop
            # does not stay in shared memory there.
            return 64 * 1024
        return self.shared_memory


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", "cuda", 80, 108, 163 * 1024, 2.9),
        Chip("H100", "cuda", 90, 132, 227 * 1024, 7.5),
        Chip("H200", "cuda", 90, 132, 227 * 1024, 7.5),
        Chip("B200", "cuda", 100, 148, 227 * 1024, 15.0),
        Chip("RTX 4090", "cuda", 89, 128, 99 * 1024, 1.3),
        Chip("MI300X", "hip", "gfx942", 304, 64 * 1024, 4.3),
    )
}
# What runs the kernels under Triton's interpreter, one program after the other.
INTERPRETER = Chip("interpreter", "interpreter", 0, 1, 1 << 40, 1.0, cooperative=False)


@dataclass(frozen=True)
class Plan:
    """One way to launch one kernel.

    Attributes:
        kernel: "forward" or "backward".
        variant: "independent", "resident", "cooperative", "cluster", "streaming" or "stepwise".
        exchange: "none", "flag", "barrier", "cluster" or "launch" (see `exchange.py`).
        block_h, block_n, block_k: hidden units and sequences of a program; the inner dimension of
            its product is taken block_k at a time.
        splits: parts of that dimension that are added up side by side.
        together: blocks of it that are waited for together; of a resident backward, gates that are
            multiplied together.
        warps: of a program.
        units: programs along the hidden dimension.
        slots: programs along the batch; each takes every slots-th block of it.
        at_once: directions in a launch; 1 of 2 if both do not fit the chip together.
        bytes_on_chip: shared memory, or registers, that a program is expected to take.
        floor_us: how long a step takes by the model, all sequences and directions, in microseconds.
        in_registers: of how many gates W_hh is kept there, not in shared memory.
        streamed: blocks of each part of the inner dimension whose W_hh is not kept: every step
            reads it again, from the L1 cache if there is room.
        pause: cycles before a step first looks for what the others send (exchange "flag").
        sums: of a product of few rows and sequences, that are made side by side: a matrix
            instruction that adds to the last one's result waits for it.
    """

    kernel: str
    variant: str
    exchange: str
    block_h: int
    block_n: int
    block_k: int
    splits: int
    together: int
    warps: int
    units: int
    slots: int
    at_once: int
    bytes_on_chip: int
    floor_us: float
    in_registers: int = 0
    streamed: int = 0
    pause: int = 0
    sums: int = 1

    @property
    def programs(self) -> int:
        return self.units * self.slots * self.at_once

    @property
    def on_chip(self) -> bool:
        """Whether W_hh stays on the chip for the whole launch."""
        return self.variant in ("resident", "cooperative", "cluster")

    @property
    def cluster(self) -> int:
        """Programs that must run next to each other."""
        return self.units if self.exchange == "cluster" else 1

    def __str__(self) -> str:
        directions = "both directions" if self.at_once == 2 else "one direction"
        held = f", {self.in_registers} gates' W_hh in registers" if self.in_registers else ""
        held += f" but {self.streamed} blocks" if self.streamed else ""
        return (
            f"{self.kernel}: {self.variant} ({self.exchange}), blocks of {self.block_h} units x "
            f"{self.block_n} sequences x {self.block_k}, {self.programs} programs of {self.warps} "
            f"warps for {directions} at once, {self.bytes_on_chip / 1024:.0f} KB each{held}, about "
            f"{self.floor_us:.2f} us a step"
        )


@dataclass(frozen=True)
class Shape:
    """What is to be planned: one kernel over one layer.

    Attributes:
        kernel: "forward" or "backward".
        products: P, the parts of W_hh h: G, or what a user's cell says.
        hidden_size, directions, batch: H, D, N.
        itemsize: bytes of an element.
        copies: of W_hh on the chip: 2 where float32 is made of three TF32 products.
        numbers: blocks of numbers that a step holds besides the states. The limits of this file
            were found with torch's cells; a user's may have more.
    """

    kernel: str
    products: int
    hidden_size: int
    directions: int
    batch: int
    itemsize: int
    copies: int = 1
    numbers: int = 0

    @property
    def inner(self) -> int:
        """Inner dimension of a step's product."""
        return self.hidden_size * (self.products if self.kernel == "backward" else 1)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _threads(chip: Chip, warps: int) -> int:
    return warps * (64 if chip.backend == "hip" else 32)


def rows_of(shape: Shape, block_h: int) -> int:
    """Rows of the product: forward the gates of every unit, padded to a power of two."""
    return block_h * (_power_of_two(shape.products) if shape.kernel == "forward" else 1)


def _independent(shape: Shape, chip: Chip) -> Iterator[Plan]:
    """Two numbers of each block a thread, as memory likes it; units and sequences are all alike."""
    block_h, block_n, warps = 64, 4, 4
    units, slots = _ceil(shape.hidden_size, block_h), _ceil(shape.batch, block_n)
    waves = _ceil(units * slots * shape.directions, chip.multiprocessors)
    yield Plan(
        shape.kernel, "independent", "none", block_h, block_n, block_h, 1, 1, warps, units, slots,
        shape.directions, 0, waves * (_WITHIN_US + _pointwise_us(shape, block_h * block_n, warps)),
    )  # fmt: skip


def _resident(shape: Shape, chip: Chip) -> Iterator[Plan]:
    """One program for all units; of 16-bit weights as many gates in registers as leave room."""
    block = max(16, _power_of_two(shape.hidden_size))
    backward = shape.kernel == "backward"
    gate = block * block * shape.itemsize * shape.copies
    for block_n in (8, 16, 32, 64):
        narrow = block_n == 8
        # A matrix instruction has sixteen rows.
        warps = min(8, max(block // 16, 1 if narrow else 4))
        if not _compiles_resident(shape, chip, block_n, warps):
            continue
        threads = _threads(chip, warps)
        held = 0
        if narrow and shape.itemsize == 2:
            room = (64 if shape.numbers <= 16 else 32) if backward else 128
            held = min(shape.products, room * threads * 4 // gate)
        together = 4 if backward and held else 1
        weight = (shape.products - held) * gate
        # Forward h, backward the gradients of all gates; turned into an operand of the product.
        sent = block * block_n * shape.itemsize * (shape.products if backward else 1)
        if weight + sent > chip.weight_room or not _fits_resident(
            shape, chip, block * block_n / threads, narrow
        ):
            continue
        slots = _ceil(shape.batch, block_n)
        waves = _ceil(slots * shape.directions, chip.multiprocessors)
        flops = 2 * shape.products * block * block * block_n
        step = (
            _WITHIN_US
            + _pointwise_us(shape, block * block_n, warps)
            + _product_us(chip, shape, weight, flops, narrow)
        )
        over = _RESIDENT_OVER[shape.kernel][warps]
        over *= _RESIDENT_FLOAT32_OVER if shape.itemsize == 4 else 1
        yield Plan(
            shape.kernel,
            "resident",
            "none",
            block,
            block_n,
            block,
            1,
            together,
            warps,
            1,
            slots,
            shape.directions,
            weight + sent,
            waves * over * step,
            held,
        )


def _fits_resident(shape: Shape, chip: Chip, elements: float, narrow: bool) -> bool:
    """Whether a resident program's numbers stay in registers, going by what the compiler made.

    Args:
        elements: of a block for each thread.
        narrow: with eight sequences.
    """
    needed = elements * (1 + max(shape.products, shape.numbers / 4))
    # Rows that do not begin at 16 bytes are loaded in pieces, with an address each.
    in_pieces = shape.hidden_size * shape.itemsize % 16 > 0
    if narrow:
        apart = shape.copies > 1 and shape.products > 1 and _multiplies_apart(chip)
        return needed <= (24 if in_pieces else 28) and not apart
    if in_pieces:
        return False
    most = {2: (40, 32), 4: (32, 20)}[shape.itemsize][shape.kernel == "backward"]
    return needed <= (most if shape.copies == 1 else most // 2)


def _multiplies_apart(chip: Chip) -> bool:
    """Whether the chip's matrix units have a memory of their own: data-centre Blackwell."""
    return isinstance(chip.architecture, int) and 100 <= chip.architecture < 120


def _is_hopper_or_later(chip: Chip) -> bool:
    return isinstance(chip.architecture, int) and chip.architecture >= 90


def _is_in_data_centres(chip: Chip) -> bool:
    """Hopper, or Blackwell but that of graphics cards."""
    return isinstance(chip.architecture, int) and 90 <= chip.architecture < 120


def _compiles_resident(shape: Shape, chip: Chip, block_n: int, warps: int) -> bool:
    """Whether Triton (3.6 to 3.9) makes what it should of a resident kernel."""
    backward = shape.kernel == "backward"
    narrow = block_n == 8
    if shape.copies > 1 and backward and warps == 1:
        # Spills.
        return False
    if narrow:
        return chip.backend == "cuda" and not chip.narrow_apart
    if chip.backend == "hip":
        # Wider blocks spill.
        return block_n == 16
    # Where products lie in a memory apart, it fails on backwards and spills three products for one.
    return not _multiplies_apart(chip) or not (backward or shape.copies > 1)


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


def _held(shape: Shape, chip: Chip) -> Iterator[Plan]:
    """Cooperative plans with W_hh in registers and the data as its own flag.

    Each warp multiplies its part of the inner dimension, from pieces of 16 bytes that it loads
    itself; so rows must begin at those. Only where no plan holds all of W_hh, it is held in part.
    """
    if chip.backend != "cuda" or shape.copies > 1 or shape.hidden_size * shape.itemsize % 16:
        return
    block_k = 64 // shape.itemsize
    found = []
    for at_once, block_h, block_n, warps in itertools.product(
        range(1, shape.directions + 1), (8, 16, 32, 64), (8, 16, 32), (4, 8)
    ):
        units = _ceil(shape.hidden_size, block_h)
        if units * at_once > chip.multiprocessors:
            continue
        blocks = _ceil(shape.inner, warps * block_k)
        block_bytes = _block_bytes(shape, block_h, warps)
        # Of wide blocks a step would be thousands of instructions; four warps hold less; others
        # spilled a few bytes, also those that have to leave out what is beyond the inner dimension.
        can_stream = (block_n, warps) == (16, 8) and block_h <= 16
        can_stream = can_stream and shape.inner % (warps * block_k) == 0
        most = min(blocks, _MOST_STREAMED // block_bytes + 1) if can_stream else 1
        for streamed in range(most):
            sums, together = 1, _together(shape, chip, block_h, block_n, warps, streamed)
            if not streamed:
                sums, together = _sums_and_together(shape, chip, block_h, block_n, warps)
            if together:
                slots = _slots(shape, chip, block_n, units * at_once)
                found.append(
                    Plan(
                        shape.kernel, "cooperative", "flag", block_h, block_n, block_k, warps,
                        together, warps, units, slots, at_once, (blocks - streamed) * block_bytes,
                        0.0, shape.products, streamed, 0, sums,
                    )
                )  # fmt: skip
                break
    held = [plan for plan in found if not plan.streamed]
    for one in held or found:
        one = replace(one, pause=pause_of(one))
        step = paused_part(one) * _step_us(_HELD_US, held_counts(shape, one))
        yield replace(one, floor_us=turns_of(shape, one) * step)


def pause_of(found: Plan) -> int:
    """Cycles before a step looks for what the others send."""
    if found.units < _FEW_PROGRAMS or (found.streamed and found.kernel == "backward"):
        # A streaming backward has much of W_hh to read before.
        return 0
    return min(_PAUSE * found.units, _LONGEST_PAUSE)


def paused_part(found: Plan) -> float:
    """Which part of a step is left with its pause."""
    return 1 - _PAUSE_GAIN * found.pause / _PAUSE


def _clusters(shape: Shape, chip: Chip) -> Iterator[Plan]:
    """Plans whose programs share a direction's hidden units as one cluster; W_hh as `_held`."""
    if not _is_hopper_or_later(chip) or chip.backend != "cuda" or shape.copies > 1:
        return
    if shape.hidden_size * shape.itemsize % 16:
        return
    for block_h, block_n, warps in itertools.product((8, 16, 32, 64), (8, 16), (4, 8)):
        units = _ceil(shape.hidden_size, block_h)
        largest = _NEIGHBOURS if _is_in_data_centres(chip) else 0
        # A number that two threads have would be sent twice.
        if units not in (*_CLUSTERS, largest) or block_h * block_n < 32 * warps:
            continue
        block_k = 64 // shape.itemsize
        other = _CLUSTER_REGISTERS if _multiplies_apart(chip) else 0
        if shape.kernel == "forward":
            blocks = _ceil(shape.inner, warps * block_k)
            weights = blocks * _block_bytes(shape, block_h, warps)
            sums, together = _sums_and_together(shape, chip, block_h, block_n, warps, other)
        else:
            sums = 1
            blocks = _ceil(shape.products * block_h, block_k)
            weights = blocks * _rounds(shape, warps) * warps * 1024
            needed = _needed_backward(shape, units, blocks, block_h, block_n, warps)
            together = block_h * block_n <= 128 * warps and needed <= _HELD_REGISTERS - other
        at_once = clusters_at_once(chip, units) // shape.directions
        slots = min(_ceil(shape.batch, block_n), max(1, at_once))
        found = Plan(
            shape.kernel, "cluster", "cluster", block_h, block_n, block_k, warps, int(together),
            warps, units, slots, shape.directions, weights, 0.0, shape.products, 0, 0, sums,
        )  # fmt: skip
        parts = 4 * warps * rows_of(shape, block_h) * block_n if shape.kernel == "forward" else 0
        if together and room_bytes(shape, found) + parts <= _PLAIN_SHARED:
            step = _step_us(_CLUSTER_US, cluster_counts(shape, found))
            yield replace(found, floor_us=turns_of(shape, found) * step)


def clusters_at_once(chip: Chip, size: int) -> int:
    """So many clusters of so many programs at least are on the chip at once."""
    return max(1, chip.multiprocessors // _GROUP) * (_NEIGHBOURS // size)


def _rounds(shape: Shape, warps: int) -> int:
    """How often each warp of a cluster's backward multiplies sixteen rows, of all units."""
    return _ceil(shape.hidden_size, 16 * warps)


def _needed_backward(
    shape: Shape, units: int, blocks: int, block_h: int, block_n: int, warps: int
) -> float:
    """Registers that a cluster's backward needs, about; blocks: of the inner dimension."""
    elements, rounds = block_h * block_n // (32 * warps), _rounds(shape, warps)
    # Of W_hh, of what is multiplied with it, of the results, and where these go.
    needed: float = 8 * blocks * rounds + blocks * block_n // 2 + (block_n // 2 + 10) * rounds
    # What is added up, and a step's own numbers.
    return needed + units * elements + 1.5 * shape.numbers * elements


def room_bytes(shape: Shape, found: Plan) -> int:
    """Bytes for what a program of a cluster is sent, by two steps, and lays out for its warps."""
    parts = found.splits * found.block_k
    if shape.kernel == "forward":
        return 2 * _ceil(shape.inner, parts) * found.splits * found.block_n * 64
    own = _ceil(shape.products * found.block_h, found.block_k) * found.block_n * 64
    return 2 * (own + 4 * found.cluster * found.block_h * found.block_n)


def _block_bytes(shape: Shape, block_h: int, warps: int) -> int:
    """Bytes of W_hh in a block of each warp's part of the inner dimension; it is 64 wide."""
    # A matrix instruction has sixteen rows.
    return 64 * warps * max(16, rows_of(shape, block_h))


def _sums_and_together(
    shape: Shape, chip: Chip, block_h: int, block_n: int, warps: int, other: int = 0
) -> tuple[int, int]:
    """Sums side by side, as many as keep four results under way and cost no wait; `_together`."""
    blocks = _ceil(shape.inner, warps * 64 // shape.itemsize)
    together = _together(shape, chip, block_h, block_n, warps, 0, other)
    if not together:
        return 1, 0
    results = max(1, rows_of(shape, block_h) // 16) * (block_n // 8)
    for sums in (4, 2):
        less = _together(shape, chip, block_h, block_n, warps, 0, other, sums)
        if sums <= min(blocks, 4 // results) and less:
            if _ceil(blocks, less) == _ceil(blocks, together):
                return sums, less
    return 1, together


def _together(
    shape: Shape,
    chip: Chip,
    block_h: int,
    block_n: int,
    warps: int,
    streamed: int,
    other: int = 0,
    sums: int = 1,
) -> int:
    """Blocks that registers have room for beside W_hh but its last blocks; 0 if there is none.

    Args:
        other: so many are for something else. sums: of a product, side by side.
    """
    threads = 32 * warps
    rows = rows_of(shape, block_h)
    multiplied = max(16, rows)
    blocks = _ceil(shape.inner, warps * 64 // shape.itemsize)
    elements = max(1, block_h * block_n // threads)
    # Numbers of 32 bits in a thread: of W_hh, of that two blocks that are not held, of a block of
    # what is multiplied with it, of the result, of its parts that a thread adds.
    weights = multiplied * (blocks - streamed + (2 if streamed else 0)) // 2
    block, result = block_n // 2, sums * multiplied * block_n // 32
    parts = warps * rows // block_h * elements
    room = (_HELD_REGISTERS if _is_hopper_or_later(chip) else _HELD_REGISTERS_BEFORE) - weights
    room -= other + (_STREAM_REGISTERS if streamed else 0)
    padded = shape.inner * shape.itemsize % (64 * warps) > 0
    if warps == 8 and room <= _LITTLE_ROOM and not streamed:
        # Of every eight sequences beyond the first, addresses, and which pieces there are.
        more = block_n // 8 - 1
        room -= 14 * more if padded else max(4 * more, 9 if shape.itemsize == 4 and more else 0)
    elif padded:
        # Likewise, where blocks are wide or W_hh takes nearly all.
        room -= 9 if block_n == 32 else 4 if room <= 8 else 0
    if 4 * warps * rows * block_n > chip.shared_memory:
        return 0
    # Of eight warps some plans that just fit spilled eight bytes.
    needed = parts + 1.5 * shape.numbers * elements + (2 if warps == 8 else 0)
    needed += 4 * elements if padded and elements == 4 else 0
    if elements > (1 if streamed else 4) or needed > room:
        return 0
    # Beside a block of W_hh on its way few others can be.
    most = 16 // block if streamed else 64 // block
    return max(0, min(blocks, (room - result) // block, most))


def _slots(shape: Shape, chip: Chip, block_n: int, programs: int) -> int:
    """Blocks of sequences side by side, of so many programs each."""
    return min(_ceil(shape.batch, block_n), max(1, chip.multiprocessors // programs))


def turns_of(shape: Shape, found: Plan) -> int:
    """How often a program starts at the first step: for each block of sequences, and direction."""
    tiles = _ceil(shape.batch, found.block_n)
    return _ceil(tiles, found.slots) * _ceil(shape.directions, found.at_once)


def held_counts(shape: Shape, found: Plan) -> tuple[float, ...]:
    """What a step of a plan with W_hh in registers takes, in the units of `_HELD_US`."""
    warps, block_n = found.warps, found.block_n
    rows = rows_of(shape, found.block_h)
    blocks = _ceil(shape.inner, warps * found.block_k)
    loaded = blocks * warps * found.block_k * block_n * shape.itemsize / 1e3
    # All programs' loads come to the same few lines of the L2 cache.
    every = loaded * found.programs / 1e3
    products = max(16, rows) // 16 * blocks * 2 * block_n // 8 * warps // 4 * shape.itemsize // 2
    elements = max(found.block_h * block_n, 32 * warps)
    shared = 4 * warps * (rows * block_n + rows // found.block_h * elements) / 1e3
    again = found.streamed * _block_bytes(shape, found.block_h, warps) / 1e5
    return 1.0, loaded, every**0.5, products, shared, again


def cluster_counts(shape: Shape, found: Plan) -> tuple[float, ...]:
    """What a step of a cluster's plan takes, in the units of `_CLUSTER_US`."""
    if shape.kernel == "forward":
        _, sent, _, products, shared, _ = held_counts(shape, found)
    else:
        sent = 4 * found.cluster * found.block_h * found.block_n / 1e3
        blocks = _ceil(shape.products * found.block_h, found.block_k)
        rounds = _rounds(shape, found.warps)
        products = rounds * blocks * 2 * found.block_n // 8 * found.warps // 4
        products *= shape.itemsize // 2
        # What is added up, and what all warps read of what one has laid out.
        shared = sent + found.warps * blocks * found.block_n * 64 / 1e3
    product = products * _HELD_US[3] + shared * _HELD_US[4]
    elements = found.block_h * found.block_n / (32 * found.warps)
    return 1.0, sent, product, elements, float(shape.kernel == "backward")


def _step_us(constants: tuple[float, ...], counts: tuple[float, ...]) -> float:
    return sum(us * count for us, count in zip(constants, counts, strict=True))


def _spread(shape: Shape, chip: Chip, variant: str) -> Iterator[Plan]:
    """Plans whose programs share a direction's hidden units."""
    if variant == "cooperative":
        yield from _held(shape, chip)
    exchange = "launch" if variant == "stepwise" else "barrier"
    for at_once, block_h, block_n, warps in itertools.product(
        range(1, shape.directions + 1), (8, 16, 32, 64), (8, 16, 32, 64), (4, 8)
    ):
        # Blocks of eight sequences are a warp's own matrix instructions', as are those with splits.
        narrow = block_n == 8
        if narrow and (variant != "cooperative" or chip.backend == "hip"):
            continue
        units = _ceil(shape.hidden_size, block_h)
        if variant != "stepwise" and units * at_once > chip.multiprocessors:
            continue
        for splits in (warps,) if narrow else (1, warps):
            for block_k in _block_ks(shape.inner, splits):
                draft = Plan(
                    shape.kernel, variant, exchange, block_h, block_n, block_k, splits, 1, warps,
                    units, 1, at_once, 0, 0.0,
                )  # fmt: skip
                found = _finished(shape, chip, draft)
                if found is not None:
                    yield found
                    # Smaller blocks only wait more often.
                    break


def _block_ks(inner: int, splits: int) -> list[int]:
    """Blocks that pad the inner dimension no more than the smallest does, the largest first."""
    least = _ceil(inner, splits * 16) * 16
    return [k for k in (128, 64, 32, 16) if _ceil(inner, splits * k) * k == least]


def _room_in_registers(shape: Shape, draft: Plan) -> int:
    """Bytes of blocks that may be on their way from the others at a time; 0 if nothing fits.

    Going by what the compiler made of many plans.
    """
    block_n, splits, warps = draft.block_n, draft.splits, draft.warps
    threads = 32 * warps
    rows = rows_of(shape, draft.block_h)
    product = splits * rows * block_n // threads
    elements = draft.block_h * block_n / threads
    # Wider elements take more instructions, and those more registers.
    wide = shape.itemsize // 2 * shape.copies
    backward = shape.kernel == "backward"
    most = 2
    if backward and splits > 1:
        most = 8 // warps if shape.products > 1 or shape.numbers > 6 else 16 // warps
    if not draft.on_chip:
        if rows < (64 if splits == 1 else 16) or product > 32 // wide or elements > most:
            return 0
        stream = max(8, 24 // shape.itemsize) if backward else 48 // shape.itemsize
        return threads * 4 * stream
    if splits == 1:
        # Matrix instructions that read W_hh by 64-bit descriptors, which stay in registers too.
        large = not backward and shape.inner <= 512 and warps == 8 and rows >= 128
        fits = large and shape.copies == 1 and block_n <= 64 // wide
        return threads * 4 * 16 if fits else 0
    if backward:
        # A user's cell may have very many numbers; smaller blocks than half there are none.
        fits = elements * min(2.0, max(1.0, shape.numbers / 20)) <= most
    else:
        fits = product <= 32 // wide and elements <= most
    return threads * 4 * ((48 if warps == 4 else 32) // wide) if fits else 0


def _most_blocks(shape: Shape, chip: Chip) -> int:
    """So many blocks of W_hh a program can keep: each has addresses, which stay in registers."""
    if shape.itemsize == 2:
        return 8 if _multiplies_apart(chip) else 16
    if shape.copies > 1 or _multiplies_apart(chip):
        return 4
    return 8 if chip.architecture == 80 or shape.kernel == "backward" else 12


def _finished(shape: Shape, chip: Chip, draft: Plan) -> Plan | None:
    """A draft with what follows from its blocks; None if it does not fit the chip."""
    rows = rows_of(shape, draft.block_h)
    if chip.backend == "hip" and rows < 16:
        # Triton makes no matrix instruction of fewer.
        return None
    blocks = _ceil(shape.inner, draft.splits * draft.block_k)
    inner = blocks * draft.splits * draft.block_k
    weight = rows * inner * shape.itemsize * shape.copies
    if chip.backend == "hip":
        # In registers.
        weight = rows * inner * shape.itemsize
    one_block = draft.splits * draft.block_k * draft.block_n * shape.itemsize
    scratch = draft.splits * rows * draft.block_n * 4 + 2048
    together = min(blocks, _room_in_registers(shape, draft) // one_block)
    if not together:
        return None
    if draft.on_chip:
        # What a barrier has let through is loaded all at once.
        if blocks > _most_blocks(shape, chip) or (
            draft.exchange == "barrier" and together < blocks
        ):
            return None
        kept, shared = weight, max(together * one_block, scratch)
    else:
        # Three products for one, in a loop, are made of small blocks only without spilling.
        if draft.block_k * shape.itemsize * shape.copies > 256 // shape.copies:
            return None
        # Both operands come by in a pipeline of three blocks.
        together, kept = 1, 0
        shared = 3 * (one_block + draft.splits * draft.block_k * rows * shape.itemsize) + scratch
    if chip.backend == "hip":
        if shared > chip.shared_memory or kept > chip.weight_room:
            return None
    elif shared + kept > chip.shared_memory:
        return None

    latency = _LAUNCH_US if draft.exchange == "launch" else _BARRIER_US + _LOAD_US
    passing = inner * draft.block_n * shape.itemsize + (weight - kept)
    handling = _MOVED * shape.itemsize / 2 * inner * draft.block_n / 128 / _CYCLES_PER_US
    flops = 2 * max(16, rows) * inner * draft.block_n
    product = _product_us(chip, shape, weight, flops)
    pointwise = _pointwise_us(shape, draft.block_h * draft.block_n, draft.warps)
    step = _WITHIN_US + latency + passing / _L2_BYTES_PER_US + handling + product + pointwise
    slots = _slots(shape, chip, draft.block_n, draft.units * draft.at_once)
    found = replace(draft, together=together, slots=slots, bytes_on_chip=shared + kept)
    found = replace(found, floor_us=turns_of(shape, found) * _SPREAD_OVER[draft.warps] * step)
    if draft.variant == "stepwise":
        # A launch may have more programs than run at once.
        found = replace(found, slots=_ceil(shape.batch, draft.block_n))
    return found


def _plans(shape: Shape, chip: Chip, variant: str) -> Iterator[Plan]:
    """All plans of a variant that fit the chip."""
    if (variant == "independent") != (shape.products == 0):
        return
    if variant == "independent":
        yield from _independent(shape, chip)
    elif variant == "resident":
        yield from _resident(shape, chip)
    elif variant == "cluster":
        yield from _clusters(shape, chip)
    elif chip.cooperative or variant == "stepwise":
        yield from _spread(shape, chip, variant)


# Each is looked at if nothing of those before it fits.
_CLASSES = (("independent", "resident", "cooperative", "cluster"), ("streaming",), ("stepwise",))


def _time(plan: Plan) -> tuple[float, int]:
    """What the best plan has the least of."""
    return plan.floor_us, plan.programs


def plan(shape: Shape, chip: Chip, variant: str | None = None) -> Plan | None:
    """The fastest plan by the model; None if no variant, or not the one named, fits the chip."""
    # No block has fewer sequences, so batches of as many blocks have one plan: where every batch
    # is another, most need no search.
    least = 8 if shape.products else 4
    return _plan(replace(shape, batch=_ceil(shape.batch, least) * least), chip, variant)


@functools.lru_cache(maxsize=4096)
def _plan(shape: Shape, chip: Chip, variant: str | None) -> Plan | None:
    if chip == INTERPRETER:
        return _interpreted(shape, variant)
    classes = ((variant,),) if variant else _CLASSES
    for names in classes:
        found = itertools.chain.from_iterable(_plans(shape, chip, name) for name in names)
        best = min(found, key=_time, default=None)
        if best is not None:
            if best.streamed and variant is None:
                # Neither keeps all of W_hh on the chip.
                best = min([best, *_plans(shape, chip, "streaming")], key=_time)
            return best
    return None


def _interpreted(shape: Shape, variant: str | None) -> Plan | None:
    """Few, large programs: the interpreter's time goes by programs, not by their size."""
    block = max(16, _power_of_two(shape.hidden_size))
    block_n = min(64, max(16, _power_of_two(shape.batch)))
    slots = _ceil(shape.batch, block_n)
    # As on a GPU: of 16-bit weights some of a backward are left where they are.
    held = 0 if shape.itemsize > 2 else shape.products
    if shape.kernel == "backward":
        held = min(held, 2)
    resident = Plan(
        shape.kernel, "resident", "none", block, block_n, block, 1, 4 if held else 1, 4, 1, slots,
        shape.directions, 0, 0.0, held,
    )  # fmt: skip
    if shape.products == 0:
        independent = replace(resident, variant="independent", in_registers=0)
        return independent if variant in (None, "independent") else None
    if variant in (None, "resident"):
        return resident
    if variant != "stepwise":
        return None
    spread = replace(resident, variant="stepwise", exchange="launch", together=1, in_registers=0)
    half = max(8, block // 2)
    splits = 2 if shape.kernel == "backward" else 1
    return replace(
        spread, block_h=half, block_k=16, splits=splits, units=_ceil(shape.hidden_size, half)
    )
