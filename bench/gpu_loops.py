"""Loops on a GPU: device time from events beside wall time, and calls on a flushed L2 cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from bench.gpu_timing import Stopwatch
from bench.turns import Side

# More than the L2 cache of any GPU of today (B200: 126 MB).
FLUSH_BYTES = 256 * 2**20
FLUSHED_CALLS = 10


class DeviceLoop:
    """Seconds per call by events on the device; the wall's, with a wait at the end, are kept."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        # By the identity of a side: its seconds per call on the wall, a value per loop.
        self.wall: dict[int, list[float]] = {}

    def __call__(self, side: Side, calls: int) -> float:
        with side.context():
            times = self.stopwatch.loop(side.step, calls)
        self.wall.setdefault(id(side), []).append(times.wall)
        return times.device

    def wall_seconds(self, side: Side) -> float:
        """Median seconds per call on the wall."""
        return statistics.median(self.wall[id(side)])


def device_loop(device: str = "cuda") -> DeviceLoop:
    return DeviceLoop(Stopwatch(torch.device(device)))


def flushed_seconds(sides: Mapping[str, Side], device: str = "cuda") -> dict[str, float]:
    """Median device seconds of single calls, each after the L2 cache was overwritten."""
    stopwatch = Stopwatch(torch.device(device))
    flush: Callable[[], object] = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(FLUSHED_CALLS):
        for name, side in sides.items():
            with side.context():
                stopwatch.wait()
                flush()
                first = stopwatch.mark()
                side.step()
                last = stopwatch.mark()
                stopwatch.wait()
            taken[name].append(stopwatch.between(first, last))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
