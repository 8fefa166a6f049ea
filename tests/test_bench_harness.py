"""The benchmark harness: what it would show if it were wrong about what it measures."""

from __future__ import annotations

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

from bench import cases, gate, paired, tables, workload  # noqa: E402  (needs the path)

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


def test_every_case_of_the_issue_is_measured() -> None:
    selected = cases.select("issue")
    assert len(selected) == len(ISSUE) * 3 * 2 * 2
    for cell in ("rnn", "gru", "lstm"):
        for training in (False, True):
            for packed in (False, True):
                chosen = [
                    case
                    for case in selected
                    if (case.cell, case.training, case.packed) == (cell, training, packed)
                ]
                assert sizes_of(chosen) == ISSUE


def test_other_sizes_are_off_the_grid() -> None:
    assert not sizes_of(cases.select("other")) & ISSUE


def test_case_ids_are_unique_and_lead_back_to_the_case() -> None:
    every = [
        case for grid in cases.GRIDS for case in cases.select(grid, cases.CELLS + cases.EXTRA_CELLS)
    ]
    assert len({case.id for case in every}) == len(every)
    assert all(cases.case_by_id(case.id) == case for case in every)


def test_every_cell_and_mode_is_in_the_quick_selection() -> None:
    quick = cases.select("issue", quick=True)
    kinds = {(case.cell, case.training, case.packed) for case in quick}
    assert len(kinds) == 12
    assert len(quick) < 60


@pytest.mark.parametrize("size", [*cases.ISSUE_GRID, *cases.OTHER_SIZES], ids=lambda size: size.id)
def test_lengths_descend_from_all_steps_to_half_of_them(size: cases.Size) -> None:
    lengths = size.lengths()
    assert len(lengths) == size.batch
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == size.seq_len
    assert lengths[-1] == (size.seq_len if size.batch == 1 else math.ceil(size.seq_len / 2))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("cell", cases.CELLS + cases.EXTRA_CELLS)
def test_the_sides_of_a_case_are_equal_and_pass_the_gate(
    cell: str, training: bool, packed: bool
) -> None:
    case = cases.Case(cell, training, packed, TINY)
    ours = workload.Workload(case, workload.OURS)
    reference = workload.Workload(case, workload.TORCH)
    # Every class is ours or torch's, never the same on both sides.
    assert type(ours.layer).__module__.startswith("triton_rnn")
    assert type(reference.layer).__module__.startswith("torch")
    results = ours.results()
    gate.check_equal(results, reference.results(), 1e-5)
    assert ("c_n" in results) == (cell == "lstm")
    gradients = [name for name in results if name.startswith("grad of ")]
    # Of the input, and of two weights and two biases per layer and direction.
    assert len(gradients) == (1 + 4 * 2 * 2 if training else 0)


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

    case = cases.Case("gru", training, False, cases.Size(8, 20, 16, 16))
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


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0])
def test_a_pair_gives_the_ratio_of_the_sides(scale: float) -> None:
    clock, turns = [0.0], list[str]()
    ours, reference = (FakeSide(*side, clock, turns) for side in (("a", scale), ("b", 3 * scale)))
    pair = paired.measure(ours, reference, timer=lambda: clock[0])
    assert pair.ratio == pytest.approx(3)
    assert pair.ratio_quartiles == pytest.approx((3, 3))
    assert statistics.median(pair.ours) == pytest.approx(scale)
    assert len(pair.ours) == len(pair.reference) >= paired.FEWEST_ROUNDS
    # The clock of a slow machine: the sides are not run on and on.
    if scale == 30.0:
        assert len(pair.ours) == paired.FEWEST_ROUNDS


def test_the_sides_are_timed_in_turn() -> None:
    clock, turns = [0.0], list[str]()
    ours, reference = (FakeSide(name, 0.05, clock, turns) for name in "ab")
    pair = paired.measure(ours, reference, paired.Budget(rounds=6), timer=lambda: clock[0])
    # a b, b a, a b: neighbouring turns of a side melt into one.
    assert turns[:5] == ["a", "b", "a", "b", "a"]
    assert len(turns) >= len(pair.ours)


def test_ratios_are_of_medians_and_quartiles_of_neighbours() -> None:
    pair = paired.Pair((1.0, 1.0, 10.0), (2.0, 2.0, 30.0), 1)
    assert pair.ratio == 2.0
    assert pair.ratio_quartiles == (2.0, 2.5)


def test_the_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert paired.geometric_mean([4.0, 0.25]) == pytest.approx(1.0)
    assert paired.geometric_mean([2.0, 2.0, 16.0]) == pytest.approx(4.0)
    for impossible in ([], [1.0, 0.0]):
        with pytest.raises(statistics.StatisticsError):
            paired.geometric_mean(impossible)


def measured(cell: str, training: bool, packed: bool, ratio: float) -> tables.Measurement:
    case = cases.Case(cell, training, packed, TINY)
    return tables.Measurement(case, paired.Pair((1.0,) * 4, (ratio,) * 4, 1))


def test_a_summary_reaches_its_target_only_by_mean_and_by_worst_case() -> None:
    target = next(target for target in tables.TARGETS if target.group == "GRU training")
    fast, faster = measured("gru", True, False, 2.5), measured("gru", True, True, 3.0)
    summary = tables.summarise(target, [fast, faster])
    assert summary.padded == pytest.approx(2.5)
    assert summary.packed == pytest.approx(3.0)
    assert summary.both == pytest.approx(math.sqrt(7.5))
    # Over 2.6 with the packed cases, but not without.
    assert not summary.reached
    assert tables.summarise(target, [faster]).reached
    slow = measured("gru", True, False, 0.99)
    summary = tables.summarise(target, [slow, *[faster] * 20])
    assert summary.worst is slow
    assert not summary.reached


def test_the_targets_are_the_issues() -> None:
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
    case = cases.Case("gru", True, False, TINY)
    busy = tables.Measurement(case, paired.Pair((1.0,), (2.0,), 1, others_share=0.5))
    quiet = tables.Measurement(case, paired.Pair((1.0,), (2.0,), 1, others_share=0.01))
    assert "are marked ?" in tables.to_markdown(tables.Report("", True, measurements=[busy]))
    assert "are marked ?" not in tables.to_markdown(tables.Report("", True, measurements=[quiet]))


SPOILED_RNN = """
import torch, triton_rnn

class SpoiledRNN(torch.nn.RNN):
    def forward(self, *arguments):
        output, h_n = super().forward(*arguments)
        return output * 1.001, h_n

triton_rnn.RNN = SpoiledRNN
"""


def test_a_run_ends_with_a_table_of_what_passed_the_gate_alone(tmp_path: Path) -> None:
    """A whole ``pytest bench`` of one size and two cells, one of which computes wrongly."""
    (tmp_path / "spoiled_rnn.py").write_text(SPOILED_RNN)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "bench/test_layers.py", "--quick", "--tb=line"]
    command += ["--cell", "rnn", "--cell", "gru", "--case", "inference-padded-N1-T5-"]
    command += ["--save-table", str(tmp_path / "table"), "-p", "no:cacheprovider"]
    command += ["-p", "spoiled_rnn"]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "2 failed, 2 passed" in run.stdout
    assert "output: relative error" in run.stdout
    # pytest-benchmark's own table, a row per side; none for the cell that computes wrongly.
    gru, rnn = "gru-inference-padded-N1-T5-I4-H3-L1-D1", "rnn-inference-padded-N1-T5-I4-H3-L1-D1"
    assert f"benchmark '{gru}': 2 tests" in run.stdout
    assert f"benchmark '{rnn}'" not in run.stdout
    ours_last = run.stdout.rindex("Ratios over torch.nn beside the targets")
    assert ours_last > run.stdout.rindex(f"benchmark '{gru}'")
    assert "GRU inference" in run.stdout
    assert "RNN inference" not in run.stdout
    assert f"Not timed, the gate or an error stopped them: {rnn}" in run.stdout

    saved = json.loads((tmp_path / "table.json").read_text())
    assert [entry["id"] for entry in saved["cases"]] == [gru]
    entry = saved["cases"][0]
    assert entry["ratio"] == pytest.approx(entry["seconds_torch"] / entry["seconds_ours"])
    assert saved["failed"] == [rnn]
    markdown = (tmp_path / "table.md").read_text()
    assert "| N1 T5 I4 H3 L1 D1 |" in markdown
    assert f"{entry['ratio']:.2f}" in markdown
