"""All that the GPU run asks of the Triton backend's insides: adapt this file when they move."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import triton_rnn
from bench.beyond_cells import MinimalGatedUnit, PeepholeLSTM
from bench.gpu_grid import TuningPoint
from triton_rnn import dispatch, extended, functional, health, route
from triton_rnn.backends.native import calls
from triton_rnn.cells import CELLS
from triton_rnn.kernels import planner
from triton_rnn.kernels.chips import INTERPRETER
from triton_rnn.kernels.plan import Plan
from triton_rnn.own import call as own
from triton_rnn.request import Call, Request

# The functions that a training step's device time is split by.
PHASES = (
    ("products", "project"),
    ("launch", "forward"),
    ("launch", "backward"),
    ("products", "grad_input"),
    ("products", "grad_weight"),
)
# Users' cells by the names that cases give them; the twin of each is its own plain loop.
OWN = {"peephole": PeepholeLSTM, "mgu": MinimalGatedUnit, "ind_rnn": triton_rnn.IndRNN}
# Alternatives of one tuning point, the chosen plan included.
CANDIDATES = 16
# In cycles, beside the planner's.
PAUSES = (0, 100, 200, 300, 450)


def set_tf32(allowed: bool) -> None:
    """Turn the switch that cuDNN's recurrent layers, and so ours, follow."""
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if allowed else "ieee"


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def forced(variant: str) -> Iterator[None]:
    """Plans of one variant only; "cooperative+barrier" takes the best with that exchange.

    Without a variant all is as users have it. With one, the backend does not try its kernels out
    before it uses them, so that an error is the kernels' own, not the reason of a refusal.
    """
    from triton_rnn.backends.triton import launch

    name, _, exchange = variant.partition("+")
    plan_of = launch.plan_of

    def exchanged(request: Request, kernel: str) -> Plan | None:
        found = plan_of(request, kernel)
        if found is None or found.exchange not in ("flag", "barrier"):
            return found
        return best_exchanging(request, kernel, exchange) or found

    before = launch.variant
    with _environment(TRITON_RNN_CHECK="0") if name else contextlib.nullcontext():
        launch.variant = name or None
        if exchange:
            launch.plan_of = exchanged
        # Choices of a backend are remembered by request, and a request does not name the variant.
        forget_choices()
        try:
            yield
        finally:
            launch.plan_of, launch.variant = plan_of, before
            forget_choices()


def forget_choices() -> None:
    """Forget which backend runs what, and that one has failed: the next case starts anew."""
    dispatch._choose.cache_clear()
    calls.forget()
    health._failures.clear()


def raise_failed_wait(device: torch.device) -> None:
    """Wait for the device, and raise if a program on it waited in vain."""
    from triton_rnn.backends.triton import launch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    launch.raise_failed_wait(device)


@contextlib.contextmanager
def masks_of_every_dtype() -> Iterator[None]:
    """Within, the masks of dropout are the same whatever they multiply; torch draws others."""
    torchs = extended.dropout

    def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        return x * torchs(torch.ones_like(x, dtype=torch.float32), p, training).to(x.dtype)

    extended.dropout = dropout
    try:
        yield
    finally:
        extended.dropout = torchs


def requests_of(module: Any, input: Any, hx: Any = None, **more: Any) -> list[Request]:
    """What every layer of a call asks of a backend."""
    prepare = own.prepare if isinstance(module, triton_rnn.Recurrent) else functional.prepare
    more = {"lengths": None, "reset_mask": None, "reset_to": "zeros", "all_states": False} | more
    beyond = None
    if isinstance(module, torch.nn.RNNBase):
        beyond = extended.prepare(module, input, hx, **more)
    if beyond is not None:
        with dispatch.use_backend("triton"):
            call: Call | None = route.route(beyond).call
    else:
        call = prepare(module, input, hx)
    if call is None:
        raise ValueError("the call is malformed or out of the ordinary")
    first = call.request
    deeper = first._replace(input_size=first.directions * first.output_size)
    return [first, *[deeper] * (module.num_layers - 1)]


def plans_of(module: Any, input: Any, hx: Any = None, **more: Any) -> list[Plan | None]:
    """The plan of every kernel of every layer of a call; None where nothing fits."""
    from triton_rnn.backends.triton import launch

    return [
        launch.plan_of(request, kernel)
        for request in requests_of(module, input, hx, **more)
        for kernel in (("forward", "backward") if request.needs_grad else ("forward",))
    ]


def floor_us(plans: Sequence[Plan | None]) -> float:
    """The least that a step of all layers can take by the planner's model."""
    return sum(plan.floor_us for plan in plans if plan is not None)


@contextlib.contextmanager
def phases_watched(
    watch: Callable[[str, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Put `watch(name, function)` in the place of every function that `PHASES` names."""
    from triton_rnn.backends.triton import launch, products

    modules = {"launch": launch, "products": products}
    before = {(module, name): getattr(modules[module], name) for module, name in PHASES}
    try:
        for (module, name), function in before.items():
            label = f"recurrence {name}" if module == "launch" else name
            setattr(modules[module], name, watch(label, function))
        yield
    finally:
        for (module, name), function in before.items():
            setattr(modules[module], name, function)


# Tuning -----------------------------------------------------------------------------------------


def request_of(point: TuningPoint, device: torch.device) -> Request:
    return Request(
        CELLS["rnn_tanh" if point.cell == "rnn" else point.cell],
        device,
        getattr(torch, point.dtype),
        point.steps,
        point.batch,
        point.hidden,
        point.hidden,
        point.hidden,
        point.directions,
        True,
        False,
        point.saving,
    )


def candidates(point: TuningPoint, device: torch.device) -> list[Plan]:
    """The planner's choice first, then what is worth a try beside it.

    Clusters of programs, pauses before a step looks for what the others send, two programs on a
    multiprocessor, the other exchange, more or less of W_hh in registers, other warps, and of all
    that the planner looks at by turns the nearest to its choice and the one with the lowest floor.
    """
    from triton_rnn.backends.triton import launch

    request = request_of(point, device)
    chosen = launch.plan_of(request, point.kernel)
    if chosen is None:
        return []
    plans = every_plan(request, point.kernel) or [dataclasses.replace(chosen, block_n=32)]
    near = _neighbours(chosen, plans)
    fast = sorted(plans, key=lambda plan: plan.floor_us)
    found = [chosen]
    # The best of each size of a cluster.
    sizes = {plan.cluster: plan for plan in reversed(fast) if plan.variant == "cluster"}
    found += sorted(sizes.values(), key=lambda plan: plan.floor_us)[:3]
    if chosen.exchange == "flag":
        found += [dataclasses.replace(chosen, pause=cycles) for cycles in PAUSES]
    found += _two_at_a_time(plans, point.batch)
    if chosen.variant == "cooperative":
        exchange = "barrier" if chosen.exchange == "flag" else "flag"
        found += [plan for plan in [best_exchanging(request, point.kernel, exchange)] if plan]
    if chosen.streamed:
        # The same with more and less of W_hh read again, and all of it by the other kernel.
        found += [dataclasses.replace(chosen, streamed=chosen.streamed + by) for by in (1, -1)]
        others = [plan for plan in every_plan(request, point.kernel) if not plan.on_chip]
        found += sorted(others, key=lambda plan: plan.floor_us)[:1]
    if chosen.variant == "resident" and chosen.in_registers:
        products = launch.kernel_cell(request.cell).products
        found += [dataclasses.replace(chosen, in_registers=held) for held in (0, products)]
    if chosen.exchange not in ("flag", "cluster"):
        # Else a warp is a part of the inner dimension.
        found += [dataclasses.replace(chosen, warps=warps) for warps in (4, 8)]
    found += [plan for pair in zip(near, fast, strict=True) for plan in pair]
    distinct: dict[Plan, Plan] = {}
    for plan in found:
        distinct.setdefault(_launch_of(plan), plan)
    return list(distinct.values())[:CANDIDATES]


def _two_at_a_time(plans: Sequence[Plan], batch: int) -> list[Plan]:
    """The best plan of four warps that takes blocks of the batch by turns, with twice the programs.

    Two such programs fit a multiprocessor: while one waits for the others, the other has work.
    """
    for plan in sorted(plans, key=lambda plan: plan.floor_us):
        tiles = -(-batch // plan.block_n)
        if plan.exchange == "flag" and plan.warps == 4 and tiles > plan.slots:
            return [dataclasses.replace(plan, slots=min(tiles, 2 * plan.slots))]
    return []


def _launch_of(plan: Plan) -> Plan:
    """A plan without what the model says of it."""
    return dataclasses.replace(plan, floor_us=0.0, bytes_on_chip=0)


def _neighbours(chosen: Plan, plans: Sequence[Plan]) -> list[Plan]:
    """Plans by how many of the chosen one's blocks they change, then by their floor."""

    def distance(plan: Plan) -> tuple[int, float]:
        fields = ("variant", "exchange", "block_h", "block_n", "block_k", "at_once")
        changed = sum(getattr(plan, name) != getattr(chosen, name) for name in fields)
        return changed, plan.floor_us

    return sorted(plans, key=distance)


def every_plan(request: Request, kernel: str) -> list[Plan]:
    """All that the planner looks at; nothing for the interpreter."""
    from triton_rnn.backends.triton import launch

    chip = launch.chip_of(request.device)
    if chip == INTERPRETER:
        return []
    shape = launch.shape_of(
        launch.kernel_cell(request.cell),
        kernel,
        request.hidden_size,
        request.directions,
        request.batch,
        request.dtype.itemsize,
        launch.copies(launch.precision(request.dtype, chip.backend)),
    )
    variants = ("resident", "cooperative", "cluster", "streaming")
    return [plan for name in variants for plan in planner._plans(shape, chip, name)]


def waits_once(point: TuningPoint, plan: Plan, device: torch.device) -> bool:
    """Whether a program waits for others once a step: for all blocks, and all its sequences."""
    from triton_rnn.backends.triton import launch

    request = request_of(point, device)
    kernel_cell = launch.kernel_cell(request.cell)
    inner = point.hidden * (kernel_cell.products if point.kernel == "backward" else 1)
    whole = plan.together * plan.splits * plan.block_k >= inner
    return whole and plan.slots * plan.block_n >= point.batch


def best_exchanging(request: Request, kernel: str, exchange: str) -> Plan | None:
    """The fastest cooperative plan with an exchange, by the model; None if there is none."""
    plans = [
        plan
        for plan in every_plan(request, kernel)
        if plan.variant == "cooperative" and plan.exchange == exchange
    ]
    return min(plans, key=lambda plan: plan.floor_us, default=None)


@contextlib.contextmanager
def planned(plan: Plan) -> Iterator[None]:
    """Every launch by this plan."""
    from triton_rnn.backends.triton import launch

    before = launch.plan_of
    launch.plan_of = lambda request, kernel: plan
    try:
        yield
    finally:
        launch.plan_of = before


def recurrence(point: TuningPoint, device: torch.device) -> Callable[[bool], list[torch.Tensor]]:
    """A call of one recurrence kernel alone on random numbers; it gives what the kernel computes.

    The forward overwrites its preactivations with what it saves. Called with True it is given the
    first ones again, so that two plans can be compared; for timing any bounded numbers will do.
    """
    from triton_rnn.backends.triton import launch

    request = request_of(point, device)
    cell = launch.kernel_cell(request.cell)
    size, directions = request.hidden_size, request.directions
    rows = request.seq_len * request.batch
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        numbers = torch.randn(*shape, generator=generator, device=device)
        return numbers.to(request.dtype)

    w_hh = [random(cell.products * size, size) / (2 * size**0.5) for _ in range(directions)]
    state = random(directions, request.batch, size)
    c_0 = state if cell.has_c else None
    preact = random(rows, directions, cell.row * size)
    if point.kernel == "forward":
        vectors = [random(size) if cell.biases else None for _ in range(directions)]
        gates = preact.clone()

        def forward(fresh: bool) -> list[torch.Tensor]:
            if fresh:
                gates.copy_(preact)
            output = gates.new_empty(rows, directions * size)
            _, h_n, *_ = launch.forward(request, output, gates, w_hh, vectors, state, c_0, None)
            return [output, h_n]

        return forward
    # What a forward saves: gates between 0 and 1, or the output between -1 and 1.
    output = random(rows, directions * size).tanh()
    saved = preact.sigmoid() if cell.saves else output
    states = random(rows, directions, size) if cell.has_c else output
    grad_output = random(rows, directions * size)

    def backward(fresh: bool) -> list[torch.Tensor]:
        grad_gates, grad_h_0, _ = launch.backward(
            request, grad_output, saved, states, state, w_hh, [None], state, c_0, None
        )
        return [grad_gates, grad_h_0]

    return backward
