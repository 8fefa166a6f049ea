"""Times the parts of a training step, and one recurrence under many plans. Runs in a child."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import gpu_inside
from bench.gate import GPU_TOLERANCE
from bench.gpu_grid import TimingCase, TuningPoint
from bench.gpu_timing import Stopwatch, begin, sides_of
from bench.gpu_workers import Result, failure
from triton_rnn.kernels.plan import Plan

# Training steps whose parts are timed; rounds over all plans of a point.
STEPS, ROUNDS = 10, 5

# Phases -----------------------------------------------------------------------------------------


def phases(case: TimingCase, device: torch.device) -> Result:
    """Device time of every part of a training step of ours, and of cuBLAS for the same products.

    The device is given something to wait for before each step, so that the CPU is ahead and what
    lies between two events is work, not launching.
    """
    begin()
    watch = Stopwatch(device)
    kernels = sides_of(case, device)[2]
    marks: list[tuple[str, Any, Any]] = []
    arguments: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            arguments[name] = (function, given)
            first = watch.mark()
            found = function(*given, **named)
            marks.append((name, first, watch.mark()))
            return found

        return call

    with kernels.context():
        for _ in range(2):
            kernels.step()
        totals: list[dict[str, float]] = []
        with gpu_inside.phases_watched(watched):
            for _ in range(STEPS if device.type == "cuda" else 2):
                marks.clear()
                watch.wait()
                watch.head_start()
                first = watch.mark()
                kernels.step()
                last = watch.mark()
                watch.wait()
                total = {"step": watch.between(first, last)}
                for name, start, end in marks:
                    total[name] = total.get(name, 0.0) + watch.between(start, end)
                totals.append(total)
    gpu_inside.raise_failed_wait(device)
    seconds = {name: statistics.median(t[name] for t in totals) for name in totals[0]}
    seconds["other"] = seconds["step"] - sum(s for name, s in seconds.items() if name != "step")
    return {"status": "ok", "seconds": seconds, "products": _products(arguments, watch)}


def _products(
    arguments: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], watch: Stopwatch
) -> dict[str, dict[str, float]]:
    """Seconds of the projection and of one weight's gradient, ours and by cuBLAS."""
    project, given = arguments["project"]
    input, weights, bias_ih, bias_hh = given[:4]
    rows = input.detach().reshape(-1, input.size(-1))
    biases = [a + b for a, b in zip(bias_ih, bias_hh, strict=True)]
    operands = list(zip(biases, [weight.t() for weight in weights], strict=True))

    def by_cublas() -> None:
        for bias, weight in operands:
            torch.addmm(bias, rows, weight)

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "project": (lambda: project(*given), by_cublas)
    }
    if "grad_weight" in arguments:
        grad_weight, (grad, operand, *more) = arguments["grad_weight"]
        pairs["grad_weight"] = (
            lambda: grad_weight(grad, operand, *more),
            lambda: grad.t() @ operand,
        )
    found = {}
    for name, (ours, theirs) in pairs.items():
        # With cuBLAS' switch like that of recurrent layers ours would be cuBLAS' too.
        found[name] = {"ours": alone(ours, watch)}
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            found[name]["cublas"] = alone(theirs, watch)
        finally:
            matmul.fp32_precision = before
    return found


def alone(function: Callable[[], object], watch: Stopwatch, repeats: int = STEPS) -> float:
    """Median seconds of a function on a device that the CPU is ahead of; two warm it up."""
    found = []
    for number in range(repeats + 2 if watch.device.type == "cuda" else 3):
        watch.wait()
        watch.head_start()
        first = watch.mark()
        function()
        last = watch.mark()
        watch.wait()
        if number >= 2:
            found.append(watch.between(first, last))
    return statistics.median(found)


# Tuning -----------------------------------------------------------------------------------------


def candidates(point: TuningPoint, device: torch.device) -> Result:
    """The plans to try at a point, the planner's choice first."""
    gpu_inside.set_tf32(True)
    plans = gpu_inside.candidates(point, device)
    return {"status": "ok", "plans": [dataclasses.asdict(plan) for plan in plans]}


def warm_plan(point: TuningPoint, plan: Plan, device: torch.device) -> Result:
    """Have one plan compiled and see it run."""
    gpu_inside.set_tf32(True)
    begun = time.perf_counter()
    with gpu_inside.planned(plan):
        gpu_inside.recurrence(point, device)(True)
        gpu_inside.raise_failed_wait(device)
    return {"status": "ok", "compile_s": round(time.perf_counter() - begun, 2)}


def tune(point: TuningPoint, plans: Sequence[Plan], device: torch.device) -> Result:
    """Time one recurrence kernel under every plan, in rounds taken in turn.

    A plan that gives other numbers than the first one is marked, and not timed.
    """
    gpu_inside.set_tf32(True)
    watch = Stopwatch(device)
    call = gpu_inside.recurrence(point, device)
    rows: list[dict[str, Any]] = []
    expected: list[Tensor] = []
    for plan in plans:
        row: dict[str, Any] = {
            "plan": dataclasses.asdict(plan),
            "name": str(plan),
            "floor_us": plan.floor_us,
        }
        rows.append(row)
        try:
            with gpu_inside.planned(plan):
                found = call(True)
                gpu_inside.raise_failed_wait(device)
        except Exception as error:
            row.update(failure(error))
            # A dead context fails here again, and then the task as a whole does.
            watch.wait()
            continue
        expected = expected or [tensor.clone() for tensor in found]
        row["difference"] = max(map(_difference, found, expected))
        row["status"] = "ok" if row["difference"] <= GPU_TOLERANCE[point.dtype] else "wrong"
    timed = [(plan, row) for plan, row in zip(plans, rows, strict=True) if row["status"] == "ok"]
    times: list[list[float]] = [[] for _ in timed]
    for number in range(ROUNDS if device.type == "cuda" else 1):
        order = range(len(timed)) if number % 2 == 0 else reversed(range(len(timed)))
        for index in order:
            with gpu_inside.planned(timed[index][0]):
                times[index].append(alone(lambda: call(False), watch, repeats=2))
    gpu_inside.raise_failed_wait(device)
    for (_, row), seconds in zip(timed, times, strict=True):
        row["us_per_step"] = statistics.median(seconds) * 1e6 / point.steps
        row["spread"] = (max(seconds) - min(seconds)) / statistics.median(seconds)
    rows.sort(key=lambda row: row.get("us_per_step", math.inf))
    return {"status": "ok", "plans": rows}


def _difference(actual: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.float() - expected.float())
    found = float(difference / torch.linalg.vector_norm(expected.float()).clamp(min=1e-30))
    return found if found == found else math.inf
