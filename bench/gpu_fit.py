"""The planner's constants from the plans that a GPU run has timed.

    python -m bench.gpu_fit bench/results/gpu.json

Of every plan with W_hh in registers of several programs it takes what a step took and what the
planner counts for one (`plan.held_counts`, of a cluster's `plan.cluster_counts`), and finds the
constants, none below zero, whose sums are off by the least part of the measured times. It prints
them for `plan._HELD_US` and `plan._CLUSTER_US`, and how well they do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu_grid import ITEMSIZE
from triton_rnn.backends.triton import launch
from triton_rnn.cells import CELLS
from triton_rnn.kernels.plan import Plan, Shape, cluster_counts, held_counts, turns_of

ROUNDS = 20_000

# By how programs exchange: the planner's constants, and what it multiplies with them.
Counts = Callable[[Shape, Plan], tuple[float, ...]]
FITS: dict[str, tuple[str, Counts]] = {
    "flag": ("_HELD_US", held_counts),
    "cluster": ("_CLUSTER_US", cluster_counts),
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


def measured(
    data: dict[str, Any], exchange: str = "flag"
) -> list[tuple[str, float, tuple[float, ...]]]:
    """Of every plan of an exchange that was timed: its name, a turn's step in us, its counts."""
    found = []
    _, counts = FITS[exchange]
    names = {field.name for field in fields(Plan)}
    for point in data.get("tuning", {}).get("results", []):
        shape = shape_of(point["case"])
        for row in point.get("plans", []):
            plan = Plan(**{name: value for name, value in row["plan"].items() if name in names})
            if plan.exchange == exchange and not plan.pause and row["status"] == "ok":
                us = row["us_per_step"] / turns_of(shape, plan)
                blocks = f"{plan.block_h} x {plan.block_n}, {plan.warps} warps"
                found.append((f"{point['id']} {blocks}", us, counts(shape, plan)))
    return found


def fitted(us: Sequence[float], counts: Sequence[tuple[float, ...]]) -> np.ndarray:
    """The constants, none below zero, of the least squares of relative errors.

    By multiplicative updates (Lee and Seung, 2001), which keep signs: all numbers here are
    positive.
    """
    shares = np.array(counts) / np.array(us)[:, None]
    scale = shares.mean(0)
    shares = shares / scale
    wanted = shares.T @ np.ones(len(us))
    gram = shares.T @ shares
    constants = np.full(shares.shape[1], 1.0 / shares.shape[1])
    for _ in range(ROUNDS):
        constants *= wanted / (gram @ constants)
    return constants / scale


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_fit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", type=Path, help="gpu.json of `bench.gpu_session`")
    options = parser.parse_args(arguments)
    data = json.loads(options.results.read_text())
    found = {exchange: measured(data, exchange) for exchange in FITS}
    if not any(found.values()):
        print("no plan with W_hh in registers was timed there", file=sys.stderr)
        return 1
    for exchange, rows in found.items():
        if rows:
            _, us, counts = zip(*rows, strict=True)
            constants = fitted(us, counts)
            print(FITS[exchange][0], "=", tuple(float(f"{value:.4f}") for value in constants))
            for name, taken, count in rows:
                part = constants @ count / taken
                print(f"{name:52s} {taken:6.2f} us a turn's step, {part:.2f} of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
