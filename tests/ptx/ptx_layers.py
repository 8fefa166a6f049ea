"""Layers whose kernels are compiled for a GPU and run on `ptx_machine`.

All else is as it is on a GPU, up to the call of Triton's driver: plans, launchers, what Triton
specialises a kernel for.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from ptx_machine import Machine
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.no_device import no_device
from triton_rnn.backends import triton as backend
from triton_rnn.backends.triton import launch, launcher, products
from triton_rnn.kernels.chips import CHIPS

# A wait looks so often before it gives up: few times, for the machine is slow, and many, for it is
# not fair. (A multiple of 1024, see `pieces.look_again`.)
POLLS = 1 << 13

# Of the compiler, as far as anybody sets them.
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_cooperative_grid")


class NoPlan(Exception):
    """A layer that no plan of the variant fits."""


class _Kernel:
    """A kernel in the place of Triton's, which runs on the machine.

    Args:
        compiled: what Triton has compiled; machine: for it. kinds: of its arguments.
        run_of: runs it: is given the machine, programs, those of a cluster, kinds and arguments.
    """

    function = 1

    def __init__(
        self, compiled: Any, machine: Machine, kinds: Sequence[str], run_of: Callable[..., None]
    ) -> None:
        self.packed_metadata = compiled.packed_metadata
        self._machine, self._kinds, self._run_of = machine, kinds, run_of

    def launch_metadata(self, *launch: Any) -> None:
        return None

    def run(
        self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, metadata: Any,
        enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        """As `CompiledKernel.run`."""
        assert (y, z) == (1, 1)
        warps, cluster, shared = packed
        assert (warps, shared) == (self.packed_metadata[0], self.packed_metadata[2])
        self._run_of(self._machine, x * cluster, cluster, self._kinds, arguments)


@functools.lru_cache(maxsize=256)
def _compiled(
    function: Any,
    architecture: int,
    signature: Sequence[tuple[str, str]],
    constants: Sequence[tuple[Any, Any]],
    attributes: Sequence[tuple[Any, Any]],
    options: Sequence[tuple[str, Any]],
    edit: Callable[[str], str],
) -> tuple[Any, Machine]:
    source = ASTSource(
        function,
        dict(signature),
        dict(constants),
        {place: [list(each) for each in what] for place, what in attributes},
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=dict(options))
    metadata = compiled.metadata
    return compiled, Machine(edit(compiled.asm["ptx"]), metadata.num_warps, metadata.shared)


def forget_compiled() -> None:
    """Let all kernels be compiled anew."""
    _compiled.cache_clear()


def as_it_is(text: str) -> str:
    return text


@contextlib.contextmanager
def on_machine(
    name: str,
    *,
    variant: str | None = None,
    seed: int = 0,
    edit: Callable[[str], str] = as_it_is,
    polls: int = POLLS,
    known: Sequence[torch.Tensor] = (),
    **changes: Any,
) -> Iterator[SimpleNamespace]:
    """Within, the backend believes that CPU tensors are on a chip.

    Args:
        name: of the chip. variant: of the plans. seed: of the order of events.
        edit: what becomes of the PTX of recurrences. changes: of the plans.
        known: what kernels point to without being given it, at `FIRST_ADDRESS`.

    Yields:
        plans: those that were asked for. executed: instructions of a warp, of each launch.
    """
    chip = CHIPS[name]
    # Blackwell's own matrix instructions are not among the machine's.
    older = CHIPS["H200"] if chip.architecture == 100 else chip
    seen = SimpleNamespace(plans=[], executed=[], cold={})
    # Of the launch that is under way: a launcher may hand on no more than their addresses.
    tensors: list[torch.Tensor] = []

    def make(
        function: Any, signature: Mapping[str, str], device: int, constants: Mapping[Any, Any],
        options: Any, attributes: Mapping[Any, Any], *others: Any,
    ) -> _Kernel:  # fmt: skip
        ours = function is not products.matmul
        compiled, machine = _compiled(
            function,
            (chip if ours else older).architecture,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple((place, tuple(map(tuple, what))) for place, what in attributes.items()),
            tuple((key, getattr(options, key)) for key in _OPTIONS),
            edit if ours else as_it_is,
        )
        run = functools.partial(run_of, function.__name__)
        return _Kernel(compiled, machine, tuple(signature.values()), run)

    def run_of(
        name: str, machine: Machine, programs: int, cluster: int, kinds: Sequence[str],
        given: Sequence[Any],
    ) -> None:  # fmt: skip
        at = {tensor.data_ptr(): tensor for tensor in tensors}
        arguments = [
            at[argument] if kind.startswith("*") and isinstance(argument, int) else argument
            for kind, argument in zip(kinds, given, strict=True)
            if kind != "constexpr"
        ]
        seen.executed.append(machine.launch(programs, cluster, tensors, arguments, seed))
        seen.cold.setdefault(name, []).append(machine.memory.cold)

    call = launcher.Launcher.__call__

    def noted_call(self: Any, device: Any, programs: int, given: Any, others: Any) -> None:
        every = (*given, *others)
        given_tensors = (each for each in every if isinstance(each, torch.Tensor))
        tensors[:] = [*known, *given_tensors]
        call(self, device, programs, given, others)

    planned = launch.plan_of

    def plan_of(request: Any, kernel: str) -> Any:
        found = planned(request, kernel)
        if found is None:
            raise NoPlan
        found = dataclasses.replace(found, **changes)
        seen.plans.append(found)
        return found

    with contextlib.ExitStack() as stack:
        stack.enter_context(no_device(chip, make=make))
        for module, part, value in (
            (products, "chip_of", lambda device: older),
            (launcher.Launcher, "__call__", noted_call),
            (launch, "POLLS", polls),
            (launch, "variant", variant),
            (launch, "plan_of", plan_of),
            (backend, "supports", lambda request: None),
        ):
            stack.enter_context(mock.patch.object(module, part, value))
        yield seen
