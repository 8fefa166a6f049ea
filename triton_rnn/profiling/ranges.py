"""Named ranges of a call's phases, for whichever profiler is on.

A range is called `triton_rnn::CELL.PHASE[LAYER.DIRECTION]`, such as
`triton_rnn::lstm.backward.recurrence[0.reverse]`; the call of a module is `triton_rnn::CELL`.

torch's profilers see them as `record_function` ranges, and so does `emit_nvtx`. For Nsight without
it, TRITON_RNN_NVTX=1 pushes NVTX ranges too. With neither, a call asks `on()` a few times, about
0.1 us each, and no range is made.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from triton_rnn import environment
from triton_rnn.cells import Cell

PREFIX = "triton_rnn::"

_profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled
_nvtx = environment.is_on("TRITON_RNN_NVTX", default=False)


class _Here(threading.local):
    """The layer that this thread works on; kept up only while `on()`."""

    layer = 0


here = _Here()
_nobody_looks = contextlib.nullcontext()


def on() -> bool:
    """Whether anybody looks."""
    return _nvtx or _profiler_enabled()


def suffix(direction: str) -> str:
    """What ends the name of a range of the layer at hand."""
    return f"[{here.layer}.{direction}]"


@contextlib.contextmanager
def _open(name: str) -> Iterator[None]:
    nvtx = _nvtx and torch.cuda.is_available()
    with torch.profiler.record_function(name):
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()


def call(cell: Cell) -> contextlib.AbstractContextManager[None]:
    """The range of a module's call."""
    return _open(PREFIX + cell.name) if on() else _nobody_looks


def phase(cell: Cell, name: str, direction: str) -> contextlib.AbstractContextManager[None]:
    """The range of a phase of the layer at hand.

    Args:
        name: `projection`, `recurrence`, `backward.recurrence`, `backward.weights`; `torch`,
            `native` and `reference` where one call does it all.
        direction: `forward`, `reverse`, or `both` where they are not apart.
    """
    if not on():
        return _nobody_looks
    return _open(f"{PREFIX}{cell.name}.{name}{suffix(direction)}")


def inside(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a range."""
    with _open(name):
        return function(*arguments)
