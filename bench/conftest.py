"""Options of ``pytest bench``, the measuring of a case, and the report at the end."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import providers, tables
from bench.cases import CELLS, EXTRA_CELLS, GRIDS, Case, select
from bench.gate import GateError, check_equal, tolerance_of
from bench.gpu_loops import device_loop, flushed_seconds
from bench.machine import CommandError, check_place, describe_machine
from bench.tables import Measurement, Report
from bench.turns import QUICK_BUDGET, Budget, measure
from bench.workload import OURS, TORCH
from triton_rnn import BackendError

report_key = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("triton_rnn", "triton_rnn against torch.nn and others")
    group.addoption("--quick", action="store_true", help="small cases, short budgets: two minutes")
    group.addoption(
        "--cell",
        action="append",
        choices=CELLS + EXTRA_CELLS,
        help="only this cell (repeatable); rnn-relu is measured only when asked for",
    )
    group.addoption("--case", default="", metavar="TEXT", help="only cases with TEXT in their id")
    group.addoption("--grid", choices=GRIDS, default="standard", help="which list of sizes")
    group.addoption(
        "--provider",
        action="append",
        choices=providers.PROVIDERS,
        help="beside triton_rnn and torch.nn only this one (repeatable); triton_rnn: no other",
    )
    group.addoption(
        "--device", choices=("cpu", "cuda"), help="only this device; both where there is a GPU"
    )
    group.addoption("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")
    group.addoption(
        "--save-table",
        type=Path,
        metavar="FILE",
        help="write FILE.md and FILE.json, anew after every case",
    )


def selected_cells(config: pytest.Config) -> tuple[str, ...]:
    return tuple(dict.fromkeys(config.getoption("--cell") or CELLS))


def selected_devices(config: pytest.Config) -> tuple[str, ...]:
    present = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    asked = config.getoption("--device")
    return tuple(device for device in present if asked in (None, device))


def selected_cases(config: pytest.Config) -> list[Case]:
    return select(
        config.getoption("--grid"),
        selected_cells(config),
        config.getoption("--case"),
        config.getoption("--quick"),
        selected_devices(config),
    )


def selected_providers(config: pytest.Config, case: Case) -> list[str]:
    return providers.chosen(case, config.getoption("--provider") or (), config.getoption("--quick"))


def pytest_configure(config: pytest.Config) -> None:
    path: Path | None = config.getoption("--save-table")
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for suffix in (".md", ".json"):
                check_place(path.with_suffix(suffix))
        except (OSError, CommandError) as error:
            raise pytest.UsageError(f"--save-table: {error}") from None
    threads = config.getoption("--threads")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError("--threads: a number above zero")
        torch.set_num_threads(threads)
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA or ROCm device")
    # A row per provider: the columns that compare them, unless others were asked for.
    given = config.invocation_params.args
    if not any(argument.startswith("--benchmark-columns") for argument in given):
        config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]
    narrowed = [f"--cell {cell}" for cell in config.getoption("--cell") or ()]
    narrowed += [
        f"{name} {value}"
        for name in ("--case", "--threads", "--device")
        if (value := config.getoption(name))
    ]
    if not torch.cuda.is_available() and "--device cpu" in narrowed:
        # The CPU's cases are all that there are.
        narrowed.remove("--device cpu")
    quick = config.getoption("--quick")
    grid = config.getoption("--grid")
    title = " ".join(
        [f"triton_rnn over torch.nn, grid '{grid}'", *(["--quick"] if quick else []), *narrowed]
    )
    complete = grid in ("standard", "small") and not quick and not narrowed
    targets = tables.SMALL_TARGETS if grid == "small" else tables.TARGETS
    config.stash[report_key] = Report(title, complete, quick, targets, describe_machine())


class Laboratory:
    """Measures a case once, when the first of its rows asks."""

    def __init__(self, config: pytest.Config, report: Report):
        self.config = config
        self.budget = QUICK_BUDGET if config.getoption("--quick") else Budget()
        self.path: Path | None = config.getoption("--save-table")
        self.report = report
        self.done: dict[Case, Measurement] = {}
        self.errors: dict[tuple[Case, str], Exception] = {}

    def sides(self, case: Case) -> dict[str, providers.Measured]:
        """The sides of a case, all run once and found equal to torch.nn; ours and torch.nn first.

        A side that cannot be built, fails, or computes something else is left out, and the reason
        kept. If it is ours or torch.nn, there is nothing to compare and no side is left.
        """
        sides: dict[str, providers.Measured] = {}
        expected = None
        # torch.nn's results come first, for all others are held against them.
        names = sorted(selected_providers(self.config, case), key=lambda name: name != TORCH)
        for name in names:
            try:
                side = providers.build(name, case)
                results = side.results()
                if expected is None:
                    expected = results
                check_equal(results, expected, tolerance_of(case))
            except Exception as error:
                self.errors[case, name] = error
                if name in (OURS, TORCH):
                    for other in names:
                        self.errors.setdefault((case, other), error)
                    return {}
            else:
                sides[name] = side
        return {name: sides[name] for name in sorted(sides, key=providers.PROVIDERS.index)}

    def check(self, case: Case, provider: str) -> None:
        """The gate alone."""
        if case not in self.done:
            self.sides(case)
            self.done[case] = Measurement(case)
        self._raise(case, provider)

    def measure(self, case: Case, provider: str) -> Measurement:
        """The case as measured; what kept this provider from being timed is raised."""
        if case not in self.done:
            self.done[case] = self._measured(case)
            if self.path is not None:
                # An interrupted run keeps what it measured.
                tables.save(self.report, self.path)
        self._raise(case, provider)
        return self.done[case]

    def _raise(self, case: Case, provider: str) -> None:
        error = self.errors.get((case, provider))
        # A backend asked for by name that does not do such a call is no failure.
        if isinstance(error, BackendError):
            pytest.skip(str(error))
        # Nor is another package's own error; the report names it. A wrong result is one.
        if provider in providers.PEERS and error is not None and not isinstance(error, GateError):
            pytest.skip(f"{provider}: {type(error).__name__}: {error}")
        if error is not None:
            raise error

    def _measured(self, case: Case) -> Measurement:
        sides = self.sides(case)
        failed = {
            name: " ".join(f"{type(error).__name__}: {error}".split())
            for (at, name), error in self.errors.items()
            if at == case and not isinstance(error, BackendError)
        }
        measurement = Measurement(case, failed=failed)
        if sides:
            on_device = device_loop() if case.device == "cuda" else None
            measurement.rounds = measure(sides, self.budget, on_device)
            measurement.details = {
                name: providers.describe(name, side) for name, side in sides.items()
            }
            if on_device is not None:
                for name, seconds in flushed_seconds(sides).items():
                    wall = on_device.wall_seconds(sides[name])
                    measurement.details[name].update(flushed_seconds=seconds, wall_seconds=wall)
            work = providers.work_of(case)
            measurement.operations, measurement.least_bytes = work
            measurement.floor_seconds = providers.floor_seconds(case, work)
            self.report.add_ceilings(case)
        self.report.measurements.append(measurement)
        return measurement


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[report_key]


@pytest.fixture(scope="session")
def child_environment(pytestconfig: pytest.Config) -> dict[str, str]:
    """--threads for measurements in a process of their own."""
    threads = pytestconfig.getoption("--threads")
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}


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
