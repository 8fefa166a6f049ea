"""``python -m bench growth``: fits, order of measurement, what is kept, first results."""

import gc
import inspect
import io
import json
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")

from bench import first_results, growth
from bench.__main__ import main
from bench.cases import Size
from bench.report import curves
from bench.report.load import Curve

TINY = Size(2, 3, 4, 4)
TINY_VALUES = {
    "seq_len": (1, 2, 4),
    "batch": (1, 2, 4),
    "hidden_size": (2, 4, 8),
    "layers": (1, 2, 3),
    "threads": (1, 2),
}
CURVE_KEYS = {
    "cell",
    "mode",
    "axis",
    "provider",
    "base",
    "points",
    "exponent",
    "exponent_error",
    "exponent_last",
}


class Clock:
    """Time that passes only where a step says so."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def step(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds

        return run


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.0, 1.0, 2.0])
def test_exponent_of_a_power_law_is_found_exactly(exponent):
    found = growth.fit([(x, 3e-5 * x**exponent) for x in (1, 2, 4, 8, 16)])
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.last == pytest.approx(exponent, abs=1e-9)
    assert found.error == pytest.approx(0, abs=1e-7)


def test_error_of_the_exponent_covers_noise():
    draw = random.Random(0)
    covered = 0
    for _ in range(400):
        noisy = [(2**power, 1e-4 * 2**power * 2 ** draw.gauss(0, 0.1)) for power in range(8)]
        found = growth.fit(noisy)
        # Student's t at 95 % and 6 degrees of freedom.
        covered += abs(found.exponent - 1) < 2.447 * found.error
    assert 0.91 < covered / 400 < 0.985


def test_last_exponent_is_the_limit_where_a_fixed_cost_bends_the_curve():
    found = growth.fit([(x, 1e-3 + 1e-6 * x**2) for x in (8, 16, 32, 64, 128, 256, 512, 1024)])
    assert found.exponent < 1.5 < found.last < 2
    assert found.error > 0.05


def test_a_picture_shows_no_error_of_two_points():
    two, three = ([(10.0, 1.0), (20.0, 2.0), (40.0, 4.1)][:count] for count in (2, 3))
    for points, expected in ((two, "0.98"), (three, "0.98 ± 0.02")):
        curve = Curve("gru", "inference", "steps", "triton_rnn", "", points, 0.98, 0.02, 0.98)
        assert curves.exponent(curve) == expected


def test_two_points_have_an_exponent_and_no_error():
    found = growth.fit([(1, 1.0), (2, 0.6)])
    assert found.exponent == pytest.approx(found.last)
    assert found.error == 0


def test_sides_are_measured_in_turn():
    clock = Clock()
    sides = [clock.step("a", 0.01), clock.step("b", 0.02)]
    found = growth.seconds_in_turn(sides, 0.05, lambda: clock.now)
    warm_up = 2 * growth.WARM_UP_CALLS
    assert "".join(clock.log[:warm_up]) == "aabb"
    assert "".join(clock.log[warm_up:]) == "abbaabba"
    assert found == pytest.approx([0.01, 0.02])


def test_fast_calls_are_timed_in_loops_and_slow_ones_a_few_times():
    clock = Clock()
    sides = [clock.step("fast", 0.0005), clock.step("slow", 10.0)]
    found = growth.seconds_in_turn(sides, 0.1, lambda: clock.now)
    assert clock.log.count("slow") == growth.WARM_UP_CALLS + growth.FEWEST_ROUNDS
    assert clock.log.count("fast") > 7 * growth.FEWEST_ROUNDS
    assert found == pytest.approx([0.0005, 10.0])


def test_collector_is_off_while_the_clock_runs_and_on_again_after_an_error():
    seen = []

    def step():
        seen.append(gc.isenabled())
        if len(seen) == 4:
            raise ArithmeticError

    assert gc.isenabled()
    with pytest.raises(ArithmeticError):
        growth.seconds_in_turn([step], 0.01)
    assert gc.isenabled()
    assert seen == [False] * 4


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])])
def test_thread_counts_double_up_to_all_cores(cores, counts):
    assert growth.thread_counts(cores) == counts


def test_input_is_as_wide_as_the_hidden_state():
    assert growth.size_at(TINY, "hidden_size", 16) == Size(2, 3, 16, 16)
    assert growth.size_at(TINY, "layers", 5) == Size(2, 3, 4, 4, layers=5)
    assert growth.size_at(TINY, "threads", 2) == TINY


@pytest.mark.parametrize("axis", growth.AXES)
@pytest.mark.parametrize(("cell", "mode"), [("rnn", "inference"), ("lstm", "training")])
def test_every_axis_is_measured(axis, cell, mode):
    threads = torch.get_num_threads()
    curves = growth.measure_axis(cell, mode, axis, TINY_VALUES[axis], TINY, 0.001)
    assert torch.get_num_threads() == threads
    assert [curve["provider"] for curve in curves] == ["triton_rnn", "torch.nn"]
    for curve in curves:
        assert set(curve) == CURVE_KEYS
        assert (curve["cell"], curve["mode"], curve["axis"]) == (cell, mode, axis)
        assert curve["base"] == {"batch": 2, "seq_len": 3, "hidden_size": 4, "layers": 1}
        assert [x for x, _ in curve["points"]] == list(TINY_VALUES[axis])
        assert all(seconds > 0 for _, seconds in curve["points"])


def test_threads_are_restored_after_an_error(monkeypatch):
    seen = []

    def fail(*arguments):
        seen.append(torch.get_num_threads())
        raise ArithmeticError

    monkeypatch.setattr(growth, "make_step", fail)
    threads = torch.get_num_threads()
    with pytest.raises(ArithmeticError):
        growth.measure_axis("rnn", "inference", "threads", (threads + 1,), TINY, 0.001)
    assert seen == [threads + 1]
    assert torch.get_num_threads() == threads


def test_training_step_leaves_the_gradients_of_one_step():
    step = first_results.make_step("torch.nn", "gru", "training", TINY)
    leaves = inspect.getclosurevars(step).nonlocals["leaves"]
    step()
    once = [leaf.grad.clone() for leaf in leaves]
    step()
    for leaf, before in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, before)


def test_table_fits_80_columns_unabridged():
    points = [(1, 1.0), (2, 2.5), (4, 3.5)]
    curves = [
        growth._curve("lstm", "inference", "hidden_size", provider, TINY, points)
        for provider in first_results.PROVIDERS
    ]
    output = io.StringIO()
    growth.Console(width=80, file=output).print(growth.curve_table(curves))
    assert "…" not in output.getvalue()
    assert "lstm inference" in output.getvalue()
    assert "0.90 ± 0.24" in output.getvalue()


def test_interruption_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    real, asked = growth.measure_axis, []

    def interrupted(cell, mode, axis, values, base, seconds):
        asked.append(axis)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(cell, mode, axis, TINY_VALUES[axis], TINY, 0.001)

    monkeypatch.setattr(growth, "measure_axis", interrupted)
    path = tmp_path / "growth.json"
    assert main(["growth", "--quick", "--cell", "rnn", "--save", str(path)]) == 130
    assert [one.name for one in tmp_path.iterdir()] == ["growth.json"]
    document = json.loads(path.read_text())
    assert set(document) == {"kind", "schema", "machine", "curves", "first_results"}
    assert (document["kind"], document["schema"]) == ("growth", 1)
    assert [(one["axis"], one["provider"]) for one in document["curves"]] == [
        ("seq_len", "triton_rnn"),
        ("seq_len", "torch.nn"),
    ]
    assert document["first_results"] == []
    assert "seq_len" in capsys.readouterr().out


def test_file_is_left_as_it_was_where_writing_fails(tmp_path):
    path = tmp_path / "growth.json"
    path.write_text("before")
    with pytest.raises(ValueError):
        growth.save({"seconds": float("nan")}, path)
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_first_results_and_their_failures_are_saved(monkeypatch, tmp_path):
    def rows(*arguments):
        yield first_results.row("a", 1.0)
        yield first_results.row("b", None, "failed: RuntimeError: no")

    monkeypatch.setattr(first_results, "start_rows", rows)
    monkeypatch.setattr(first_results, "triton_rows", lambda starts: iter(()))
    monkeypatch.setattr(first_results, "native_rows", lambda starts: iter(()))
    monkeypatch.setattr(growth, "QUICK", growth.replace(growth.QUICK, seconds=0.001))
    path = tmp_path / "growth.json"
    arguments = ["growth", "--quick", "--cell", "rnn", "--axis", "layers", "--save", str(path)]
    assert main(arguments) == 1
    document = json.loads(path.read_text())
    assert [one["mode"] for one in document["curves"][::2]] == ["inference", "training"]
    assert [one["seconds"] for one in document["first_results"]] == [1.0, None]


def test_first_call_is_measured_in_fresh_processes():
    rows = list(first_results.start_rows(["lstm"], ["training"], ["triton_rnn"], 2))
    assert [one["name"] for one in rows] == [
        "import torch, first start",
        "import torch, later starts",
        "import triton_rnn after torch, first start",
        "import triton_rnn after torch, later starts",
        "triton_rnn lstm training, first call, first start",
        "triton_rnn lstm training, first call, later starts",
    ]
    assert all(one["seconds"] > 0 for one in rows)
    assert not first_results.failed(rows)


def test_failed_process_is_told_in_a_line():
    rows = list(first_results.start_rows(["nothing"], ["inference"], ["torch.nn"], 1))
    assert len(rows) == 1
    assert rows[0]["seconds"] is None
    assert rows[0]["note"].startswith("failed: AttributeError")
    assert first_results.failed(rows)


def test_kernels_are_compiled_once_and_then_come_from_the_cache():
    pytest.importorskip("triton")
    compiled, cached = first_results.triton_rows(1)
    assert compiled["name"] == "Triton kernels of an LSTM layer for sm_90, compiled"
    assert cached["name"] == "Triton kernels of an LSTM layer for sm_90, from the cache"
    assert compiled["note"].startswith("3 kernels")
    assert 0 < cached["seconds"] < compiled["seconds"] / 2


def test_loops_are_compiled_once_and_then_come_from_the_cache():
    compiled, cached = first_results.native_rows(1)
    if compiled["seconds"] is None:
        pytest.skip(f"no C loops here: {compiled['note']}")
    assert compiled["name"] == "C loops, compiled"
    assert compiled["note"].startswith("float32 LSTM forward, ")
    assert 0 < cached["seconds"] < compiled["seconds"] / 5


def test_kernels_are_skipped_without_triton(monkeypatch):
    monkeypatch.setattr(
        first_results, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None))
    )
    rows = list(first_results.triton_rows(1))
    assert [one["seconds"] for one in rows] == [None, None]
    assert all(one["note"] == "skipped: there is no triton" for one in rows)
    assert not first_results.failed(rows)


def test_bad_requests_exit_with_2_and_a_line(monkeypatch, tmp_path, capsys):
    assert main(["growth", "--save", str(tmp_path / "missing" / "growth.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["growth", "--save", str(tmp_path)]) == 2
    monkeypatch.setattr(growth, "usable_cores", lambda: 1)
    assert main(["growth", "--axis", "threads"]) == 2
    for arguments in (["--axis", "width"], ["--cell", "qrnn"], ["--mode", "both"]):
        with pytest.raises(SystemExit) as stopped:
            main(["growth", *arguments])
        assert stopped.value.code == 2
