"""Options of ``pytest bench``, the measuring of a case, and the report at the end."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import tables
from bench.cases import CELLS, EXTRA_CELLS, GRIDS, Case, select
from bench.gate import RELU_TOLERANCE, TOLERANCE, check_equal
from bench.machine import describe_machine
from bench.paired import QUICK_BUDGET, Budget, Pair, measure
from bench.tables import Measurement, Report
from bench.workload import OURS, TORCH, Workload
from triton_rnn import BackendError

report_key = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("triton_rnn", "triton_rnn against torch.nn")
    group.addoption("--quick", action="store_true", help="small cases, short budgets: a minute")
    group.addoption(
        "--cell",
        action="append",
        choices=CELLS + EXTRA_CELLS,
        help="only this cell (repeatable); rnn-relu is measured only when asked for",
    )
    group.addoption("--case", default="", metavar="TEXT", help="only cases with TEXT in their id")
    group.addoption("--grid", choices=GRIDS, default="issue", help="which list of sizes")
    group.addoption("--backend", metavar="NAME", help="run ours inside use_backend(NAME)")
    group.addoption("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")
    group.addoption(
        "--save-table", type=Path, metavar="FILE", help="write FILE.md and FILE.json at the end"
    )


def selected_cells(config: pytest.Config) -> tuple[str, ...]:
    return tuple(dict.fromkeys(config.getoption("--cell") or CELLS))


def selected_cases(config: pytest.Config) -> list[Case]:
    return select(
        config.getoption("--grid"),
        selected_cells(config),
        config.getoption("--case"),
        config.getoption("--quick"),
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    # Two rows per case: the columns that compare them, unless others were asked for.
    given = config.invocation_params.args
    if not any(argument.startswith("--benchmark-columns") for argument in given):
        config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]
    narrowed = [f"--cell {cell}" for cell in config.getoption("--cell") or ()]
    narrowed += [
        f"{name} {value}"
        for name in ("--case", "--backend", "--threads")
        if (value := config.getoption(name))
    ]
    quick = config.getoption("--quick")
    grid = config.getoption("--grid")
    title = " ".join(
        [f"triton_rnn over torch.nn, grid '{grid}'", *(["--quick"] if quick else []), *narrowed]
    )
    complete = grid == "issue" and not quick and not narrowed
    config.stash[report_key] = Report(title, complete, describe_machine())


class Laboratory:
    """Measures a case once, when the first of its two rows asks."""

    def __init__(self, config: pytest.Config, report: Report):
        self.backend: str | None = config.getoption("--backend")
        self.budget = QUICK_BUDGET if config.getoption("--quick") else Budget()
        self.report = report
        self.done: dict[Case, Pair | Exception] = {}

    def sides(self, case: Case) -> tuple[Workload, Workload]:
        """Ours and torch.nn's side of a case, both run once and found equal.

        Raises:
            GateError: they do not compute the same.
        """
        ours, reference = Workload(case, OURS, self.backend), Workload(case, TORCH)
        tolerance = RELU_TOLERANCE if case.cell == "rnn-relu" else TOLERANCE
        check_equal(ours.results(), reference.results(), tolerance)
        return ours, reference

    def check(self, case: Case) -> None:
        """The gate alone; skips what the backend of --backend does not do."""
        try:
            self.sides(case)
        except BackendError as error:
            pytest.skip(str(error))

    def measure(self, case: Case) -> Pair:
        """The timed pair; what kept a case from being timed is raised for both of its rows."""
        if case not in self.done:
            try:
                pair = measure(*self.sides(case), self.budget)
            except Exception as error:
                self.done[case] = error
                # --backend asked for what that backend does not do: no failure.
                if not isinstance(error, BackendError):
                    self.report.failed.append(case.id)
            else:
                self.done[case] = pair
                self.report.measurements.append(Measurement(case, pair))
        outcome = self.done[case]
        if isinstance(outcome, BackendError):
            pytest.skip(str(outcome))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[report_key]


@pytest.fixture(scope="session")
def child_environment(pytestconfig: pytest.Config) -> dict[str, str]:
    """--backend and --threads for measurements in a process of their own."""
    given = {
        "TRITON_RNN_BACKEND": pytestconfig.getoption("--backend"),
        "OMP_NUM_THREADS": pytestconfig.getoption("--threads"),
    }
    return {name: str(value) for name, value in given.items() if value is not None}


@pytest.fixture(scope="session")
def laboratory(pytestconfig: pytest.Config, report: Report) -> Iterator[Laboratory]:
    return Laboratory(pytestconfig, report)


# After pytest-benchmark's own table.
@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    report = config.stash[report_key]
    if report:
        terminalreporter.section("triton_rnn over torch.nn")
        text = io.StringIO()
        colour = terminalreporter._tw.hasmarkup
        # Narrower than this, the rows of a table would be broken up.
        width = max(shutil.get_terminal_size().columns, 150)
        console = Console(file=text, force_terminal=colour, no_color=not colour, width=width)
        for part in tables.render(report):
            console.print(part)
        terminalreporter.write(text.getvalue())
        path = config.getoption("--save-table")
        if path is not None:
            written = tables.save(report, path)
            terminalreporter.write_line(f"written: {', '.join(map(str, written))}")
