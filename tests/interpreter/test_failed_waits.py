"""Programs that wait in vain: every launch ends, and no wrong number is a plausible one."""

import warnings

import pytest
import torch
from compare import (
    EXCHANGES,
    assert_torchs_numbers,
    each_state,
    exact_and_ours,
    exchanging,
    input_and_hx,
    run_on_kernels,
)
from threads import AsFarAsItCan, InTurn, Threads
from tolerances import assert_close, flat_outputs, random, run

import triton_rnn
from triton_rnn import health
from triton_rnn.backends.triton import launch

CPU = torch.device("cpu")
FAILED = "waited in vain for the others: {} recurrence at step {}"
ANY = r"\d+"


@pytest.fixture(params=["flag", "barrier"])
def exchange(request, monkeypatch):
    """Three programs per direction, and few looks per wait; those that stream wait at a barrier."""
    monkeypatch.setattr(launch, "POLLS", 100)
    exchanging(monkeypatch, *EXCHANGES[request.param])
    return request.param


def raised(match):
    """The failed wait is raised by the next call, and the device is warned of once."""
    with (
        pytest.warns(RuntimeWarning, match="'triton' is not used any more on cpu") as warned,
        pytest.raises(RuntimeError, match=match),
    ):
        launch.raise_failed_wait(CPU)
    assert len(warned) == 1


def right_or_nan(actual, expected):
    """The elements that are no NaN are right; returns where they are NaN."""
    lost = actual.isnan()
    if not lost.all():
        # The tolerance of float32, of numbers in float64.
        assert_close(actual.double()[~lost], expected[~lost], tolerance=2e-5)
    return lost


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("kind", ["rnn_relu", "gru", "lstm"])
@pytest.mark.usefixtures("poisoned")
def test_what_depends_on_a_program_that_never_runs_is_nan(monkeypatch, exchange, kind, missing):
    threads = Threads(monkeypatch)
    threads.withheld["recurrence_forward"] = (missing,)
    exact, ours = exact_and_ours(kind, 5, 20)
    input, hx = input_and_hx(kind, ours, 4, 3, 5, batch=3)
    expected = flat_outputs(exact, exact(input.double(), each_state(torch.Tensor.double, hx)))
    with triton_rnn.use_backend("triton"):
        actual = flat_outputs(ours, ours(input, hx))
    lost = right_or_nan(actual["output"], expected["output"])
    assert lost[1:].all(), "a number of a step that waited in vain"
    others = torch.ones(20, dtype=torch.bool)
    others[8 * missing : 8 * missing + 8] = False
    assert torch.equal(lost[0].any(0), ~others), "the first step needs nobody else"
    assert all(actual[name].isnan().all() for name in ("h_n", "c_n") if name in actual)
    raised(FAILED.format("forward", ANY))


@pytest.fixture
def plausible(monkeypatch):
    """Unwritten memory holds numbers that nobody would take for wrong."""

    def new_empty(self, *sizes, **options):
        return self.new_full(torch.empty(*sizes).shape, 0.25, **options)

    def empty_like(input, **options):
        return torch.full_like(input, 0.25, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)


@pytest.mark.parametrize("kind", ["rnn_relu", "gru", "lstm"])
@pytest.mark.usefixtures("plausible")
def test_a_program_that_gave_up_is_not_counted_for_the_one_that_is_missing(
    monkeypatch, exchange, kind
):
    """Else who waits a little longer goes on, with what the memory held before the launch."""
    threads = Threads(monkeypatch)
    threads.withheld["recurrence_forward"] = (2,)
    _, ours = exact_and_ours(kind, 5, 20)
    input, hx = input_and_hx(kind, ours, 4, 3, 5, batch=3)
    with triton_rnn.use_backend("triton"):
        output = ours(input, hx)[0]
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError) as error:
        launch.raise_failed_wait(CPU)
    assert output[1:, :, :16].isnan().all()
    assert FAILED.format("forward", 1) in str(error.value), "step 1 is the first that waits"


@pytest.mark.parametrize("kind", ["rnn_relu", "gru", "lstm"])
@pytest.mark.usefixtures("plausible")
def test_no_final_state_is_plausible_if_the_last_step_waited_in_vain(monkeypatch, exchange, kind):
    """Of the programs that did run: what they waited for was whatever the memory held."""
    threads = Threads(monkeypatch)
    threads.withheld["recurrence_forward"] = (2,)
    _, ours = exact_and_ours(kind, 5, 20)
    input, hx = input_and_hx(kind, ours, 2, 3, 5, batch=3)
    with triton_rnn.use_backend("triton"):
        states = flat_outputs(ours, ours(input, hx))
    raised(FAILED.format("forward", ANY))
    assert states["output"][1, :, :16].isnan().all()
    for name in ("h_n", "c_n"):
        assert name not in states or states[name][..., :16].isnan().all(), name


@pytest.mark.parametrize("kind", ["rnn_relu", "gru", "lstm"])
@pytest.mark.usefixtures("plausible")
def test_no_initial_gradient_is_plausible_if_the_last_step_waited_in_vain(
    monkeypatch, exchange, kind
):
    threads = Threads(monkeypatch)
    threads.withheld["recurrence_backward"] = (2,)
    _, ours = exact_and_ours(kind, 5, 20)
    input, hx = input_and_hx(kind, ours, 1, 3, 5, batch=3)
    results = run_on_kernels(ours, input, hx)
    raised(FAILED.format("backward", ANY))
    # c_0's gradient of a single step is complete before anything is waited for.
    assert results["grad of h_0"][..., :16].isnan().all()


@pytest.mark.parametrize("kind", ["rnn_relu", "gru", "lstm"])
@pytest.mark.usefixtures("poisoned")
def test_gradients_that_depend_on_a_program_that_never_runs_are_nan(monkeypatch, exchange, kind):
    threads = Threads(monkeypatch)
    threads.withheld["recurrence_backward"] = (1,)
    _, ours = exact_and_ours(kind, 5, 20)
    input, hx = input_and_hx(kind, ours, 4, 3, 5, batch=3)
    results = run_on_kernels(ours, input, hx)
    assert results["output"].isfinite().all()
    for name, value in results.items():
        if name.startswith("grad of") and name != "grad of c_0":
            # The first step of the backward, t = 3, has the input's part of three programs.
            assert value.isnan().any(), name
    assert results["grad of input"].isnan().all()
    assert results["grad of h_0"].isnan().all()
    raised(FAILED.format("backward", ANY))


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.usefixtures("poisoned")
def test_a_program_that_comes_when_the_others_are_gone_adds_no_wrong_number(
    monkeypatch, exchange, kind, late
):
    """As happens when the programs of a launch do not all fit the device."""
    threads = Threads(monkeypatch)
    threads.late["recurrence_forward"] = (late,)
    exact, ours = exact_and_ours(kind, 5, 20)
    input, hx = input_and_hx(kind, ours, 4, 3, 5, batch=3)
    expected = flat_outputs(exact, exact(input.double(), each_state(torch.Tensor.double, hx)))
    with triton_rnn.use_backend("triton"):
        actual = flat_outputs(ours, ours(input, hx))
    lost = right_or_nan(actual["output"], expected["output"])
    assert lost[2:].all() and actual["h_n"].isnan().all()
    raised(FAILED.format("forward", ANY))


@pytest.mark.usefixtures("poisoned")
def test_the_other_direction_does_not_suffer(monkeypatch, exchange):
    threads = Threads(monkeypatch)
    # Programs 3, 4, 5 are the second direction's.
    threads.withheld["recurrence_forward"] = (4,)
    exact, ours = exact_and_ours("gru", 5, 20, bidirectional=True)
    input, hx = input_and_hx("gru", ours, 4, 3, 5, batch=3)
    expected = exact(input.double(), hx.double())[0]
    with triton_rnn.use_backend("triton"):
        output = ours(input, hx)[0]
    lost = right_or_nan(output, expected)
    assert not lost[..., :20].any()
    assert lost[:3, :, 20:].all()
    raised(FAILED.format("forward", ANY))


def test_a_failed_wait_is_raised_by_the_next_call_and_remembered(monkeypatch, exchange):
    threads = Threads(monkeypatch)
    threads.withheld["recurrence_forward"] = (0,)
    exact, ours = exact_and_ours("gru", 5, 20)
    input, hx = input_and_hx("gru", ours, 3, 3, 5, batch=3)
    with torch.no_grad(), triton_rnn.use_backend("triton"):
        ours(input, hx)
        assert health.failure("triton", CPU) is None
        threads.withheld.clear()
        with (
            pytest.warns(RuntimeWarning, match="'triton' is not used any more on cpu") as warned,
            pytest.raises(RuntimeError, match=FAILED.format("forward", ANY)),
        ):
            ours(input, hx)
    assert len(warned) == 1
    assert "waited in vain" in health.failure("triton", CPU)
    # What is left works, and nothing of the failure comes back.
    launch.raise_failed_wait(CPU)
    for backend in ("auto", "torchscript", "aten", "reference"):
        with triton_rnn.use_backend(backend):
            actual = run(ours, input, hx)
        expected = run(exact, input.double(), hx.double())
        # The tolerance of float32, of numbers in float64.
        assert_close(actual["output"].double(), expected["output"], tolerance=2e-5)


def test_a_second_failure_is_raised_without_a_second_warning():
    launch._error_words(CPU)[1] = 3
    raised(FAILED.format("backward", 2))
    launch._error_words(CPU)[0] = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=FAILED.format("forward", 7)):
            launch.raise_failed_wait(CPU)


def test_both_kernels_are_named_if_both_failed():
    launch._error_words(CPU)[:] = torch.tensor([1, 5])
    raised("forward recurrence at step 0, backward recurrence at step 4")


def sentinel(tensor):
    """The bit pattern that means: not written yet."""
    bits = tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32)
    bits.fill_(-1)
    assert tensor.isnan().all()


@pytest.mark.parametrize(
    ("dtype", "schedule"),
    [(torch.float32, InTurn), (torch.float16, AsFarAsItCan)],
    ids=["float32", "float16"],
)
@pytest.mark.parametrize("exchange", ["flag", "barrier", "cluster"], indirect=True)
@pytest.mark.parametrize("where", ["h_0", "bias_ih_l0", "input", "grad of output"])
@pytest.mark.parametrize("kind", ["rnn_relu", "gru"])
def test_a_callers_nan_that_looks_like_unwritten_memory_is_just_a_nan(
    monkeypatch, exchange, kind, where, dtype, schedule
):
    """Of one sequence, one unit, or one step: nobody may wait for it, as no other number comes."""
    Threads(monkeypatch, schedule)
    exact, ours = exact_and_ours(kind, 5, 24, dtype=dtype)
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)

    def prepare_grad(grad):
        if where == "grad of output" and grad.dim() == 3 and grad.size(0) == 3:
            grad = grad.clone()
            if grad.dtype == torch.float64:
                grad[1, 0] = float("nan")
            else:
                sentinel(grad[1, 0])
        return grad

    if where == "h_0":
        sentinel(hx[0, 1])
    elif where == "input":
        sentinel(input[1, 0])
    elif where == "bias_ih_l0":
        with torch.no_grad():
            sentinel(ours.bias_ih_l0.detach()[3:4])
        exact.load_state_dict(ours.state_dict())
    views = {"prepare_grad": prepare_grad}
    expected = run(exact, input.double(), hx.double(), **views)
    actual = run_on_kernels(ours, input, hx, **views)
    assert launch._error_words(CPU).tolist() == [0, 0]
    for name, value in expected.items():
        found, lost = actual[name].isnan(), value.isnan()
        if kind == "rnn_relu" and where == "grad of output":
            # torch selects where the kernels multiply by 0: there NaN stays NaN.
            found = found & lost
        assert torch.equal(found, lost), f"NaN elsewhere in {name}"


@pytest.mark.parametrize("exchange", ["cluster"], indirect=True)
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.usefixtures("plausible")
def test_a_cluster_that_lacks_a_program_has_no_number_at_all(monkeypatch, exchange, kernel):
    """No device starts one, but should it: also the first step waits for everybody."""
    threads = Threads(monkeypatch)
    threads.withheld[f"recurrence_{kernel}"] = (2,)
    _, ours = exact_and_ours("lstm", 5, 20)
    input, hx = input_and_hx("lstm", ours, 3, 3, 5, batch=3)
    results = run_on_kernels(ours, input, hx)
    if kernel == "forward":
        assert results["output"][..., :16].isnan().all()
    else:
        assert results["output"].isfinite().all()
        assert results["grad of h_0"][..., :16].isnan().all()
    raised(FAILED.format(kernel, 0))


def test_waits_in_time_leave_no_trace(monkeypatch, exchange):
    Threads(monkeypatch)
    exact, ours = exact_and_ours("lstm", 5, 20)
    hx = (random(1, 3, 20, dtype=torch.float32), random(1, 3, 20, dtype=torch.float32))
    assert_torchs_numbers(exact, ours, random(3, 3, 5, dtype=torch.float32), hx)
    launch.raise_failed_wait(CPU)


def test_a_failure_is_told_where_the_first_call_was_in_inference_mode(monkeypatch):
    """Tensors that were made there cannot be written to elsewhere."""
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_errors", {})
        with torch.inference_mode():
            launch._error_words(CPU)[0] = 4
        raised(FAILED.format("forward", 3))
        launch.raise_failed_wait(CPU)
