"""The launch plan as a function: it fits the chip, covers the work, and asks no device."""

import itertools
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from triton_rnn.kernels.chips import CHIPS, INTERPRETER
from triton_rnn.kernels.plan import Plan, Shape, room_bytes, rows_of, turns_of
from triton_rnn.kernels.planner import _plan, clusters_at_once, plan
from triton_rnn.kernels.step_time import held_counts, pause_of, paused_part

SIZES = (1, 20, 100, 128, 256, 650, 1024, 1536, 3000)
BATCHES = (1, 17, 256)


def shapes(kernel, products=(1, 3, 4), batches=BATCHES, numbers=0):
    for count, size, directions, batch in itertools.product(products, SIZES, (1, 2), batches):
        for itemsize, copies in ((2, 1), (4, 1), (4, 2)):
            yield Shape(kernel, count, size, directions, batch, itemsize, copies, numbers)


def is_power_of_two(number):
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("name", sorted(CHIPS))
def test_every_plan_fits_its_chip_and_covers_all_units_and_sequences(name, kernel):
    chip = CHIPS[name]
    variants = set()
    for shape in shapes(kernel):
        found = plan(shape, chip)
        assert found is not None, shape
        variants.add(found.variant)
        assert found.kernel == kernel
        blocks = (found.block_h, found.block_n, found.block_k, found.splits)
        assert all(map(is_power_of_two, blocks)), (shape, found)
        assert found.block_k >= 16, "a matrix instruction takes 16 at least"
        assert found.units * found.block_h >= shape.hidden_size, (shape, found)
        assert (found.units - 1) * found.block_h < shape.hidden_size, (shape, found)
        assert found.at_once in (1, shape.directions)
        assert found.floor_us > 0
        tiles = -(-shape.batch // found.block_n)
        assert 1 <= found.slots <= tiles, (shape, found)
        if found.exchange in ("flag", "barrier"):
            # A program that waits for one that has no multiprocessor waits for ever.
            assert found.programs <= chip.multiprocessors, (shape, found)
        elif found.exchange != "cluster":
            assert found.slots == tiles, "without an exchange nobody comes round again"
        if found.exchange == "flag":
            assert_held(found, shape, chip)
        elif chip.backend == "cuda":
            assert found.bytes_on_chip <= chip.shared_memory, (shape, found)
    assert {"resident", "cooperative", "streaming"} <= variants


def assert_held(found, shape, chip):
    """W_hh in registers, of which a thread has 255, read in pieces of 16 bytes, four a block."""
    assert found.variant == "cooperative" and chip.backend == "cuda"
    assert found.bytes_on_chip < 4 * 255 * 32 * found.warps, (shape, found)
    parts = 4 * found.splits * rows_of(shape, found.block_h) * found.block_n
    assert parts <= chip.shared_memory, (shape, found)
    assert found.splits == found.warps and found.block_k * shape.itemsize == 64
    assert shape.hidden_size * shape.itemsize % 16 == 0 and shape.copies == 1
    blocks = -(-shape.inner // (found.splits * found.block_k))
    rows = max(16, rows_of(shape, found.block_h))
    assert 0 <= found.streamed < blocks
    assert found.bytes_on_chip == 64 * found.splits * rows * (blocks - found.streamed)


@pytest.mark.parametrize(
    ("kernel", "itemsize", "sizes"),
    [("forward", 2, (1280, 1536)), ("backward", 2, (1536,)), ("backward", 4, (768, 1024))],
)
def test_what_registers_cannot_hold_is_read_again(kernel, itemsize, sizes):
    """Of an LSTM, where no plan holds all of W_hh; if that takes long all of it is read from L2."""
    chip = CHIPS["H200"]

    def of(hidden_size, variant=None, copies=1):
        shape = Shape(kernel, 4, hidden_size, 1, 16, itemsize, copies, 16)
        return plan(shape, chip, variant)

    assert of(512).streamed == 0
    for hidden_size in sizes:
        found = of(hidden_size)
        assert (found.variant, found.exchange) == ("cooperative", "flag")
        assert found.streamed > 0 and found.warps == 8
        assert found.floor_us < of(hidden_size, "streaming").floor_us
    assert of(sizes[0]).floor_us < of(2048).floor_us
    assert of(2056).variant == "streaming"
    # Rows that the blocks do not divide, and three products for one.
    assert of(sizes[-1] + 8).streamed == of(sizes[-1], copies=2).streamed == 0


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("name", sorted(CHIPS))
def test_a_clusters_programs_hold_all_units_and_send_each_number_once(name, kernel):
    chip = CHIPS[name]
    found = {shape: plan(shape, chip, "cluster") for shape in shapes(kernel)}
    planned = {shape: one for shape, one in found.items() if one is not None}
    # Hopper and later; of whole pieces of 16 bytes; of a product that is one.
    assert bool(planned) == (name in ("H100", "H200", "B200"))
    for shape, one in planned.items():
        assert one.exchange == "cluster" and one.cluster in (2, 3, 4, 5, 6, 7, 8, 16)
        assert one.cluster == one.units and one.units * one.block_h >= shape.hidden_size
        assert one.block_h * one.block_n >= 32 * one.warps, "a number would be sent twice"
        parts = 4 * one.splits * rows_of(shape, one.block_h) * one.block_n
        parts *= kernel == "forward"
        assert room_bytes(shape, one) + parts <= 48 * 1024, (shape, one)
        # Of two steps the state, or backward what all programs send for each unit, in float32.
        sent = shape.hidden_size * one.block_n * (shape.itemsize if kernel == "forward" else 4)
        assert room_bytes(shape, one) >= 2 * sent
        assert one.programs <= chip.multiprocessors and one.at_once == shape.directions
        assert shape.copies == 1 and shape.hidden_size * shape.itemsize % 16 == 0
    sizes = {shape.hidden_size for shape in planned}
    assert not planned or (128 in sizes and max(sizes) <= 1024)


def test_clusters_are_for_shapes_that_they_are_faster_for():
    chip = CHIPS["H200"]
    chosen = set()
    for kernel in ("forward", "backward"):
        for shape in shapes(kernel):
            found = plan(shape, chip)
            others = [plan(shape, chip, name) for name in ("resident", "cooperative", "cluster")]
            fastest = min((one.floor_us for one in others if one), default=found.floor_us)
            assert found.streamed or found.floor_us == pytest.approx(fastest)
            chosen.add((shape.hidden_size, found.cluster > 1))
            # None waits for another one's place on the chip.
            assert found.cluster == 1 or found.slots * found.at_once <= clusters_at_once(
                chip, found.cluster
            )
    assert (128, True) in chosen and (1024, True) not in chosen
    # As many as an H200's driver says.
    assert {size: clusters_at_once(chip, size) for size in (2, 4, 8, 16)} == {
        2: 56, 4: 28, 8: 14, 16: 7,
    }  # fmt: skip
    # Graphics cards promise eight programs next to each other.
    card = replace(chip, architecture=120)
    assert {
        plan(shape, card, "cluster").cluster
        for shape in shapes("forward", (1,))
        if plan(shape, card, "cluster")
    } <= set(range(2, 9))


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_users_cells_of_any_number_of_products_and_numbers_have_a_plan(kernel):
    for chip in (CHIPS["A100"], CHIPS["B200"]):
        for products, numbers in ((2, 22), (8, 80)):
            for shape in shapes(kernel, (products,), (17,), numbers):
                found = plan(shape, chip)
                assert found is not None, shape
                if found.exchange != "flag":
                    assert found.bytes_on_chip <= chip.shared_memory, (shape, found)


def test_a_cell_without_a_product_needs_no_programs_side_by_side():
    for chip in CHIPS.values():
        for shape in shapes("backward", (0,)):
            found = plan(shape, chip)
            assert (found.variant, found.exchange) == ("independent", "none")
            assert found.units * found.block_h >= shape.hidden_size
            assert found.slots * found.block_n >= shape.batch
            assert found.at_once == shape.directions
            assert plan(shape, chip, "resident") is None
        assert plan(Shape("forward", 1, 64, 1, 16, 2), chip, "independent") is None
    shape = Shape("forward", 0, 100, 2, 33, 4)
    assert plan(shape, INTERPRETER).variant == "independent"
    assert plan(shape, INTERPRETER, "stepwise") is None


def test_more_numbers_than_torchs_cells_have_take_smaller_blocks():
    chip = CHIPS["H200"]
    usual = plan(Shape("backward", 4, 512, 1, 64, 2, 1, 14), chip)
    heavy = plan(Shape("backward", 4, 512, 1, 64, 2, 1, 60), chip)
    elements = [found.block_h * found.block_n // found.warps for found in (usual, heavy)]
    assert elements[0] >= elements[1]
    assert plan(Shape("backward", 4, 64, 1, 16, 2, 1, 14), chip, "resident") is not None
    assert plan(Shape("backward", 4, 64, 1, 16, 2, 1, 60), chip, "resident") is None


def test_the_weights_of_a_program_are_counted_in_full():
    chip = CHIPS["H200"]
    for shape in shapes("forward"):
        found = plan(shape, chip, "cooperative")
        if found is not None:
            inner = shape.hidden_size - found.streamed * found.splits * found.block_k
            kept = rows_of(shape, found.block_h) * inner * shape.itemsize
            assert found.bytes_on_chip >= kept * shape.copies, (shape, found)


@pytest.mark.parametrize(
    ("size", "variant"),
    [(16, "resident"), (128, "cluster"), (256, "cluster"), (1024, "cooperative")],
)
def test_w_hh_stays_on_the_chip_as_long_as_it_fits(size, variant):
    found = plan(Shape("forward", 4, size, 1, 16, 2), CHIPS["H200"])
    assert found.variant == variant
    assert found.on_chip


def test_w_hh_streams_when_the_whole_chip_is_too_small_for_it():
    # 4 * 2048 * 2048 * 4 bytes are 64 MB, an H200 has 132 * 227 KB, and as many in registers.
    found = plan(Shape("forward", 4, 2048, 1, 16, 4), CHIPS["H200"])
    assert found.variant == "streaming"
    assert not found.on_chip


def test_directions_that_do_not_fit_together_are_launched_in_turn():
    chip = CHIPS["H200"]
    both = plan(Shape("forward", 4, 1024, 2, 16, 2), chip)
    assert both.at_once == 2
    in_turn = plan(Shape("forward", 4, 1536, 2, 16, 2), chip)
    assert in_turn.at_once == 1
    assert in_turn.floor_us == pytest.approx(
        2 * plan(Shape("forward", 4, 1536, 1, 16, 2), chip).floor_us
    )


@pytest.mark.parametrize("name", ["A100", "H200", "B200"])
@pytest.mark.parametrize(
    ("kernel", "products", "held"),
    [("forward", 1, 1), ("forward", 4, 4), ("backward", 3, 2), ("backward", 4, 2)],
)
def test_a_resident_program_keeps_as_many_gates_in_registers_as_leave_room(
    name, kernel, products, held
):
    """16 bits of 128 x 128 weights are 32 registers of each of 256 threads, which have 255."""
    shape = Shape(kernel, products, 128, 1, 16, 2, 1, 4 * products)
    found = plan(shape, CHIPS[name], "resident")
    assert (found.block_n, found.warps) == (8, 8)
    assert found.in_registers == held
    left = (products - held) * 128 * 128 * 2
    assert left <= found.bytes_on_chip < left + 32 * 128 * 8


def test_float32_is_kept_in_shared_memory():
    for products in (1, 3, 4):
        found = plan(Shape("forward", products, 64, 1, 16, 4), CHIPS["H200"], "resident")
        assert found.in_registers == 0


def test_a_crowd_is_not_taken_eight_at_a_time():
    # 2048 sequences are 256 blocks of eight, for 132 multiprocessors.
    found = plan(Shape("forward", 1, 64, 1, 2048, 2, 1, 3), CHIPS["H200"])
    assert found.variant == "resident"
    assert found.block_n > 8
    assert found.slots <= CHIPS["H200"].multiprocessors


def test_where_even_narrow_products_lie_apart_a_backward_is_spread():
    chip = replace(CHIPS["B200"], narrow_apart=True)
    for products in (1, 4):
        assert plan(Shape("forward", products, 64, 1, 16, 2), chip, "resident").in_registers == 0
        assert plan(Shape("backward", products, 64, 1, 16, 2), chip, "resident") is None


def test_rows_of_no_whole_pieces_wait_at_a_barrier():
    """Of 16 bytes; and float32 as three products, which has its weights twice."""
    chip = CHIPS["H200"]
    for itemsize, size, copies, exchange in (
        (2, 256, 1, "flag"),
        (2, 260, 1, "barrier"),
        (4, 260, 1, "flag"),
        (4, 258, 1, "barrier"),
        (4, 132, 2, "barrier"),
    ):
        shape = Shape("forward", 4, size, 1, 16, itemsize, copies)
        assert plan(shape, chip, "cooperative").exchange == exchange
    assert plan(Shape("forward", 4, 256, 1, 16, 2), CHIPS["MI300X"]).exchange == "barrier"


def test_of_all_variants_that_fit_the_fastest_is_taken():
    """Few units are faster alone; many sequences have no room to be spread over programs."""
    for name, size, batch, variant in (
        ("H200", 16, 16, "resident"),
        ("H200", 128, 16, "cluster"),
        ("H200", 384, 16, "cooperative"),
        ("H200", 128, 2048, "resident"),
        ("A100", 128, 16, "cooperative"),
    ):
        shape = Shape("forward", 4, size, 1, batch, 2)
        variants = ("resident", "cooperative", "cluster")
        every = [plan(shape, CHIPS[name], variant) for variant in variants]
        found = plan(shape, CHIPS[name])
        assert found == min(filter(None, every), key=lambda plan: plan.floor_us)
        assert found.variant == variant


def test_what_a_step_is_counted_to_take():
    """By hand: an LSTM of 768 units, 16 of them and 8 sequences a program, as 96 programs."""
    shape = Shape("forward", 4, 768, 1, 16, 2)
    found = Plan(
        "forward", "cooperative", "flag", 16, 8, 32, 8, 3, 8, 48, 2, 1, 0, 0.0, 4
    )  # fmt: skip
    one, loaded, root, products, shared, again = held_counts(shape, found)
    assert one == 1 and again == 0
    assert loaded == 768 * 8 * 2 / 1e3
    assert root == pytest.approx((96 * loaded / 1e3) ** 0.5)
    # 64 rows are four instructions high, 96 numbers of each warp six deep; two warps a scheduler.
    assert products == 4 * 6 * 2
    # Each warp writes its part of 64 x 8 numbers; each thread reads four gates of one element.
    assert shared == 4 * (8 * 64 * 8 + 8 * 4 * 256) / 1e3
    # A block of 64 rows and 32 numbers of each warp.
    assert held_counts(shape, replace(found, streamed=2))[-1] == 2 * 8 * 64 * 32 * 2 / 1e5
    assert turns_of(shape, found) == 1
    assert turns_of(replace(shape, batch=17, directions=2), found) == 4


def test_the_more_programs_there_are_the_longer_a_step_waits_before_it_looks():
    held = Plan("forward", "cooperative", "flag", 16, 8, 32, 8, 3, 8, 48, 2, 1, 0, 0.0, 4)
    pauses = [pause_of(replace(held, units=units)) for units in (8, 16, 48, 96, 128)]
    assert pauses == sorted(pauses) and pauses[0] == 0 < pauses[1] and pauses[-1] == pauses[-2]
    assert paused_part(held) == 1 > paused_part(replace(held, pause=pauses[1])) > 0.8
    # One that reads much of W_hh again has something to do.
    assert pause_of(replace(held, streamed=1)) > 0
    assert pause_of(replace(held, kernel="backward", streamed=1)) == 0
    assert plan(Shape("forward", 4, 768, 1, 16, 2, 1, 16), CHIPS["H200"]).pause == pause_of(held)


def test_a_chip_that_cannot_launch_cooperatively_gets_no_exchange():
    chip = replace(CHIPS["A100"], cooperative=False)
    for shape in shapes("backward"):
        found = plan(shape, chip)
        assert found is not None
        assert found.variant in ("resident", "stepwise")
        assert found.exchange in ("none", "launch")


def test_a_variant_by_name_is_that_variant_or_nothing():
    chip = CHIPS["H200"]
    shape = Shape("forward", 4, 1024, 1, 16, 2)
    for variant in ("cooperative", "streaming", "stepwise"):
        assert plan(shape, chip, variant).variant == variant
    assert plan(shape, chip, "resident") is None
    with pytest.raises(ValueError, match="unknown variant 'coperative'; choose from independent"):
        plan(shape, chip, "coperative")


def test_only_the_batch_not_the_length_decides_the_blocks():
    # One compilation serves all batches of a class: few different blocks over many batches.
    chip = CHIPS["H200"]
    blocks = {
        (found.block_h, found.block_n, found.block_k, found.splits, found.variant)
        for batch in range(1, 300)
        if (found := plan(Shape("forward", 4, 512, 1, batch, 2), chip))
    }
    assert len(blocks) <= 6
    assert "seq_len" not in Shape.__dataclass_fields__


@pytest.mark.parametrize("name", ["H200", "A100", "MI300X", "interpreter"])
@pytest.mark.parametrize("variant", [None, "streaming", "stepwise"])
def test_batches_of_as_many_blocks_have_one_plan_which_is_each_ones_own(name, variant):
    chip = {**CHIPS, "interpreter": INTERPRETER}[name]
    for products, size in ((4, 100), (3, 512), (0, 40)):
        shape = Shape("forward", products, size, 1, 1, 2)
        searched = _plan.cache_info().misses
        for batch in range(1, 41):
            found = plan(replace(shape, batch=batch), chip, variant)
            assert found == _plan.__wrapped__(replace(shape, batch=batch), chip, variant)
        assert _plan.cache_info().misses - searched <= (5 if products else 10)


def test_a_plan_is_frozen_and_says_what_it_is():
    found = plan(Shape("forward", 4, 768, 1, 16, 2), CHIPS["H200"])
    with pytest.raises(FrozenInstanceError):
        found.block_h = 1
    text = str(found)
    for part in ("forward", found.variant, str(found.block_h), "us a step", "KB"):
        assert part in text
    assert isinstance(found, Plan)


def test_the_interpreter_gets_what_needs_no_programs_side_by_side():
    for kernel in ("forward", "backward"):
        shape = Shape(kernel, 4, 100, 2, 33, 4)
        assert plan(shape, INTERPRETER).variant == "resident"
        assert plan(shape, INTERPRETER, "stepwise").units == 2
        assert plan(shape, INTERPRETER, "cooperative") is None


def test_planning_imports_neither_triton_nor_torch():
    # From their folder, in the place of the package, which itself imports torch.
    code = (
        "import sys, types\n"
        "for name, path in (('triton_rnn', ''), ('triton_rnn.kernels', sys.argv[1])):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [path]\n"
        "from triton_rnn.kernels import chips, plan, planner\n"
        "shape = plan.Shape('forward', 4, 768, 1, 16, 2)\n"
        "found = planner.plan(shape, chips.CHIPS['A100'])\n"
        "print(found.variant, 'torch' in sys.modules, 'triton' in sys.modules)\n"
    )
    folder = os.path.dirname(sys.modules[Plan.__module__].__file__)
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["cooperative", "False", "False"]
