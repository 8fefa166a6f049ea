"""How a recurrence is launched: which variant, which blocks, how many programs.

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

from dataclasses import dataclass


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
        numbers: blocks of numbers that a step holds besides the states. The planner's limits
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


def ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def rows_of(shape: Shape, block_h: int) -> int:
    """Rows of the product: forward the gates of every unit, padded to a power of two."""
    return block_h * (power_of_two(shape.products) if shape.kernel == "forward" else 1)


def turns_of(shape: Shape, found: Plan) -> int:
    """How often a program starts at the first step: for each block of sequences, and direction."""
    tiles = ceil(shape.batch, found.block_n)
    return ceil(tiles, found.slots) * ceil(shape.directions, found.at_once)


def rounds_of(shape: Shape, warps: int) -> int:
    """How often each warp of a cluster's backward multiplies sixteen rows, of all units."""
    return ceil(shape.hidden_size, 16 * warps)


def room_bytes(shape: Shape, found: Plan) -> int:
    """Bytes for what a program of a cluster is sent, by two steps, and lays out for its warps."""
    parts = found.splits * found.block_k
    if shape.kernel == "forward":
        return 2 * ceil(shape.inner, parts) * found.splits * found.block_n * 64
    own = ceil(shape.products * found.block_h, found.block_k) * found.block_n * 64
    return 2 * (own + 4 * found.cluster * found.block_h * found.block_n)


def block_bytes(shape: Shape, block_h: int, warps: int) -> int:
    """Bytes of W_hh in a block of each warp's part of the inner dimension; it is 64 wide."""
    # A matrix instruction has sixteen rows.
    return 64 * warps * max(16, rows_of(shape, block_h))
