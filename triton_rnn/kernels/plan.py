"""How to launch a recurrence: which variant, which blocks, how many programs. Plain Python.

A plan is found by trying every shape of blocks that fits the chip and taking the one whose step has
the lowest floor by `_step_us`. Nothing is measured at run time and nothing depends on the length of
the sequences, so a plan can be read, tested and compiled ahead with no GPU at hand.

Variants, the earlier the better where it fits:

- resident: one program owns all hidden units of a direction; W_hh fits one multiprocessor, and the
  state never leaves it.
- cooperative: W_hh is spread over the programs and stays on the chip; they exchange the state at
  every step.
- streaming: as cooperative, but W_hh is too large for the chip: every step reads it from L2.
- stepwise: a launch per step. For devices without cooperative launch, and the interpreter.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

# How long a step takes at the least, in microseconds, from published measurements on an H100; the
# other chips are taken to be alike. The order of two plans is what counts.
_WITHIN_US = 0.25  # two products' and one pointwise latency within a multiprocessor
_FLAG_US = 0.6  # from one multiprocessor's store to another's load
_BARRIER_US = 1.0
_LAUNCH_US = 5.0
_L2_BYTES_PER_US = 80e3  # into one multiprocessor, all of them reading
_SHARED_BYTES_PER_US = 200e3  # from shared memory into the matrix units: 128 bytes a cycle


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
    """

    name: str
    backend: str
    architecture: int | str
    multiprocessors: int
    shared_memory: int
    matrix_mflops: float
    cooperative: bool = True

    @property
    def weight_room(self) -> int:
        """Bytes of W_hh that a program can keep."""
        if self.backend == "hip":
            # Registers, twice as many as on other chips: the 64 KB of shared memory are too few.
            return 128 * 1024
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
        variant: "resident", "cooperative", "streaming" or "stepwise".
        exchange: "none", "flag", "barrier" or "launch" (see `exchange.py`).
        block_h, block_n, block_k: hidden units and sequences of a program; the inner dimension of
            its product is taken block_k at a time.
        splits: parts of that dimension that are added up side by side.
        warps: of a program.
        units: programs along the hidden dimension.
        slots: programs along the batch; each takes every slots-th block of it.
        at_once: directions in a launch; 1 of 2 if both do not fit the chip together.
        bytes_on_chip: shared memory, or registers, that a program is expected to take.
        floor_us: the least a step can take, all sequences and directions, in microseconds.
    """

    kernel: str
    variant: str
    exchange: str
    block_h: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    units: int
    slots: int
    at_once: int
    bytes_on_chip: int
    floor_us: float

    @property
    def programs(self) -> int:
        return self.units * self.slots * self.at_once

    @property
    def on_chip(self) -> bool:
        """Whether W_hh stays on the chip for the whole launch."""
        return self.variant in ("resident", "cooperative")

    def __str__(self) -> str:
        directions = "both directions" if self.at_once == 2 else "one direction"
        return (
            f"{self.kernel}: {self.variant} ({self.exchange}), blocks of {self.block_h} units x "
            f"{self.block_n} sequences x {self.block_k}, {self.programs} programs of {self.warps} "
            f"warps for {directions} at once, {self.bytes_on_chip / 1024:.0f} KB each, floor "
            f"{self.floor_us:.2f} us a step"
        )


@dataclass(frozen=True)
class Shape:
    """What is to be planned: one kernel over one layer.

    Attributes:
        kernel: "forward" or "backward".
        gates, hidden_size, directions, batch: G, H, D, N.
        itemsize: bytes of an element of W_hh.
    """

    kernel: str
    gates: int
    hidden_size: int
    directions: int
    batch: int
    itemsize: int

    @property
    def inner(self) -> int:
        """Inner dimension of a step's product."""
        return self.hidden_size * (self.gates if self.kernel == "backward" else 1)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _threads(chip: Chip, warps: int) -> int:
    return warps * (64 if chip.backend == "hip" else 32)


def _rows(shape: Shape, block_h: int) -> int:
    """Rows of the product: forward the gates of every unit, three of them padded to four."""
    return block_h * (_power_of_two(shape.gates) if shape.kernel == "forward" else 1)


def _resident(shape: Shape, chip: Chip) -> Iterator[Plan]:
    block = max(16, _power_of_two(shape.hidden_size))
    weight = shape.gates * block * block * shape.itemsize
    warps = 4 if block <= 64 else 8
    for block_n in (16, 32, 64):
        state = block * block_n
        # Forward h, backward the gradients of all gates; turned into an operand of the product.
        sent = state * shape.itemsize * (shape.gates if shape.kernel == "backward" else 1)
        # What lives in registers: products, the step's numbers and those of the next.
        live = state * 4 * (2 * shape.gates + 4)
        if live > _threads(chip, warps) * 4 * 168 or weight + sent > chip.weight_room:
            continue
        slots = _ceil(shape.batch, block_n)
        waves = _ceil(slots * shape.directions, chip.multiprocessors)
        flops = 2 * shape.gates * block * block * block_n
        step = _WITHIN_US + _product_us(chip, shape, weight, flops)
        yield Plan(
            shape.kernel,
            "resident",
            "none",
            block,
            block_n,
            block,
            1,
            warps,
            1,
            slots,
            shape.directions,
            weight + sent,
            waves * step,
        )


def _product_us(chip: Chip, shape: Shape, weight_bytes: int, flops: int) -> float:
    """A program's part of a product: its weights must reach the matrix units, and be multiplied."""
    rate = chip.matrix_mflops * 1e6 * (2 / shape.itemsize)
    return max(weight_bytes / _SHARED_BYTES_PER_US, flops / rate)


def _spread(shape: Shape, chip: Chip, variant: str) -> Iterator[Plan]:
    """Plans whose programs share a direction's hidden units."""
    block_hs = (8, 16, 32, 64, 128) if shape.gates == 1 else (8, 16, 32)
    for at_once in {1, shape.directions}:
        for block_h in block_hs:
            units = _ceil(shape.hidden_size, block_h)
            for block_n in (16, 32, 64, 128):
                for block_k in (32, 64, 128, 256):
                    plan = _spread_plan(shape, chip, variant, at_once, block_h, block_n, block_k)
                    if plan is not None and units * at_once <= chip.multiprocessors:
                        yield plan


def _spread_plan(
    shape: Shape, chip: Chip, variant: str, at_once: int, block_h: int, block_n: int, block_k: int
) -> Plan | None:
    rows = _rows(shape, block_h)
    warps = 8 if rows * block_n >= 8192 or rows >= 128 else 4
    splits = 4 if shape.kernel == "backward" and block_h <= 32 else 1
    blocks = _ceil(shape.inner, splits * block_k)
    inner = blocks * splits * block_k
    weight = rows * inner * shape.itemsize
    exchanged = splits * block_k * block_n * shape.itemsize
    product = splits * rows * block_n * 4
    threads = _threads(chip, warps)

    # Registers: the product, a block on its way to shared memory, the step's numbers and the next.
    pointwise = block_h * block_n * 4 * (2 * shape.gates + 6)
    if product + exchanged + pointwise > threads * 4 * 128:
        return None
    shared = max(2 * exchanged, product) + 2048
    if chip.backend == "hip":
        if shared > chip.shared_memory:
            return None
    elif variant == "cooperative":
        shared += weight
    if variant == "cooperative":
        if weight > chip.weight_room or (chip.backend == "cuda" and shared > chip.shared_memory):
            return None
        if blocks > 32:
            return None
    else:
        # Pipelined: three blocks of both operands on their way.
        shared = 3 * splits * block_k * (rows + block_n) * shape.itemsize + product
        if shared > chip.shared_memory or block_k > 128:
            return None

    units = _ceil(shape.hidden_size, block_h)
    tiles = _ceil(shape.batch, block_n)
    side_by_side = max(1, chip.multiprocessors // (units * at_once))
    slots = tiles if variant == "stepwise" else min(tiles, side_by_side)
    turns = _ceil(tiles, min(slots, side_by_side)) * _ceil(shape.directions, at_once)
    exchange = {"cooperative": "flag", "streaming": "barrier", "stepwise": "launch"}[variant]
    latency = {"flag": _FLAG_US, "barrier": _BARRIER_US, "launch": _LAUNCH_US}[exchange]
    passing = inner * block_n * shape.itemsize
    if variant != "cooperative":
        passing += weight
    flops = 2 * max(16, rows) * inner * block_n
    step = (
        _WITHIN_US
        + latency
        # Each block is waited for, checked and turned into an operand.
        + 0.05 * blocks
        + passing / _L2_BYTES_PER_US
        + _product_us(chip, shape, weight, flops)
    )
    return Plan(
        shape.kernel,
        variant,
        exchange,
        block_h,
        block_n,
        block_k,
        splits,
        warps,
        units,
        slots,
        at_once,
        shared if chip.backend == "cuda" else shared + weight,
        turns * step,
    )


@functools.lru_cache(maxsize=4096)
def plan(shape: Shape, chip: Chip, variant: str | None = None) -> Plan | None:
    """The plan with the lowest floor; None if no variant, or not the one named, fits the chip."""
    if chip == INTERPRETER:
        return _interpreted(shape, variant)
    wanted = (variant,) if variant else ("resident", "cooperative", "streaming", "stepwise")
    for name in wanted:
        if name in ("cooperative", "streaming") and not chip.cooperative:
            continue
        found = _resident(shape, chip) if name == "resident" else _spread(shape, chip, name)
        best = min(found, key=lambda plan: (plan.floor_us, plan.programs), default=None)
        if best is not None:
            return best
    return None


def _interpreted(shape: Shape, variant: str | None) -> Plan | None:
    """Few, large programs: the interpreter's time goes by programs, not by their size."""
    block = max(16, _power_of_two(shape.hidden_size))
    block_n = min(64, max(16, _power_of_two(shape.batch)))
    slots = _ceil(shape.batch, block_n)
    resident = Plan(
        shape.kernel, "resident", "none", block, block_n, block, 1, 4, 1, slots,
        shape.directions, 0, 0.0,
    )  # fmt: skip
    if variant in (None, "resident"):
        return resident
    if variant != "stepwise":
        return None
    spread = replace(resident, variant="stepwise", exchange="launch")
    half = max(8, block // 2)
    splits = 2 if shape.kernel == "backward" else 1
    return replace(
        spread, block_h=half, block_k=16, splits=splits, units=_ceil(shape.hidden_size, half)
    )
