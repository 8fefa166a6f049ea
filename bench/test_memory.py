"""Peak memory of a training step against torch.nn, each side in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.cases import Case, Size
from bench.children import RETURN_FREED, run_child
from bench.conftest import selected_cells
from bench.tables import PeakMemory, Report
from bench.workload import OURS, PAIR, TORCH

MIDDLE = Size(32, 100, 256, 256, directions=2)
LARGE = Size(64, 256, 512, 512)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    quick = config.getoption("--quick")
    forms = ((MIDDLE, False),) if quick else ((MIDDLE, False), (MIDDLE, True), (LARGE, False))
    cases = [
        Case(cell, "training", packed, size)
        for cell in selected_cells(config)
        for size, packed in forms
    ]
    cases = [case for case in cases if config.getoption("--case") in case.id]
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def peak_of(provider: str, case: Case, environment: dict[str, str]) -> int:
    printed = run_child("memory", provider, case.id, environment={**environment, **RETURN_FREED})
    assert isinstance(printed["bytes"], int)
    return printed["bytes"]


@pytest.mark.skipif(
    not os.access(Path("/proc/self/clear_refs"), os.W_OK),
    reason="no /proc/self/clear_refs to write: the peak of a step cannot be read here",
)
def test_training_needs_no_more_memory_than_torch(
    report: Report, child_environment: dict[str, str], case: Case
) -> None:
    bytes_of = {provider: peak_of(provider, case, child_environment) for provider in PAIR}
    peak = PeakMemory(case, bytes_of[OURS], bytes_of[TORCH])
    if not peak.reached and peak.ours < 1.25 * peak.reference:
        # Chance can only add a little, so the least of two counts.
        again = {provider: peak_of(provider, case, child_environment) for provider in PAIR}
        peak = PeakMemory(
            case, min(bytes_of[OURS], again[OURS]), min(bytes_of[TORCH], again[TORCH])
        )
    report.memory.append(peak)
    assert peak.reached, (
        f"ours {peak.ours / 2**20:.1f} MiB, torch.nn's {peak.reference / 2**20:.1f}"
    )
