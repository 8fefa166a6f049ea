"""Ranges, the profile session and its command: right names, right sums, nothing when off."""

import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import triton_rnn
from triton_rnn.__main__ import main
from triton_rnn.backends import torchscript
from triton_rnn.kernels import metadata
from triton_rnn.profiling import ranges, session, work

T, N, I, H = 20, 2, 4, 6  # noqa: E741 - sizes, as everywhere


@pytest.fixture
def layer():
    """A GRU with two layers and directions, and its input."""
    torch.manual_seed(0)
    module = triton_rnn.GRU(I, H, 2, bidirectional=True)
    return module, torch.randn(T, N, I, requires_grad=True)


def names_of(profiler):
    return {e.name for e in profiler.events() if e.name.startswith("triton_rnn::")}


def run(module, given, backend):
    with triton_rnn.use_backend(backend):
        output, _ = module(given)
        data = output.data if hasattr(output, "batch_sizes") else output
        data.sum().backward()
    return output


def test_every_phase_layer_and_direction_of_torchscript_has_its_range(layer):
    module, given = layer
    with torch.profiler.profile() as profiler:
        run(module, given, "torchscript")
    phases = ("projection", "recurrence", "backward.recurrence", "backward.weights")
    expected = {
        f"triton_rnn::gru.{phase}[{number}.{direction}]"
        for phase in phases
        for number in (0, 1)
        for direction in ("forward", "reverse")
    }
    assert names_of(profiler) == {"triton_rnn::gru", *expected}


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_cell_has_its_ranges_forward_and_backward(cell, packed):
    module = getattr(triton_rnn, cell)(I, H)
    given = torch.randn(T, N, I)
    if packed:
        given = pack_sequence([given[:, 0], given[: T // 2, 1]])
    with torch.profiler.profile() as profiler:
        run(module, given, "torchscript")
    name = {"RNN": "rnn_tanh"}.get(cell, cell.lower())
    phases = ("projection", "recurrence", "backward.recurrence", "backward.weights")
    expected = {f"triton_rnn::{name}.{phase}[0.forward]" for phase in phases}
    assert names_of(profiler) == {f"triton_rnn::{name}", *expected}


def test_calls_that_are_torchs_or_the_references_have_one_range(layer):
    module, given = layer
    with torch.profiler.profile() as profiler:
        run(module, given, "aten")
    assert names_of(profiler) == {"triton_rnn::gru", "triton_rnn::gru.torch[all]"}
    with torch.profiler.profile() as profiler:
        run(module, given, "reference")
    ranges_of_layers = {f"triton_rnn::gru.reference[{number}.both]" for number in (0, 1)}
    assert names_of(profiler) == {"triton_rnn::gru", *ranges_of_layers}


def test_without_a_profiler_no_range_is_made(layer, monkeypatch):
    module, given = layer

    def forbidden(*arguments):
        raise AssertionError("a range was made")

    monkeypatch.setattr(ranges, "_open", forbidden)
    monkeypatch.setattr(torch.profiler, "record_function", forbidden)
    monkeypatch.setattr(ranges, "inside", forbidden)
    seen = []
    original = torchscript._named
    monkeypatch.setattr(
        torchscript, "_named", lambda *args: seen.extend(original(*args)) or seen[-2:]
    )
    for backend in ("torchscript", "aten", "reference"):
        run(module, given, backend)
    # Two layers, two directions, forward and backward: compiled code is told to make none.
    assert len(seen) == 8
    assert {run.prefix for run in seen} == {""}


def test_numbers_are_the_same_with_and_without_a_profiler(layer):
    module, given = layer
    plain = run(module, given, "torchscript")
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    with triton_rnn.profile():
        profiled = run(module, given, "torchscript")
    assert torch.equal(plain, profiled)
    for parameter, grad in zip(module.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("backend", ["native", "torchscript", "aten", "reference"])
def test_shares_of_a_session_sum_to_one(layer, backend):
    with triton_rnn.profile() as found:
        run(*layer, backend)
    assert sum(phase.share for phase in found.phases) == pytest.approx(1.0)
    assert all(phase.seconds >= 0 for phase in found.phases)


def test_the_backward_of_torchs_own_kernels_is_found_by_its_nodes(layer):
    with triton_rnn.profile() as found:
        run(*layer, "aten")
    phases = {phase.name: phase for phase in found.phases}
    backward = phases["gru.backward.torch"]
    assert backward.seconds > 0
    # Forward: input and recurrent product of both layers and directions. Backward: twice that.
    forward = 2 * 2 * T * N * 3 * H * ((I + H) + (2 * H + H))
    assert phases["gru.torch"].operations == forward
    assert backward.operations == 2 * forward
    assert any(span.name == "triton_rnn::gru.backward.torch[all]" for span in found.spans)


@pytest.mark.parametrize(("cell", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_operations_are_those_counted_by_hand(cell, gates):
    module, given = getattr(triton_rnn, cell)(I, H), torch.randn(T, N, I)
    with triton_rnn.profile() as found:
        run(module, given, "torchscript")
    name = {"RNN": "rnn_tanh"}.get(cell, cell.lower())
    operations = {phase.name: phase.operations for phase in found.phases}
    rows, width = T * N, gates * H
    assert operations[f"{name}.projection"] == 2 * rows * I * width
    assert operations[f"{name}.recurrence"] == 2 * rows * H * width
    assert operations[f"{name}.backward.recurrence"] == 2 * rows * H * width
    # Gradients of the input, of W_ih and of W_hh.
    assert operations[f"{name}.backward.weights"] == 2 * rows * width * (I + I + H)


def test_the_verdict_names_the_largest_phase_and_what_holds_it_up():
    found = session.profile()
    found.spans = (session.Span("triton_rnn::gru", 0.0, 1.0),)

    def phase(name, share, arithmetic, memory):
        return session.Phase(name, 1, share, share, 1, 1, arithmetic, memory)

    small = phase("gru.projection", 0.1, 0.9, 0.0)
    found.phases = (small, phase("gru.recurrence", 0.9, 0.05, 0.01))
    assert found.verdict.startswith("gru.recurrence takes 90% of the time")
    assert "cost of single operations" in found.verdict
    found.phases = (small, phase("gru.recurrence", 0.9, 0.7, 0.1))
    assert "bound by arithmetic" in found.verdict
    found.phases = (small, phase("gru.recurrence", 0.9, 0.1, 0.7))
    assert "bound by memory bandwidth" in found.verdict
    outside = session.Phase(session.OUTSIDE, 0, 0.9, 0.9, None, None, None, None)
    found.phases = (small, outside)
    assert "do not bound" in found.verdict


def test_a_session_without_a_recurrent_layer_says_so():
    with triton_rnn.profile() as found:
        torch.ones(3).add(1)
    assert found.verdict == "No recurrent layer of triton_rnn ran."
    assert str(found)


def test_an_exception_passes_and_what_ran_is_kept(layer):
    module, given = layer
    found = triton_rnn.profile()

    def fails():
        with found:
            run(module, given, "torchscript")
            raise LookupError("the user's own")

    with pytest.raises(LookupError, match="the user's own"):
        fails()
    assert any(phase.name == "gru.recurrence" for phase in found.phases)
    # And another one can begin.
    with triton_rnn.profile():
        pass


def test_a_device_that_fails_at_the_end_leaves_no_profiler_behind(layer, monkeypatch):
    def fails(device):
        raise RuntimeError("of the device")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    found = triton_rnn.profile()

    def ends():
        with found:
            run(*layer, "torchscript")
            found._seen = (torch.device("cuda", 1), torch.float32)

    with pytest.raises(RuntimeError, match="of the device"):
        ends()
    with triton_rnn.profile() as after:
        run(*layer, "torchscript")
    assert after.phases


def test_a_second_profiler_is_refused_at_once(layer):
    message = "a profiler is already running"
    with triton_rnn.profile(), pytest.raises(RuntimeError, match=message), triton_rnn.profile():
        pass
    profiler = torch.profiler.profile()
    with profiler, pytest.raises(RuntimeError, match=message), triton_rnn.profile():
        pass


def test_layers_of_other_threads_run_and_are_not_counted(layer):
    module, given = layer
    outputs = []

    def work_of_a_thread():
        for _ in range(5):
            outputs.append(run(module, given.detach(), "torchscript"))

    with triton_rnn.profile() as found:
        threads = [threading.Thread(target=work_of_a_thread) for _ in range(2)]
        for thread in threads:
            thread.start()
        expected = run(module, given.detach(), "torchscript")
        for thread in threads:
            thread.join()
    assert len(outputs) == 10
    assert all(torch.equal(output, expected) for output in outputs)
    operations = {phase.name: phase.operations for phase in found.phases}
    request = triton_rnn.explain(module, given).request
    one = work.forward_work(request, T * N)["recurrence"].operations
    assert operations["gru.recurrence"] == 2 * one
    assert sum(phase.share for phase in found.phases) == pytest.approx(1.0)


def test_nvtx_ranges_are_pushed_and_popped_when_asked_for(layer, monkeypatch):
    module, given = layer
    told = []
    nvtx = SimpleNamespace(range_push=told.append, range_pop=lambda: told.append("pop"))
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ranges, "_nvtx", True)
    with triton_rnn.use_backend("aten"), torch.no_grad():
        module(given)
    assert told == ["triton_rnn::gru", "triton_rnn::gru.torch[all]", "pop", "pop"]


def test_importing_the_package_brings_no_pictures_and_no_tables():
    code = "import sys, triton_rnn; print([n for n in ('matplotlib', 'rich') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_command_prints_a_table_and_writes_trace_picture_and_numbers(tmp_path, capsys):
    arguments = ["profile", "--cell", "gru", "--hidden", "8", "--layers", "2", "--bidirectional"]
    arguments += ["--packed", "--seq-len", "20", "--steps", "2", "--out", str(tmp_path)]
    arguments += ["--backend", "torchscript"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for word in ("gru.recurrence", "gru.backward.weights", "GFLOP/s", "takes", "backend"):
        assert word in printed
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "triton_rnn::gru.backward.recurrence[1.reverse]" in names
    numbers = json.loads((tmp_path / "profile.json").read_text())
    assert numbers["kind"] == "profile"
    assert sum(phase["share"] for phase in numbers["phases"]) == pytest.approx(1.0)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "profile.json",
        "timeline.png",
        "trace.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--hidden", "0"], "--hidden"),
        (["--cell", "elman"], "--cell"),
        (["--packed", "--batch", "1"], "--batch 2"),
        (["--backend", "no-such"], "no-such"),
        (["--backend", "triton", "--device", "cpu"], "triton"),
    ],
)
def test_a_bad_request_gets_one_line_and_exit_code_2(arguments, word, tmp_path, capsys):
    out = tmp_path / "out"
    try:
        code = main(["profile", *arguments, "--out", str(out)])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error:" in error
    assert word in error
    assert not out.exists() or not list(out.iterdir())


def test_proton_is_told_names_operations_and_bytes_by_hand_count():
    half = torch.empty(T * N, 2, 4 * H, dtype=torch.float16)
    args = {"gates_ptr": half, "grad_gates_ptr": half, "T": T, "N": N, "begin": 0, "end": T}
    args |= {"H": H, "GATES": 4, "INPUTS": 4, "WIDTH": 4, "SAVED": 4, "AT_ONCE": 2}
    args |= {"SAVE_C": True, "HAS_C": True}
    found = metadata.forward_metadata((1,), None, args)
    assert found["name"] == f"triton_rnn_recurrence_forward_H{H}_N{N}"
    assert found["flops16"] == 2 * (2 * T * N * 4 * H * H)
    # Preactivations in, h, gates and c out, W_hh once.
    assert found["bytes"] == 2 * 2 * (T * N * (4 + 1 + 4 + 1) * H + 4 * H * H)
    one_step = metadata.backward_metadata((1,), None, {**args, "begin": 3, "end": 4})
    assert one_step["flops16"] == 2 * (2 * N * 4 * H * H)
    a = torch.empty(5, 3)
    args = {"a_ptr": a, "M": 5, "N": 7, "K": 3, "D": 2, "SUM": False}
    product = metadata.matmul_metadata((1,), None, args)
    assert product["flops32"] == 2 * 2 * 5 * 7 * 3
    assert product["bytes"] == 4 * 2 * (5 * 3 + 3 * 7 + 5 * 7)


def test_what_was_not_profiled_cannot_be_saved(tmp_path):
    with pytest.raises(RuntimeError, match="nothing was profiled yet"):
        triton_rnn.profile().save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_in_one_line_that_it_cannot_write(capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session.profile, "save", full)
    sizes = ["--steps", "1", "--hidden", "4", "--seq-len", "3", "--batch", "2"]
    assert main(["profile", *sizes, "--out", "anywhere"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "error: cannot write into anywhere" in line and "No space left" in line
