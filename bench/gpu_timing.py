"""Times a case on a GPU: torch.nn, ours on `auto`, ours on the kernels. Runs in a child process."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_rnn
from bench import gpu_inside
from bench.gate import GPU_TOLERANCE, GateError
from bench.gpu_grid import TimingCase, algorithm
from bench.gpu_workers import Result

# A round of a side takes about so long, and all rounds of a case so long, in seconds.
ROUND_SECONDS, CASE_SECONDS = 0.008, 0.5
FEWEST_ROUNDS, MOST_ROUNDS, MOST_CALLS = 3, 7, 50
# Cycles that the device idles for, so that the CPU is ahead of it: about 1.5 ms.
HEAD_START = 3_000_000


class Times(NamedTuple):
    """Seconds.

    Attributes:
        device: between two marks that the device passes.
        wall: from before the first call until the device has done the last.
        host: until the last call has been handed to the device: what Python and the launches take,
            unless the device's queue was full.
    """

    device: float
    wall: float
    host: float


class Stopwatch:
    """Time on the device and on the wall; on a CPU, in a rehearsal, both are the wall's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        """Seconds between two marks that the device has passed."""
        if self.device.type != "cuda":
            return float(second - first)
        return float(first.elapsed_time(second)) / 1e3

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def head_start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda._sleep(HEAD_START)

    def loop(self, step: Callable[[], object], calls: int) -> Times:
        """Seconds per call."""
        self.wait()
        start = time.perf_counter()
        first = self.mark()
        for _ in range(calls):
            step()
        last = self.mark()
        handed_over = time.perf_counter()
        self.wait()
        return Times(
            self.between(first, last) / calls,
            (time.perf_counter() - start) / calls,
            (handed_over - start) / calls,
        )


@dataclass
class Side:
    """One of those that are timed in turn."""

    name: str
    layer: Any
    input: Tensor | PackedSequence
    leaf: Tensor
    grad_output: Tensor
    training: bool
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def step(self) -> Tensor:
        """One inference or training step; the gradients are set to None first."""
        if not self.training:
            with torch.no_grad():
                return _rows(self.layer(self.input)[0])
        self.layer.zero_grad(set_to_none=True)
        self.leaf.grad = None
        output = _rows(self.layer(self.input)[0])
        output.backward(self.grad_output)
        return output.detach()

    def results(self) -> dict[str, Tensor]:
        with self.context():
            found = {"output": self.step()}
        if self.training:
            leaves = {"input": self.leaf, **dict(self.layer.named_parameters())}
            for name, leaf in leaves.items():
                assert leaf.grad is not None, name
                found[f"grad of {name}"] = leaf.grad
        return found


def _rows(output: Any) -> Tensor:
    return output.data if isinstance(output, PackedSequence) else output


def sides_of(case: TimingCase, device: torch.device) -> tuple[Side, Side, Side]:
    """torch.nn, ours on `auto` and ours on the kernels: equal weights, the same data.

    In the place of torch.nn stands the plain loop of a user's cell.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)

    own = gpu_inside.OWN.get(case.cell)

    def layer(package: Any) -> Any:
        return (own or getattr(package, case.cell.upper()))(
            case.hidden,
            case.hidden,
            case.layers,
            bidirectional=case.directions == 2,
            dtype=dtype,
            device=device,
        )

    theirs, ours = layer(torch.nn), layer(triton_rnn)
    ours.load_state_dict(theirs.state_dict())
    dense = torch.randn(case.steps, case.batch, case.hidden, device=device).to(dtype)
    packed = pack_padded_sequence(dense, torch.tensor(case.lengths())) if case.packed else None
    # Packing is not timed: the packed data is the leaf.
    leaf = (dense if packed is None else packed.data).requires_grad_(case.training)
    input = leaf if packed is None else packed._replace(data=leaf)
    width = case.directions * case.hidden
    grad = torch.randn(*leaf.shape[:-1], width, device=device).to(dtype)

    def side(name: str, layer: Any, backend: str | None) -> Side:
        context = nullcontext if backend is None else lambda: triton_rnn.use_backend(backend)
        return Side(name, layer, input, leaf, grad, case.training, context)

    loop = None if own is None else "reference"
    return side("cudnn", theirs, loop), side("auto", ours, "auto"), side("triton", ours, "triton")


def gate(case: TimingCase, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The worst relative difference of two sides.

    Raises:
        GateError: it is too large, or a NaN; names each result.
    """
    worst, wrong = 0.0, []
    for name, expected in theirs.items():
        difference = torch.linalg.vector_norm(ours[name].float() - expected.float())
        error = float(difference / torch.linalg.vector_norm(expected.float()).clamp(min=1e-30))
        worst = max(worst, error)
        if not error <= GPU_TOLERANCE[case.dtype]:
            wrong.append(f"{name}: relative difference {error:.1e}")
    if wrong:
        raise GateError("; ".join(wrong))
    return worst


def in_turn(
    sides: Mapping[str, Callable[[], object]], watch: Stopwatch, contexts: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Seconds per call of every side, rounds taken in turn: a b c, c b a, ..."""
    names, once = list(sides), {}
    for name in names:
        with contexts[name]():
            once[name] = min(watch.loop(sides[name], 1).wall for _ in range(3))
    calls = {
        name: max(1, min(MOST_CALLS, round(ROUND_SECONDS / max(once[name], 1e-6))))
        for name in names
    }
    per_round = sum(calls[name] * once[name] for name in names)
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(CASE_SECONDS / max(per_round, 1e-6))))
    times: dict[str, list[Times]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            with contexts[name]():
                times[name].append(watch.loop(sides[name], calls[name]))
    return {name: _statistics(times[name], calls[name]) for name in names}


def _statistics(times: Sequence[Times], calls: int) -> dict[str, Any]:
    device = [one.device for one in times]
    median = statistics.median(device)
    return {
        "device_s": median,
        "wall_s": statistics.median(one.wall for one in times),
        "host_s": statistics.median(one.host for one in times),
        "spread": (max(device) - min(device)) / median,
        "rounds": len(times),
        "calls": calls,
    }


def peak_bytes(side: Side, device: torch.device) -> int | None:
    """Most memory that a step takes beyond what was there before it."""
    if device.type != "cuda":
        return None
    side.layer.zero_grad(set_to_none=True)
    side.leaf.grad = None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with side.context():
        side.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def begin() -> None:
    """The settings that all times are taken under."""
    gpu_inside.set_tf32(True)
    gpu_inside.forget_choices()


def warm(case: TimingCase, device: torch.device) -> Result:
    """Have every kernel of a case compiled, so that no compiler runs beside what is timed.

    Compiled code goes to Triton's cache on disk. What a kernel is compiled for does not depend on
    the number of steps, but for how a float32 weight's gradient is split.
    """
    begin()
    # Many processes do this at a time, so the memory is shared.
    steps = case.steps if case.bytes < (4e9 if case.dtype == "float32" else 3e8) else 64
    short = dataclasses.replace(case, steps=steps)
    begun = time.perf_counter()
    _, auto, ours = sides_of(short, device)
    for side in (ours, auto):
        with side.context():
            side.step()
    gpu_inside.raise_failed_wait(device)
    return {"status": "ok", "compile_s": round(time.perf_counter() - begun, 2)}


def measure(case: TimingCase, device: torch.device) -> Result:
    """Gate, then time a case; a case that differs from torch.nn gets no times.

    Where `auto` takes the kernels, the two sides of ours are one and are timed once.
    """
    begin()
    watch = Stopwatch(device)
    theirs, auto, kernels = sides_of(case, device)
    cudnn = torch.backends.cudnn.version() or 0
    result: Result = {
        "status": "ok",
        "algorithm": algorithm(case, cudnn),
        "algorithm_backward": algorithm(case, cudnn, backward=True) if case.training else "",
    }
    # As the sides are called: without gradients less is to be done, and another backend may do it.
    with torch.set_grad_enabled(case.training):
        explained = triton_rnn.explain(auto.layer, auto.input)
        with kernels.context():
            result["plan"] = str(triton_rnn.explain(kernels.layer, kernels.input))
            plans = gpu_inside.plans_of(kernels.layer, kernels.input)
    result["backend"] = explained.backend
    # Why `auto` did not take the kernels, if it did not.
    result["why"] = explained.reasons.get("triton", "")
    result["floor_us"] = gpu_inside.floor_us(plans)

    sides = {"cudnn": theirs, "auto": auto, "triton": kernels}
    begun = time.perf_counter()
    expected = {name: value.clone() for name, value in theirs.results().items()}
    result["difference"] = 0.0
    for side in (auto, kernels):
        result["difference"] = max(result["difference"], gate(case, side.results(), expected))
    gpu_inside.raise_failed_wait(device)
    del expected
    result["first_calls_s"] = round(time.perf_counter() - begun, 2)
    if explained.backend == "triton":
        del sides["triton"]

    gc.collect()
    gc.disable()
    try:
        times = in_turn(
            {name: side.step for name, side in sides.items()},
            watch,
            {name: side.context for name, side in sides.items()},
        )
    finally:
        gc.enable()
    gpu_inside.raise_failed_wait(device)
    for name, side in sides.items():
        times[name]["us_per_step"] = times[name]["device_s"] * 1e6 / case.steps
        times[name]["peak_bytes"] = peak_bytes(side, device)
    times.setdefault("triton", times["auto"])
    result["times"] = times
    for name in ("auto", "triton"):
        result[f"ratio_{name}"] = times["cudnn"]["device_s"] / times[name]["device_s"]
        result[f"wall_ratio_{name}"] = times["cudnn"]["wall_s"] / times[name]["wall_s"]
    result["floor_share"] = result["floor_us"] / times["triton"]["us_per_step"]
    return result
