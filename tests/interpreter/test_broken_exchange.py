"""That a broken exchange is seen: each way to break it gives wrong numbers or a failed wait.

Without these, the tests of `test_exchange` might pass for programs that happen to run in an order
in which nobody has to wait.
"""

import pytest
import torch
import triton.language as tl
from compare import (
    EXCHANGES,
    assert_as_expected,
    each_state,
    exact_and_ours,
    exchanging,
    input_and_hx,
    run_on_kernels,
)
from threads import AsFarAsItCan, AtRandom, Threads
from tolerances import run
from triton.runtime import interpreter

from triton_rnn.backends.triton import launch
from triton_rnn.kernels import backward, cluster, exchange, forward, pieces, product, steps

# Where each kernel's part in the exchange is called.
KERNELS = {
    "forward": (forward, product, pieces),
    "backward": (backward, product, cluster, pieces),
}


def never(*args):
    pass


def one_too_few(counter_ptr, target, polls):
    return exchange.wait_for_arrivals(counter_ptr, target - 1, polls)


def not_at_all(counter_ptr, target, polls):
    return True


class StoresAfterArriving:
    """What is stored between a wait and the arrival is written after it."""

    def __init__(self):
        self.stores = {}

    def wait(self, *args):
        self.stores[running_program()] = []
        return exchange.wait_for_arrivals(*args)

    def store(self, *args):
        late = self.stores.get(running_program())
        if late is None:
            steps.store_blocks(*args)
        else:
            late.append(args)

    def arrive(self, counter_ptr):
        exchange.arrive(counter_ptr)
        for store in self.stores.pop(running_program()):
            steps.store_blocks(*store)


def running_program():
    return interpreter.interpreter_builder.grid_idx


def load_with(change):
    """`load_when_written` that waits for other words."""
    original = pieces.load_when_written

    def load_when_written(*args):
        named = dict(zip(original.arg_names, args, strict=True))
        named["polls"] = type(named["polls"])([change(polls) for polls in named["polls"]])
        return original(**named)

    return load_when_written


def wait_with(change):
    """Both kernels of a cluster, waiting for other numbers."""
    original = cluster.sum_when_sent

    def sum_when_sent(places, polls, *args):
        return original(places, change(polls), *args)

    return {"load_when_written": load_with(change), "sum_when_sent": sum_when_sent}


def none_of_them(polls):
    return polls * 0


def half_of_them(polls):
    """Of every four threads of a row the first two: a part of it is another program's too."""
    if len(polls.shape) == 2:
        # Of sums of what was sent: by sequences and units.
        return tl.where(tl.arange(0, polls.shape[1])[None, :] % 4 < 2, polls, 0)
    quarter = tl.arange(0, 4)[None, None, :]
    return tl.where(quarter < 2, polls, 0)


def half(buffer):
    """`_unwritten` of the first half."""
    rows = buffer[: buffer.size(0) // 2]
    rows.view(torch.int32).fill_(-1)


def is_wrong(monkeypatch, expected, ours, input, hx):
    """Whether any of several orders of events gives other numbers than torch's or a failed wait."""
    for schedule in (
        AsFarAsItCan,
        lambda: AsFarAsItCan(backwards=True),
        lambda: AsFarAsItCan(leave_after=("arrive",)),
        lambda: AtRandom(1),
        lambda: AtRandom(2),
    ):
        with monkeypatch.context() as patch:
            Threads(patch, schedule)
            actual = run_on_kernels(ours, input, hx)
            words = launch._error_words(torch.device("cpu"))
            failed = bool(words.any())
            words.zero_()
        try:
            assert_as_expected(actual, expected, input.dtype)
        except AssertionError:
            return True
        if failed:
            return True
    return False


def late_stores():
    late = StoresAfterArriving()
    return {"store_blocks": late.store, "arrive": late.arrive, "wait_for_arrivals": late.wait}


BREAKAGES = {
    ("barrier", "nothing"): dict,
    ("barrier", "the arrival before the stores"): late_stores,
    ("barrier", "no arrival"): lambda: {"arrive": never},
    ("barrier", "a wait for one too few"): lambda: {"wait_for_arrivals": one_too_few},
    ("barrier", "no wait"): lambda: {"wait_for_arrivals": not_at_all},
    ("streaming", "nothing"): dict,
    ("streaming", "the arrival before the stores"): late_stores,
    ("streaming", "a wait for one too few"): lambda: {"wait_for_arrivals": one_too_few},
    ("flag", "nothing"): dict,
    ("flag", "no wait"): lambda: {"load_when_written": load_with(none_of_them)},
    ("flag", "a wait for half a block"): lambda: {"load_when_written": load_with(half_of_them)},
    ("flag", "no store"): lambda: {"send": never},
    ("cluster", "nothing"): dict,
    ("cluster", "no wait"): lambda: wait_with(none_of_them),
    ("cluster", "a wait for half a block"): lambda: wait_with(half_of_them),
    ("cluster", "no store"): lambda: {"send_to_all": never, "send_parts": never},
    ("cluster", "what was read stays"): lambda: {"unwrite": never},
}


def break_kernel(monkeypatch, kernel, breakage):
    """Replace functions of the exchange where one kernel calls them."""
    places = [
        (module, name) for name in breakage for module in KERNELS[kernel] if hasattr(module, name)
    ]
    assert places or not breakage, f"{set(breakage)} are gone from the kernels: what is it now?"
    for module, name in places:
        monkeypatch.setattr(module, name, breakage[name])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("way", "breakage"), [pytest.param(*key, id="-".join(key)) for key in BREAKAGES]
)
@pytest.mark.usefixtures("poisoned")
def test_a_broken_exchange_is_seen(monkeypatch, way, breakage, kernel):
    """Memory that is not written yet is NaN. With nothing broken, the control, all is right."""
    monkeypatch.setattr(launch, "POLLS", 200)
    exchanging(monkeypatch, *EXCHANGES[way])
    exact, ours = exact_and_ours("gru", 5, 20)
    input, hx = input_and_hx("gru", ours, 4, 3, 5, batch=3)
    expected = run(exact, input.double(), each_state(torch.Tensor.double, hx))
    break_kernel(monkeypatch, kernel, BREAKAGES[way, breakage]())
    assert is_wrong(monkeypatch, expected, ours, input, hx) == (breakage != "nothing")


@pytest.mark.parametrize("fill", [never, half], ids=["no fill", "half a fill"])
@pytest.mark.usefixtures("poisoned")
def test_a_missing_fill_is_seen(monkeypatch, fill):
    monkeypatch.setattr(launch, "POLLS", 200)
    exchanging(monkeypatch, *EXCHANGES["flag"])
    exact, ours = exact_and_ours("gru", 5, 20)
    input, hx = input_and_hx("gru", ours, 4, 3, 5, batch=3)
    expected = run(exact, input.double(), each_state(torch.Tensor.double, hx))
    monkeypatch.setattr(launch, "_unwritten", fill)
    assert is_wrong(monkeypatch, expected, ours, input, hx)
