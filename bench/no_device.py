"""The Triton backend without a device: everything up to the launch, and nothing after it.

A driver that starts nothing stands in the place of Triton's, so what the backend does on the
processor can be looked at, and timed, on any machine. Tensors are the CPU's; results are whatever
was in memory; or what the kernels make of it that `tests/ptx` puts in the place of Triton's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from triton_rnn import dispatch
from triton_rnn.backends import triton as backend
from triton_rnn.backends.native import calls
from triton_rnn.backends.triton import launch, products
from triton_rnn.kernels.chips import CHIPS, Chip

# No machine has so many devices, so nothing that is compiled for a real one is found, or replaced.
DEVICE = 99
KERNELS = (launch.recurrence_forward, launch.recurrence_backward, products.matmul)

# What is told of a launch: the kernel's name and the key that Triton finds its code by, the grid
# and the stream, the arguments, the metadata, and whether any hooks come with it.
Told = Callable[[tuple[str, Any], tuple[Any, ...], tuple[Any, ...], Any, bool], None]
# What makes a kernel, from the function and what Triton has found out about a launch: signature,
# device, constants, options, attributes, and whether it is to be launched.
Maker = Callable[..., Any]


def _untold(*launch: Any) -> None:
    """Nobody asks."""


class _Kernel:
    """What Triton would have compiled for a key."""

    function, packed_metadata = 1, (4, 1, 0)

    def __init__(self, name: str, key: Any, tell: Told) -> None:
        self.key, self.tell = (name, key), tell

    def launch_metadata(self, grid: Any, stream: Any, *arguments: Any) -> str:
        return "metadata"

    def run(
        self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, metadata: Any,
        enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        """As `CompiledKernel.run`, from Triton 3.6 to 3.9."""
        self.tell(self.key, (x, y, z, stream), arguments, metadata, bool(enter and enter.calls))


def _forget() -> None:
    for cached in (launch._ready, launch._launcher, products._ready, dispatch._choose):
        cached.cache_clear()
    calls.forget()
    for kernel in KERNELS:
        kernel.device_caches.pop(DEVICE, None)


@contextlib.contextmanager
def no_device(
    chip: Chip | str = "H200", tell: Told = _untold, make: Maker | None = None
) -> Iterator[None]:
    """Within, the backend serves CPU tensors as if they were on a chip; nothing is compiled.

    Args:
        tell: is told of every launch. make: makes the kernels, which then tell nobody.
    """
    chip = CHIPS[chip] if isinstance(chip, str) else chip
    target = GPUTarget("cuda", int(chip.architecture), 32)
    stand_in = SimpleNamespace(
        get_current_device=lambda: DEVICE,
        get_current_stream=lambda device: 7,
        get_current_target=lambda: target,
    )

    def compile_nothing(function: Any, key: Any, *arguments: Any) -> _Kernel:
        kernel = make(function, *arguments) if make else _Kernel(function.__name__, key, tell)
        function.device_caches[DEVICE][0][key] = kernel
        return kernel

    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (JITFunction, "_do_compile", compile_nothing),
            (driver, "_active", stand_in),
            (backend, "cannot", lambda request: None),
            (launch, "chip_of", lambda device: chip),
            (products, "chip_of", lambda device: chip),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        _forget()
        stack.callback(_forget)
        yield
