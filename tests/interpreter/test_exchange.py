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
    assert_torchs_numbers,
    exact_and_ours,
    exchanging,
    input_and_hx,
    pack,
    run_on_kernels,
)
from threads import AsFarAsItCan, AtRandom, InTurn, Threads
from tolerances import LAYERS, TOLERANCES, assert_close, assert_same_bits

import triton_rnn
from triton_rnn.backends.triton import launch
from triton_rnn.kernels import exchange as exchange_module
from triton_rnn.kernels.plan import INTERPRETER, Shape, plan

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


@pytest.mark.parametrize(
    ("directions", "at_once", "form"),
    [(1, 1, "padded"), (2, 2, "packed"), (2, 1, "padded")],
    ids=["1", "2", "2_in_turn"],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_torchs(monkeypatch, exchange, kind, directions, at_once, form):
    exchanging(monkeypatch, *EXCHANGES[exchange], at_once=at_once)
    threads = Threads(monkeypatch, lambda: AtRandom(len(kind) + directions))
    exact, ours = exact_and_ours(kind, 5, 19, bidirectional=directions == 2)
    input, hx = input_and_hx(kind, ours, 4, 3, 5, batch=3)
    prepare = pack([3, 4, 1]) if form == "packed" else as_it_is
    assert_torchs_numbers(exact, ours, input, hx, prepare=prepare)
    # 19 units in blocks of 8.
    launches = directions // at_once
    assert threads.launches == [
        *[("recurrence_forward", 3 * at_once)] * launches,
        *[("recurrence_backward", 3 * at_once)] * launches,
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_order_of_events_changes_a_bit(monkeypatch, exchange, schedule):
    exchanging(monkeypatch, *EXCHANGES[exchange])
    Threads(monkeypatch, SCHEDULES[schedule])
    exact, ours = exact_and_ours("lstm", 5, 19)
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
    exact, ours = exact_and_ours(kind, 5, 9, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 3, 35, 5, batch=35)
    prepare = pack([1] * 16 + [2] * 17 + [3] * 2) if form == "packed" else as_it_is
    assert_torchs_numbers(exact, ours, input, hx, prepare=prepare)
    assert {programs for _, programs in threads.launches} == {2 * slots * at_once}


@pytest.mark.parametrize(
    ("block_k", "splits", "together"), [(16, 1, 1), (16, 1, 2), (32, 1, 8), (16, 4, 1), (16, 2, 2)]
)
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru"])
def test_no_cut_of_the_inner_dimension_loses_a_part(
    monkeypatch, exchange, kind, block_k, splits, together
):
    """Four programs; the last block of the product is part empty in some of these cuts."""
    cut = {"block_k": block_k, "splits": splits, "together": together}
    exchanging(monkeypatch, *EXCHANGES[exchange], **cut)
    threads = Threads(monkeypatch)
    exact, ours = exact_and_ours(kind, 5, 31)
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)
    assert_torchs_numbers(exact, ours, input, hx)
    assert {programs for _, programs in threads.launches} == {4}


# Sixteen bits have a pattern of their own for what is not written yet. They are looked at two at a
# time where a row is of whole pairs and a block of 32 or more.
SINGLE, IN_PAIRS = (19, 16, False), (22, 32, True)


@pytest.mark.parametrize(
    ("exchange", "cut"),
    [("flag", SINGLE), ("flag", IN_PAIRS), ("barrier", SINGLE), ("streaming", SINGLE)],
    ids=["flag", "flag_pairs", "barrier", "streaming"],
)
@pytest.mark.parametrize(
    ("kind", "form"), zip(LAYERS, itertools.cycle(["padded", "packed"]), strict=False)
)
def test_float16_is_exchanged_as_float32_is(monkeypatch, exchange, kind, form, cut):
    hidden_size, block_k, pairs = cut
    exchanging(monkeypatch, *EXCHANGES[exchange], block_k=block_k, pairs=pairs)
    Threads(monkeypatch, lambda: AtRandom(3))
    exact, ours = exact_and_ours(kind, 5, hidden_size, dtype=torch.float16, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)
    prepare = pack([2, 3, 1]) if form == "packed" else as_it_is
    assert_torchs_numbers(exact, ours, input, hx, prepare=prepare)


@pytest.mark.parametrize(
    ("block_k", "splits", "together"), [(32, 1, 1), (32, 1, 2), (64, 1, 8), (32, 4, 1), (32, 2, 2)]
)
def test_no_cut_of_the_inner_dimension_loses_a_pair(monkeypatch, block_k, splits, together):
    cut = {"block_k": block_k, "splits": splits, "together": together}
    exchanging(monkeypatch, *EXCHANGES["flag"], pairs=True, **cut)
    Threads(monkeypatch)
    exact, ours = exact_and_ours("gru", 5, 54, dtype=torch.float16)
    input, hx = input_and_hx("gru", ours, 3, 3, 5, batch=3)
    assert_torchs_numbers(exact, ours, input, hx)


def test_pairs_are_read_of_an_initial_state_that_begins_at_an_odd_place(monkeypatch):
    """Half a pair: such an address a GPU refuses to read 32 bits from."""
    hidden_size, block_k, pairs = IN_PAIRS
    exchanging(monkeypatch, *EXCHANGES["flag"], block_k=block_k, pairs=pairs)
    Threads(monkeypatch)
    exact, ours = exact_and_ours("gru", 5, hidden_size, dtype=torch.float16)
    input, hx = input_and_hx("gru", ours, 3, 3, 5, batch=3)
    odd = torch.cat([hx.new_zeros(1), hx.flatten()])[1:].view_as(hx)
    assert odd.data_ptr() % 4 == 2
    addresses = []
    launched = launch._launch_all

    def watched(ready, request, tensors, *args):
        # gates, w_hh and vectors of two directions, h_0
        addresses.append(tensors[5].data_ptr())
        return launched(ready, request, tensors, *args)

    monkeypatch.setattr(launch, "_launch_all", watched)
    with triton_rnn.use_backend("triton"), torch.no_grad():
        actual = ours(input, odd)
    for mine, torchs in zip(actual, exact(input.double(), odd.double()), strict=True):
        assert_close(mine.double(), torchs, tolerance=TOLERANCES[torch.float16])
    assert addresses[0] % 4 == 0


@triton.jit
def look(pairs_ptr, found_ptr, written, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    found = exchange_module._unwritten(tl.load(pairs_ptr + place), written != 0, True)
    tl.store(found_ptr + place, (found != 0).to(tl.int32))


def test_a_pair_is_unwritten_if_either_half_is_and_only_then():
    """The pattern beside every other half, its neighbours among the integers, and many others."""
    pattern = -2
    near = torch.tensor([-1, 0, 1, pattern, -3, 0x7FFE, 0x7FFF, -0x8000, -0x7FFF, 0x00FE, -258])
    halves = torch.cat([near, torch.randint(-0x8000, 0x8000, (1013,), generator=seeded())])
    low = torch.cat([halves, torch.full_like(halves, pattern), *[halves.roll(i) for i in range(6)]])
    high = torch.cat([torch.full_like(halves, pattern), halves, *[halves] * 6])
    pairs = torch.stack([low, high], 1).to(torch.int16).view(torch.int32).flatten()
    for written in (1, 0):
        found = torch.full_like(pairs, -1)
        look[(1,)](pairs, found, written, pairs.numel())
        expected = ((low == pattern) | (high == pattern)) & bool(written)
        assert torch.equal(found.bool(), expected)


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", LAYERS)
def test_one_step_and_one_unit_need_no_others(monkeypatch, exchange, kind):
    exchanging(monkeypatch, *EXCHANGES[exchange])
    Threads(monkeypatch)
    for seq_len, hidden_size in ((1, 19), (3, 3), (3, 1)):
        if kind == "lstm_proj" and hidden_size == 1:
            continue
        exact, ours = exact_and_ours(kind, 5, hidden_size)
        input, hx = input_and_hx(kind, ours, seq_len, 1, 5, batch=1)
        assert_torchs_numbers(exact, ours, input, hx)


def test_only_launches_that_wait_are_cooperative():
    """A cooperative launch is refused if the programs do not all fit: needless ones must not be."""
    for variant in ("resident", "stepwise"):
        planned = plan(Shape("forward", 3, 19, 1, 3, 4), INTERPRETER, variant)
        assert "launch_cooperative_grid" not in launch.recurrence_options(planned)


def test_every_launch_that_waits_is_cooperative(monkeypatch, exchange):
    exchanging(monkeypatch, *EXCHANGES[exchange])
    options = []
    made = launch.recurrence_options
    monkeypatch.setattr(
        launch, "recurrence_options", lambda plan: options.append(made(plan)) or options[-1]
    )
    Threads(monkeypatch)
    _, ours = exact_and_ours("gru", 5, 19)
    input, hx = input_and_hx("gru", ours, 2, 3, 5, batch=3)
    run_on_kernels(ours, input, hx)
    assert [option["launch_cooperative_grid"] for option in options] == [True, True]
