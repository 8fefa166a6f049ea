"""Trying a kernel out before it is trusted: once per process, device and kind of kernel.

What a compiler makes of a kernel on a device that nobody has tried is not known. So the first
request of a kind runs the very plan that it will get on a few short sequences, and the result is
held against torch's own. TRITON_RNN_CHECK=0 turns this off.
"""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triton_rnn import dispatch, environment, health, reference
from triton_rnn.backends.triton import launch, products
from triton_rnn.cells import OwnCell, RegularizedCell
from triton_rnn.extras import Extras
from triton_rnn.kernels.plan import Plan
from triton_rnn.request import Request

if TYPE_CHECKING:
    from triton_rnn.backends.triton import layer

# Norm of the difference over norm of the reference, which is computed in float64 from the same
# rounded numbers. A state is rounded to 11 (float16, TF32), 8 (bfloat16) or 22 bits in each of
# three steps. The 16 bits have more room than that: a relu's unit near zero is turned by a
# rounding, one of thousands, and its gradient is off by all of itself (IndRNN in bfloat16 on an
# H200: 3e-2). A wrong block is off by more.
_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 3e-3}
_STEPS = 3


def obstacle(request: Request) -> str | None:
    """Why the kernels cannot serve a request on its device, or None."""
    cell = launch.kernel_cell(request.cell)
    blocks = max(4, cell.row, cell.width)
    largest = request.directions * blocks * request.hidden_size * request.batch
    if largest >= 2**31:
        return f"a step has {largest} numbers, more than 32 bits can count"
    largest = cell.products * request.hidden_size**2
    if largest >= 2**31:
        return f"W_hh has {largest} numbers, more than 32 bits can count"
    architecture = launch.chip_of(request.device).architecture
    if request.device.type == "cuda" and isinstance(architecture, int) and architecture < 80:
        return f"the kernels are made for compute capability 8.0 and later, not {architecture / 10}"
    failed = health.failure("triton", request.device)
    if failed is not None:
        return failed
    kernels = ("forward", "backward") if request.needs_grad else ("forward",)
    plans = {}
    for kernel in kernels:
        found = launch.plan_of(request, kernel)
        if found is None:
            return f"no plan of the {kernel} recurrence fits this device"
        plans[kernel] = found
    if request.device.type == "cpu" or not environment.is_on("TRITON_RNN_CHECK", default=True):
        return None
    return first_use(request, plans)


# What came of it, for every kind of kernel that was tried.
_tried: dict[tuple[Any, ...], str | None] = {}


def first_use(request: Request, plans: dict[str, Plan]) -> str | None:
    """What is wrong with the kernels of a request on its device, or None; tried out once a kind."""
    short = request._replace(seq_len=_STEPS, input_size=16)
    compiled = _compiled_for(plans)
    kind = (
        # What the kernels are compiled for: neither the batch nor how many programs run.
        short._replace(batch=0),
        launch.precision(request.dtype, launch.chip_of(request.device).backend),
        # Who makes the products.
        products.cublas_agrees(request.device, request.dtype),
        products.is_for_cublas_in_tf32(request.device, request.dtype),
        *compiled.values(),
    )
    if kind not in _tried:
        if dispatch.capturing(request.device):
            # Comparing waits for the device, which a capture forbids.
            return None
        # No more sequences than make a program begin twice, or give each multiprocessor two, if
        # fewer get the same plan.
        most = launch.chip_of(request.device).multiprocessors
        enough = max(2 * min(plan.slots, most) * plan.block_n for plan in plans.values())
        fewer = short._replace(batch=min(enough, request.batch))
        try:
            _tried[kind] = _try(fewer if _is_planned(fewer, compiled) else short)
        except torch.OutOfMemoryError:
            # It takes more than the call, in float64: the next one of the kind tries again.
            return None
    return _tried[kind]


def _compiled_for(plans: dict[str, Plan]) -> dict[str, Plan]:
    """What the kernels of plans are compiled for."""
    return {kernel: replace(plan, slots=0, floor_us=0.0) for kernel, plan in plans.items()}


def _is_planned(request: Request, compiled: dict[str, Plan]) -> bool:
    """Whether a request gets kernels compiled for just that."""
    plans = {kernel: launch.plan_of(request, kernel) for kernel in compiled}
    found = {kernel: plan for kernel, plan in plans.items() if plan is not None}
    return _compiled_for(found) == compiled


def _try(request: Request) -> str | None:
    """Run a request and report what is wrong.

    Kernels that do not compile or start are out of use by themselves; after a wrong number, or a
    wait in vain, none is trusted on that device.
    """
    cell = request.cell.name
    try:
        error = compare(request)
        if request.device.type == "cuda":
            # Whether a wait ran out is known when the programs have ended.
            torch.cuda.current_stream(request.device).synchronize()
        launch.raise_failed_wait(request.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        reason = f"its {cell} kernels do not run here: {type(problem).__name__}: {problem}"
        warnings.warn(f"triton_rnn: backend 'triton': {reason}", RuntimeWarning, stacklevel=2)
        return reason
    limit = _TOLERANCES[request.dtype]
    # Written so that a NaN fails.
    if not error <= limit:
        reason = f"its {cell} kernels are off by {error:.1e}, {limit:.0e} is allowed"
        health.report("triton", request.device, reason)
        return reason
    return None


def compare(request: Request) -> float:
    """Run a layer on random numbers: the worst error of all results, as a part of their norm."""
    from triton_rnn.backends.triton import layer

    # Of our own: the caller's random numbers are the same, whether a kernel is tried out or not.
    generator = torch.Generator(request.device).manual_seed(0)
    size, cell = request.hidden_size, request.cell
    directions, batch = request.directions, request.batch

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        device = request.device
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)
        return (numbers * scale).to(request.dtype)

    # As torch initialises them: the preactivations stay where the gates are alive.
    bound = size**-0.5
    rows_hh = (cell.products if isinstance(cell, OwnCell) else cell.gates) * size
    shapes: list[tuple[int, ...]] = [
        (cell.gates * size, request.input_size),
        (rows_hh, request.output_size),
    ]
    shapes += [(cell.gates * size,), (rows_hh,)] if request.biased else []
    shapes += [(request.output_size, size)] if cell.projected else []
    shapes += [(cell.unit_weights, size)] if isinstance(cell, OwnCell) else []
    weights = [random(*shape, scale=bound) for shape in shapes * directions]
    # A packed batch is one with a sequence less in the last step.
    sizes = [batch] * request.seq_len
    if request.packed:
        sizes[-1] = max(1, batch - 1)
    rows = random(sum(sizes), request.input_size)
    input = rows if request.packed else rows.view(request.seq_len, batch, request.input_size)
    states = [random(directions, batch, request.output_size)]
    states += [random(directions, batch, size)] if cell.states == 2 else []
    h_0, c_0 = states[0], states[1] if len(states) > 1 else None
    grads = [random(rows.size(0), directions * request.output_size)]
    grads += [random(*state.shape) for state in states]

    # A user's cell may do without some weights.
    needs = [True] * 3 + [weight.numel() > 0 for weight in weights]
    batch_sizes = sizes if request.packed else []
    given, extras = layer.Given(), Extras()
    if isinstance(cell, RegularizedCell):
        given, extras = _given(request, rows.size(0), generator)
        if cell.shows_c:
            grads.append(random(rows.size(0), directions * size))
    results, saved = layer.forward(request, input, batch_sizes, h_0, c_0, weights, given)
    found: list[Tensor | None] = list(results)
    if request.needs_grad:
        found += layer.backward(
            request, input, batch_sizes, h_0, c_0, weights, saved, grads, needs, given
        )
    arguments = [t.double().requires_grad_() for t in (rows, *states, *weights)]
    own_h_0 = arguments[1]
    own_c_0 = arguments[2] if cell.states == 2 else None
    own_weights = arguments[1 + len(states) :]
    with torch.enable_grad():
        if isinstance(cell, RegularizedCell):
            assert cell.plain is not None
            expected = reference.extended_layer(
                cell.plain, arguments[0], sizes, own_h_0, own_c_0, own_weights, extras
            )
        else:
            expected = reference.layer(cell, arguments[0], sizes, own_h_0, own_c_0, own_weights)
    right: list[Tensor] = [t.detach() for t in expected]
    if request.needs_grad:
        right += torch.autograd.grad(
            expected,
            [argument for argument in arguments if argument.numel() > 0],
            [grad.double() for grad in grads],
            allow_unused=True,
            materialize_grads=True,
        )
    pairs = zip((t for t in found if t is not None), right, strict=True)
    return max(_error(actual, wanted) for actual, wanted in pairs)


def _given(request: Request, rows: int, generator: torch.Generator) -> tuple["layer.Given", Extras]:
    """Random masks for a cell that is given more, as the kernels and as the reference take them."""
    from triton_rnn.backends.triton import layer

    cell, directions, size = request.cell, request.directions, request.hidden_size
    assert isinstance(cell, RegularizedCell)

    def halves(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=request.device) < 0.5

    locked = 2.0 * halves(directions, request.batch, size) if cell.locked else None
    zoneouts = [halves(rows, directions * size) if p is None else p for p in cell.zoneout]
    extras = Extras(
        recurrent_mask=None if locked is None else locked.double(),
        zoneout_h=zoneouts[0],
        zoneout_c=zoneouts[1] if len(zoneouts) == 2 else 0.0,
        clip_hidden=cell.clip_hidden,
        clip_cell=cell.clip_cell,
        all_cells=cell.shows_c,
    )
    masks = [mask for mask in zoneouts if isinstance(mask, Tensor)]
    return layer.Given(None if locked is None else locked.to(request.dtype), masks), extras


def _error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double().reshape(expected.shape) - expected
    return float(difference.norm() / expected.norm().clamp_min(1e-12))
