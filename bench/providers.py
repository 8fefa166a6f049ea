"""Who is measured: ours, each of our backends by name, torch.nn, and what else people use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

import triton_rnn
from bench.cases import Case
from bench.gpu_grid import TimingCase, algorithm
from bench.peers import (
    COMPILED,
    LOOP,
    ONNXRUNTIME,
    CompiledWorkload,
    LoopWorkload,
    OnnxWorkload,
    compiled_obstacle,
    loop_obstacle,
    onnx_obstacle,
)
from bench.turns import Side
from bench.workload import OURS, PAIR, TORCH, Results, Workload, backend_of
from triton_rnn import dispatch
from triton_rnn.profiling.ceilings import ceilings
from triton_rnn.profiling.work import Work, backward_work, forward_work, total

BACKENDS = tuple(f"{OURS}:{name}" for name in dispatch.BACKENDS)
PEERS = (COMPILED, ONNXRUNTIME, LOOP)
PROVIDERS = (*PAIR, *BACKENDS, *PEERS)

# oneDNN, cuDNN and MIOpen are each called by one operator per layer or stack.
_ONE_CALL = {"mkldnn_rnn_layer": "oneDNN", "_cudnn_rnn": "cuDNN", "miopen_rnn": "MIOpen"}


class Measured(Side, Protocol):
    """A side that also says what it computes."""

    def results(self) -> Results: ...


def obstacle(provider: str, case: Case) -> str | None:
    """Why a provider is not measured for a case; None when it is.

    What a backend of ours refuses for other reasons, it says when the case is built.
    """
    backend = backend_of(provider)
    if backend is not None:
        return dispatch.unavailable(backend)
    obstacles: dict[str, Callable[[Case], str | None]] = {
        COMPILED: compiled_obstacle,
        ONNXRUNTIME: onnx_obstacle,
        LOOP: loop_obstacle,
    }
    return obstacles[provider](case) if provider in obstacles else None


def chosen(case: Case, asked: Sequence[str], quick: bool) -> list[str]:
    """The providers of a case: ours and torch.nn, and those asked for that can do it.

    Where none is asked for, all are; but not those whose compilation alone takes a --quick run's
    time.
    """
    wanted = asked or [name for name in PROVIDERS if not (quick and name == COMPILED)]
    others = [name for name in PROVIDERS if name in wanted and name not in PAIR]
    return [*PAIR, *(name for name in others if obstacle(name, case) is None)]


def build(provider: str, case: Case) -> Measured:
    """The side of a provider for a case; not yet run.

    Raises:
        KeyError: there is no such provider.
    """
    if provider not in PROVIDERS:
        raise KeyError(provider)
    workloads: dict[str, Callable[[Case], Measured]] = {
        COMPILED: CompiledWorkload,
        ONNXRUNTIME: OnnxWorkload,
        LOOP: LoopWorkload,
    }
    return workloads[provider](case) if provider in workloads else Workload(case, provider)


def work_of(case: Case) -> Work:
    """Operations of the matrix products and the least bytes of a call, all layers; of a whole step
    those of its layer: head, loss and optimiser are little beside it.
    """
    layer = Workload(case, OURS)
    request = triton_rnn.explain(layer.layer, layer.input).request
    assert request is not None
    rows = layer.leaf.shape[:-1].numel()
    found = Work()
    for number in range(case.size.layers):
        if number:
            request = request._replace(input_size=request.directions * request.output_size)
        found = found.plus(total(forward_work(request, rows)))
        if case.training:
            found = found.plus(total(backward_work(request, rows)))
    return found


def floor_seconds(case: Case, work: Work) -> float:
    """The least that the work can take by the measured ceilings of the machine."""
    limits = ceilings(torch.device(case.device), getattr(torch, case.dtype))
    arithmetic = work.operations / limits.operations_per_second
    return max(arithmetic, work.bytes / limits.bytes_per_second)


def describe(provider: str, side: Measured) -> dict[str, object]:
    """What ran: backend and plan of ours, the algorithm of torch.nn, and the memory it took."""
    if not isinstance(side, Workload):
        return {"algorithm": "one graph, CPUExecutionProvider", "peak_bytes": None}
    operators, peak = _observe(side)
    found: dict[str, object] = {"peak_bytes": peak}
    if provider.partition(":")[0] == OURS:
        # As the step is run: whether gradients are wanted decides between backends.
        with side.context(), torch.set_grad_enabled(side.case.training):
            explanation = triton_rnn.explain(side.layer, side.input)
        found["backend"] = explanation.backend
        found["plan"] = list(explanation.plan)
    found["algorithm"] = _algorithm(provider, side.case, operators)
    return found


def _algorithm(provider: str, case: Case, operators: set[str]) -> str:
    called = {
        library for name, library in _ONE_CALL.items() if any(name in found for found in operators)
    }
    if called == {"cuDNN"} and provider == TORCH:
        size = case.size
        sizes = (size.hidden_size, size.batch, size.seq_len, size.directions, size.layers)
        timing = TimingCase(case.cell, case.dtype, case.training, *sizes, case.packed)
        version = torch.backends.cudnn.version() or 0
        names = [algorithm(timing, version)]
        if case.training:
            names.append(f"backward {algorithm(timing, version, backward=True)}")
        return f"cuDNN {', '.join(names)}"
    if called:
        return ", ".join(sorted(called))
    if provider == TORCH:
        return "native: torch's loop of operators"
    if provider == COMPILED:
        return "Inductor, unrolled"
    return "a Python loop over cells" if provider == LOOP else ""


def _observe(side: Workload) -> tuple[set[str], int]:
    """Names of the operators of a step, and most bytes that torch held beyond those before it.

    What a library takes without torch's allocator (oneDNN's scratchpads, MKL's buffers) is not in
    it; ``test_memory.py`` measures the process.
    """
    cuda = side.case.device == "cuda"
    with side.context():
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        side.step()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=not cuda) as profiler:
            side.step()
    found = profiler.profiler
    assert found is not None and found.kineto_results is not None
    events = found.kineto_results.events()
    names = {event.name() for event in events}
    if cuda:
        torch.cuda.synchronize()
        return names, torch.cuda.max_memory_allocated() - before
    held = most = 0
    memory = [event for event in events if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return names, most
