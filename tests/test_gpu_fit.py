"""The planner's constants and the results of a GPU that they were fitted to."""

import json
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="the planner's cells need triton, which is for Linux alone")

ROOT = Path(__file__).parent.parent
sys.path.append(os.fspath(ROOT))

from bench import gpu_fit, gpu_grid  # noqa: E402  (needs the path)
from triton_rnn.kernels import planner  # noqa: E402
from triton_rnn.kernels.chips import CHIPS  # noqa: E402
from triton_rnn.kernels.plan import Shape, turns_of  # noqa: E402
from triton_rnn.kernels.step_time import HELD_US, cluster_counts  # noqa: E402

KEPT = ROOT / "bench" / "results" / "gpu-plans.json"


def test_the_constants_of_times_that_are_such_sums_are_found():
    draw = np.random.default_rng(0)
    counts = [tuple(row) for row in draw.uniform(0.1, 3.0, (40, 4))]
    constants = np.array([0.5, 0.0, 0.2, 1.5])
    us = [float(constants @ np.array(row)) for row in counts]
    assert gpu_fit.fitted(us, counts) == pytest.approx(constants, abs=0.01)


def test_the_planners_constants_describe_the_kept_results():
    """To a sixth of most times; of plans that nobody chooses some are far off."""
    rows = gpu_fit.measured(json.loads(KEPT.read_text()))
    assert len(rows) >= 30
    errors = []
    for name, us, counts, weight in rows:
        model = sum(constant * count for constant, count in zip(HELD_US, counts, strict=True))
        errors.append(abs(model / us - 1))
        assert errors[-1] < 0.5 or weight < 0.7, name
    assert statistics.median(errors) < 1 / 6


def test_plans_of_clusters_are_fitted_by_their_own_counts(capsys, tmp_path):
    shape = Shape("forward", 4, 128, 1, 16, 2, 1, 16)
    plans = list(planner._plans(shape, CHIPS["H200"], "cluster"))
    constants = np.array([0.1, 0.03, 1.5, 0.2, 0.0])
    rows = [
        {
            "plan": asdict(plan),
            "status": "ok",
            "us_per_step": float(constants @ cluster_counts(shape, plan)) * turns_of(shape, plan),
        }
        for plan in plans
    ]
    case = asdict(gpu_grid.TuningPoint("lstm", "bfloat16", 128, 16, "forward"))
    results = [{"id": "point", "case": case, "plans": rows}]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"tuning": {"results": results}}))
    assert gpu_fit.main([os.fspath(path)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("CLUSTER_US = (") and len(others) == len(plans) > 2
    assert all(line.endswith(("1.00 of it", "0.99 of it", "1.01 of it")) for line in others)


def test_the_command_prints_constants_and_how_well_they_do(capsys, tmp_path):
    assert gpu_fit.main([os.fspath(KEPT)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("HELD_US = (") and lines[0].count(",") == len(HELD_US) - 1
    fitted = [line for line in lines if line.endswith(" of it")]
    data = json.loads(KEPT.read_text())
    assert len(fitted) == sum(len(gpu_fit.measured(data, name)) for name in gpu_fit.FITS)
    # And every recurrence whose plan was tried with several pauses.
    assert len(lines) - len(fitted) - 2 == len(list(gpu_fit.pauses(data))) > 5
    empty = tmp_path / "gpu.json"
    empty.write_text("{}")
    assert gpu_fit.main([os.fspath(empty)]) == 1
    assert "no plan with W_hh in registers" in capsys.readouterr().err
