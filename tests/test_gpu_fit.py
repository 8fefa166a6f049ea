"""The planner's constants and the results of a GPU that they were fitted to."""

import json
import os
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="the planner's cells need triton, which is for Linux alone")

ROOT = Path(__file__).parent.parent
sys.path.append(os.fspath(ROOT))

from bench import gpu_fit  # noqa: E402  (needs the path)
from triton_rnn.kernels.plan import _HELD_US  # noqa: E402

KEPT = ROOT / "bench" / "results" / "gpu.json"


def test_the_constants_of_times_that_are_such_sums_are_found():
    draw = np.random.default_rng(0)
    counts = [tuple(row) for row in draw.uniform(0.1, 3.0, (40, 4))]
    constants = np.array([0.5, 0.0, 0.2, 1.5])
    us = [float(constants @ np.array(row)) for row in counts]
    assert gpu_fit.fitted(us, counts) == pytest.approx(constants, abs=0.01)


def test_the_planners_constants_describe_the_kept_results():
    """To a sixth of most times; one shape, an RNN of many units, is far better than its model."""
    rows = gpu_fit.measured(json.loads(KEPT.read_text()))
    assert len(rows) >= 30
    errors = []
    for name, us, counts in rows:
        model = sum(constant * count for constant, count in zip(_HELD_US, counts, strict=True))
        errors.append(abs(model / us - 1))
        assert errors[-1] < 0.5, name
    assert statistics.median(errors) < 1 / 6


def test_the_command_prints_constants_and_how_well_they_do(capsys, tmp_path):
    assert gpu_fit.main([os.fspath(KEPT)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("_HELD_US = (") and lines[0].count(",") == len(_HELD_US) - 1
    assert len(lines) == 1 + len(gpu_fit.measured(json.loads(KEPT.read_text())))
    empty = tmp_path / "gpu.json"
    empty.write_text("{}")
    assert gpu_fit.main([os.fspath(empty)]) == 1
    assert "no plan with W_hh in registers" in capsys.readouterr().err
