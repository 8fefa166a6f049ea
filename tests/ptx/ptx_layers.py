"""Layers whose kernels are compiled for a GPU and run on `ptx_machine`."""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from ptx_machine import Machine
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_rnn.backends import triton as backend
from triton_rnn.backends.triton import launch, products
from triton_rnn.kernels.plan import CHIPS, Chip

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

# A wait looks so often before it gives up: few times, for the machine is slow, and many, for it is
# not fair. (A multiple of 1024, see `pieces.look_again`.)
POLLS = 1 << 13


class Launcher:
    """As the backend's, but what it launches is compiled for a chip and run on the machine."""

    chip: Chip
    seed = 0
    edit: Callable[[str], str]
    executed: list[int]

    def __init__(self, kernel: Any, constants: Any, options: Any, cluster: int = 1) -> None:
        self._kernel, self._constants, self._options = kernel, constants, options
        self._cluster = cluster

    def __call__(self, device: torch.device, programs: int, tensors: Any, others: Any) -> None:
        arguments = (*tensors, *others)
        signature, constants, attributes, left = self._specialised(arguments)
        machine = _machine(
            self._kernel,
            self.chip,
            signature,
            constants,
            attributes,
            tuple(self._options.items()),
            type(self).edit,
        )
        every = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        self.executed.append(machine.launch(programs, self._cluster, every, left, self.seed))

    def _specialised(self, arguments: Any) -> Any:
        """What Triton compiles for these arguments: types, constants, and what 16 divides."""
        kernel = self._kernel
        plain = set(kernel.do_not_specialize or ())
        signature, attributes, left = [], [], []
        constants = [
            ((kernel.arg_names.index(name),), value) for name, value in self._constants.items()
        ]
        for place, (name, argument) in enumerate(
            zip(kernel.arg_names[: len(arguments)], arguments, strict=True)
        ):
            if isinstance(argument, torch.Tensor):
                signature.append((name, _POINTERS[argument.dtype]))
                number = argument.data_ptr()
            elif argument == 1 and name not in plain:
                signature.append((name, "constexpr"))
                constants.append(((place,), 1))
                continue
            else:
                signature.append((name, "i32" if -(2**31) <= argument < 2**31 else "i64"))
                number = argument
            left.append(argument)
            if number % 16 == 0 and name not in plain:
                attributes.append((place,))
        signature += [(name, "constexpr") for name in self._constants]
        return tuple(signature), tuple(constants), tuple(attributes), left


@functools.lru_cache(maxsize=256)
def _machine(
    kernel: Any,
    chip: Chip,
    signature: Any,
    constants: Any,
    attributes: Any,
    options: Any,
    edit: Callable[[str], str],
) -> Machine:
    source = ASTSource(
        kernel,
        dict(signature),
        dict(constants),
        {place: [["tt.divisibility", 16]] for place in attributes},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", chip.architecture, 32), options=dict(options)
    )
    return Machine(edit(compiled.asm["ptx"]), compiled.metadata.num_warps, compiled.metadata.shared)


def as_it_is(text: str) -> str:
    return text


def on_machine(
    monkeypatch: Any,
    name: str,
    *,
    variant: str | None = None,
    seed: int = 0,
    edit: Callable[[str], str] = as_it_is,
    polls: int = POLLS,
    **changes: Any,
) -> SimpleNamespace:
    """From now to the end of the test, the backend believes that CPU tensors are on a chip.

    Args:
        name: of the chip. variant: of the plans. seed: of the order of events.
        edit: what becomes of the PTX of recurrences. changes: of the plans.

    Returns:
        plans: those that were asked for. executed: instructions of a warp, of each launch.
    """
    chip = dataclasses.replace(CHIPS[name], clusters=variant == "cluster")
    # Blackwell's own matrix instructions are not among the machine's.
    older = CHIPS["H200"] if chip.architecture == 100 else chip
    seen = SimpleNamespace(plans=[], executed=[])
    for module, own, change in ((launch, chip, edit), (products, older, as_it_is)):
        monkeypatch.setattr(module, "chip_of", lambda device, own=own: own)
        parts = {"chip": own, "seed": seed, "edit": change, "executed": seen.executed}
        monkeypatch.setattr(module, "Launcher", type("Launcher", (Launcher,), parts))
    for cached in (launch._ready, launch._launcher, products._ready):
        cached.cache_clear()
    monkeypatch.setattr(launch, "POLLS", polls)
    monkeypatch.setattr(launch, "variant", variant)
    for question in ("cannot", "supports"):
        monkeypatch.setattr(backend, question, lambda request: None)
    planned = launch.plan_of

    def plan_of(request: Any, kernel: str) -> Any:
        found = dataclasses.replace(planned(request, kernel), **changes)
        seen.plans.append(found)
        return found

    monkeypatch.setattr(launch, "plan_of", plan_of)
    return seen
