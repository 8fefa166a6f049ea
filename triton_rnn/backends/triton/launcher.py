"""Launching a kernel again, without the work of the first time."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

# As Triton tells pointers apart: a kernel for those that are so aligned reads wider.
_ALIGNMENT = 16


def _of_any_size(tensors: Sequence[Tensor]) -> Sequence[Any]:
    """Tensors as Triton does not look at their size.

    For an AMD GPU it tells those of up to 2 GB apart, and makes kernels for them alone that count
    in 32 bits: launched again with a larger tensor these read elsewhere, and most recurrences do
    not compile as such (Triton 3.6 to 3.8: a pointer is chosen among two tensors').
    """
    if torch.version.hip is None:
        return tensors
    return [triton.reinterpret(tensor, tensor.dtype) for tensor in tensors]


def _is_watched() -> bool:
    """Whether a profiler wants to be told of every launch."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


class Launcher:
    """A kernel and what it is compiled for: constants, options, device, types and sizes.

    Triton finds out at every launch what each of fifty arguments is, and by that what it has
    compiled for them: a hundred microseconds of Python, in which a small layer could have run. What
    decides is the same for every launch of a launcher, but for the alignment of tensors. So the
    first launch goes Triton's way, and hands back what was compiled; the others start that.

    Args:
        kernel: the `@triton.jit` function: first tensors, then others, then constants.
        constants: of the kernel, by name. options: of the compiler.
        cluster: programs side by side in the grid that must run next to each other on the chip.
    """

    def __init__(
        self,
        kernel: Any,
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
        cluster: int = 1,
    ) -> None:
        self._kernel, self._constants, self._options = kernel, constants, options
        self._cluster = cluster
        # In the order of the kernel's signature; not there under the interpreter.
        names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
        self._in_order = [constants[name] for name in names]
        # What Triton hands back: how it starts a kernel, which, and how it is to run.
        self._start: Callable[..., None] | None = None
        self._function = self._packed_metadata = None

    def __call__(
        self, device: torch.device, programs: int, tensors: Sequence[Tensor], others: Sequence[Any]
    ) -> None:
        """Launch the kernel on the current stream of a device, which is the current one.

        Args:
            tensors, others: the arguments. Of the others the kernel is not compiled for more than
                their types, or they are the same at every launch.
        """
        pointers = [tensor.data_ptr() for tensor in tensors]
        aligned = functools.reduce(operator.or_, pointers) % _ALIGNMENT == 0
        start = self._start
        if start is None or not aligned or _is_watched():
            launch = self._launch if self._cluster == 1 else self._launch_clusters
            found = launch(programs, _of_any_size(tensors), others)
            # The interpreter hands back nothing.
            if aligned and found is not None:
                self._function = found.function
                self._packed_metadata = self._packed(found)
                # The last of them, for other threads look at it.
                self._start = found.run
            return
        # What Triton does with what it has found: the form of this call is the same from 3.6 to
        # 3.9. No metadata and no hooks, for nobody watches.
        start(
            programs // self._cluster,
            1,
            1,
            triton.runtime.driver.active.get_current_stream(device.index),
            self._function,
            self._packed_metadata,
            None,
            None,
            None,
            *pointers,
            *others,
            *self._in_order,
        )

    def _launch(self, programs: int, tensors: Sequence[Any], others: Sequence[Any]) -> Any:
        """Triton's way."""
        return self._kernel[(programs,)](*tensors, *others, **self._constants, **self._options)

    def _launch_clusters(self, programs: int, tensors: Sequence[Any], others: Sequence[Any]) -> Any:
        """The same, in clusters: to Triton a cluster shares one program's work, so it has none."""
        found = self._kernel.warmup(
            *tensors, *others, grid=(programs,), **self._constants, **self._options
        )
        active, runtime = triton.runtime.driver.active, triton.knobs.runtime
        stream = active.get_current_stream(active.get_current_device())
        arguments = (*tensors, *others, *self._in_order)
        # Which also loads it, and so `found.function` is there.
        start = found.run
        start(
            programs // self._cluster,
            1,
            1,
            stream,
            found.function,
            self._packed(found),
            found.launch_metadata((programs, 1, 1), stream, *arguments),
            runtime.launch_enter_hook,
            runtime.launch_exit_hook,
            *arguments,
        )
        return found

    def _packed(self, found: Any) -> Any:
        """How a kernel is to run, as Triton tells its driver: of a cluster's, whose it is, too."""
        if self._cluster == 1:
            return found.packed_metadata
        warps, _, shared = found.packed_metadata
        return warps, self._cluster, shared
