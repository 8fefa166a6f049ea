"""``python -m bench growth``: how the time of a call grows, and how long the first one takes.

A curve is the time of a call over one axis, the others at a base. Its exponent is the slope of the
straight line through (log x, log seconds), that is, seconds grow as x to this power. To expect:

- steps (``seq_len``): 1, for they come one after the other.
- ``batch``: 0 while weights are read and calls are made for a few rows, rising to 1.
- ``hidden_size``: 0 while calls cost more than their products, rising to 2.
- ``layers``: 1.
- ``threads``: between 0 (nothing to share) and -1 (all of it shared); above 0 where sharing costs
  more than it gives, as in small layers.

One exponent is only a summary: where a cost that is fixed and one that grows meet, the line is
bent, and the slope of a straight one depends on where the points were set. The slope between the
last two points is nearer to the limit that matters; how far the points lie off the line shows in
the standard error.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import first_results
from bench.cases import Size
from bench.first_results import OURS, PROVIDERS, TORCH, make_step
from bench.machine import CommandError, check_place, describe_machine, write

CELLS = ("rnn", "gru", "lstm")
MODES = ("inference", "training")
# What each grows with, and the exponents to expect of it.
AXES = {
    "seq_len": "1",
    "batch": "0 to 1",
    "hidden_size": "0 to 2",
    "layers": "1",
    "threads": "-1 to 0",
}

# A round is a loop of calls long enough for the clock.
ROUND_SECONDS = 0.004
FEWEST_ROUNDS = 3
# The first call sets up what later ones reuse, and TorchScript specialises at the second.
WARM_UP_CALLS = 2

Curve = dict[str, Any]


@dataclass(frozen=True)
class Extent:
    """How much is measured: the points of the axes, seconds per side of a point, fresh starts."""

    base: Size
    values: Mapping[str, Sequence[int]]
    seconds: float
    start_cells: Sequence[str]
    start_providers: Sequence[str]
    starts: int
    triton_starts: int


FULL = Extent(
    base=Size(8, 100, 128, 128),
    values={
        "seq_len": (8, 16, 32, 64, 128, 256, 512, 1024, 2048),
        "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
        "hidden_size": (8, 16, 32, 64, 128, 256, 512, 1024),
        "layers": (1, 2, 3, 4, 6, 8),
    },
    seconds=0.2,
    start_cells=CELLS,
    start_providers=PROVIDERS,
    starts=3,
    triton_starts=2,
)
QUICK = Extent(
    base=Size(4, 16, 32, 32),
    values={
        "seq_len": (8, 32, 128),
        "batch": (1, 8, 64),
        "hidden_size": (8, 32, 128),
        "layers": (1, 2, 4),
    },
    seconds=0.015,
    start_cells=("lstm",),
    start_providers=(OURS,),
    starts=2,
    triton_starts=1,
)


@dataclass(frozen=True)
class Fit:
    """The exponent of a power law, its standard error, and the slope between the last points.

    Two points leave nothing to estimate an error from: it is 0 then.
    """

    exponent: float
    error: float
    last: float


def fit(points: Sequence[tuple[int, float]]) -> Fit:
    """Fit seconds = factor * x ** exponent by least squares of the logarithms.

    Raises:
        statistics.StatisticsError: fewer than two points, or all at one x.
    """
    x = [math.log(place) for place, _ in points]
    y = [math.log(seconds) for _, seconds in points]
    slope, intercept = statistics.linear_regression(x, y)
    error = 0.0
    if len(points) > 2:
        residuals = [after - intercept - slope * at for at, after in zip(x, y, strict=True)]
        mean = statistics.fmean(x)
        spread = math.fsum((at - mean) ** 2 for at in x)
        variance = math.fsum(residual**2 for residual in residuals) / (len(points) - 2)
        error = math.sqrt(variance / spread)
    return Fit(slope, error, (y[-1] - y[-2]) / (x[-1] - x[-2]))


def seconds_in_turn(
    steps: Sequence[Callable[[], object]],
    seconds: float,
    timer: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of a call of each step, measured in turn: a b, b a, a b, ...

    Whatever slows the machine for a while slows all of them, and none always runs in the cache that
    another left. The garbage collector is off while the clock runs.
    """

    def one_round(step: Callable[[], object]) -> float:
        calls, elapsed, begin = 0, 0.0, timer()
        # Not a number of calls planned beforehand: on a machine that others come to use, a call
        # takes a thousand times as long as the one that the plan was made by.
        while elapsed < ROUND_SECONDS:
            step()
            calls += 1
            elapsed = timer() - begin
        return elapsed / calls

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for step in steps:
            for _ in range(WARM_UP_CALLS):
                step()
        taken: list[list[float]] = [[] for _ in steps]
        order = list(range(len(steps)))
        begun = timer()
        while len(taken[0]) < FEWEST_ROUNDS or timer() - begun < seconds * len(steps):
            for which in order:
                taken[which].append(one_round(steps[which]))
            order.reverse()
    finally:
        if collecting:
            gc.enable()
    return [statistics.median(rounds_of_one) for rounds_of_one in taken]


def size_at(base: Size, axis: str, value: int) -> Size:
    """``base`` with ``value`` on ``axis``; the input is as wide as the hidden state."""
    if axis == "threads":
        return base
    if axis == "hidden_size":
        return replace(base, hidden_size=value, input_size=value)
    return replace(base, **{axis: value})


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and all of them."""
    doubling = [2**power for power in range(cores.bit_length())]
    return [count for count in doubling if count < cores] + [cores]


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_axis(
    cell: str, mode: str, axis: str, values: Sequence[int], base: Size, seconds: float
) -> list[Curve]:
    """The curves of both providers over ``axis``, as they are saved.

    OpenMP's pool follows the number of threads, so these need no process of their own.
    """
    points: dict[str, list[tuple[int, float]]] = {provider: [] for provider in PROVIDERS}
    threads = torch.get_num_threads()
    try:
        for value in values:
            if axis == "threads":
                torch.set_num_threads(value)
            size = size_at(base, axis, value)
            steps = [make_step(provider, cell, mode, size) for provider in PROVIDERS]
            for provider, taken in zip(PROVIDERS, seconds_in_turn(steps, seconds), strict=True):
                points[provider].append((value, taken))
    finally:
        torch.set_num_threads(threads)
    return [_curve(cell, mode, axis, provider, base, points[provider]) for provider in PROVIDERS]


def _curve(
    cell: str,
    mode: str,
    axis: str,
    provider: str,
    base: Size,
    points: Sequence[tuple[int, float]],
) -> Curve:
    found = fit(points)
    return {
        "cell": cell,
        "mode": mode,
        "axis": axis,
        "provider": provider,
        "base": {
            "batch": base.batch,
            "seq_len": base.seq_len,
            "hidden_size": base.hidden_size,
            "layers": base.layers,
        },
        "points": [list(point) for point in points],
        "exponent": found.exponent,
        "exponent_error": found.error,
        "exponent_last": found.last,
    }


def save(document: Mapping[str, object], path: Path | None) -> None:
    """Write all of the document or leave the file as it was."""
    if path is not None:
        write(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _exponent_cells(curve: Curve) -> tuple[str, str]:
    # Two points lie on a line, so they say nothing of an error.
    error = f" ± {curve['exponent_error']:.2f}" if len(curve["points"]) > 2 else ""
    return f"{curve['exponent']:.2f}{error}", f"{curve['exponent_last']:.2f}"


def curve_table(curves: Sequence[Curve]) -> Table:
    """A row per cell, mode and axis: the exponents of both providers."""
    table = Table(title="time of a call grows as x to the power of", padding=0)
    # Narrow enough for 80 columns: a row that is folded cannot be compared with the next.
    for name in ("call", "x", "expected"):
        table.add_column(name, no_wrap=True)
    for provider in PROVIDERS:
        table.add_column(provider, justify="right", no_wrap=True)
        table.add_column("last", justify="right", no_wrap=True)
    sides: dict[tuple[str, str, str], dict[str, Curve]] = {}
    for curve in curves:
        sides.setdefault((curve["cell"], curve["mode"], curve["axis"]), {})[curve["provider"]] = (
            curve
        )
    for (cell, mode, axis), side in sides.items():
        exponents = [_exponent_cells(side[provider]) for provider in (OURS, TORCH)]
        table.add_row(f"{cell} {mode}", axis, AXES[axis], *exponents[0], *exponents[1])
    return table


def first_table(rows: Sequence[first_results.Row]) -> Table:
    """A row per first result."""
    table = Table(title="time to a first result, in fresh processes")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_column("note")
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.4g}"
        table.add_row(row["name"], seconds, row["note"])
    return table


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--axis", nargs="+", choices=tuple(AXES), help="all unless given")
    parser.add_argument("--quick", action="store_true", help="few small points: does it run at all")
    parser.add_argument("--curves-only", action="store_true", help="no first results")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="rewritten at every curve")


def _axes(asked: Sequence[str] | None, cores: int) -> list[str]:
    if cores > 1:
        return list(dict.fromkeys(asked or AXES))
    if asked and "threads" in asked:
        raise CommandError("--axis threads wants at least two cores; there is one")
    return [axis for axis in asked or AXES if axis != "threads"]


def run(options: argparse.Namespace) -> int:
    """Measure, save after every curve, print; returns 1 if a fresh process failed."""
    path: Path | None = options.save
    check_place(path)
    extent = QUICK if options.quick else FULL
    cores = usable_cores()
    axes = _axes(options.axis, cores)
    values = {**extent.values, "threads": thread_counts(cores)}
    # An option given twice is asked for once.
    cells, modes = list(dict.fromkeys(options.cell)), list(dict.fromkeys(options.mode))
    curves: list[Curve] = []
    rows: list[first_results.Row] = []
    document = {
        "kind": "growth",
        "schema": 1,
        "machine": describe_machine(),
        "curves": curves,
        "first_results": rows,
    }
    try:
        for cell in cells:
            for mode in modes:
                for axis in axes:
                    print(f"{cell} {mode}: {axis}", file=sys.stderr)
                    curves += measure_axis(
                        cell, mode, axis, values[axis], extent.base, extent.seconds
                    )
                    save(document, path)
        if not options.curves_only:
            print("first results", file=sys.stderr)
            _measure_first_results(cells, modes, extent, rows, lambda: save(document, path))
    finally:
        # What an interruption left is worth a look too.
        console = Console()
        console.print(curve_table(curves))
        if rows:
            console.print(first_table(rows))
    return 1 if first_results.failed(rows) else 0


def _measure_first_results(
    cells: Sequence[str],
    modes: Sequence[str],
    extent: Extent,
    rows: list[first_results.Row],
    keep: Callable[[], None],
) -> None:
    """Append to ``rows``, and ``keep`` them after each."""
    started = [cell for cell in cells if cell in extent.start_cells] or cells[:1]
    for row in first_results.start_rows(started, modes, extent.start_providers, extent.starts):
        rows.append(row)
        keep()
    for compiled in (first_results.native_rows, first_results.triton_rows):
        for row in compiled(extent.triton_starts):
            rows.append(row)
            keep()
