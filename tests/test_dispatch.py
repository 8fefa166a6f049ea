"""Backends are chosen as asked, for the thread or task that asked, and say why."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import triton_rnn
from triton_rnn import dispatch, environment, functional
from triton_rnn.backends.native import rules
from triton_rnn.cells import LSTM
from triton_rnn.request import Request


def _backend(module: torch.nn.Module, *input: torch.Tensor) -> str:
    return triton_rnn.explain(module, *input).backend


@pytest.fixture
def gru() -> triton_rnn.GRU:
    return triton_rnn.GRU(3, 4)


LONG = torch.zeros(50, 2, 3)


NATIVE = dispatch.unavailable("native")
needs_native = pytest.mark.skipif(NATIVE is not None, reason=f"no C loops: {NATIVE}")


@needs_native
def test_auto_takes_the_c_loops_for_a_sequence_on_the_cpu(gru):
    assert _backend(gru, LONG) == "native"
    assert _backend(gru, LONG[:1]) == "native"
    assert _backend(triton_rnn.LSTM(3, 4).double(), LONG.double()) == "native"
    assert _backend(triton_rnn.LSTM(3, 4, proj_size=2), LONG) == "native"
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(50, 3), torch.zeros(30, 3)])
    assert _backend(triton_rnn.LSTM(3, 4), packed) == "native"


@needs_native
def test_auto_takes_torchscript_for_what_the_c_loops_do_not_do(gru):
    assert _backend(gru.bfloat16(), LONG.bfloat16()) == "torchscript"
    assert _backend(triton_rnn.RNN(3, 2100), LONG) == "torchscript"
    with torch.no_grad():
        assert _backend(triton_rnn.RNN(3, 1600), LONG) == "torchscript"


def _slower(hidden: int, batch: int, *, needs_grad: bool, packed: bool = False) -> bool:
    """Whether `auto` leaves a float32 LSTM of this size to others than the C loops."""
    request = Request(
        cell=LSTM,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seq_len=50,
        batch=batch,
        input_size=3,
        hidden_size=hidden,
        output_size=hidden,
        directions=1,
        biased=True,
        packed=packed,
        needs_grad=needs_grad,
    )
    return rules.slower(request) is not None


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_auto_leaves_to_onednn_the_lstm_at_which_that_is_faster(monkeypatch):
    def on(capability: str) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    on("AVX2")
    assert not _slower(512, 64, needs_grad=False) and not _slower(1024, 64, needs_grad=True)
    on("AVX512")
    assert not _slower(512, 64, needs_grad=True)
    assert not _slower(128, 32, needs_grad=False) and not _slower(768, 32, needs_grad=False)
    assert _slower(128, 33, needs_grad=False) and _slower(767, 32, needs_grad=False)
    assert not _slower(512, 64, needs_grad=False, packed=True)
    on("DEFAULT")
    for needs_grad in (False, True):
        assert not _slower(128, 32, needs_grad=needs_grad)
        assert _slower(128, 33, needs_grad=needs_grad) and _slower(513, 1, needs_grad=needs_grad)
        assert not _slower(513, 1, needs_grad=needs_grad, packed=True)


@needs_native
def test_auto_leaves_few_steps_of_many_weights_to_others():
    gru = triton_rnn.GRU(3, 200)
    assert _backend(gru, torch.zeros(4, 1, 3)) == "native"
    assert _backend(gru, torch.zeros(3, 1, 3)) != "native"
    with torch.no_grad():
        assert _backend(gru, torch.zeros(1, 1, 3)) == "native"


@needs_native
def test_the_c_loops_take_few_steps_where_onednn_lays_out_the_weights_too(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    lstm = triton_rnn.LSTM(3, 410)
    assert _backend(lstm, torch.zeros(1, 1, 3)) == "native"
    assert _backend(lstm.double(), torch.zeros(1, 1, 3, dtype=torch.float64)) != "native"


@pytest.mark.parametrize(
    "name", [pytest.param("native", marks=needs_native), "torchscript", "aten", "reference"]
)
def test_an_explicit_request_is_honoured(gru, name):
    with triton_rnn.use_backend(name):
        explanation = triton_rnn.explain(gru, LONG)
        output, _ = gru(LONG)
    assert explanation.backend == name
    assert set(explanation.reasons) == set(dispatch.BACKENDS) - {name}
    assert output.shape == (50, 2, 4)


def test_an_explicit_request_that_cannot_be_honoured_raises_with_the_reason(gru):
    with (
        triton_rnn.use_backend("triton"),
        pytest.raises(
            triton_rnn.BackendError, match=r"'triton'.*run on a GPU, the input is on the CPU"
        ),
    ):
        gru(LONG)
    with (
        torch.autocast("cpu", torch.bfloat16),
        triton_rnn.use_backend("torchscript"),
        pytest.raises(triton_rnn.BackendError, match="autocast is on"),
    ):
        gru(LONG)


def test_malformed_input_gets_torchs_error_under_every_backend(gru):
    with triton_rnn.use_backend("triton"), pytest.raises(ValueError, match="2D or 3D"):
        gru(torch.zeros(3))


def test_an_unknown_backend_is_refused_at_once():
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'; choose from auto, triton"):
        triton_rnn.use_backend("cuda")


def test_the_choice_ends_with_the_block_also_after_an_error(gru):
    with pytest.raises(ZeroDivisionError), triton_rnn.use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch.requested() == "auto"


def test_blocks_nest_and_one_object_can_be_entered_twice():
    block = triton_rnn.use_backend("reference")
    with block:
        with triton_rnn.use_backend("aten"):
            with block:
                assert dispatch.requested() == "reference"
            assert dispatch.requested() == "aten"
        assert dispatch.requested() == "reference"
    assert dispatch.requested() == "auto"


def test_it_decorates_functions_and_coroutines():
    @triton_rnn.use_backend("reference")
    def plain() -> str:
        return dispatch.requested()

    @triton_rnn.use_backend("aten")
    async def later() -> str:
        await asyncio.sleep(0)
        return dispatch.requested()

    async def both() -> list[str]:
        return await asyncio.gather(later(), asyncio.to_thread(plain))

    assert plain() == "reference"
    assert asyncio.run(both()) == ["aten", "reference"]
    assert dispatch.requested() == "auto"


def test_another_thread_does_not_see_the_choice():
    seen = []
    with triton_rnn.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_one_object_serves_threads_that_are_in_its_block_together():
    block, together = triton_rnn.use_backend("reference"), threading.Barrier(2)

    def inside():
        with block:
            together.wait(10)
            seen = dispatch.requested()
            together.wait(10)
        return seen, dispatch.requested()

    with ThreadPoolExecutor(2) as pool:
        found = [each.result() for each in [pool.submit(inside) for _ in range(2)]]
    assert found == [("reference", "auto")] * 2


def test_what_is_out_of_use_on_the_current_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    asked = []
    monkeypatch.setattr(
        dispatch.backend_module("triton"), "supports", lambda request: asked.append(request.device)
    )
    assert dispatch.unavailable("triton") is None
    assert asked == [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", True), ("1", True), ("yes", True), ("0", False), ("False", False), ("off", False)],
)
def test_switches_of_the_environment_are_read_alike(monkeypatch, value, expected):
    monkeypatch.setenv("TRITON_RNN_ANY", value)
    assert environment.is_on("TRITON_RNN_ANY", default=True) is expected
    monkeypatch.delenv("TRITON_RNN_ANY")
    assert environment.is_on("TRITON_RNN_ANY", default=True)
    assert not environment.is_on("TRITON_RNN_ANY", default=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("reference", "reference"), ("", "auto"), ("nonsense", "unknown backend 'nonsense'")],
)
def test_the_environment_variable_is_read(value, expected):
    code = (
        "import torch, triton_rnn\n"
        "m = triton_rnn.GRU(3, 4)\n"
        "try: print(triton_rnn.dispatch.requested()); triton_rnn.explain(m, torch.zeros(9, 2, 3))\n"
        "except ValueError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_RNN_BACKEND": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in run.stdout


def test_importing_the_package_imports_neither_triton_nor_a_backend():
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport triton_rnn\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = run.stdout.split()
    assert "triton_rnn.modules" in added
    assert not [name for name in added if name.split(".")[0] == "triton" or ".backends." in name]


def test_without_the_compiler_the_same_loops_run_as_plain_python():
    code = (
        "import torch, triton_rnn\nfrom triton_rnn.backends import torchscript\n"
        "torch.manual_seed(0)\n"
        "ours = triton_rnn.GRU(3, 4, bidirectional=True)\nx = torch.randn(30, 2, 3)\n"
        "with triton_rnn.use_backend('torchscript'): y = ours(x)[0]\n"
        "y.sum().backward()\n"
        "with triton_rnn.use_backend('aten'): z = ours(x)[0]\n"
        "torch.testing.assert_close(y, z)\nprint(torchscript.compile_check())"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTORCH_JIT": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "False" in run.stdout
    assert "plain Python" in run.stdout


def test_users_see_no_deprecation_warning_of_torchscript():
    code = (
        "import torch, triton_rnn\n"
        "for c in (triton_rnn.RNN, triton_rnn.GRU, triton_rnn.LSTM):\n"
        "    with triton_rnn.use_backend('torchscript'):\n"
        "        c(3, 4, bidirectional=True)(torch.randn(5, 2, 3))[0].sum().backward()\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stderr == ""


def test_explain_reads_well_and_runs_nothing(gru, monkeypatch):
    def ran(*_):
        raise AssertionError("a layer ran")

    for name in ("native", "torchscript"):
        monkeypatch.setattr(dispatch.backend_module(name), "forward", ran)
    monkeypatch.setattr(functional, "layer", ran)
    with triton_rnn.use_backend("torchscript"):
        text = str(triton_rnn.explain(gru, LONG))
    assert text.startswith("backend torchscript\n  layer 0: compiled")
    if NATIVE is None:
        native = str(triton_rnn.explain(gru, LONG))
        assert native.startswith("backend native\n  layer 0: one C call, vectors of ")
    assert "not triton: " in text


@pytest.mark.parametrize("wanted", ["auto", "reference"])
@pytest.mark.parametrize(
    "kind", [triton_rnn.GRU, triton_rnn.LSTM, triton_rnn.LSTMCell, triton_rnn.GRUCell]
)
def test_explain_under_vmap_names_the_plain_loops(kind, wanted):
    module, told = kind(3, 4), []
    shape = (2, 5, 3) if "Cell" in kind.__name__ else (2, 7, 5, 3)

    def call(x):
        told.append(triton_rnn.explain(module, x))
        result = module(x)
        return result[0] if isinstance(result, tuple) else result

    with triton_rnn.use_backend(wanted):
        torch.vmap(call)(torch.randn(shape))
    assert told[0].backend == "reference"
    if wanted == "auto":
        reason = "torch.vmap is at work, which needs the plain loops"
        assert set(told[0].reasons.values()) == {reason}


def test_explain_says_of_options_and_lengths_where_the_kernels_run():
    """They are generated for these, where there is a GPU."""
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")
    x = torch.randn(7, 2, 3)
    lengths = torch.tensor([7, 3])
    for options, more in (({}, {"lengths": lengths}), ({"zoneout": 0.1}, {})):
        module = triton_rnn.GRU(3, 4, **options)
        reason = triton_rnn.explain(module, x, **more).reasons["triton"]
        assert reason == "the Triton kernels run on a GPU, the input is on the CPU"
    normalized = triton_rnn.explain(triton_rnn.GRU(3, 4, layer_norm=True), x)
    assert "know nothing of layer_norm" in normalized.reasons["triton"]


def test_explain_of_malformed_input_says_so(gru):
    explanation = triton_rnn.explain(gru, torch.zeros(3))
    assert explanation.backend == "aten"
    assert "malformed" in explanation.reasons["torchscript"]


def test_explain_refuses_what_is_not_ours():
    with pytest.raises(TypeError, match="not a recurrent module"):
        triton_rnn.explain(torch.nn.Linear(3, 4), torch.zeros(3))
    with pytest.raises(TypeError, match=r"triton_rnn\.replace"):
        triton_rnn.explain(torch.nn.GRU(3, 4), LONG)


def test_cells_run_on_the_backend_that_is_asked_for():
    for cell in (triton_rnn.RNNCell(3, 4), triton_rnn.GRUCell(3, 4), triton_rnn.LSTMCell(3, 4)):
        for input in (torch.randn(5, 3), torch.randn(3)):
            expected = cell(input)
            for name in ("torchscript", "reference", *([] if NATIVE else ["native"])):
                with triton_rnn.use_backend(name):
                    found = cell(input)
                    assert _backend(cell, input) == name
                torch.testing.assert_close(found, expected)


@needs_native
def test_auto_takes_cells_without_a_backward_and_small_gru_cells_with_one():
    input = torch.randn(5, 3)
    for kind in (triton_rnn.RNNCell, triton_rnn.GRUCell, triton_rnn.LSTMCell):
        small, larger, large = kind(3, 4), kind(3, 200), kind(3, 1600)
        trained = "native" if kind is triton_rnn.GRUCell else "aten"
        assert [_backend(cell, input) for cell in (small, larger, large)] == [
            trained,
            "aten",
            "aten",
        ]
        with torch.no_grad():
            found = [_backend(cell, input) for cell in (small, larger, large)]
        assert found == ["native", "native", "aten"]
        first = small(input)
        first = first[0] if isinstance(first, tuple) else first
        assert ("LayerFunction" in type(first.grad_fn).__name__) == (trained == "native")


# torch says this whenever the flags are set, whatever they are set to.
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
def test_the_onednn_switch_takes_effect_between_calls():
    lstm, input = triton_rnn.LSTM(3, 600).bfloat16(), LONG.bfloat16()
    assert _backend(lstm, input) == "aten"
    with torch.backends.mkldnn.flags(enabled=False):
        assert _backend(lstm, input) == "torchscript"
    assert _backend(lstm, input) == "aten"


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (torch.backends.cudnn.rnn, "fp32_precision", "ieee"),
        (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        (torch, "are_deterministic_algorithms_enabled", lambda: True),
    ],
)
def test_a_choice_for_float32_on_a_gpu_is_made_anew_when_a_switch_is_turned(
    monkeypatch, place, name, value
):
    """All three decide who makes its products, and so what was tried out."""
    asked = []
    monkeypatch.setattr(dispatch, "_choose", lambda *facts: asked.append(facts))
    on_gpu = Request(
        LSTM, torch.device("cuda", 0), torch.float32, 5, 2, 3, 4, 4, 1, True, False, True
    )
    for request in (on_gpu, on_gpu._replace(dtype=torch.float16)):
        dispatch.choose(request, "auto")
    monkeypatch.setattr(place, name, value)
    for request in (on_gpu, on_gpu._replace(dtype=torch.float16)):
        dispatch.choose(request, "auto")
    assert asked[0] != asked[2] and asked[1] == asked[3]


def test_what_does_not_run_when_it_is_called_cannot_be_decorated():
    def generator():
        yield 1

    async def asynchronous():
        yield 1

    class Model:
        pass

    for function in (generator, asynchronous, Model):
        with pytest.raises(TypeError, match="use it as a context manager inside"):
            triton_rnn.use_backend("reference")(function)


def test_a_backend_of_the_environment_is_told_as_such(monkeypatch):
    x = torch.randn(5, 2, 3)
    monkeypatch.setattr(dispatch, "_environment", "foo")
    with pytest.raises(ValueError, match=r"unknown backend 'foo' \(of the variable TRITON_RNN_B"):
        triton_rnn.GRU(3, 4)(x)
    monkeypatch.setattr(dispatch, "_environment", "triton")
    if not torch.cuda.is_available():
        with pytest.raises(triton_rnn.BackendError, match=r"'triton' \(of the variable TRITON_RNN"):
            triton_rnn.GRU(3, 4)(x)
        with (
            triton_rnn.use_backend("triton"),
            pytest.raises(triton_rnn.BackendError, match="backend 'triton' cannot"),
        ):
            triton_rnn.GRU(3, 4)(x)
