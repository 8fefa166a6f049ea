"""Which plan a recurrence gets: the fastest that fits the chip, by a model. Plain Python.

A plan is found by trying every shape of blocks that fits the chip and taking the one whose step
takes the least time (`step_time`). Nothing depends on the length of the sequences, so a plan can be
read, tested and compiled ahead with no GPU at hand.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

from triton_rnn.kernels import step_time
from triton_rnn.kernels.chips import INTERPRETER, Chip
from triton_rnn.kernels.plan import (
    Plan,
    Shape,
    block_bytes,
    ceil,
    power_of_two,
    room_bytes,
    rounds_of,
    rows_of,
)

# How many programs make a cluster: up to eight on all devices, and sixteen, which is as many as run
# next to each other, in data centres. Multiprocessors lie in groups of about so many, each of which
# holds whole clusters: of an H200's 132 there is room for 7 clusters of sixteen and 15 of eight.
_CLUSTERS, _NEIGHBOURS, _GROUP = (2, 3, 4, 5, 6, 7, 8), 16, 18
# Shared memory of a program that asks for no more than every program gets.
_PLAIN_SHARED = 48 * 1024
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


def _threads(chip: Chip, warps: int) -> int:
    return warps * (64 if chip.backend == "hip" else 32)


def _independent(shape: Shape, chip: Chip) -> Iterator[Plan]:
    """Two numbers of each block a thread, as memory likes it; units and sequences are all alike."""
    block_h, block_n, warps = 64, 4, 4
    units, slots = ceil(shape.hidden_size, block_h), ceil(shape.batch, block_n)
    found = Plan(
        shape.kernel, "independent", "none", block_h, block_n, block_h, 1, 1, warps, units, slots,
        shape.directions, 0, 0.0,
    )  # fmt: skip
    yield replace(found, floor_us=step_time.independent_us(shape, chip, found))


def _resident(shape: Shape, chip: Chip) -> Iterator[Plan]:
    """One program for all units; of 16-bit weights as many gates in registers as leave room."""
    block = max(16, power_of_two(shape.hidden_size))
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
        found = Plan(
            shape.kernel, "resident", "none", block, block_n, block, 1, together, warps, 1,
            ceil(shape.batch, block_n), shape.directions, weight + sent, 0.0, held,
        )  # fmt: skip
        yield replace(found, floor_us=step_time.resident_us(shape, chip, found, weight))


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
        apart = shape.copies > 1 and shape.products > 1 and chip.multiplies_apart
        return needed <= (24 if in_pieces else 28) and not apart
    if in_pieces:
        return False
    most = {2: (40, 32), 4: (32, 20)}[shape.itemsize][shape.kernel == "backward"]
    return needed <= (most if shape.copies == 1 else most // 2)


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
    return not chip.multiplies_apart or not (backward or shape.copies > 1)


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
        units = ceil(shape.hidden_size, block_h)
        if units * at_once > chip.multiprocessors:
            continue
        blocks = ceil(shape.inner, warps * block_k)
        each = block_bytes(shape, block_h, warps)
        # Of wide blocks a step would be thousands of instructions; four warps hold less; others
        # spilled a few bytes, also those that have to leave out what is beyond the inner dimension.
        can_stream = (block_n, warps) == (16, 8) and block_h <= 16
        can_stream = can_stream and shape.inner % (warps * block_k) == 0
        most = min(blocks, _MOST_STREAMED // each + 1) if can_stream else 1
        for streamed in range(most):
            sums, together = 1, _together(shape, chip, block_h, block_n, warps, streamed)
            if not streamed:
                sums, together = _sums_and_together(shape, chip, block_h, block_n, warps)
            if together:
                slots = _slots(shape, chip, block_n, units * at_once)
                found.append(
                    Plan(
                        shape.kernel, "cooperative", "flag", block_h, block_n, block_k, warps,
                        together, warps, units, slots, at_once, (blocks - streamed) * each,
                        0.0, shape.products, streamed, 0, sums,
                    )
                )  # fmt: skip
                break
    held = [plan for plan in found if not plan.streamed]
    for one in held or found:
        one = replace(one, pause=step_time.pause_of(one))
        yield replace(one, floor_us=step_time.held_us(shape, one))


def _clusters(shape: Shape, chip: Chip) -> Iterator[Plan]:
    """Plans whose programs share a direction's hidden units as one cluster; W_hh as `_held`."""
    if not chip.is_hopper_or_later or chip.backend != "cuda" or shape.copies > 1:
        return
    if shape.hidden_size * shape.itemsize % 16:
        return
    for block_h, block_n, warps in itertools.product((8, 16, 32, 64), (8, 16), (4, 8)):
        units = ceil(shape.hidden_size, block_h)
        largest = _NEIGHBOURS if chip.is_in_data_centres else 0
        # A number that two threads have would be sent twice.
        if units not in (*_CLUSTERS, largest) or block_h * block_n < 32 * warps:
            continue
        block_k = 64 // shape.itemsize
        other = _CLUSTER_REGISTERS if chip.multiplies_apart else 0
        if shape.kernel == "forward":
            blocks = ceil(shape.inner, warps * block_k)
            weights = blocks * block_bytes(shape, block_h, warps)
            sums, together = _sums_and_together(shape, chip, block_h, block_n, warps, other)
        else:
            sums = 1
            blocks = ceil(shape.products * block_h, block_k)
            weights = blocks * rounds_of(shape, warps) * warps * 1024
            needed = _needed_backward(shape, units, blocks, block_h, block_n, warps)
            together = block_h * block_n <= 128 * warps and needed <= _HELD_REGISTERS - other
        at_once = clusters_at_once(chip, units) // shape.directions
        slots = min(ceil(shape.batch, block_n), max(1, at_once))
        found = Plan(
            shape.kernel, "cluster", "cluster", block_h, block_n, block_k, warps, int(together),
            warps, units, slots, shape.directions, weights, 0.0, shape.products, 0, 0, sums,
        )  # fmt: skip
        parts = 4 * warps * rows_of(shape, block_h) * block_n if shape.kernel == "forward" else 0
        if together and room_bytes(shape, found) + parts <= _PLAIN_SHARED:
            yield replace(found, floor_us=step_time.cluster_us(shape, found))


def clusters_at_once(chip: Chip, size: int) -> int:
    """So many clusters of so many programs at least are on the chip at once."""
    return max(1, chip.multiprocessors // _GROUP) * (_NEIGHBOURS // size)


def _needed_backward(
    shape: Shape, units: int, blocks: int, block_h: int, block_n: int, warps: int
) -> float:
    """Registers that a cluster's backward needs, about; blocks: of the inner dimension."""
    elements, rounds = block_h * block_n // (32 * warps), rounds_of(shape, warps)
    # Of W_hh, of what is multiplied with it, of the results, and where these go.
    needed: float = 8 * blocks * rounds + blocks * block_n // 2 + (block_n // 2 + 10) * rounds
    # What is added up, and a step's own numbers.
    return needed + units * elements + 1.5 * shape.numbers * elements


def _sums_and_together(
    shape: Shape, chip: Chip, block_h: int, block_n: int, warps: int, other: int = 0
) -> tuple[int, int]:
    """Sums side by side, as many as keep four results under way and cost no wait; `_together`."""
    blocks = ceil(shape.inner, warps * 64 // shape.itemsize)
    together = _together(shape, chip, block_h, block_n, warps, 0, other)
    if not together:
        return 1, 0
    results = max(1, rows_of(shape, block_h) // 16) * (block_n // 8)
    for sums in (4, 2):
        less = _together(shape, chip, block_h, block_n, warps, 0, other, sums)
        if sums <= min(blocks, 4 // results) and less:
            if ceil(blocks, less) == ceil(blocks, together):
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
    blocks = ceil(shape.inner, warps * 64 // shape.itemsize)
    elements = max(1, block_h * block_n // threads)
    # Numbers of 32 bits in a thread: of W_hh, of that two blocks that are not held, of a block of
    # what is multiplied with it, of the result, of its parts that a thread adds.
    weights = multiplied * (blocks - streamed + (2 if streamed else 0)) // 2
    block, result = block_n // 2, sums * multiplied * block_n // 32
    parts = warps * rows // block_h * elements
    room = (_HELD_REGISTERS if chip.is_hopper_or_later else _HELD_REGISTERS_BEFORE) - weights
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
    return min(ceil(shape.batch, block_n), max(1, chip.multiprocessors // programs))


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
        units = ceil(shape.hidden_size, block_h)
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
    least = ceil(inner, splits * 16) * 16
    return [k for k in (128, 64, 32, 16) if ceil(inner, splits * k) * k == least]


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
        return 8 if chip.multiplies_apart else 16
    if shape.copies > 1 or chip.multiplies_apart:
        return 4
    return 8 if chip.architecture == 80 or shape.kernel == "backward" else 12


def _finished(shape: Shape, chip: Chip, draft: Plan) -> Plan | None:
    """A draft with what follows from its blocks; None if it does not fit the chip."""
    rows = rows_of(shape, draft.block_h)
    if chip.backend == "hip" and rows < 16:
        # Triton makes no matrix instruction of fewer.
        return None
    blocks = ceil(shape.inner, draft.splits * draft.block_k)
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

    slots = _slots(shape, chip, draft.block_n, draft.units * draft.at_once)
    found = replace(draft, together=together, slots=slots, bytes_on_chip=shared + kept)
    us = step_time.spread_us(shape, chip, found, inner, weight, kept)
    found = replace(found, floor_us=us)
    if draft.variant == "stepwise":
        # A launch may have more programs than run at once.
        found = replace(found, slots=ceil(shape.batch, draft.block_n))
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
VARIANTS = tuple(name for names in _CLASSES for name in names)


def _time(plan: Plan) -> tuple[float, int]:
    """What the best plan has the least of."""
    return plan.floor_us, plan.programs


def plan(shape: Shape, chip: Chip, variant: str | None = None) -> Plan | None:
    """The fastest plan by the model; None if no variant, or not the one named, fits the chip.

    Raises:
        ValueError: if there is no variant of that name.
    """
    if variant and variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose from {', '.join(VARIANTS)}")
    # No block has fewer sequences, so batches of as many blocks have one plan: where every batch
    # is another, most need no search.
    least = 8 if shape.products else 4
    return _plan(replace(shape, batch=ceil(shape.batch, least) * least), chip, variant)


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
    block = max(16, power_of_two(shape.hidden_size))
    block_n = min(64, max(16, power_of_two(shape.batch)))
    slots = ceil(shape.batch, block_n)
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
        spread, block_h=half, block_k=16, splits=splits, units=ceil(shape.hidden_size, half)
    )
