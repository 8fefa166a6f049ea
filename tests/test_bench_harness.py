"""The benchmark harness: what it would show if it were wrong about what it measures."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

import triton_rnn

ROOT = Path(__file__).parent.parent
# Appended: an installed triton_rnn is still the one that is tested.
sys.path.append(str(ROOT))

from bench import (  # noqa: E402  (needs the path)
    cases,
    gate,
    gpu_loops,
    providers,
    tables,
    turns,
    workload,
)
from bench.__main__ import main  # noqa: E402  (needs the path)

TINY = cases.Size(3, 5, 4, 3, layers=2, directions=2)
ISSUE = {
    (1, 5, 4, 3, 1, 1),
    (1, 50, 1, 16, 1, 1),
    (10, 3, 100, 20, 4, 1),
    (32, 10, 10, 20, 2, 1),
    (1, 100, 128, 128, 1, 1),
    (8, 100, 128, 128, 1, 2),
    (32, 100, 128, 128, 2, 1),
    (32, 100, 256, 256, 1, 2),
    (64, 256, 512, 512, 1, 1),
    (1, 1000, 512, 512, 1, 1),
    (16, 256, 1024, 1024, 1, 1),
}


def sizes_of(selected: list[cases.Case]) -> set[tuple[int, ...]]:
    return {
        (s.batch, s.seq_len, s.input_size, s.hidden_size, s.layers, s.directions)
        for s in (case.size for case in selected)
    }


def test_every_case_of_the_standard_grid_is_measured() -> None:
    selected = cases.select("standard")
    kinds = [("inference", False), ("inference", True), ("training", False), ("training", True)]
    kinds.append(("step", False))
    assert len(selected) == len(ISSUE) * 3 * len(kinds)
    for cell in ("rnn", "gru", "lstm"):
        for kind in kinds:
            chosen = [c for c in selected if c.cell == cell and (c.mode, c.packed) == kind]
            assert sizes_of(chosen) == ISSUE


def test_cases_of_a_gpu_are_there_only_where_one_is_asked_for() -> None:
    assert {case.device for case in cases.select("standard")} == {"cpu"}
    both = cases.select("standard", devices=("cpu", "cuda"))
    on_gpu = [case for case in both if case.device == "cuda"]
    assert {case.dtype for case in on_gpu} == set(cases.GPU_DTYPES)
    assert {case.mode for case in on_gpu} == set(cases.MODES)
    assert len({case.id for case in both}) == len(both)


def test_other_sizes_are_off_the_grid() -> None:
    assert not sizes_of(cases.select("other")) & ISSUE


def test_case_ids_are_unique_and_lead_back_to_the_case() -> None:
    for grid in cases.GRIDS:
        every = cases.select(grid, cases.CELLS + cases.EXTRA_CELLS)
        assert len({case.id for case in every}) == len(every)
        assert all(cases.case_by_id(case.id) == case for case in every)


def test_the_small_grids_targets_are_of_small_sizes() -> None:
    assert {target.group: (target.mean, target.worst) for target in tables.SMALL_TARGETS} == {
        "RNN inference, small": (6.0, 1.5),
        "GRU inference, small": (6.0, 1.5),
        "LSTM inference, small": (2.5, 1.1),
        "RNN training, small": (5.0, 1.5),
        "GRU training, small": (5.0, 1.5),
        "LSTM training, small": (2.5, 1.1),
    }
    target = tables.SMALL_TARGETS[0]
    found = [case for case in cases.select("small", ("rnn",)) if target.contains(case)]
    assert {case.size.hidden_size for case in found} == {3, 16, 64, 128}
    assert {case.size.batch for case in found} == {1, 2, 8}


def test_a_peer_is_compared_in_a_line() -> None:
    def beside(ours: float, theirs: float) -> tables.Measurement:
        sides = {"triton_rnn": {0: ours}, "torch.nn": {0: 8.0}, "onnxruntime": {0: theirs}}
        rounds = turns.Rounds(sides, dict.fromkeys(sides, 1))
        size = cases.Size(1, int(theirs), 2, 2)
        return tables.Measurement(cases.Case("gru", "inference", False, size), rounds)

    report = tables.Report("", True, measurements=[beside(1.0, 2.0), beside(4.0, 2.0)])
    report.measurements[1].case = cases.Case("gru", "inference", False, cases.Size(1, 9, 2, 2))
    lines = tables.closing_lines(report)
    assert any(
        "As fast as onnxruntime or faster in 1 of 2 cases; geometric mean 1.00, worst 0.50" in line
        for line in lines
    )


def test_every_cell_and_mode_is_in_the_quick_selection() -> None:
    quick = cases.select("standard", quick=True)
    kinds = {(case.cell, case.mode, case.packed) for case in quick}
    assert len(kinds) == 15
    assert len(quick) < 75


@pytest.mark.parametrize(
    "size", [*cases.STANDARD_SIZES, *cases.OTHER_SIZES], ids=lambda size: size.id
)
def test_lengths_descend_from_all_steps_to_half_of_them(size: cases.Size) -> None:
    lengths = size.lengths()
    assert len(lengths) == size.batch
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == size.seq_len
    assert lengths[-1] == (size.seq_len if size.batch == 1 else math.ceil(size.seq_len / 2))


CELLS = cases.CELLS + cases.EXTRA_CELLS
CLASSES = cases.cases_of([TINY], CELLS)


@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.id)
def test_the_sides_of_a_case_are_equal_and_pass_the_gate(case: cases.Case) -> None:
    ours = workload.Workload(case, workload.OURS)
    reference = workload.Workload(case, workload.TORCH)
    # Every class is ours or torch's, never the same on both sides.
    assert type(ours.layer).__module__.startswith("triton_rnn")
    assert type(reference.layer).__module__.startswith("torch")
    results = ours.results()
    gate.check_equal(results, reference.results(), 1e-5)
    assert ("c_n" in results) == (case.cell == "lstm")
    gradients = [name for name in results if name.startswith("grad of ")]
    # Of two weights and two biases per layer and direction; a whole step's input is data.
    of_input = case.mode == "training"
    assert len(gradients) == (of_input + 4 * 2 * 2 if case.training else 0)


@pytest.mark.parametrize("provider", providers.PROVIDERS)
@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.id)
def test_every_provider_computes_what_torch_does_or_says_why_not(
    case: cases.Case, provider: str
) -> None:
    """Two layers of two directions: gates, order, states and directions all have to be right."""
    reason = providers.obstacle(provider, case)
    if provider == providers.COMPILED:
        # Twenty unrolled steps are too many by the harness's own rule; the next test compiles.
        assert reason is not None
        return
    if reason is not None:
        known = ("padded input", "inference only", "no CUDA", "not installed", "no C compiler")
        assert any(words in reason for words in known)
        assert provider not in providers.chosen(case, (), quick=False)
        return
    reference = workload.Workload(case, workload.TORCH).results()
    try:
        results = providers.build(provider, case).results()
    except triton_rnn.BackendError:
        # A backend's own tests say which calls it refuses; here it is one that a table leaves out.
        assert provider in providers.BACKENDS
        return
    gate.check_equal(results, reference, gate.tolerance_of(case))


def test_torch_compile_is_measured_where_little_is_to_be_compiled() -> None:
    case = cases.Case("gru", "training", False, cases.Size(2, 2, 3, 4))
    if providers.obstacle(providers.COMPILED, case) is not None:
        pytest.skip("torch.compile needs a C++ compiler")
    # Whatever was compiled before in this process.
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    side = providers.build(providers.COMPILED, case)
    reference = workload.Workload(case, workload.TORCH).results()
    gate.check_equal(side.results(), reference, gate.TOLERANCE)
    # It was compiled, and not left to torch.nn's own loop.
    assert providers.describe(providers.COMPILED, side)["algorithm"] == "Inductor, unrolled"
    assert graphs["unique_graphs"] == before + 1


def test_quick_runs_leave_out_what_takes_long_to_compile() -> None:
    case = cases.Case("gru", "inference", False, cases.Size(1, 5, 4, 3))
    assert providers.COMPILED not in providers.chosen(case, (), quick=True)
    assert providers.chosen(case, ("triton_rnn",), quick=False) == list(workload.PAIR)
    asked = providers.chosen(case, ("loop",), quick=False)
    assert asked == ["triton_rnn", "torch.nn", "loop"]


@pytest.mark.parametrize(
    ("cell", "packed", "algorithm"),
    [("lstm", False, "oneDNN"), ("lstm", True, "native"), ("gru", False, "native")],
)
def test_what_torch_ran_is_named_from_what_it_ran(cell: str, packed: bool, algorithm: str) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    side = workload.Workload(cases.Case(cell, "training", packed, TINY), workload.TORCH)
    side.results()
    found = providers.describe(workload.TORCH, side)
    assert str(found["algorithm"]).startswith(algorithm)
    # At least the gradients of the weights.
    assert found["peak_bytes"] >= 4 * sum(p.numel() for p in side.layer.parameters())


def test_work_is_counted_by_hand() -> None:
    size = cases.Size(2, 3, 4, 5, layers=2)
    inference = cases.Case("gru", "inference", False, size)
    # Two operations for each of 6 rows, 15 outputs of (4 + 5) and of (5 + 5) inputs.
    assert providers.work_of(inference).operations == 2 * 6 * 15 * (9 + 10)
    training = cases.Case("gru", "training", False, size)
    assert providers.work_of(training).operations == 3 * 2 * 6 * 15 * (9 + 10)
    assert providers.floor_seconds(training, providers.work_of(training)) > 0


Result = tuple[torch.Tensor, torch.Tensor]


def shifted_output(output: torch.Tensor, h_n: torch.Tensor) -> Result:
    return output + 1e-3, h_n


def scaled_state(output: torch.Tensor, h_n: torch.Tensor) -> Result:
    return output, h_n * 1.001


def not_a_number(output: torch.Tensor, h_n: torch.Tensor) -> Result:
    return torch.where(output == output.max(), torch.nan, output), h_n


def right_with_a_row_of_the_last_step_left_out_of_the_gradient(
    output: torch.Tensor, h_n: torch.Tensor
) -> Result:
    mask = torch.ones_like(output)
    mask[-1, -1] = 0
    return output * mask + output.detach() * (1 - mask), h_n


def other_dtype(output: torch.Tensor, h_n: torch.Tensor) -> Result:
    return output.double(), h_n


def results_of_a_gru(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.nn.GRU], object], training: bool
) -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor | None]]:
    """What the two sides compute when ours is torch's GRU, spoiled."""

    def spoiled(*arguments: int, bidirectional: bool) -> torch.nn.GRU:
        layer = torch.nn.GRU(*arguments, bidirectional=bidirectional)
        spoil(layer)
        return layer

    case = cases.Case(
        "gru", "training" if training else "inference", False, cases.Size(8, 20, 16, 16)
    )
    reference = workload.Workload(case, workload.TORCH).results()
    monkeypatch.setattr(triton_rnn, "GRU", spoiled)
    return workload.Workload(case, workload.OURS).results(), reference


@pytest.mark.parametrize(
    ("spoil", "training", "named"),
    [
        (shifted_output, False, "output: relative error"),
        (scaled_state, False, "h_n: relative error"),
        (not_a_number, False, "output: relative error nan"),
        (other_dtype, False, "output: torch.float64"),
        (
            right_with_a_row_of_the_last_step_left_out_of_the_gradient,
            True,
            r"^grad of input: relative error .*grad of weight_hh_l0: relative error",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_gate_stops_a_wrong_layer(
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[torch.Tensor, torch.Tensor], Result],
    training: bool,
    named: str,
) -> None:
    def hook(layer: torch.nn.GRU) -> object:
        return layer.register_forward_hook(lambda module, arguments, result: spoil(*result))

    with pytest.raises(gate.GateError, match=named):
        gate.check_equal(*results_of_a_gru(monkeypatch, hook, training))


def test_the_gate_stops_a_layer_that_gives_a_parameter_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = results_of_a_gru(
        monkeypatch, lambda layer: layer.bias_hh_l0.requires_grad_(False), training=True
    )
    with pytest.raises(gate.GateError, match=r"^grad of bias_hh_l0: missing on one side$"):
        gate.check_equal(*results)


def test_the_gate_lets_an_unspoiled_layer_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    gate.check_equal(*results_of_a_gru(monkeypatch, lambda layer: None, training=True))


def test_the_gate_sees_one_wrong_element_among_a_million() -> None:
    reference = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    ours = reference.clone()
    ours[12345] += 1
    with pytest.raises(gate.GateError):
        gate.check_equal({"output": ours}, {"output": reference})


def test_the_gate_sees_a_result_that_one_side_lacks() -> None:
    with pytest.raises(gate.GateError, match="c_n"):
        gate.check_equal({"output": torch.ones(1)}, {"output": torch.ones(1), "c_n": torch.ones(1)})


class FakeSide:
    """Takes ``seconds`` of a clock that only it moves, and notes its turns."""

    def __init__(self, name: str, seconds: float, clock: list[float], turns: list[str]):
        self.name, self.seconds, self.clock, self.turns = name, seconds, clock, turns
        self.context: Callable[[], AbstractContextManager[object]] = nullcontext

    def step(self) -> None:
        self.clock[0] += self.seconds
        if not self.turns or self.turns[-1] != self.name:
            self.turns.append(self.name)


def timed(
    seconds: dict[str, float], budget: turns.Budget | None = None
) -> tuple[turns.Rounds, list[str]]:
    clock, turn = [0.0], list[str]()
    sides = {name: FakeSide(name, taken, clock, turn) for name, taken in seconds.items()}
    return turns.measure(sides, budget, turns.wall_loop(lambda: clock[0])), turn


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0])
def test_rounds_give_the_ratio_of_the_sides(scale: float) -> None:
    rounds, _ = timed({"a": scale, "b": 3 * scale, "c": 10 * scale})
    assert rounds.ratio("a", "b") == pytest.approx(3)
    assert rounds.ratio("c", "b") == pytest.approx(0.3)
    assert rounds.ratio_quartiles("a", "b") == pytest.approx((3, 3))
    assert rounds.median("a") == pytest.approx(scale)
    assert len(rounds.of("a")) == len(rounds.of("b")) >= turns.FEWEST_ROUNDS
    assert len(rounds.of("c")) >= turns.FEWEST_ROUNDS
    # The clock of a slow machine: the sides are not run on and on.
    if scale == 30.0:
        assert len(rounds.of("a")) == turns.FEWEST_ROUNDS


def test_the_sides_are_timed_in_turn() -> None:
    rounds, turn = timed({"a": 0.05, "b": 0.05}, turns.Budget(rounds=6))
    # a b, b a, a b: neighbouring turns of a side melt into one.
    assert turn[:5] == ["a", "b", "a", "b", "a"]
    assert len(turn) >= len(rounds.of("a"))


def test_a_slow_further_side_sits_out_rounds_spread_over_all_of_them() -> None:
    rounds, _ = timed({"a": 1e-4, "b": 1e-4, "slow": 0.05})
    taken = list(rounds.seconds["slow"])
    assert turns.FEWEST_ROUNDS <= len(taken) < len(rounds.of("a")) / 5
    gaps = {after - before for before, after in itertools.pairwise(taken)}
    assert len(gaps) == 1
    assert taken[-1] >= len(rounds.of("a")) - 2 * gaps.pop()


def test_ratios_are_of_medians_and_quartiles_of_neighbours() -> None:
    seconds = {"a": {0: 1.0, 1: 1.0, 2: 10.0}, "b": {0: 2.0, 1: 2.0, 2: 30.0}}
    rounds = turns.Rounds(seconds, {"a": 1, "b": 1})
    assert rounds.ratio("a", "b") == 2.0
    assert rounds.ratio_quartiles("a", "b") == (2.0, 2.5)


def test_rounds_on_a_device_keep_the_time_on_the_wall_too() -> None:
    case = cases.Case("gru", "inference", False, TINY)
    sides = {name: workload.Workload(case, name) for name in workload.PAIR}
    loop = gpu_loops.device_loop("cpu")
    rounds = turns.measure(sides, turns.QUICK_BUDGET, loop)
    assert rounds.median(workload.OURS) > 0
    # On a CPU both are the wall's.
    wall = loop.wall_seconds(sides[workload.OURS])
    assert wall == pytest.approx(rounds.median(workload.OURS), rel=0.5)
    flushed = gpu_loops.flushed_seconds(sides, "cpu")
    assert set(flushed) == set(sides)
    assert min(flushed.values()) > 0


def test_the_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert turns.geometric_mean([4.0, 0.25]) == pytest.approx(1.0)
    assert turns.geometric_mean([2.0, 2.0, 16.0]) == pytest.approx(4.0)
    for impossible in ([], [1.0, 0.0]):
        with pytest.raises(statistics.StatisticsError):
            turns.geometric_mean(impossible)


def measured(
    cell: str, mode: str, packed: bool, ratio: float, others_share: float | None = None
) -> tables.Measurement:
    sides = {"triton_rnn": dict.fromkeys(range(4), 1.0), "torch.nn": dict.fromkeys(range(4), ratio)}
    rounds = turns.Rounds(sides, dict.fromkeys(sides, 1), others_share)
    return tables.Measurement(cases.Case(cell, mode, packed, TINY), rounds)


def test_a_summary_reaches_its_target_only_by_mean_and_by_worst_case() -> None:
    target = next(target for target in tables.TARGETS if target.group == "GRU training")
    fast, faster = measured("gru", "training", False, 2.5), measured("gru", "training", True, 3.0)
    summary = tables.summarise(target, [fast, faster])
    assert summary.padded == pytest.approx(2.5)
    assert summary.packed == pytest.approx(3.0)
    assert summary.both == pytest.approx(math.sqrt(7.5))
    # Over 2.6 with the packed cases, but not without.
    assert not summary.reached
    assert tables.summarise(target, [faster]).reached
    slow = measured("gru", "training", False, 0.99)
    summary = tables.summarise(target, [slow, *[faster] * 20])
    assert summary.worst is slow
    assert not summary.reached


def test_the_targets_are_these() -> None:
    targets = {target.group: (target.mean, target.worst) for target in tables.TARGETS}
    assert targets == {
        "RNN inference": (2.0, 1.0),
        "RNN training": (2.2, 1.0),
        "RNN relu inference": (2.0, 1.0),
        "RNN relu training": (2.2, 1.0),
        "GRU inference": (1.6, 1.0),
        "GRU training": (2.6, 1.0),
        "LSTM inference": (1.05, 0.97),
        "LSTM training": (1.05, 0.97),
        "all cells training, packed": (2.0, 1.0),
    }


def test_a_case_measured_beside_other_work_is_marked() -> None:
    busy = measured("gru", "training", False, 2.0, others_share=0.5)
    quiet = measured("gru", "training", False, 2.0, others_share=0.01)
    assert "are marked ?" in tables.to_markdown(tables.Report("", True, measurements=[busy]))
    assert "are marked ?" not in tables.to_markdown(tables.Report("", True, measurements=[quiet]))


def test_a_run_that_is_cut_off_while_it_writes_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tables.Report("first", True)
    _, data = tables.save(report, tmp_path / "table")
    before = data.read_text()

    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tables.save(tables.Report("second", True), tmp_path / "table")
    assert data.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.md"]


SPOILED_RNN = """
import torch, triton_rnn

class SpoiledRNN(torch.nn.RNN):
    def forward(self, *arguments):
        output, h_n = super().forward(*arguments)
        return output * 1.001, h_n

triton_rnn.RNN = SpoiledRNN
"""


def test_a_table_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "pytest", "bench/test_layers.py", "--quick", "-p"]
    command += ["no:cacheprovider", "--save-table", str(tmp_path / "file" / "table")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--save-table: " in run.stderr
    assert "Traceback" not in run.stderr


def test_a_run_ends_with_a_table_of_what_passed_the_gate_alone(tmp_path: Path) -> None:
    """A whole ``pytest bench`` of one size and two cells, one of which computes wrongly."""
    (tmp_path / "spoiled_rnn.py").write_text(SPOILED_RNN)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "bench/test_layers.py", "--quick", "--tb=line"]
    command += ["--cell", "rnn", "--cell", "gru", "--case", "inference-padded-N1-T5-"]
    command += ["--save-table", str(tmp_path / "table"), "-p", "no:cacheprovider"]
    command += ["-p", "spoiled_rnn", "--provider", "loop"]
    command += [f"--benchmark-json={tmp_path / 'benchmark.json'}"]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "output: relative error" in run.stdout
    # pytest-benchmark's own table, a row per provider; none for the cell that computes wrongly.
    gru, rnn = "gru-inference-padded-N1-T5-I4-H3-L1-D1", "rnn-inference-padded-N1-T5-I4-H3-L1-D1"
    assert f"benchmark '{gru}': 3 tests" in run.stdout
    assert f"benchmark '{rnn}'" not in run.stdout
    assert "3 failed, 3 passed" in run.stdout
    ours_last = run.stdout.rindex("Ratios over torch.nn beside the targets")
    assert ours_last > run.stdout.rindex(f"benchmark '{gru}'")
    assert "GRU inference" in run.stdout
    assert "RNN inference" not in run.stdout
    assert f"Not timed: {rnn}, triton_rnn: GateError" in run.stdout

    saved = json.loads((tmp_path / "table.json").read_text())
    found = {entry["id"]: entry for entry in saved["cases"]}
    assert set(found) == {gru, rnn}
    assert found[rnn]["providers"] == {}
    assert "triton_rnn" in found[rnn]["failed"]
    rows = found[gru]["providers"]
    assert set(rows) == {"triton_rnn", "torch.nn", "loop"}
    ratio = rows["torch.nn"]["seconds"] / rows["triton_rnn"]["seconds"]
    assert rows["triton_rnn"]["ratio"] == pytest.approx(ratio)
    assert rows["torch.nn"]["algorithm"].startswith("native")
    assert 0 < rows["triton_rnn"]["roofline"] < 1
    markdown = (tmp_path / "table.md").read_text()
    assert "| N1 T5 I4 H3 L1 D1 |" in markdown
    assert f"{ratio:.2f}" in markdown
    # The report reads what was just written.
    out = tmp_path / "report"
    assert main(["report", str(tmp_path / "table.json"), "--out", str(out)]) == 0
    assert gru.split("-padded")[0].replace("-", " ") in (out / "report.md").read_text()

    details = json.loads((tmp_path / "benchmark.json").read_text())
    rows = {entry["name"]: entry["extra_info"] for entry in details["benchmarks"]}
    assert rows["triton_rnn"]["backend"] in ("native", "aten")
    for name in ("operations", "least_bytes", "machine", "dtype", "peak_bytes", "roofline"):
        assert rows["triton_rnn"][name] is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--provider", "keras"], "invalid choice: 'keras'"),
        (["--threads", "0"], "--threads: a number above zero"),
        (["--grid", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_arguments_are_told_in_a_line(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "pytest", "bench", *arguments, "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    # pytest's code for wrong usage.
    assert run.returncode == 4
    assert words in run.stderr
    assert "Traceback" not in run.stderr
