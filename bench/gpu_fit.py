"""The planner's constants from the plans that a GPU run has timed.

    python -m bench.gpu_fit bench/results/gpu-plans.json

Of every plan with W_hh in registers of several programs it takes what a step took and what
`kernels/step_time.py` counts for one (`held_counts`, of a cluster's `cluster_counts`), and finds
the constants, none below zero, whose sums are off by the least part of the measured times. The
nearer a plan is to the best of its recurrence the more it counts. It prints the constants for
`HELD_US` and `CLUSTER_US`, and how well they do.

Pauses are no part of the sums (`paused_part`): of one recurrence's best plan with several ones it
prints each by itself, for `pause_of` to be judged by.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.gpu_grid import ITEMSIZE
from triton_rnn.backends.triton import launch
from triton_rnn.cells import CELLS
from triton_rnn.kernels.chips import CHIPS
from triton_rnn.kernels.plan import Plan, Shape, turns_of
from triton_rnn.kernels.planner import clusters_at_once
from triton_rnn.kernels.step_time import cluster_counts, held_counts, pause_of, paused_part

ROUNDS = 20_000

# By how programs exchange: the planner's constants, and what it multiplies with them.
Counts = Callable[[Shape, Plan], tuple[float, ...]]
FITS: dict[str, tuple[str, Counts]] = {
    "flag": ("HELD_US", held_counts),
    "cluster": ("CLUSTER_US", cluster_counts),
}


def shape_of(case: dict[str, Any]) -> Shape:
    """What the planner is asked for a tuning point."""
    cell = CELLS["rnn_tanh" if case["cell"] == "rnn" else case["cell"]]
    return launch.shape_of(
        launch.kernel_cell(cell),
        case["kernel"],
        case["hidden"],
        case["directions"],
        case["batch"],
        ITEMSIZE[case["dtype"]],
        1,
    )


class Row(NamedTuple):
    """A plan that was timed: its name, a turn's step, what is counted, and how much it counts."""

    name: str
    us: float
    counts: tuple[float, ...]
    weight: float


def timed(data: dict[str, Any]) -> Iterator[tuple[dict[str, Any], float, Plan, float]]:
    """Every plan of a run: its recurrence, the best time of that, and its own, us a step."""
    names = {field.name for field in fields(Plan)}
    for point in data.get("tuning", {}).get("results", []):
        rows = [row for row in point.get("plans", []) if row["status"] == "ok"]
        best = min((row["us_per_step"] for row in rows), default=0.0)
        for row in rows:
            plan = Plan(**{name: value for name, value in row["plan"].items() if name in names})
            yield point, best, plan, row["us_per_step"]


def measured(data: dict[str, Any], exchange: str = "flag", chip: str = "H200") -> list[Row]:
    """Every plan of an exchange that was timed, with the planner's pause or none."""
    found = []
    _, counts = FITS[exchange]
    for point, best, plan, us in timed(data):
        if plan.exchange != exchange or plan.pause not in (0, pause_of(plan)):
            continue
        if exchange == "cluster" and plan.slots * plan.at_once > clusters_at_once(
            CHIPS[chip], plan.cluster
        ):
            # Some wait until others are done.
            continue
        shape = shape_of(point["case"])
        step = us / turns_of(shape, plan) / paused_part(plan)
        blocks = f"{plan.block_h} x {plan.block_n}, {plan.warps} warps"
        found.append(Row(f"{point['id']} {blocks}", step, counts(shape, plan), best / us))
    return found


def pauses(data: dict[str, Any]) -> Iterator[str]:
    """A line for each recurrence whose plan was timed with several pauses."""
    found: dict[tuple[str, Plan], dict[int, float]] = {}
    for point, _, plan, us in timed(data):
        if plan.exchange == "flag":
            found.setdefault((point["id"], replace(plan, pause=0, floor_us=0.0)), {})[
                plan.pause
            ] = us
    for (name, plan), times in found.items():
        if len(times) > 2:
            each = ", ".join(f"{pause}: {us:.2f}" for pause, us in sorted(times.items()))
            yield f"{name:48s} {plan.units:3d} programs, {pause_of(plan)} by the rule; {each}"


def fitted(
    us: Sequence[float],
    counts: Sequence[tuple[float, ...]],
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """The constants, none below zero, of the least squares of relative errors.

    By multiplicative updates (Lee and Seung, 2001), which keep signs: all numbers here are
    positive.
    """
    weight = np.ones(len(us)) if weights is None else np.array(weights)
    shares = np.array(counts) / np.array(us)[:, None] * weight[:, None]
    # Of what nothing counts, nothing is known.
    scale = np.where(shares.any(0), shares.mean(0), np.inf)
    shares = shares / scale
    wanted = shares.T @ weight
    gram = shares.T @ shares
    constants = np.full(shares.shape[1], 1.0 / shares.shape[1])
    for _ in range(ROUNDS):
        constants *= wanted / np.maximum(gram @ constants, 1e-30)
    return constants / scale


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_fit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", type=Path, help="gpu.json of `bench.gpu_session`")
    options = parser.parse_args(arguments)
    try:
        data = json.loads(options.results.read_text())
        found = {exchange: measured(data, exchange) for exchange in FITS}
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"{options.results} is no gpu.json of bench.gpu_session: {error!r}")
    if not any(found.values()):
        print("no plan with W_hh in registers was timed there", file=sys.stderr)
        return 1
    for exchange, rows in found.items():
        if rows:
            _, us, counts, weights = zip(*rows, strict=True)
            constants = fitted(us, counts, weights)
            print(FITS[exchange][0], "=", tuple(float(f"{value:.4f}") for value in constants))
            for name, taken, count, _ in rows:
                part = constants @ count / taken
                print(f"{name:52s} {taken:6.2f} us a turn's step, {part:.2f} of it")
    for line in pauses(data):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
