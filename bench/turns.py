"""Sides timed in turn, and the statistics of their rounds."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

FEWEST_ROUNDS = 3

Quartiles = tuple[float, float]


class Side(Protocol):
    """What is timed: ``step`` inside of ``context``, whose own cost is not counted."""

    @property
    def step(self) -> Callable[[], object]: ...

    @property
    def context(self) -> Callable[[], AbstractContextManager[object]]: ...


@dataclass(frozen=True)
class Step:
    """A side that is a function and, perhaps, what it is called inside of."""

    step: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Budget:
    """How long to measure. A round is a loop of calls long enough for the clock."""

    # Of each of the two sides that are compared first of all.
    seconds_per_side: float = 0.6
    # Of each further side, which sits out rounds if it takes longer.
    seconds_per_peer: float = 0.25
    round_seconds: float = 0.004
    rounds: int = 5
    # Sides so slow that `rounds` of them would take longer than this get FEWEST_ROUNDS.
    total_seconds: float = 6.0


QUICK_BUDGET = Budget(
    seconds_per_side=0.08, seconds_per_peer=0.03, round_seconds=0.002, total_seconds=1.0
)


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of each side by round; rounds of all sides were taken in turn."""

    seconds: Mapping[str, Mapping[int, float]]
    calls_per_round: Mapping[str, int]
    # The share of the machine's cores that other processes used meanwhile; None where unknown.
    others_share: float | None = None

    def of(self, side: str) -> tuple[float, ...]:
        return tuple(self.seconds[side].values())

    def median(self, side: str) -> float:
        return statistics.median(self.of(side))

    def quartiles(self, side: str) -> Quartiles:
        return _quartiles(self.of(side))

    def ratio(self, side: str, over: str) -> float:
        """How many times faster ``side`` is: median of ``over`` over median of ``side``."""
        return self.median(over) / self.median(side)

    def ratio_quartiles(self, side: str, over: str) -> Quartiles:
        """First and third quartile of the ratios of the rounds, each of neighbours in time."""
        mine, theirs = self.seconds[side], self.seconds[over]
        return _quartiles([theirs[index] / mine[index] for index in mine if index in theirs])


def _quartiles(values: Iterable[float]) -> Quartiles:
    values = list(values)
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
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


Loop = Callable[[Side, int], float]


def wall_loop(timer: Callable[[], float] = time.perf_counter) -> Loop:
    """Seconds per call of a loop of calls, by a clock on the wall."""

    def loop(side: Side, calls: int) -> float:
        step = side.step
        with side.context():
            start = timer()
            for _ in range(calls):
                step()
            return (timer() - start) / calls

    return loop


@dataclass(frozen=True)
class _Plan:
    """Calls per round of each side, after how many rounds it takes part again, and rounds."""

    calls: dict[str, int]
    strides: dict[str, int]
    rounds: int


def _plan(seconds: Mapping[str, float], budget: Budget) -> _Plan:
    """For sides that take about ``seconds`` per call; the first two set the number of rounds."""
    calls = {
        name: max(1, math.ceil(budget.round_seconds / max(taken, 1e-9)))
        for name, taken in seconds.items()
    }
    cost = {name: max(calls[name] * taken, 1e-9) for name, taken in seconds.items()}
    pair, peers = list(cost)[:2], list(cost)[2:]
    seconds_of_pair = sum(cost[name] for name in pair)
    rounds = max(budget.rounds, round(2 * budget.seconds_per_side / seconds_of_pair))
    if rounds * seconds_of_pair > budget.total_seconds:
        rounds = max(FEWEST_ROUNDS, int(budget.total_seconds / seconds_of_pair))
    strides = dict.fromkeys(pair, 1)
    for name in peers:
        wanted = max(FEWEST_ROUNDS, int(budget.seconds_per_peer / cost[name]))
        strides[name] = max(1, rounds // wanted)
    return _Plan(calls, strides, rounds)


def measure(
    sides: Mapping[str, Side], budget: Budget | None = None, loop: Loop | None = None
) -> Rounds:
    """Time sides in turn in this process: a b c, c b a, a b c, ...

    Whatever slows the machine for a while slows all, and none always runs in another's cache. All
    are expected to have run once. The garbage collector is off while the clock runs. The first two
    are in every round; a slow one of the others only in some.
    """
    budget, loop = budget or Budget(), loop or wall_loop()
    collecting = gc.isenabled()
    gc.collect()
    watch, begun = OthersWatch(), time.monotonic()
    gc.disable()
    try:
        # The least of a few calls, unless one call is slow enough to say it all.
        samples: dict[str, dict[int, float]] = {}
        for name, side in sides.items():
            taken = [loop(side, 1)]
            while len(taken) < 10 and sum(taken) < 4 * budget.round_seconds:
                taken.append(loop(side, 1))
            samples[name] = dict(enumerate(taken))
        plan = _plan({name: min(taken.values()) for name, taken in samples.items()}, budget)
        # Such slow calls are a first round already; others are thrown away.
        slow = all(len(taken) == 1 and plan.calls[name] == 1 for name, taken in samples.items())
        if not slow:
            samples = {name: {} for name in sides}
        for index in range(1 if slow else 0, plan.rounds):
            # Every side's rounds are spread over all the time, and each has its first at once.
            turn = [name for name in sides if index % plan.strides[name] == 0]
            for name in turn if index % 2 == 0 else reversed(turn):
                samples[name][index] = loop(sides[name], plan.calls[name])
            # The plan was made on a quieter machine than this.
            late = time.monotonic() - begun > len(sides) * budget.total_seconds
            if late and min(map(len, samples.values())) >= FEWEST_ROUNDS:
                break
    finally:
        if collecting:
            gc.enable()
    return Rounds(samples, plan.calls, watch.share())
