"""What ``import triton_rnn`` and the first call cost, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.children import run_child
from bench.conftest import selected_cells
from bench.tables import Cost, Report
from bench.workload import OURS

IMPORT_SECONDS = 0.050
FIRST_CALL_SECONDS = 0.150
# As users have it, also where the environment forbids to keep it: without, half of an import is
# Python's compiling.
BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}
# The compiler's second, and the rest of a first call.
MACHINE_SECONDS = 1.0 + FIRST_CALL_SECONDS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    if "cell" in metafunc.fixturenames:
        modes = ("training",) if config.getoption("--quick") else ("inference", "training")
        metafunc.parametrize("cell", selected_cells(config))
        metafunc.parametrize("mode", modes)


@pytest.fixture(autouse=True)
def _nothing_narrower_is_asked_for(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--case"):
        pytest.skip("--case asks for certain layers")


def seconds_of(printed: dict[str, object]) -> float:
    assert isinstance(printed["seconds"], float)
    return printed["seconds"]


def test_import_brings_neither_triton_nor_scripts_anything(report: Report) -> None:
    """The time is reported, the rest is asserted: a slow disk is no fault of the package's."""
    # The first one may have to write the bytecode; the least is what an import costs.
    printed = [run_child("import", environment=BYTECODE) for _ in range(3)]
    seconds = min(map(seconds_of, printed))
    report.costs.append(Cost("import triton_rnn, after torch", seconds, IMPORT_SECONDS))
    assert not printed[0]["imported_triton"]
    assert printed[0]["scripted"] == []


def test_first_call(
    report: Report, child_environment: dict[str, str], tmp_path: Path, cell: str, mode: str
) -> None:
    # Whatever is compiled once per machine is compiled by the first, and found by the second.
    environment = {**child_environment, **BYTECODE, "XDG_CACHE_HOME": str(tmp_path)}
    environment["TRITON_RNN_CACHE"] = str(tmp_path / "triton_rnn")
    arguments = ("first-call", OURS, cell, mode)
    ever, again = (seconds_of(run_child(*arguments, environment=environment)) for _ in range(2))
    name = f"first call of {cell}, {mode}"
    report.costs.append(Cost(f"{name}, once per machine", ever, MACHINE_SECONDS))
    report.costs.append(Cost(f"{name}, once per process", again, FIRST_CALL_SECONDS))
