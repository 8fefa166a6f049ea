"""`triton_rnn.profile()`: what a piece of code spends its time on, phase by phase."""

import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from triton_rnn.profiling import ranges, work
from triton_rnn.profiling.work import Work
from triton_rnn.request import Request
from triton_rnn.version import __version__

OUTSIDE = "outside triton_rnn"
AROUND = "around the phases"
# Autograd runs a node of the backward inside an event of this name.
_ENGINE = "autograd::engine::evaluate_function: "
_OUR_NODE = _ENGINE + "LayerFunctionBackward"
# Ranges of calls that are torch's from there on; their backward has no range of ours.
_WHOLE = (".torch", ".reference")
# From this share of a ceiling on, the ceiling is what holds a phase up.
_BOUND = 0.4

_active: "profile | None" = None
_lock = threading.Lock()


def note_forward(request: Request, rows: int, whole: str) -> None:
    """Tell the session, if there is one, what work a layer's forward is.

    Args:
        whole: the phase that holds all of the layer, or "" where there are several.
    """
    # Another thread may end the session meanwhile.
    session = _active
    if session is None:
        return
    found = work.forward_work(request, rows)
    session.add(request, {whole: work.total(found)} if whole else found)
    # The plain loops' backward is autograd's, so nobody else will tell of it.
    if whole == "reference" and request.needs_grad:
        session.add(request, {"backward.reference": work.total(work.backward_work(request, rows))})


def note_backward(request: Request, rows: int, whole: str) -> None:
    """Likewise for its backward."""
    session = _active
    if session is not None:
        found = work.backward_work(request, rows)
        session.add(request, {f"backward.{whole}": work.total(found)} if whole else found)


def note_stack(request: Request, rows: int, layers: int) -> None:
    """Likewise for all layers in one call of torch's."""
    session = _active
    if session is None:
        return
    for number in range(layers):
        if number == 1:
            request = request._replace(input_size=request.directions * request.output_size)
        session.add(request, {"torch": work.total(work.forward_work(request, rows))})
        if request.needs_grad:
            session.add(request, {"backward.torch": work.total(work.backward_work(request, rows))})


@dataclass(frozen=True)
class Phase:
    """A phase, all layers and directions of all calls together.

    Attributes:
        name: `lstm.recurrence` and so on; or what lies outside of phases.
        calls: ranges of it.
        seconds: on the device that computes: the GPU's if there is one, else the CPU's.
        share: of the session's time.
        operations, bytes: what the phase has to do, see `profiling.work`; None if not known.
        arithmetic, memory: shares of this machine's measured ceilings; None if not known.
    """

    name: str
    calls: int
    seconds: float
    share: float
    operations: int | None
    bytes: int | None
    arithmetic: float | None
    memory: float | None


@dataclass(frozen=True)
class Span:
    """One range of the profile: seconds from the session's first event on."""

    name: str
    start: float
    end: float


class profile:  # noqa: N801 - used like a function, as torch.profiler.profile is
    """Profile the recurrent layers in a block of code.

    >>> with triton_rnn.profile() as session:
    ...     model(input).sum().backward()
    >>> print(session)                # time, share, GFLOP/s, GB/s, shares of the ceilings
    >>> print(session.verdict)        # which phase bounds the run, and by what
    >>> session.save("folder")        # trace.json for a trace viewer, profile.json, timeline.png

    torch.profiler runs underneath and slows small operations by some microseconds each, so the
    shares are of the profiled run; measure speed without it. As with torch's, only the thread that
    enters is seen, and what autograd does for it. An exception in the block passes, and
    what ran until then is kept.

    Raises:
        RuntimeError: on entering, if a profiler is already running.
    """

    def __init__(self) -> None:
        self.phases: tuple[Phase, ...] = ()
        self.spans: tuple[Span, ...] = ()
        self.seconds = 0.0
        self._profiler: Any = None
        self._work: dict[str, Work] = {}
        self._guard = threading.Lock()
        self._seen: tuple[torch.device, torch.dtype] | None = None

    def add(self, request: Request, found: dict[str, Work]) -> None:
        """Count work; called by the layers."""
        with self._guard:
            self._seen = (request.device, request.dtype)
            for name, part in found.items():
                key = f"{request.cell.name}.{name}"
                self._work[key] = self._work.get(key, Work()).plus(part)

    def __enter__(self) -> "profile":
        global _active
        with _lock:
            if _active is not None or torch._C._autograd._profiler_enabled():
                raise RuntimeError("triton_rnn.profile(): a profiler is already running")
            _active = self
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        try:
            self._profiler.__enter__()
        except BaseException:
            _active = None
            raise
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _active
        try:
            try:
                if self._seen is not None and self._seen[0].type == "cuda":
                    torch.cuda.synchronize(self._seen[0])
            finally:
                # Whatever the device says, torch's profiler is to end here.
                self.seconds = time.perf_counter() - self._start
                self._profiler.__exit__(kind, error, trace)
        finally:
            _active = None
        self._read(self._profiler.events() or [])

    def _read(self, events: Sequence[Any]) -> None:
        origin = min((event.time_range.start for event in events), default=0.0)
        own = [event for event in events if event.name.startswith(ranges.PREFIX)]

        def _span(name: str, event: Any) -> Span:
            begin, end = event.time_range.start - origin, event.time_range.end - origin
            return Span(name, begin / 1e6, end / 1e6)

        spans = [_span(event.name, event) for event in own]
        on_gpu = self._seen is not None and self._seen[0].type == "cuda"

        def seconds(event: Any) -> float:
            if on_gpu:
                return float(event.device_time_total) / 1e6
            return (event.time_range.end - event.time_range.start) / 1e6

        calls: dict[str, int] = {}
        times: dict[str, float] = {}

        def count(name: str, event: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            times[name] = times.get(name, 0.0) + seconds(event)

        whole: dict[int, str] = {}
        around = 0.0
        for event in own:
            name, bracket, _ = event.name.removeprefix(ranges.PREFIX).partition("[")
            if not bracket:
                around += seconds(event)
                continue
            count(name, event)
            # A forward's phases lie in the call's range, a backward's in the engine's event.
            around -= seconds(event)
            if name.endswith(_WHOLE):
                cell, _, kind = name.rpartition(".")
                for number in _sequence_numbers(event):
                    whole[number] = f"{cell}.backward.{kind}"
        for event in events:
            if event.name.startswith(_OUR_NODE):
                around += seconds(event)
            elif event.name.startswith(_ENGINE) and event.sequence_nr in whole:
                count(whole[event.sequence_nr], event)
                spans.append(_span(f"{ranges.PREFIX}{whole[event.sequence_nr]}[all]", event))
        self.spans = tuple(spans)
        accounted = sum(times.values()) + max(around, 0.0)
        total = max(self.seconds, accounted, 1e-12)
        self.phases = tuple(
            self._phase(name, calls[name], times[name], total)
            for name in sorted(times, key=lambda name: -times[name])
        )
        rest = ((AROUND, max(around, 0.0)), (OUTSIDE, total - accounted))
        self.phases += tuple(
            Phase(name, 0, spent, spent / total, None, None, None, None) for name, spent in rest
        )

    def _phase(self, name: str, calls: int, seconds: float, total: float) -> Phase:
        done = self._work.get(name)
        if done is None or self._seen is None:
            return Phase(name, calls, seconds, seconds / total, None, None, None, None)
        from triton_rnn.profiling.ceilings import ceilings

        best = ceilings(*self._seen)
        spent = max(seconds, 1e-12)
        return Phase(
            name,
            calls,
            seconds,
            seconds / total,
            done.operations,
            done.bytes,
            done.operations / spent / best.operations_per_second,
            done.bytes / spent / best.bytes_per_second,
        )

    @property
    def verdict(self) -> str:
        """Which phase bounds the run, and by what, in a sentence."""
        if not self.spans:
            return "No recurrent layer of triton_rnn ran."
        largest = max(self.phases, key=lambda phase: phase.seconds)
        begin = f"{largest.name} takes {largest.share:.0%} of the time"
        if largest.name == OUTSIDE:
            return f"{begin}: the recurrent layers do not bound this run."
        if largest.arithmetic is None or largest.memory is None:
            return f"{begin}: checks, autograd and first calls, more than the layers' arithmetic."
        reached = (
            f"{largest.arithmetic:.0%} of the machine's arithmetic"
            f" and {largest.memory:.0%} of its memory bandwidth"
        )
        if max(largest.arithmetic, largest.memory) < _BOUND:
            return (
                f"{begin} at {reached}: its steps wait for one another and for the cost of single"
                " operations, neither for arithmetic nor for memory."
            )
        bound = "arithmetic" if largest.arithmetic >= largest.memory else "memory bandwidth"
        return f"{begin} at {reached}: it is bound by {bound}."

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The table's header and rows, as text."""
        header = ("phase", "ranges", "ms", "share", "GFLOP/s", "of peak", "GB/s", "of peak")
        return header, [_row(phase) for phase in self.phases]

    def __str__(self) -> str:
        header, rows = self.rows()
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(
                text.ljust(width) if i == 0 else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (header, *rows)
        ]
        return "\n".join((*lines, self.verdict))

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values: seconds, operations, bytes."""
        return {
            "kind": "profile",
            "schema": 1,
            "versions": {
                "triton_rnn": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "seconds": self.seconds,
            "verdict": self.verdict,
            "phases": [asdict(phase) for phase in self.phases],
            "ranges": [asdict(span) for span in self.spans],
        }

    def save(self, folder: str | Path, title: str = "") -> list[Path]:
        """Write trace.json, profile.json and, where matplotlib is installed, timeline.png.

        Args:
            folder: made if it is not there. title: stands above the picture.

        Returns:
            The files written.

        Raises:
            RuntimeError: if nothing was profiled yet.
        """
        if self._profiler is None:
            raise RuntimeError("triton_rnn.profile(): nothing was profiled yet")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        trace, numbers = folder / "trace.json", folder / "profile.json"
        with tempfile.TemporaryDirectory(dir=folder) as own:
            unfinished = Path(own) / "trace.json"
            self._profiler.export_chrome_trace(str(unfinished))
            os.replace(unfinished, trace)
            unfinished = Path(own) / "profile.json"
            unfinished.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
            os.replace(unfinished, numbers)
            written = [trace, numbers]
            try:
                from triton_rnn.profiling.picture import timeline
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "matplotlib":
                    raise
                return written
            unfinished = Path(own) / "timeline.png"
            unfinished.write_bytes(timeline(self.spans, title))
            os.replace(unfinished, folder / "timeline.png")
        return [*written, folder / "timeline.png"]


def _sequence_numbers(event: Any) -> set[int]:
    """Of an event and all inside of it: the numbers that their nodes in the backward carry."""
    found, waiting = set(), [event]
    while waiting:
        one = waiting.pop()
        if one.sequence_nr >= 0:
            found.add(one.sequence_nr)
        waiting += one.cpu_children
    return found


def _row(phase: Phase) -> tuple[str, ...]:
    def rate(amount: int | None) -> str:
        return "" if amount is None else f"{amount / max(phase.seconds, 1e-12) / 1e9:.1f}"

    def percent(share: float | None) -> str:
        return "" if share is None else f"{share:.0%}"

    return (
        phase.name,
        str(phase.calls or ""),
        f"{1e3 * phase.seconds:.3f}",
        f"{phase.share:.1%}",
        rate(phase.operations),
        percent(phase.arithmetic),
        rate(phase.bytes),
        percent(phase.memory),
    )
