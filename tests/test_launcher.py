"""Launches after the first: what they start, and with what, against Triton's own way.

With a driver that starts nothing, and nothing compiled: a kernel here is the key that Triton finds
it by. Every launch is made both ways, and both must come to the same kernel and arguments.
"""

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")

from own_cells import MinimalGatedUnit, PeepholeLSTM, Uneven  # noqa: E402

import triton_rnn  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.no_device import no_device  # noqa: E402
from triton_rnn import functional  # noqa: E402
from triton_rnn.backends import native  # noqa: E402
from triton_rnn.backends import triton as backend  # noqa: E402
from triton_rnn.backends.triton import launch, launcher  # noqa: E402
from triton_rnn.backends.triton.extended import ExtendedLayer  # noqa: E402
from triton_rnn.cells import CELLS, OwnCell, RegularizedCell  # noqa: E402
from triton_rnn.extras import Extras  # noqa: E402
from triton_rnn.own.regularized import regularized  # noqa: E402
from triton_rnn.request import Request  # noqa: E402


@pytest.fixture
def launches():
    """What was launched: see `Told` of bench/no_device.py."""
    made = []
    with no_device(tell=lambda *launch: made.append(launch)):
        yield made


@pytest.fixture
def both_ways(monkeypatch, launches):
    """Every launch made twice, by the launcher and by Triton; those that the first made itself."""
    short = []
    right = launcher.Launcher.__call__

    def call(self, device, programs, tensors, others):
        right(self, device, programs, tensors, others)
        found = launches.pop()
        self._kernel[(programs,)](*tensors, *others, **self._constants, **self._options)
        expected = launches.pop()
        assert found[0] == expected[0]
        # Triton counts programs, and so many are a cluster.
        assert (found[1][0] * self._cluster, *found[1][1:]) == expected[1]
        assert len(found[2]) == len(expected[2])
        for ours, theirs in zip(found[2], expected[2], strict=True):
            if isinstance(theirs, torch.Tensor) and not isinstance(ours, torch.Tensor):
                assert ours == theirs.data_ptr()
            else:
                assert ours is theirs or ours == theirs
        if found[3] is None:
            short.append(self)

    monkeypatch.setattr(launcher.Launcher, "__call__", call)
    return short


def request_of(cell, dtype, **changes):
    made = Request(
        cell,
        torch.device("cpu"),
        dtype,
        seq_len=5,
        batch=3,
        input_size=16,
        hidden_size=32,
        output_size=16 if cell.projected else 32,
        directions=1,
        biased=True,
        packed=False,
        needs_grad=True,
    )
    return made._replace(**changes)


def run(request, sizes=None, input=None):
    """A layer, forward and, if asked for, backward, on whatever is in memory."""
    cell, size, dtype = request.cell, request.hidden_size, request.dtype
    own = isinstance(cell, OwnCell)
    rows_hh = cell.products if own else cell.gates
    shapes = [(cell.gates * size, request.input_size), (rows_hh * size, request.output_size)]
    shapes += [(cell.gates * size,), (rows_hh * size,)] if request.biased else []
    shapes += [(request.output_size, size)] if cell.projected else []
    shapes += [(cell.unit_weights, size)] if own else []
    weights = [torch.zeros(shape, dtype=dtype) for shape in shapes * request.directions]
    sizes = sizes if request.packed else []
    if input is None:
        leading = (sum(sizes),) if request.packed else (request.seq_len, request.batch)
        input = torch.zeros(*leading, request.input_size, dtype=dtype)
    h_0 = torch.zeros(request.directions, request.batch, request.output_size, dtype=dtype)
    c_0 = None
    if cell.states == 2:
        c_0 = torch.zeros(request.directions, request.batch, size, dtype=dtype)
    runs = backend
    if isinstance(cell, RegularizedCell):
        every = torch.zeros(*input.shape[:-1], request.directions * size, dtype=torch.bool)
        masks = [every if part is None else part for part in cell.zoneout]
        runs = ExtendedLayer(Extras(None, None, False, h_0 if cell.locked else None, *masks), None)
    results, saved = runs.forward(request, input, sizes, h_0, c_0, weights)
    if not request.needs_grad:
        return
    grads = [results[0].flatten(0, -2), *(None for _ in results[1:])]
    needs = [True] * 3 + [weight.numel() > 0 for weight in weights]
    runs.backward(request, input, sizes, h_0, c_0, weights, saved, grads, needs)


OWN = {
    kind.__name__: kind.cell for kind in (PeepholeLSTM, MinimalGatedUnit, Uneven, triton_rnn.IndRNN)
}
REGULARIZED = {
    "lstm_locked": regularized(CELLS["lstm"], 0.0, 0.0, (0.0, 0.0), locked=True, shows_c=False),
    "lstm_all": regularized(CELLS["lstm"], 1.0, 2.0, (None, None), locked=True, shows_c=True),
    "gru_zoneout": regularized(CELLS["gru"], 0.0, 0.0, (None,), locked=False, shows_c=False),
}
EVERY_CELL = {**CELLS, **OWN, **REGULARIZED}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", EVERY_CELL)
def test_a_later_launch_is_the_one_that_triton_would_have_made(both_ways, name, dtype, packed):
    """Other lengths, batches, sizes and layouts, each more than once and in turn."""
    turns = 0
    for _ in range(2):
        for changes in (
            {},
            {"directions": 2},
            {"needs_grad": False},
            {"biased": False},
            {"seq_len": 7, "batch": 16},
            {"hidden_size": 200, "output_size": 16 if EVERY_CELL[name].projected else 200},
            {"input_size": 1},
        ):
            request = request_of(EVERY_CELL[name], dtype, packed=packed, **changes)
            sizes = [request.batch] * (request.seq_len - 1) + [1]
            run(request, sizes)
            run(request, [request.batch, *sizes[:-1]])
            turns += 1
    assert len(both_ways) > 3 * turns


@pytest.mark.parametrize("variant", ["resident", "cooperative", "streaming", "stepwise"])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_every_variant_is_launched_as_triton_would(both_ways, monkeypatch, name, variant):
    monkeypatch.setattr(launch, "variant", variant)
    for _ in range(2):
        for directions in (1, 2):
            run(request_of(CELLS[name], torch.bfloat16, hidden_size=128, output_size=128,
                           directions=directions))  # fmt: skip
    assert both_ways


@pytest.mark.parametrize("directions", [1, 2])
def test_programs_of_a_cluster_are_one_to_the_driver(launches, monkeypatch, directions):
    """It is told how many of them are one, and that many fewer to start; on every way to it."""
    monkeypatch.setattr(launch, "variant", "cluster")
    request = request_of(
        CELLS["lstm"], torch.bfloat16, batch=33, hidden_size=128, output_size=128,
        directions=directions, needs_grad=False,
    )  # fmt: skip
    found = launch.ready(request, "forward")
    plan = found.plan
    assert (plan.exchange, plan.cluster, plan.programs) == ("cluster", 8, 8 * 5 * directions)
    starts = []
    for _ in range(3):
        launches.clear()
        run(request)
        starts.append([grid for (name, _), grid, *_ in launches if name == "recurrence_forward"])
    assert starts == [[(5 * directions, 1, 1, 7)]] * 3
    assert found.launcher._packed_metadata == (4, 8, 0)
    hooks = triton.knobs.runtime.launch_enter_hook

    def hook(metadata):
        raise AssertionError("the driver calls it, and this one starts nothing")

    hooks.add(hook)
    try:
        launches.clear()
        run(request)
    finally:
        hooks.remove(hook)
    (_, (x, *_), arguments, metadata, watched) = launches[-1]
    assert (x, metadata, watched) == (5 * directions, "metadata", True)
    assert arguments[18:21] == (5, 33, 0), "steps, sequences, first direction"


@pytest.mark.parametrize("layout", ["batch first", "every second", "reversed"])
def test_an_input_is_read_by_its_own_strides(both_ways, layout):
    request = request_of(CELLS["gru"], torch.float32)
    plain = torch.zeros(5, 3, 16)
    others = {
        "batch first": torch.zeros(3, 5, 16).transpose(0, 1),
        "every second": torch.zeros(5, 3, 32)[:, :, ::2],
        "reversed": torch.zeros(16, 3, 5).permute(2, 1, 0),
    }
    for input in (plain, others[layout], plain, others[layout]):
        run(request, input=input)
    assert both_ways


def test_a_tensor_that_is_not_aligned_gets_a_kernel_of_its_own(both_ways, launches, monkeypatch):
    request = request_of(CELLS["gru"], torch.float32, needs_grad=False)
    aligned = torch.zeros(5 * 3 * 16)
    crooked = torch.zeros(5 * 3 * 16 + 4)[1:-3]
    assert aligned.data_ptr() % 16 == 0 and crooked.data_ptr() % 16 == 4
    # The first launch of all is a crooked one: it must not be taken for the others'.
    for flat in (crooked, aligned, crooked, aligned, aligned):
        run(request, input=flat.view(5, 3, 16))
    # Of ten launches the crooked projections, and the first of each kernel, go Triton's way.
    assert len(both_ways) == 10 - 2 - 2


def test_float32_as_the_switch_says_at_every_call(both_ways, monkeypatch):
    request = request_of(CELLS["lstm"], torch.float32)
    for precision in ("tf32", "ieee", "tf32", "ieee"):
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
        run(request)
        both_ways.clear()
        run(request)
        kinds = [entry._constants["PRECISION"] for entry in both_ways]
        # The projection, two recurrences, and what the input and both weights are given.
        assert kinds == ["tf32" if precision == "tf32" else "tf32x3"] * 6


def test_who_listens_to_launches_is_told_of_each(launches):
    request = request_of(CELLS["lstm"], torch.float16, needs_grad=False)
    hooks = triton.knobs.runtime.launch_enter_hook

    def hook(metadata):
        raise AssertionError("the driver calls it, and this one starts nothing")

    def told():
        launches.clear()
        run(request)
        assert len(launches) == 2
        return [(metadata, watched) for *_, metadata, watched in launches]

    told()
    assert told() == [(None, False)] * 2
    hooks.add(hook)
    try:
        assert told() == [("metadata", True)] * 2
    finally:
        hooks.remove(hook)
    assert told() == [(None, False)] * 2


def test_a_launcher_serves_all_lengths_and_batches(launches):
    """Its first launch is slow, and a program may meet another length at every call."""
    for kernel in ("forward", "backward"):
        first = launch.ready(request_of(CELLS["gru"], torch.float16), kernel)
        for changes in ({"seq_len": 8}, {"batch": 2}, {"input_size": 3}):
            other = launch.ready(request_of(CELLS["gru"], torch.float16, **changes), kernel)
            assert other is not first and other.launcher is first.launcher
        for changes in ({"directions": 2}, {"hidden_size": 64}, {"packed": True}):
            request = request_of(CELLS["gru"], torch.float16, **changes)
            assert launch.ready(request, kernel).launcher is not first.launcher


def test_zeros_are_one_block_that_grows_and_is_never_let_go(monkeypatch):
    monkeypatch.setattr(launch, "_zeros", {})
    place = torch.device("cpu"), torch.float16
    small = launch.zeros(*place, 100)
    assert small.numel() >= 100 and not small.any()
    assert launch.zeros(*place, 7) is launch.zeros(*place, 100) is small
    large = launch.zeros(*place, 1000)
    assert large.numel() >= 1000
    assert launch.zeros(*place, 100) is large
    assert launch.zeros(torch.device("cpu"), torch.float32, 10).dtype == torch.float32
    # A launch on another stream may be reading the first.
    assert [block is one for block, one in zip(launch._zeros[place], (small, large), strict=True)]


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_states_that_are_not_given_are_nothing_to_make(launches, monkeypatch, name):
    """Nor are their gradients: zeros on a GPU are a launch each."""
    module = getattr(triton_rnn, name)(16, 32, dtype=torch.float16, bidirectional=True)
    input = torch.zeros(5, 3, 16, dtype=torch.float16)

    def step():
        with triton_rnn.use_backend("triton"):
            module(input)[0].backward(torch.ones(5, 3, 64, dtype=torch.float16))

    step()

    def refuse(*args, **kwargs):
        raise AssertionError("zeros were made")

    for place, made in ((torch, "zeros"), (torch, "zeros_like"), (torch.Tensor, "new_zeros")):
        monkeypatch.setattr(place, made, refuse)
    step()


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_a_call_that_was_seen_before_is_not_decided_anew(launches, monkeypatch, grad):
    if native.known() is None:
        pytest.skip("calls.c cannot be used here")
    module = triton_rnn.GRU(16, 32, dtype=torch.float16)
    input = torch.zeros(5, 3, 16, dtype=torch.float16)
    with triton_rnn.use_backend("triton"), torch.set_grad_enabled(grad):
        for _ in range(2):
            module(input)

        def refuse(*args):
            raise AssertionError("the call was decided anew")

        monkeypatch.setattr(functional, "prepare", refuse)
        launches.clear()
        output, h_n = module(input)
    assert output.shape == (5, 3, 32) and h_n.shape == (1, 3, 32)
    assert len(launches) == 2


def test_numbers_are_those_of_each_launch(launches):
    """The steps of a stepwise plan are launches of one launcher."""
    request = request_of(CELLS["lstm"], torch.float32, needs_grad=False)
    launcher_of = launch.ready(request, "forward").launcher
    tensors = [torch.zeros(64) for _ in range(17)]
    error = torch.zeros(2, dtype=torch.int64)
    for step in (3, 4, 5):
        numbers = (9, 3, 0, step, step + 1, 1, 100)
        launcher_of(request.device, 6, tensors, (error, *numbers))
        *_, arguments, _, _ = launches[-1]
        assert arguments[18:25] == numbers
        assert arguments[17] is error


def test_the_command_that_times_it_prints_and_writes_a_table(tmp_path, capsys):
    path = tmp_path / "host.md"
    assert main(["host", "--quick", "--save", str(path)]) == 0
    rows = [line for line in path.read_text().splitlines() if line.startswith(("| RNN", "| LSTM"))]
    assert len(rows) == 8
    assert all(float(row.split("|")[2]) > 0 for row in rows)
    assert "until a call's launches are made" in capsys.readouterr().out


@triton.jit
def _copy(a_ptr, b_ptr, n, COUNT: triton.language.constexpr):
    numbers = triton.language.arange(0, COUNT)
    triton.language.store(b_ptr + numbers, triton.language.load(a_ptr + numbers))


def test_for_an_amd_gpu_one_kernel_serves_tensors_of_any_size(monkeypatch):
    """Triton tells those of up to 2 GB apart there, for kernels that count in 32 bits."""
    compiler = pytest.importorskip("triton.backends.amd.compiler", reason="a Triton without AMD's")
    specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    given = []
    monkeypatch.setattr(launcher.torch.version, "hip", "6.0")
    started = launcher.Launcher(_copy, {"COUNT": 16}, {})
    monkeypatch.setattr(started, "_launch", lambda programs, tensors, others: given.extend(tensors))
    tensor = torch.empty(1024, dtype=torch.float16)
    started(torch.device("cpu"), 1, (tensor, tensor), (16,))
    assert len(given) == 2

    def keys(argument):
        return specialize(compiler.HIPBackend, argument, False, True, True)

    plain = keys(tensor)
    assert "S" in plain[1], "what is to be hidden"
    for wrapped in given:
        assert wrapped.data_ptr() == tensor.data_ptr()
        assert keys(wrapped) == (plain[0], plain[1].replace("S", ""))
