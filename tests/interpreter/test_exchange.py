"""The programs of one launch that exchange states, side by side, against torch.nn in float64.

On a GPU these variants are launches of programs that all run at once. Here each program is a
thread, and a schedule decides which one goes on (`threads`).
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from compare import (
    EXCHANGES,
    IN_PIECES,
    assert_torchs_numbers,
    exact_and_ours,
    exchanging,
    hidden_size,
    input_and_hx,
    pack,
    run_on_kernels,
)
from threads import AsFarAsItCan, AtRandom, InTurn, Threads
from tolerances import LAYERS, TOLERANCES, assert_close, assert_same_bits

import triton_rnn
from triton_rnn.backends.triton import launch
from triton_rnn.kernels import pieces
from triton_rnn.kernels.chips import INTERPRETER
from triton_rnn.kernels.plan import Shape
from triton_rnn.kernels.planner import plan

SCHEDULES = {
    "in_turn": InTurn,
    "as_far_as_it_can": AsFarAsItCan,
    "the_last_first": lambda: AsFarAsItCan(backwards=True),
    "away_after_arriving": lambda: AsFarAsItCan(leave_after=("arrive", "store")),
    "at_random": lambda: AtRandom(1),
}


@pytest.fixture(params=EXCHANGES)
def exchange(request):
    return request.param


@pytest.fixture(autouse=True)
def waits_end(monkeypatch):
    """Far more looks than any order of events needs: a wait that is in vain ends as failed."""
    monkeypatch.setattr(launch, "POLLS", 1000)


def as_it_is(input):
    return input


# Directions, how many at once, form; programs that stream wait at the barrier of others, and those
# of a cluster as with flags.
LAUNCHES = {"1": (1, 1, "padded"), "2": (2, 2, "packed"), "2_in_turn": (2, 1, "padded")}


@pytest.mark.parametrize(
    ("exchange", "directions", "at_once", "form"),
    [
        pytest.param(exchange, *launch, id=f"{exchange}-{name}")
        for exchange in EXCHANGES
        for name, launch in LAUNCHES.items()
        if exchange not in ("streaming", "cluster") or name == "2"
    ],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_torchs(monkeypatch, exchange, kind, directions, at_once, form):
    exchanging(monkeypatch, *EXCHANGES[exchange], at_once=at_once)
    threads = Threads(monkeypatch, lambda: AtRandom(len(kind) + directions))
    exact, ours = exact_and_ours(kind, 5, 20, bidirectional=directions == 2)
    input, hx = input_and_hx(kind, ours, 4, 3, 5, batch=3)
    prepare = pack([3, 4, 1]) if form == "packed" else as_it_is
    assert_torchs_numbers(exact, ours, input, hx, prepare=prepare)
    # 20 units in blocks of 8.
    launches = directions // at_once
    assert threads.launches == [
        *[("recurrence_forward", 3 * at_once)] * launches,
        *[("recurrence_backward", 3 * at_once)] * launches,
    ]


# Programs that stream wait at the same barrier.
@pytest.mark.parametrize("exchange", ["flag", "barrier", "cluster"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_order_of_events_changes_a_bit(monkeypatch, exchange, schedule):
    exchanging(monkeypatch, *EXCHANGES[exchange])
    Threads(monkeypatch, SCHEDULES[schedule])
    exact, ours = exact_and_ours("lstm", 5, 20)
    input, hx = input_and_hx("lstm", ours, 4, 3, 5, batch=3)
    found = assert_torchs_numbers(exact, ours, input, hx)
    again = run_on_kernels(ours, input, hx)
    assert_same_bits(again, found)
    monkeypatch.undo()
    exchanging(monkeypatch, *EXCHANGES[exchange])
    Threads(monkeypatch, lambda: AtRandom(99))
    assert_same_bits(run_on_kernels(ours, input, hx), found)


@pytest.mark.parametrize(
    ("slots", "at_once", "form"), [(1, 2, "packed"), (2, 1, "padded")], ids=["1", "2"]
)
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_batch_blocks_in_turn_keep_their_counts_apart(
    monkeypatch, exchange, kind, slots, at_once, form
):
    """Three blocks of 16 sequences on one or two slots; packed, the last block has one step."""
    exchanging(monkeypatch, *EXCHANGES[exchange], slots=slots, at_once=at_once)
    threads = Threads(monkeypatch, lambda: AtRandom(2))
    exact, ours = exact_and_ours(kind, 5, 12 if exchange in IN_PIECES else 9, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 3, 35, 5, batch=35)
    prepare = pack([1] * 16 + [2] * 17 + [3] * 2) if form == "packed" else as_it_is
    assert_torchs_numbers(exact, ours, input, hx, prepare=prepare)
    assert {programs for _, programs in threads.launches} == {2 * slots * at_once}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm"])
def test_a_clusters_next_block_of_the_batch_waits_for_the_last_one(monkeypatch, kind, schedule):
    """Nobody may send for it what a program that is behind would take for the last one's."""
    exchanging(monkeypatch, *EXCHANGES["cluster"])
    Threads(monkeypatch, SCHEDULES[schedule])
    exact, ours = exact_and_ours(kind, 5, 20)
    input, hx = input_and_hx(kind, ours, 2, 35, 5, batch=35)
    assert_torchs_numbers(exact, ours, input, hx)


@pytest.mark.parametrize(
    ("block_k", "splits", "together"), [(16, 1, 1), (16, 1, 2), (32, 1, 8), (16, 4, 1), (16, 2, 2)]
)
def test_no_cut_of_the_inner_dimension_loses_a_part(
    monkeypatch, exchange, block_k, splits, together
):
    """Four programs; the last block of the product is part empty in some of these cuts."""
    cut = {"block_k": block_k, "splits": splits, "together": together}
    exchanging(monkeypatch, *EXCHANGES[exchange], **cut)
    threads = Threads(monkeypatch)
    exact, ours = exact_and_ours("gru", 5, 28 if exchange in IN_PIECES else 31)
    input, hx = input_and_hx("gru", ours, 3, 3, 5, batch=3)
    assert_torchs_numbers(exact, ours, input, hx)
    assert {programs for _, programs in threads.launches} == {4}


@pytest.mark.parametrize(
    ("kind", "form"), zip(LAYERS, itertools.cycle(["padded", "packed"]), strict=False)
)
@pytest.mark.parametrize("exchange", ["flag", "barrier"])
def test_float16_is_exchanged_as_float32_is(monkeypatch, exchange, kind, form):
    exchanging(monkeypatch, *EXCHANGES[exchange])
    Threads(monkeypatch, lambda: AtRandom(3))
    size = hidden_size(exchange, torch.float16)
    exact, ours = exact_and_ours(kind, 5, size, dtype=torch.float16, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)
    prepare = pack([2, 3, 1]) if form == "packed" else as_it_is
    assert_torchs_numbers(exact, ours, input, hx, prepare=prepare)


@pytest.mark.parametrize(
    ("kind", "dtype", "splits", "together", "streamed", "form"),
    [
        ("gru", torch.float32, 1, 2, 1, "packed"),
        ("lstm", torch.float32, 1, 1, 2, "padded"),
        ("lstm_proj", torch.float32, 2, 8, 1, "packed"),
        ("rnn_tanh", torch.float16, 1, 2, 2, "padded"),
    ],
)
def test_weights_that_are_read_again_at_every_step(
    monkeypatch, kind, dtype, splits, together, streamed, form
):
    """The last blocks of three, the last of which is part empty; backward of those of all gates."""
    cut = {"splits": splits, "together": together, "streamed": streamed}
    exchanging(monkeypatch, *EXCHANGES["flag"], block_h=16, **cut)
    Threads(monkeypatch, lambda: AtRandom(4))
    size = splits * 2 * (64 // dtype.itemsize) + 16 // dtype.itemsize
    exact, ours = exact_and_ours(kind, 5, size, dtype=dtype, bidirectional=kind == "gru")
    before = [weight.detach().clone() for weight in ours.parameters()]
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)
    prepare = pack([2, 3, 1]) if form == "packed" else as_it_is
    assert_torchs_numbers(exact, ours, input, hx, prepare=prepare)
    assert all(map(torch.equal, ours.parameters(), before)), "the backward's copy is its own"


@pytest.mark.parametrize(
    ("splits", "together", "sums"), [(1, 1, 1), (1, 2, 2), (1, 8, 4), (4, 1, 1), (2, 2, 2)]
)
def test_no_cut_of_the_inner_dimension_loses_half_a_word(monkeypatch, splits, together, sums):
    cut = {"splits": splits, "together": together, "sums": sums}
    exchanging(monkeypatch, *EXCHANGES["flag"], block_h=16, **cut)
    Threads(monkeypatch)
    exact, ours = exact_and_ours("gru", 5, 56, dtype=torch.float16)
    input, hx = input_and_hx("gru", ours, 3, 3, 5, batch=3)
    assert_torchs_numbers(exact, ours, input, hx)


def test_pieces_are_read_of_what_begins_at_an_odd_place(monkeypatch):
    """An initial state and weights; from such an address a GPU refuses to read 16 bytes at once."""
    exchanging(monkeypatch, *EXCHANGES["flag"])
    Threads(monkeypatch)
    exact, ours = exact_and_ours("gru", 5, 24, dtype=torch.float16)
    input, hx = input_and_hx("gru", ours, 3, 3, 5, batch=3)
    odd = at_an_odd_place(hx)
    ours.weight_hh_l0 = torch.nn.Parameter(at_an_odd_place(ours.weight_hh_l0.detach()))
    addresses = []
    launched = launch._launch_all

    def watched(ready, request, tensors, *args):
        # gates, w_hh and vectors of two directions, h_0
        addresses.extend(tensors[place].data_ptr() for place in (1, 5))
        return launched(ready, request, tensors, *args)

    monkeypatch.setattr(launch, "_launch_all", watched)
    with triton_rnn.use_backend("triton"), torch.no_grad():
        actual = ours(input, odd)
    for mine, torchs in zip(actual, exact(input.double(), odd.double()), strict=True):
        assert_close(mine.double(), torchs, tolerance=TOLERANCES[torch.float16])
    assert addresses and not any(address % 16 for address in addresses)


def at_an_odd_place(tensor):
    odd = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)
    assert odd.data_ptr() % 4 == 2
    return odd


@triton.jit
def look(words_ptr, found_ptr, error_ptr, polls, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    place = tl.arange(0, SIZE)[:, None, None]
    ptrs = (words_ptr + 16 * place).to(tl.pointer_type(DTYPE))
    looks = (polls + 0 * place,)
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    pieces.load_when_written((ptrs,), looks, 1 + 0 * place, error_ptr, 1, 1, False, BITS, False, 0)
    tl.store(found_ptr, tl.load(error_ptr))


@pytest.mark.parametrize("bits", [16, 32])
def test_a_word_is_unwritten_if_a_number_in_it_is_and_only_then(bits):
    """The pattern beside every other half, its neighbours among the integers, and many others."""
    pattern = -1
    near = torch.tensor([0, 1, -2, -3, 0x7FFE, 0x7FFF, -0x8000, -0x7FFF, 0x00FF, -256])
    halves = torch.cat([near, torch.randint(-0x8000, -1, (6,), generator=seeded())])
    dtype = tl.float16 if bits == 16 else tl.float32

    def is_seen(low, high, polls=2):
        words = torch.zeros(16, dtype=torch.int32)
        words[2] = torch.tensor([low, high]).to(torch.int16).view(torch.int32).item()
        error, found = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        look[(1,)](words, found, error, polls, 1, dtype)
        return bool(found.item())

    for half in halves.tolist():
        assert is_seen(half, pattern) == (bits == 16), half
        assert is_seen(pattern, half) == (bits == 16), half
        assert not is_seen(half, half), half
    assert is_seen(pattern, pattern)
    assert not is_seen(pattern, pattern, polls=0), "what others do not write is not waited for"


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", LAYERS)
def test_one_step_and_one_unit_need_no_others(monkeypatch, exchange, kind):
    exchanging(monkeypatch, *EXCHANGES[exchange])
    Threads(monkeypatch)
    size = hidden_size(exchange)
    # In pieces a row of one piece of 16 bytes is the least.
    for seq_len, units in (
        (1, size),
        (3, 4 if exchange in IN_PIECES else 3),
        (3, 4 if exchange in IN_PIECES else 1),
    ):
        if kind == "lstm_proj" and units == 1:
            continue
        exact, ours = exact_and_ours(kind, 5, units)
        input, hx = input_and_hx(kind, ours, seq_len, 1, 5, batch=1)
        assert_torchs_numbers(exact, ours, input, hx)


def test_only_launches_that_wait_are_cooperative():
    """A cooperative launch is refused if the programs do not all fit: needless ones must not be."""
    for variant in ("resident", "stepwise"):
        planned = plan(Shape("forward", 3, 20, 1, 3, 4), INTERPRETER, variant)
        assert "launch_cooperative_grid" not in launch.recurrence_options(planned)


def test_every_launch_that_waits_is_cooperative(monkeypatch, exchange):
    exchanging(monkeypatch, *EXCHANGES[exchange])
    options = []
    made = launch.recurrence_options
    monkeypatch.setattr(
        launch, "recurrence_options", lambda plan: options.append(made(plan)) or options[-1]
    )
    Threads(monkeypatch)
    _, ours = exact_and_ours("gru", 5, 20)
    input, hx = input_and_hx("gru", ours, 2, 3, 5, batch=3)
    run_on_kernels(ours, input, hx)
    # A cluster is on the chip as a whole, or not yet.
    cooperative = [option.get("launch_cooperative_grid", False) for option in options]
    assert cooperative == [exchange != "cluster"] * 2
