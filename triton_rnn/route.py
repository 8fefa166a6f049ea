"""How a call with more than torch.nn's is done: by which backend, and in which form.

The C loops and the plain ones know all `Extras`. Others do what they know, and the rest is done
around them: lengths and resets by packing (`episodes`), locked dropout of inputs and dropout of
weights by what they are given. What cannot makes another cell, for which the Triton kernels are
generated (`own.regularized`). Layer normalization and recomputing stand around a backend
themselves, so they go together with what can be done around one, on every backend.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from triton_rnn import dispatch, obstacles, recompute
from triton_rnn.cells import CELLS
from triton_rnn.episodes import Episodes, episodes_of
from triton_rnn.extras import Extras
from triton_rnn.request import Call, Request

# What can be done around loops that know nothing of it. So can all states of a cell without c.
_AROUND = ("lengths", "reset_mask", "input_dropout", "weight_dropout")


class Drawn(NamedTuple):
    """A module's options as they hold for a call: those of training are off in evaluation."""

    input_dropout: tuple[float, ...]
    recurrent_dropout: float
    weight_dropout: float
    zoneout: tuple[float, ...]
    training: bool


class Prepared(NamedTuple):
    """A call with more than torch.nn's.

    Attributes:
        call: its tensors.
        extras: what its steps are given, but for masks that are yet to be drawn.
        drawn: what these are drawn by.
        segment: steps of a segment if its backward is to go forward again, 0 for any; else None.
    """

    call: Call
    extras: Extras
    drawn: Drawn
    segment: int | None = None


class Route(NamedTuple):
    """How a call is done.

    Attributes:
        choice: by which backend.
        backend: its module, or a backend made of it.
        call: as that one sees it.
        home: the module that has its `ExtendedLayer`; None where it knows no extras.
        episodes: of which the call is a packed batch; None if its sequences are as they were.
    """

    choice: dispatch.Choice
    backend: Any
    call: Call
    home: str | None
    episodes: Episodes | None


def choose(request: Request) -> dispatch.Choice:
    """The backend that knows all extras of a request here and now, and why each other one does not.

    Raises:
        BackendError: if the one that was asked for cannot, or none can.
    """
    wanted = dispatch.requested()
    reason = obstacles.obstacle()
    if reason is None:
        return dispatch.choose(request, wanted)
    what = ", ".join(request.extras)
    if obstacles.autocast_anywhere() or torch._C._get_tracing_state() is not None:
        raise dispatch.BackendError(f"no backend can run a call with {what}: {reason}")
    if wanted not in ("auto", "reference"):
        raise dispatch.BackendError(f"backend {wanted!r} cannot run this call: {reason}")
    # Plain torch code, which transforms and modes understand.
    others = {name: reason for name in dispatch.BACKENDS if name != "reference"}
    return dispatch.Choice("reference", others)


def route(prepared: Prepared) -> Route:
    """How a call is done here and now.

    Raises:
        BackendError: if the backend that was asked for cannot run the call, or none can.
    """
    request, wanted = prepared.call.request, dispatch.requested()
    inside = tuple(name for name in request.extras if name not in _AROUND)
    if request.cell.states == 1:
        inside = tuple(name for name in inside if name != "all_states")
    if request.cell.together or prepared.segment is not None:
        return _around_others(prepared, inside)
    knows = wanted != "auto" and hasattr(dispatch.backend_module(wanted), "TAKES_EXTRAS")
    if knows or obstacles.obstacle() is not None:
        return _knowing(choose(request), prepared.call)
    if wanted == "auto":
        best = choose(request)
        if best.backend != "reference":
            return _knowing(best, prepared.call)
        if not inside:
            found = _around(prepared, wanted)
            return _knowing(best, prepared.call) if found is None else found
        try:
            return _generated(prepared, inside, best)
        except dispatch.BackendError:
            return _knowing(best, prepared.call)
    if not inside:
        found = _around(prepared, wanted)
        return _no_steps(prepared.call) if found is None else found
    if wanted == "triton":
        return _generated(prepared, inside, None)
    # Which says why not.
    return _knowing(choose(request._replace(extras=inside)), prepared.call)


def _knowing(choice: dispatch.Choice, call: Call) -> Route:
    """By loops that know all extras."""
    backend = dispatch.backend_module(choice.backend)
    return Route(choice, backend, call, backend.TAKES_EXTRAS, None)


def _no_steps(call: Call) -> Route:
    """Of a batch whose sequences are all empty, of which nobody asks what a step would be."""
    others = {name: "there is no step" for name in dispatch.BACKENDS if name != "reference"}
    request, _, _, _, _, weights = call
    cell = CELLS[request.cell.name.removesuffix("_normalized")]
    if cell is not request.cell:
        # Without the gains and shifts that stand behind each direction's weights.
        count = 5 if request.biased else 3
        weights = [weight for at, weight in enumerate(weights) if at % count < count - 1]
    call = call._replace(request=request._replace(cell=cell), weights=weights)
    return _knowing(dispatch.Choice("reference", others), call)


def _packed(prepared: Prepared) -> tuple[Call, Episodes | None] | None:
    """A call without extras, as a packed batch of episodes if need be; None if it has no step."""
    call, extras, *_ = prepared
    request = call.request._replace(extras=())
    if extras.lengths is None and extras.reset_mask is None:
        return call._replace(request=request), None
    episodes = episodes_of(request.seq_len, request.batch, extras, request.device)
    if episodes is None:
        return None
    return by_episodes(call._replace(request=request), episodes), episodes


def by_episodes(call: Call, episodes: Episodes) -> Call:
    """A padded call as one of a packed batch of episodes."""
    request, x, _, h_0, c_0, weights = call
    directions, sizes = request.directions, episodes.batch_sizes
    return Call(
        request._replace(seq_len=len(sizes), batch=sizes[0], packed=True),
        episodes.take(x),
        sizes,
        None if h_0 is None else episodes.take_states(h_0, directions),
        None if c_0 is None else episodes.take_states(c_0, directions),
        weights,
    )


def _around(prepared: Prepared, wanted: str) -> Route | None:
    """By loops that know no extras; None if only the plain ones are left, or there is no step."""
    found = _packed(prepared)
    if found is None:
        return None
    call, episodes = found
    choice = dispatch.choose(call.request, wanted)
    if choice.backend == "reference":
        return None
    return Route(choice, dispatch.backend_module(choice.backend), call, None, episodes)


def _generated(prepared: Prepared, inside: Sequence[str], best: dispatch.Choice | None) -> Route:
    """By Triton kernels that are generated for a call's extras.

    Args:
        best: what else there is, if triton was not asked for by name.

    Raises:
        BackendError: if they cannot be, or cannot run.
    """
    request, kernels = prepared.call.request, dispatch.backend_module("triton")
    reason = kernels.cannot(request)
    if request.cell.projected:
        reason = f"the Triton kernels know nothing of {', '.join(inside)} of a projected LSTM"
    if reason is not None:
        raise dispatch.BackendError(f"backend 'triton' cannot run this call: {reason}")
    found = _packed(prepared)
    if found is None:
        return _no_steps(prepared.call)
    call, episodes = found
    call = call._replace(request=_regularized(prepared, call.request))
    choice = dispatch.choose(call.request, "triton")
    if best is not None:
        reasons = {**best.reasons, "reference": "triton comes first"}
        del reasons["triton"]
        choice = dispatch.Choice("triton", reasons)
    return Route(choice, kernels, call, kernels.REGULARIZES, episodes)


def _regularized(prepared: Prepared, request: Request) -> Request:
    """A request for the cell that a call's extras make of its own."""
    _, extras, drawn, _ = prepared
    # For few, and expensive: tracing.
    make = importlib.import_module("triton_rnn.own.regularized").regularized
    parts = drawn.zoneout[: request.cell.states]
    cell = make(
        request.cell,
        extras.clip_hidden,
        extras.clip_cell,
        tuple(None if part and drawn.training else part for part in parts),
        bool(drawn.recurrent_dropout),
        extras.all_cells,
    )
    return request._replace(cell=cell)


def _around_others(prepared: Prepared, inside: Sequence[str]) -> Route:
    """By a backend that layer normalization or recomputing stands around already."""
    request, wanted = prepared.call.request, dispatch.requested()
    what = "layer_norm" if request.cell.together else "recompute"
    if inside:
        raise dispatch.BackendError(f"{what} does not go together with {', '.join(inside)}")
    found = _packed(prepared)
    if found is None:
        return _no_steps(prepared.call)
    call, episodes = found
    if prepared.segment is None:
        call = call._replace(request=call.request._replace(extras=("layer_norm",)))
        choice = choose(call.request)
        return Route(choice, dispatch.backend_module(choice.backend), call, None, episodes)
    recompute.refuse_obstacles()
    choice = recompute.choose(call.request, wanted)
    backend = recompute.backend(call.request, wanted, prepared.segment)
    return Route(choice, backend, call, None, episodes)
