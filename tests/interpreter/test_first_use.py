"""The kernels are tried out before they are trusted, and out of use once they are wrong."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import triton_rnn
from triton_rnn import dispatch, health, known
from triton_rnn.backends.triton import check, launch, rules
from triton_rnn.cells import CELLS
from triton_rnn.kernels.chips import CHIPS
from triton_rnn.kernels.plan import Shape
from triton_rnn.kernels.planner import plan
from triton_rnn.own.regularized import regularized
from triton_rnn.request import Request

CPU = torch.device("cpu")


def request(name="lstm", dtype=torch.float32, **changes):
    cell = CELLS[name]
    output_size = 6 if cell.projected else 20
    made = Request(cell, CPU, dtype, 3, 2, 16, 20, output_size, 2, True, False, True)
    return made._replace(**changes)


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(check, "_tried", {})


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", list(CELLS))
def test_right_kernels_pass_far_below_the_limit(name, packed):
    assert check.compare(request(name, packed=packed)) < 1e-5


REGULARIZED = {
    "locked": regularized(CELLS["lstm"], 0.0, 0.0, (0.0, 0.0), locked=True, shows_c=False),
    "everything": regularized(CELLS["lstm"], 0.3, 0.2, (None, 0.4), locked=True, shows_c=True),
    "zoneout": regularized(CELLS["gru"], 0.0, 0.0, (None,), locked=False, shows_c=False),
    "clipped": regularized(CELLS["rnn_relu"], 0.3, 0.0, (0.2,), locked=True, shows_c=False),
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", REGULARIZED)
def test_cells_that_are_given_more_are_tried_out_with_it(name, packed):
    assert check.compare(request(cell=REGULARIZED[name], packed=packed)) < 1e-5


@pytest.mark.parametrize("name", ["lstm", "locked", "everything"])
def test_trying_out_leaves_the_users_random_numbers_alone(name):
    asked = request(cell=REGULARIZED[name]) if name in REGULARIZED else request(name)
    state = torch.get_rng_state()
    check.compare(asked)
    assert torch.equal(torch.get_rng_state(), state)


def test_trying_out_and_packed_batches_do_not_ask_for_the_default_device():
    # Nothing that is made on it has numbers.
    with torch.device("meta"):
        assert check.compare(request(packed=True)) < 1e-5
        assert check.compare(request(cell=REGULARIZED["everything"])) < 1e-5
        launch._packing.cache_clear()
        assert launch.packing_of([3, 2, 1], CPU).last.tolist() == [5, 4, 2]


def test_a_slip_in_a_kernel_is_over_the_limit_and_takes_the_backend_out_of_use(monkeypatch):
    right = launch.forward

    def wrong(request, output, *arguments):
        results = right(request, output, *arguments)
        output[0, 0] += 1
        return results

    monkeypatch.setattr(launch, "forward", wrong)
    with pytest.warns(RuntimeWarning, match="not used any more on cpu"):
        reason = check._try(request())
    assert "off by" in reason
    assert health.failure("triton", CPU) == reason
    with (
        triton_rnn.use_backend("triton"),
        pytest.raises(triton_rnn.BackendError, match="off by"),
    ):
        triton_rnn.LSTM(3, 4)(torch.randn(2, 2, 3))


def test_kernels_that_do_not_start_are_out_of_use_by_themselves(monkeypatch):
    def broken(*arguments):
        raise ValueError("no such instruction")

    monkeypatch.setattr(launch, "forward", broken)
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        assert "no such instruction" in check._try(request())
    assert health.failure("triton", CPU) is None


def test_a_kind_of_kernel_is_tried_once_whatever_the_length_and_batch(monkeypatch):
    tried = []
    monkeypatch.setattr(check, "_try", lambda short: tried.append(short))
    for seq_len, batch in ((3, 2), (100, 2), (7, 5)):
        asked = request(seq_len=seq_len, batch=batch)
        plans = {kernel: launch.plan_of(asked, kernel) for kernel in ("forward", "backward")}
        assert check.first_use(asked, plans) is None
    assert len(tried) == 1
    assert tried[0].seq_len == 3
    asked = request(needs_grad=False)
    check.first_use(asked, {"forward": launch.plan_of(asked, "forward")})
    assert len(tried) == 2


@pytest.mark.parametrize("fits", [True, False], ids=["same_plan", "other_plan"])
def test_no_more_sequences_are_tried_than_make_a_program_begin_twice(monkeypatch, fits):
    monkeypatch.setattr(launch, "chip_of", lambda device: CHIPS["H200"])
    tried, asked = [], request(batch=50_000)
    plans = {kernel: launch.plan_of(asked, kernel) for kernel in ("forward", "backward")}
    enough = max(2 * min(each.slots, 132) * each.block_n for each in plans.values())
    assert enough < 50_000, "a case of many turns"
    monkeypatch.setattr(check, "_try", lambda short: tried.append(short))
    if not fits:
        smaller = {k: launch.plan_of(request(batch=1), k) for k in plans}
        right = launch.plan_of
        monkeypatch.setattr(
            launch, "plan_of", lambda r, k: right(r, k) if r.batch == 50_000 else smaller[k]
        )
        assert smaller["forward"].block_n != plans["forward"].block_n
    assert check.first_use(asked, plans) is None
    assert [short.batch for short in tried] == [enough if fits else 50_000]


def test_no_memory_to_try_a_kernel_out_is_no_error_and_tried_again(monkeypatch):
    tried = []

    def lacking(short):
        tried.append(short)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(check, "compare", lacking)
    asked = request()
    plans = {kernel: launch.plan_of(asked, kernel) for kernel in ("forward", "backward")}
    for _ in range(2):
        assert check.first_use(asked, plans) is None
    assert len(tried) == 2
    monkeypatch.setattr(check, "compare", lambda short: 1.0)
    with pytest.warns(RuntimeWarning, match="off by"):
        assert "off by" in check.first_use(asked, plans)


def test_what_failed_before_a_capture_is_not_taken_during_it(monkeypatch):
    asked, tried = request(), []
    monkeypatch.setattr(check, "_try", lambda short: tried.append(short) or "wrong")
    plans = {kernel: launch.plan_of(asked, kernel) for kernel in ("forward", "backward")}
    monkeypatch.setattr(dispatch, "capturing", lambda device: True)
    assert check.first_use(asked, plans) is None
    assert not tried, "nothing can be tried meanwhile"
    monkeypatch.setattr(dispatch, "capturing", lambda device: False)
    assert check.first_use(asked, plans) == "wrong"
    monkeypatch.setattr(dispatch, "capturing", lambda device: True)
    assert check.first_use(asked, plans) == "wrong"


def test_what_32_bits_cannot_count_is_refused():
    assert "a step has" in check.obstacle(request(batch=2**28))
    # 4 x 23200^2 numbers of W_hh.
    large = request(hidden_size=23200, output_size=23200, batch=1)
    assert "W_hh has 2152960000 numbers" in check.obstacle(large)


def test_a_choice_during_a_capture_holds_for_its_call_alone(monkeypatch):
    """Nothing can be tried out meanwhile; the next call is to be."""
    asked, decided = request(), []
    monkeypatch.setattr(dispatch, "capturing", lambda device: True)
    monkeypatch.setattr(dispatch, "_choose", lambda *key: decided.append(key))
    assert dispatch.choose(asked, "auto").backend == "native"
    assert not decided
    call = SimpleNamespace(input=torch.empty(3, 2, 16))
    made = SimpleNamespace(request=asked, backend=dispatch.backend_module("native"))
    monkeypatch.setattr(known, "_known", None)
    known.remember(None, made, call)
    assert known._known is None
    monkeypatch.setattr(dispatch, "capturing", lambda device: False)
    dispatch.choose(asked, "auto")
    known.remember(None, made, call)
    assert decided and known._known is not None


def test_threads_that_come_first_together_have_one_word_for_errors(monkeypatch):
    """What a launch of one thread leaves there is what the calls of all look at."""
    monkeypatch.setattr(launch, "_errors", {})
    started, slowly = threading.Barrier(4), torch.zeros

    def zeros(*given, **named):
        time.sleep(0.05)
        return slowly(*given, **named)

    monkeypatch.setattr(torch, "zeros", zeros)

    def first():
        started.wait()
        return launch._error_words(CPU)

    with ThreadPoolExecutor(4) as pool:
        words = [each.result() for each in [pool.submit(first) for _ in range(4)]]
    assert len({each.data_ptr() for each in words}) == 1
    words[0][1] = 3
    assert list(launch._errors_of(CPU).seen) == [0, 3]
    words[0].zero_()


def test_auto_leaves_cpu_tensors_alone_under_the_interpreter():
    choice = dispatch.choose(request(), "auto")
    assert choice.backend != "triton"
    assert "interpreter is for tests" in choice.reasons["triton"]


def test_bfloat16_and_float64_are_refused_with_the_reason():
    assert "bfloat16" in dispatch.backend_module("triton").supports(request(dtype=torch.bfloat16))
    assert "float64" in dispatch.backend_module("triton").supports(request(dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "persistent"),
    [
        ({"hidden_size": 128, "output_size": 128, "needs_grad": False}, True),
        ({"hidden_size": 256, "output_size": 256, "needs_grad": False}, False),
        ({"hidden_size": 192, "output_size": 192}, False),
        ({"hidden_size": 128, "output_size": 128, "packed": True}, False),
    ],
)
def test_cudnns_rule_is_known(changes, persistent):
    assert rules.cudnn_is_persistent(request(**changes)) is persistent


def test_cudnns_best_algorithm_is_known():
    asked = request(
        dtype=torch.float16,
        hidden_size=768,
        output_size=768,
        input_size=768,
        batch=16,
        directions=1,
    )
    assert rules.cudnn_is_persistent(asked)
    assert not rules.cudnn_is_persistent(asked._replace(dtype=torch.bfloat16))
    assert not rules.cudnn_is_persistent(asked._replace(batch=17))
    assert not rules.cudnn_is_persistent(asked._replace(directions=2))


def test_auto_leaves_to_cudnn_what_is_expected_to_be_slower(monkeypatch):
    monkeypatch.setattr(
        launch,
        "plan_of",
        lambda r, kernel: plan(
            Shape(kernel, r.cell.gates, r.hidden_size, r.directions, r.batch, 2), CHIPS["H200"]
        ),
    )
    asked = request(
        dtype=torch.bfloat16,
        hidden_size=512,
        output_size=512,
        input_size=512,
        batch=16,
        seq_len=1024,
    )
    assert rules.slower_than_torch(asked) is None
    assert "cuDNN" in rules.slower_than_torch(asked._replace(batch=4096))


@pytest.fixture
def on_an_h200(monkeypatch):
    """Requests as a GPU is asked them: 16 sequences, hidden size 128, float16, 1024 steps."""
    monkeypatch.setattr(launch, "chip_of", lambda device: CHIPS["H200"])
    return request(
        dtype=torch.float16,
        hidden_size=128,
        output_size=128,
        input_size=128,
        batch=16,
        seq_len=1024,
    )


def test_of_few_steps_the_host_decides(on_an_h200):
    """cuDNN's persistent kernels are a launch or two, its others a launch and more a step."""
    long = on_an_h200._replace(needs_grad=False)
    short = long._replace(seq_len=8)
    assert rules.slower_than_torch(long) is None
    assert "cuDNN is expected to take 90 us, the kernels 140" in rules.slower_than_torch(short)
    assert rules.slower_than_torch(short._replace(packed=True)) is None
    assert rules.slower_than_torch(short._replace(dtype=torch.bfloat16)) is None


def test_what_cudnn_does_best_is_left_to_it(on_an_h200):
    large = on_an_h200._replace(hidden_size=768, output_size=768, input_size=768, directions=1)
    large = large._replace(cell=CELLS["lstm"])
    # Of many sequences the programs of a multiprocessor have several turns.
    many = large._replace(batch=128)
    assert "cuDNN" in rules.slower_than_torch(many._replace(needs_grad=False))
    assert rules.slower_than_torch(large._replace(needs_grad=False)) is None
    assert rules.slower_than_torch(large) is None
    assert rules.slower_than_torch(large._replace(directions=2)) is None


def test_w_hh_that_no_cache_keeps_costs_cudnn_more(on_an_h200):
    """Of an LSTM in float32, hidden size 1900 or 2000: 58 or 64 MB."""
    asked = on_an_h200._replace(cell=CELLS["lstm"], dtype=torch.float32, directions=1, batch=1)
    smaller, larger = (
        rules.cudnn_step_us(asked._replace(hidden_size=size, output_size=size), "forward")
        for size in (1900, 2000)
    )
    assert larger > smaller + 15
