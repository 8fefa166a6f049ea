"""What a call would do, and why, without doing it."""

from dataclasses import dataclass
from typing import Any

import torch

from triton_rnn import (
    autocast,
    cell_call,
    dispatch,
    extended,
    functional,
    normalized,
    obstacles,
    recompute,
    stacking,
)
from triton_rnn.episodes import Episodes
from triton_rnn.own import call as own
from triton_rnn.own.module import Recurrent
from triton_rnn.request import Call, Request
from triton_rnn.route import Prepared, choose, route

_MALFORMED = "malformed or out of the ordinary: torch.nn's own forward answers it"


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, and why each other one does not.

    Attributes:
        backend: name of the backend.
        reasons: for every other backend, why it was not taken.
        plan: how the backend goes about it, one line per layer; empty where torch decides.
        request: the first layer as the dispatcher saw it; None if it did not come to that.
    """

    backend: str
    reasons: dict[str, str]
    plan: tuple[str, ...]
    request: Request | None

    def __str__(self) -> str:
        lines = [f"backend {self.backend}"]
        lines += [f"  {line}" for line in self.plan]
        lines += [f"not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def _left_to_torch(reason: str) -> Explanation:
    others = {name: reason for name in dispatch.BACKENDS if name != "aten"}
    return Explanation("aten", others, (), None)


def explain(
    module: torch.nn.Module,
    input: Any,
    hx: Any = None,
    *,
    lengths: torch.Tensor | None = None,
    reset_mask: torch.Tensor | None = None,
    reset_to: str = "zeros",
    all_states: bool = False,
) -> Explanation:
    """Say which backend `module(input, hx, ...)` would run on here and now, and why.

    Nothing is run. Of a module with hidden sizes per layer or residual connections it explains the
    first layer.

    Args:
        module: a recurrent module or cell of this package.
        input, hx, lengths, reset_mask, reset_to, all_states: as for the module's call.

    Returns:
        An `Explanation`; print it to read it.

    Raises:
        TypeError: if the module is not one of this package (`triton_rnn.replace` makes it one), or
            has no lengths and the like.
        BackendError: if a backend was asked for by name, or `recompute`, and cannot run the call.
        RuntimeError, ValueError: for a `Recurrent`, a module with options, or a call with lengths
            and the like, if it is malformed.
    """
    more = lengths is not None or reset_mask is not None or all_states
    if isinstance(module, Recurrent):
        if all_states:
            raise TypeError(f"{type(module).__name__} takes no all_states")
        given = (lengths, reset_mask, reset_to) if more else None
        return _of_own_cell(module, input, hx, given)
    if more and not isinstance(module, torch.nn.RNNBase):
        raise TypeError(f"{type(module).__name__} takes no lengths, reset_mask or all_states")
    if not isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
        raise TypeError(f"{type(module).__name__} is not a recurrent module")
    if not any(base.__module__ == "triton_rnn.modules" for base in type(module).__mro__):
        raise TypeError(
            f"{type(module).__qualname__} is torch.nn's; triton_rnn.replace(module) makes it ours"
        )
    beyond_torch = more or getattr(module, "_options", None) or getattr(module, "_stacking", False)
    if isinstance(module, torch.nn.RNNBase) and beyond_torch and autocast.applies(module, input):
        with autocast.off(input):
            return explain(
                *autocast.cast(module, input, hx),
                lengths=lengths,
                reset_mask=reset_mask,
                reset_to=reset_to,
                all_states=all_states,
            )
    if isinstance(module, torch.nn.RNNBase) and (more or getattr(module, "_options", None)):
        first, state = module, hx
        if getattr(module, "_layered", False):
            first, state = stacking.layer_of(module, 0), stacking.states_by_layer(module, hx)[0]
        prepared = extended.prepare(first, input, state, lengths, reset_mask, reset_to, all_states)
        if prepared is not None:
            return _extended(prepared, first.num_layers)
    if isinstance(module, torch.nn.RNNBase) and getattr(module, "_normalized", False):
        call = normalized.prepare(module, input, hx)
        if call is None:
            return _left_to_torch(_MALFORMED)
        taken = choose(call.request)
        lines = tuple(_plan(call, taken.backend, module.num_layers))
        return Explanation(taken.backend, taken.reasons, lines, call.request)
    wanted = dispatch.requested()
    recomputed = getattr(module, "_recompute", False)
    if recomputed and torch.is_grad_enabled():
        recompute.refuse_obstacles()
    if isinstance(module, torch.nn.RNNBase):
        half = autocast.prepare(module, input, hx)
        if half is not None:
            lines = tuple(_plan(half[0], half[1].backend, module.num_layers))
            return Explanation(half[1].backend, half[1].reasons, lines, half[0].request)
    here = functional.asked_here()
    if here is None:
        return _left_to_torch(f"{obstacles.obstacle()}: torch.nn's own forward answers the call")
    if getattr(module, "_layered", False):
        # Each layer is a call of its own; the first one's input is what is here.
        hx = stacking.states_by_layer(module, hx)[0]
        module = stacking.layer_of(module, 0)
    if isinstance(module, torch.nn.RNNBase):
        layers = module.num_layers
        call = functional.prepare(module, input, hx)
    else:
        layers = 1
        call = cell_call.prepare(module, input, hx)
    if call is None:
        return _left_to_torch(_MALFORMED)
    recomputed = call.request.needs_grad and recomputed
    choice: dispatch.Choice | None
    if isinstance(module, torch.nn.RNNCellBase):
        choice = cell_call.choose(call.request, here)
        if choice is None:
            return _left_to_torch("auto leaves this step to torch's own cells")
    else:
        choice = (recompute if recomputed else dispatch).choose(call.request, here)
    if here != wanted:
        reasons = dict.fromkeys(
            choice.reasons, "torch.vmap is at work, which needs the plain loops"
        )
        choice = choice._replace(reasons=reasons)
    plan = _plan(call, choice.backend, layers)
    if recomputed:
        plan.append(_segments(call, 0 if recomputed is True else recomputed))
    return Explanation(choice.backend, choice.reasons, tuple(plan), call.request)


def _of_own_cell(module: Recurrent, input: Any, hx: Any, more: Any) -> Explanation:
    """Of a user's cell; more: lengths, reset_mask and reset_to, if there are any."""
    call, plan = own.prepare(module, input, hx), []
    request = call.request
    if more is not None:
        call, episodes = own.in_episodes(module, input, call, more)
        plan += [] if episodes is None else [_side_by_side(episodes)]
    choice = own.choose(call)
    plan += _plan(call, choice.backend, module.num_layers)
    return Explanation(choice.backend, choice.reasons, tuple(plan), request)


def _side_by_side(episodes: Episodes) -> str:
    sizes = episodes.batch_sizes
    return f"{sizes[0]} episodes side by side, the longest of {len(sizes)} steps"


def _extended(prepared: Prepared, layers: int) -> Explanation:
    """Of a call with more than torch.nn's can do."""
    choice, _, call, _, episodes = route(prepared)
    plan = [] if episodes is None else [_side_by_side(episodes)]
    plan += _plan(call, choice.backend, layers)
    if prepared.segment is not None:
        plan.append(_segments(call, prepared.segment))
    return Explanation(choice.backend, choice.reasons, tuple(plan), prepared.call.request)


def _segments(call: Call, given: int) -> str:
    steps = recompute.Recomputing(None, given).steps_of(call.request.seq_len)
    return f"in segments of {steps} steps, each gone through again in the backward"


def _plan(call: Call, backend: str, layers: int) -> list[str]:
    """How the backend goes about each layer, as far as it tells."""
    describe = getattr(dispatch.backend_module(backend), "describe", None)
    plan: list[str] = []
    if describe is not None:
        request = call.request
        rows = call.input.numel() // request.input_size
        for number in range(layers):
            if number == 1:
                size = request.directions * request.output_size
                request = request._replace(input_size=size)
            plan.append(f"layer {number}: {describe(request, rows)}")
    return plan
