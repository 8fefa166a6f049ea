"""Speed of a layer against torch.nn and others, case by case."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture  # type: ignore[import-untyped]

from bench.cases import Case
from bench.conftest import Laboratory, selected_cases, selected_providers


class RecordedClock:
    """A clock that plays back durations, so that pytest-benchmark tells what was measured in turn.

    pytest-benchmark times one function after the other; sides are only fair when timed in turn. Its
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
    config = metafunc.config
    # The providers of a case stand together.
    rows = [
        pytest.param(case, provider, id=f"{case.id}-{provider}")
        for case in selected_cases(config)
        for provider in selected_providers(config, case)
    ]
    metafunc.parametrize(("case", "provider"), rows)


@pytest.mark.benchmark(timer=clock)
def test_layer(
    benchmark: BenchmarkFixture, laboratory: Laboratory, case: Case, provider: str
) -> None:
    """The first row of a case checks and times all sides; the others read what was measured."""
    if benchmark.disabled:
        benchmark.pedantic(laboratory.check, args=(case, provider))
        return
    measurement = laboratory.measure(case, provider)
    rounds = measurement.rounds
    assert rounds is not None
    benchmark.group = case.id
    benchmark.name = provider
    benchmark.extra_info.update(measurement.facts(), **measurement.provider(provider))
    benchmark.extra_info["machine"] = laboratory.report.machine
    clock.load(rounds.of(provider))
    benchmark.pedantic(clock.advance, rounds=len(rounds.of(provider)))
