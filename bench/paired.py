"""Two callables timed in turn, and the statistics of the pair."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

FEWEST_ROUNDS = 3


class Side(Protocol):
    """What is timed: ``step`` inside of ``context``, whose own cost is not counted."""

    @property
    def step(self) -> Callable[[], object]: ...

    @property
    def context(self) -> Callable[[], AbstractContextManager[object]]: ...


@dataclass(frozen=True)
class Budget:
    """How long to measure. A round is a loop of calls long enough for the clock."""

    seconds_per_side: float = 0.6
    round_seconds: float = 0.004
    rounds: int = 5
    # A pair so slow that `rounds` of it would take longer than this gets FEWEST_ROUNDS.
    total_seconds: float = 6.0


QUICK_BUDGET = Budget(seconds_per_side=0.08, round_seconds=0.002, total_seconds=1.0)


@dataclass(frozen=True)
class Pair:
    """Seconds per call, one entry per round, the rounds of both sides taken in turn."""

    ours: tuple[float, ...]
    reference: tuple[float, ...]
    calls_per_round: int
    # The share of the machine's cores that other processes used meanwhile; None where unknown.
    others_share: float | None = None

    @property
    def ratio(self) -> float:
        """How many times faster ours is: median of the reference over median of ours."""
        return statistics.median(self.reference) / statistics.median(self.ours)

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratios of the rounds, each of neighbours in time."""
        ratios = [theirs / ours for ours, theirs in zip(self.ours, self.reference, strict=True)]
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
        return first, third


def geometric_mean(ratios: Iterable[float]) -> float:
    """The mean that a ratio and its inverse agree on.

    Raises:
        statistics.StatisticsError: no ratios, or one that is not positive.
    """
    values = list(ratios)
    if not values or min(values) <= 0:
        raise statistics.StatisticsError("a geometric mean is of positive numbers, at least one")
    return math.exp(math.fsum(map(math.log, values)) / len(values))


class OthersWatch:
    """What share of the machine others use, from its creation on.

    A thread that waits at OpenMP's barrier for one that has no core waits for milliseconds, so
    others' work does not slow both sides alike, it makes any ratio come out.
    """

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: the wall clock, all cores' busy time, this process's busy time (Linux)."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        # user nice system idle iowait irq softirq steal; guests are counted in user already.
        ticks = [int(value) for value in stat.read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, time.process_time()

    def share(self) -> float | None:
        end = self._now()
        if self.start is None or end is None:
            return None
        wall, busy, own = (after - before for before, after in zip(self.start, end, strict=True))
        return max(0.0, busy - own) / (max(wall, 1e-9) * (os.cpu_count() or 1))


def _seconds_per_call(side: Side, calls: int, timer: Callable[[], float]) -> float:
    step = side.step
    with side.context():
        start = timer()
        for _ in range(calls):
            step()
        return (timer() - start) / calls


def _plan(seconds: tuple[float, float], budget: Budget) -> tuple[int, int]:
    """Calls per round and rounds, for sides that take about ``seconds`` per call."""
    calls = max(1, math.ceil(budget.round_seconds / max(min(seconds), 1e-9)))
    seconds_of_pair = calls * sum(seconds)
    rounds = max(budget.rounds, round(2 * budget.seconds_per_side / max(seconds_of_pair, 1e-9)))
    if rounds * seconds_of_pair > budget.total_seconds:
        rounds = max(FEWEST_ROUNDS, int(budget.total_seconds / seconds_of_pair))
    return calls, rounds


def measure(
    ours: Side,
    reference: Side,
    budget: Budget | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> Pair:
    """Time two sides in turn in this process: a b, b a, a b, ...

    Whatever slows the machine for a while slows both, and neither always runs in the other's cache.
    Both are expected to have run once. The garbage collector is off while the clock runs.
    """
    budget = budget or Budget()
    collecting = gc.isenabled()
    gc.collect()
    watch, begun = OthersWatch(), time.monotonic()
    gc.disable()
    try:
        # The least of a few calls, unless one call is slow enough to say it all.
        samples: tuple[list[float], list[float]] = ([], [])
        for side, taken in zip((ours, reference), samples, strict=True):
            taken.append(_seconds_per_call(side, 1, timer))
            while len(taken) < 10 and sum(taken) < 4 * budget.round_seconds:
                taken.append(_seconds_per_call(side, 1, timer))
        calls, rounds = _plan((min(samples[0]), min(samples[1])), budget)
        # Such slow calls are a first round already; others are thrown away.
        if calls > 1 or len(samples[0]) > 1 or len(samples[1]) > 1:
            samples = ([], [])
        for index in range(len(samples[0]), rounds):
            for which in (0, 1) if index % 2 == 0 else (1, 0):
                side = (ours, reference)[which]
                samples[which].append(_seconds_per_call(side, calls, timer))
            # The plan was made on a quieter machine than this.
            late = time.monotonic() - begun > 2 * budget.total_seconds
            if late and len(samples[0]) >= FEWEST_ROUNDS:
                break
    finally:
        if collecting:
            gc.enable()
    return Pair(tuple(samples[0]), tuple(samples[1]), calls, watch.share())
