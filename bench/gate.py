"""The correctness gate: a side that computes something else is not timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bench.cases import Case

# Norm of the difference over norm of the reference, float32. Two orders of summation differ by
# about 1e-6 at the largest size. One wrong element among ten million is 3e-4, so a slip at a single
# time step, row or gate is seen; a largest-element tolerance would need to be looser to be stable.
TOLERANCE = 2e-5
# A rounding difference may move a relu from off to on: a handful of elements of the gradient then
# differ by all of their size.
RELU_TOLERANCE = 1e-3
# Both sides are rounded at every one of up to 1024 steps; float32 is TF32 on a GPU. What this lets
# pass is for the checks against float64 to find (gpu_correctness.py).
GPU_TOLERANCE = {"float16": 3e-2, "bfloat16": 1.5e-1, "float32": 2e-2}


class GateError(AssertionError):
    """Ours and torch.nn do not compute the same thing."""


def tolerance_of(case: Case) -> float:
    """What two right sides of a case may differ by."""
    if case.device != "cpu":
        return GPU_TOLERANCE[case.dtype]
    return RELU_TOLERANCE if case.cell == "rnn-relu" else TOLERANCE


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference, in float64; infinite over a zero norm."""
    difference = float(torch.linalg.vector_norm(ours.double() - reference.double()))
    norm = float(torch.linalg.vector_norm(reference.double()))
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / norm


def check_equal(
    ours: Mapping[str, torch.Tensor | None],
    reference: Mapping[str, torch.Tensor | None],
    tolerance: float = TOLERANCE,
) -> None:
    """Compare everything that two sides computed.

    Raises:
        GateError: a result is missing, or differs in shape, dtype or value; names each.
    """
    if ours.keys() != reference.keys():
        raise GateError(f"results {sorted(ours)} are not {sorted(reference)}")
    wrong = []
    for name, expected in reference.items():
        actual = ours[name]
        if actual is None or expected is None:
            if actual is not expected:
                wrong.append(f"{name}: missing on one side")
        elif actual.shape != expected.shape or actual.dtype != expected.dtype:
            wrong.append(
                f"{name}: {actual.dtype} {tuple(actual.shape)}"
                f" instead of {expected.dtype} {tuple(expected.shape)}"
            )
        else:
            error = relative_error(actual, expected)
            # Written so that NaN, on either side, is wrong.
            if not error <= tolerance:
                wrong.append(f"{name}: relative error {error:.1e} is over {tolerance:.0e}")
    if wrong:
        raise GateError("; ".join(wrong))
