"""Speed of a layer against torch.nn, case by case."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture  # type: ignore[import-untyped]

from bench.cases import Case
from bench.conftest import Laboratory, selected_cases
from bench.workload import OURS, PROVIDERS


class RecordedClock:
    """A clock that plays back durations, so that pytest-benchmark tells what was measured in turn.

    pytest-benchmark times one function after the other; a pair is only fair when timed in turn. Its
    statistics, tables, files and comparisons are kept by letting it read this clock instead.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.durations: list[float] = []

    def load(self, durations: tuple[float, ...]) -> None:
        self.durations = list(reversed(durations))

    def advance(self) -> None:
        self.now = self.durations.pop()

    def __call__(self) -> float:
        now, self.now = self.now, 0.0
        return now


clock = RecordedClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = selected_cases(metafunc.config)
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])
    # The inner parameter, so that the rows of a case stand together.
    metafunc.parametrize("provider", PROVIDERS)


@pytest.mark.benchmark(timer=clock)
def test_layer(
    benchmark: BenchmarkFixture, laboratory: Laboratory, case: Case, provider: str
) -> None:
    """The first row of a case checks and times both sides; the second reads what was measured."""
    if benchmark.disabled:
        # Untimed, so one row does for both.
        benchmark.pedantic(laboratory.check if provider == OURS else lambda _: None, args=(case,))
        return
    pair = laboratory.measure(case)
    durations = pair.ours if provider == OURS else pair.reference
    benchmark.group = case.id
    benchmark.name = provider
    benchmark.extra_info.update(
        ratio=pair.ratio,
        ratio_quartiles=pair.ratio_quartiles,
        calls_per_round=pair.calls_per_round,
    )
    clock.load(durations)
    benchmark.pedantic(clock.advance, rounds=len(durations))
