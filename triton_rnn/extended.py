"""A module's call with more than torch.nn's: lengths, resets, all states, regularization, clipping.

A door of its own beside `functional.forward`, which knows nothing of it. Random masks are drawn
here, from torch's generator and in one order for every backend, so that a seed gives the same
numbers on each: for every layer the mask of its input, those of W_hh of each direction, that of h,
those of a zoneout of h and of c, and after the layer that of `dropout`.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import compiled, dispatch, functional, obstacles
from triton_rnn.cells import RegularizedCell
from triton_rnn.episodes import Episodes, episodes_of
from triton_rnn.extras import Extras
from triton_rnn.layer import layer
from triton_rnn.options import OFF, Options
from triton_rnn.profiling import ranges
from triton_rnn.request import Request, zero_states

# Any, as a module's mode says which of their forwards it has.
_TORCHS: dict[str, Any] = {"RNN_TANH": torch.nn.RNN, "RNN_RELU": torch.nn.RNN}
_TORCHS |= {"GRU": torch.nn.GRU, "LSTM": torch.nn.LSTM}

# What can be done around the loops of a backend that know nothing of it: by packing, and by what
# the loops are given for an input and for weights. So can all states of a cell without c.
_AROUND = ("lengths", "reset_mask", "input_dropout", "weight_dropout")
_NO_STEPS = "there is no step to run"


class AllStates(NamedTuple):
    """The third result of a call with `all_states=True`: what every layer made at every step.

    Attributes:
        outputs: of each layer its output, before any dropout; of the shape and form of the output.
        cells: of each layer of an LSTM c after every step, likewise, but of hidden_size for each
            direction also where the output is projected; empty for a cell without c.
    """

    outputs: tuple[Any, ...]
    cells: tuple[Any, ...]


class _Drawn(NamedTuple):
    """A module's options as they hold for a call: those of training are off in evaluation."""

    input_dropout: tuple[float, ...]
    recurrent_dropout: float
    weight_dropout: float
    zoneout: tuple[float, ...]
    training: bool


def _drawn(module: torch.nn.RNNBase, options: Options) -> _Drawn:
    layers, states = module.num_layers, 2 if module.mode == "LSTM" else 1
    each, zoneout = options.input_dropout, options.zoneout
    inputs = each if isinstance(each, tuple) else (each,) * layers
    zoneouts = zoneout if isinstance(zoneout, tuple) else (zoneout,) * states
    if not module.training:
        return _Drawn((0.0,) * layers, 0.0, 0.0, zoneouts, False)
    return _Drawn(inputs, options.recurrent_dropout, options.weight_dropout, zoneouts, True)


def _check_lengths(lengths: Any, input: Any, request: Request) -> Tensor:
    """Lengths on the CPU, the caller's own left alone.

    Raises:
        TypeError, ValueError: if they are not those of this batch.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths should be a Tensor, got {type(lengths).__name__}")
    if isinstance(input, PackedSequence):
        raise ValueError("a PackedSequence has lengths already; lengths= is for a padded input")
    if input.dim() != 3:
        raise ValueError("lengths= is for a batch, the input is one sequence (2-D)")
    if lengths.dtype != torch.int64:
        raise ValueError(f"lengths should be int64, got {lengths.dtype}")
    if lengths.shape != (request.batch,):
        raise ValueError(
            f"lengths should be of shape ({request.batch},), got {tuple(lengths.shape)}"
        )
    # A copy: the backward reads them again.
    lengths = lengths.detach().to("cpu", copy=True)
    if request.batch:
        least, most = map(int, lengths.aminmax())
        if least < 0 or most > request.seq_len:
            raise ValueError(
                f"lengths should be from 0 to {request.seq_len}, got {least} to {most}"
            )
    return lengths


def _check_resets(module: Any, reset_mask: Any, input: Any, request: Request) -> Tensor:
    """A mask (T, N) on the input's device, the caller's own left alone.

    Raises:
        TypeError, ValueError: if it is not one of this batch.
    """
    if not isinstance(reset_mask, Tensor):
        raise TypeError(f"reset_mask should be a Tensor, got {type(reset_mask).__name__}")
    if isinstance(input, PackedSequence):
        raise ValueError("reset_mask= is for a padded input, with lengths= if need be")
    if reset_mask.dtype != torch.bool:
        raise ValueError(f"reset_mask should be bool, got {reset_mask.dtype}")
    if input.dim() == 2:
        expected: tuple[int, ...] = (request.seq_len,)
    elif module.batch_first:
        expected = (request.batch, request.seq_len)
    else:
        expected = (request.seq_len, request.batch)
    if reset_mask.shape != expected:
        raise ValueError(f"reset_mask should be of shape {expected}, got {tuple(reset_mask.shape)}")
    if input.dim() == 2:
        reset_mask = reset_mask.unsqueeze(1)
    elif module.batch_first:
        reset_mask = reset_mask.transpose(0, 1)
    return reset_mask.detach().to(request.device, copy=True)


def _names_of(options: Options, drawn: _Drawn) -> tuple[str, ...]:
    on = {
        "input_dropout": any(drawn.input_dropout),
        "recurrent_dropout": drawn.recurrent_dropout,
        "weight_dropout": drawn.weight_dropout,
        "zoneout": any(drawn.zoneout),
        "clip_hidden": options.clip_hidden,
        "clip_cell": options.clip_cell,
    }
    return tuple(name for name, value in on.items() if value)


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
    if torch._C._is_any_autocast_enabled() or torch._C._get_tracing_state() is not None:
        raise dispatch.BackendError(f"no backend can run a call with {what}: {reason}")
    if wanted not in ("auto", "reference"):
        raise dispatch.BackendError(f"backend {wanted!r} cannot run this call: {reason}")
    # Plain torch code, which transforms and modes understand.
    others = {name: reason for name in dispatch.BACKENDS if name != "reference"}
    return dispatch.Choice("reference", others)


class Route(NamedTuple):
    """How a call with more than torch.nn's is done.

    Attributes:
        choice: by which backend.
        call: as the backend sees it.
        episodes: of which the call is a packed batch; None if its sequences are as they were.
    """

    choice: dispatch.Choice
    call: functional.Call
    episodes: Episodes | None


def route(prepared: "Prepared") -> Route:
    """The backend of a call, and the call in the form that it takes.

    Where no loops but the plain ones know the call's extras, those of any other backend do what
    they know, and the rest is done around them, if it can be. What cannot makes another cell, for
    which the Triton kernels are generated.

    Raises:
        BackendError: if the backend that was asked for cannot run the call, or none can.
    """
    call, extras, _ = prepared
    request, wanted = call.request, dispatch.requested()
    knows = wanted != "auto" and hasattr(dispatch.backend_module(wanted), "TAKES_EXTRAS")
    if knows or obstacles.obstacle() is not None:
        return Route(choose(request), call, None)
    inside = tuple(name for name in request.extras if name not in _AROUND)
    if request.cell.states == 1:
        inside = tuple(name for name in inside if name != "all_states")
    if wanted == "auto":
        best = choose(request)
        if best.backend != "reference":
            return Route(best, call, None)
    elif inside and wanted != "triton":
        # Which says why not.
        return Route(choose(request._replace(extras=inside)), call, None)
    plain = call._replace(request=request._replace(extras=()))
    if inside:
        reason = _not_on_kernels(request, inside)
        if reason is None:
            plain = plain._replace(request=_regularized(prepared))
        elif wanted == "auto":
            return Route(best, call, None)
        else:
            raise dispatch.BackendError(f"backend {wanted!r} cannot run this call: {reason}")
    episodes = None
    if extras.lengths is not None or extras.reset_mask is not None:
        episodes = episodes_of(request.seq_len, request.batch, extras, request.device)
        if episodes is None:
            others = {name: _NO_STEPS for name in dispatch.BACKENDS if name != "reference"}
            return Route(dispatch.Choice("reference", others), call, None)
        plain = _by_episodes(plain, episodes)
    if inside and wanted == "auto":
        try:
            dispatch.choose(plain.request, "triton")
        except dispatch.BackendError:
            return Route(best, call, None)
        reasons = {**best.reasons, "reference": "triton comes first"}
        del reasons["triton"]
        return Route(dispatch.Choice("triton", reasons), plain, episodes)
    choice = dispatch.choose(plain.request, wanted)
    if choice.backend == "reference":
        return Route(choice, call, None)
    return Route(choice, plain, episodes)


def _not_on_kernels(request: Request, inside: Sequence[str]) -> str | None:
    """Why the Triton kernels cannot do these extras of a request, as far as is known at once."""
    if request.cell.projected:
        return f"the Triton kernels know nothing of {', '.join(inside)} of a projected LSTM"
    reason: str | None = dispatch.backend_module("triton").cannot(request)
    return reason


def _regularized(prepared: "Prepared") -> Request:
    """The request of a layer of the cell that a call's extras make of its own."""
    call, extras, drawn = prepared
    # Expensive, and for few: tracing.
    make = importlib.import_module("triton_rnn.own.regularized").regularized
    parts = drawn.zoneout[: call.request.cell.states]
    cell = make(
        call.request.cell,
        extras.clip_hidden,
        extras.clip_cell,
        tuple(None if part and drawn.training else part for part in parts),
        bool(drawn.recurrent_dropout),
        extras.all_cells,
    )
    return call.request._replace(cell=cell, extras=())


def _by_episodes(call: functional.Call, episodes: Episodes) -> functional.Call:
    """A padded call as one with a packed batch, which has no lengths and resets."""
    request, x, _, h_0, c_0, weights = call
    directions, sizes = request.directions, episodes.batch_sizes
    return functional.Call(
        request._replace(seq_len=len(sizes), batch=sizes[0], packed=True),
        episodes.take(x),
        sizes,
        None if h_0 is None else episodes.take_states(h_0, directions),
        None if c_0 is None else episodes.take_states(c_0, directions),
        weights,
    )


def refuse_malformed(module: Any, input: Any, hx: Any, names: Sequence[str]) -> NoReturn:
    """Raise what is wrong with a call that cannot be taken apart.

    Raises:
        RuntimeError: what torch.nn's own forward says.
        BackendError: if it has nothing to say.
    """
    _TORCHS[module.mode].forward(module, input, hx)
    raise dispatch.BackendError(
        f"no backend can run a call with {', '.join(names)} on tensors out of the ordinary"
    )


def _locked(
    x: Tensor, p: float, batch: int, batch_sizes: Sequence[int], episodes: Episodes | None
) -> Tensor:
    """The input of a layer under one dropout mask for all steps of a sequence."""
    mask = dropout(x.new_ones(batch, x.size(-1)), p, True)
    if episodes is not None:
        mask = episodes.take_locked(mask)
    elif batch_sizes:
        mask = mask[torch.cat([torch.arange(size) for size in batch_sizes]).to(x.device)]
    return x * mask


def _between_layers(x: Tensor, p: float, episodes: Episodes | None) -> Tensor:
    """Dropout of a layer's output, drawn for the batch as it was given."""
    if episodes is None:
        return dropout(x, p, True)
    ones = x.new_ones(episodes.steps, episodes.batch, x.size(-1))
    return x * episodes.take(dropout(ones, p, True))


def _zoneout(
    x: Tensor, size: int, p: float, training: bool, episodes: Episodes | None
) -> Tensor | float:
    if p == 0.0 or not training:
        return p
    rows = x.shape[:-1] if episodes is None else (episodes.steps, episodes.batch)
    mask = torch.empty((*rows, size), dtype=torch.bool, device=x.device).bernoulli_(p)
    return mask if episodes is None else episodes.take(mask)


def _stack(
    route: Route, batch: int, layers: int, drop: float, drawn: _Drawn, extras: Extras
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Run all layers: final states, every layer's output, every layer's cells; time-major.

    Args:
        batch: N, for which masks are drawn, however the call is done.
    """
    choice, (request, x, batch_sizes, h_0, c_0, weights), episodes = route
    backend: Any = dispatch.backend_module(choice.backend)
    home = walk = None
    if hasattr(backend, "TAKES_EXTRAS"):
        home = importlib.import_module(backend.TAKES_EXTRAS)
    elif isinstance(request.cell, RegularizedCell):
        home = importlib.import_module(backend.REGULARIZES)
        extras = extras._replace(lengths=None, reset_mask=None)
    if home is not None:
        walk = home.walk(request, batch_sizes, extras)
    directions, count = request.directions, len(weights) // layers
    per_direction = count // directions
    finals: list[Sequence[Tensor]] = []
    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    for number in range(layers):
        ranges.here.layer = number
        if number == 1:
            request = request._replace(input_size=directions * request.output_size)
        if drawn.input_dropout[number]:
            x = _locked(x, drawn.input_dropout[number], batch, batch_sizes, episodes)
        own = weights[number * count : (number + 1) * count]
        if drawn.weight_dropout:
            for at in range(1, count, per_direction):
                own[at] = dropout(own[at], drawn.weight_dropout, True)
        rows = slice(number * directions, (number + 1) * directions)
        h = None if h_0 is None else h_0[rows]
        c = None if c_0 is None else c_0[rows]
        knows = backend
        if home is not None:
            mask = None
            if drawn.recurrent_dropout:
                ones = x.new_ones(directions, batch, request.output_size)
                mask = dropout(ones, drawn.recurrent_dropout, True)
                mask = mask if episodes is None else mask.index_select(1, episodes.sequences)
            zoneouts: list[Tensor | float] = [
                _zoneout(x, directions * size, p, drawn.training, episodes)
                for size, p in zip(
                    (request.output_size, request.hidden_size), drawn.zoneout, strict=False
                )
            ]
            knows = home.ExtendedLayer(
                extras._replace(
                    recurrent_mask=mask,
                    zoneout_h=zoneouts[0],
                    zoneout_c=zoneouts[1] if len(zoneouts) == 2 else 0.0,
                ),
                walk,
            )
        elif h is None and not hasattr(backend, "TAKES_NO_STATE"):
            h, c = zero_states(request, x)
        if "stack" in vars(backend):
            one = functional.Call(request, x, batch_sizes, h, c, own)
            x, *states = backend.stack(one, backend, 1, 0.0)
        else:
            x, *states = layer(knows, request, batch_sizes, x, h, c, own)
        if extras.all_cells:
            cells.append(states.pop())
        outputs.append(x)
        finals.append(states)
        if drop > 0 and number + 1 < layers:
            x = _between_layers(x, drop, episodes)
    states = [each[0] if layers == 1 else torch.cat(each) for each in zip(*finals, strict=True)]
    return states, outputs, cells


def _plain(module: torch.nn.RNNBase, input: Any, hx: Any) -> Any:
    result = functional.forward(module, input, hx)
    return _TORCHS[module.mode].forward(module, input, hx) if result is None else result


class Prepared(NamedTuple):
    """A call with more than torch.nn's: its tensors, what its steps are given, and its masks."""

    call: functional.Call
    extras: Extras
    drawn: _Drawn


def prepare(
    module: Any,
    input: Any,
    hx: Any,
    lengths: Any,
    reset_mask: Any,
    reset_to: str,
    all_states: bool,
) -> Prepared | None:
    """What a call comes to, checked; None if it asks for no more than torch.nn's.

    Arguments and errors as of `forward`.
    """
    if reset_to not in ("zeros", "initial"):
        raise ValueError(f"reset_to should be 'zeros' or 'initial', got {reset_to!r}")
    if module._stacking:
        raise dispatch.BackendError(
            "hidden sizes per layer, residual, recompute and layer_norm do not go together with "
            "lengths, reset_mask, all_states and the options of a module"
        )
    options: Options = module._options or OFF
    drawn = _drawn(module, options)
    used = {
        "lengths": lengths is not None,
        "reset_mask": reset_mask is not None,
        "all_states": all_states,
    }
    names = tuple(name for name, value in used.items() if value) + _names_of(options, drawn)
    if not names:
        return None
    if hx is not None and module.mode == "LSTM" and isinstance(input, PackedSequence):
        functional._check_packed_cell_state(module, input, hx)
    call = functional.prepare(module, input, hx)
    if call is None:
        refuse_malformed(module, input, hx, names)
    request = call.request._replace(extras=names)
    extras = Extras(
        None if lengths is None else _check_lengths(lengths, input, request),
        None if reset_mask is None else _check_resets(module, reset_mask, input, request),
        reset_to == "initial",
        clip_hidden=options.clip_hidden or 0.0,
        clip_cell=options.clip_cell or 0.0,
        all_cells=all_states and request.cell.states == 2,
    )
    return Prepared(call._replace(request=request), extras, drawn)


def forward(
    module: Any,
    input: Any,
    hx: Any,
    lengths: Any,
    reset_mask: Any,
    reset_to: str,
    all_states: bool,
) -> Any:
    """What `module(input, hx, ...)` returns when it is asked for more than torch.nn's can do.

    Args:
        input: padded (T, N, I), or (N, T, I) with batch_first, or one sequence (T, I), or packed.
        lengths: (N,) int64 on any device, steps of each sequence of a padded batch in any order,
            from 0 to T. The numbers are those of packing, running and unpacking: what is beyond a
            sequence's end has no part in anything, outputs there are zero, h_n (and c_n) are its
            last states, the reverse direction begins at its own end. A sequence of no steps keeps
            the state it is given. (pytorch issues 4930, 7098.)
        reset_mask: (T, N) bool, or (N, T) with batch_first, or (T,): a marked step begins an
            episode. The state starts anew before it, and no gradient goes past it; the reverse
            direction, coming from the end, starts anew after it. So the result is that of running
            every episode by itself. Marks beyond a sequence's end count for nothing.
        reset_to: what an episode starts with: "zeros", or "initial" for that sequence's part of hx
            (of zeros without), which all its episodes then give gradients to. The first episode
            starts with hx, unless its first step is marked.
        all_states: return an `AllStates` third. States are those that the next step is given, but
            for resets; differentiable as every result.

    The options of the module (see `options.Options`) that are on:

    * Masks are drawn from torch's generator at every call in training. In evaluation there are
      none, and of a zoneout its expectation is taken: h = h' + p (h_before - h'), h' being the
      cell's, and the same for c. h' of an LSTM is made of the c before its zoneout.
    * The mask of h stands before W_hh only: what else the cell makes of h sees all of it (z h of a
      GRU, what a zoneout keeps). It is one for all steps and gates of a sequence, as that of the
      input is; that of W_hh is one for all steps and sequences.
    * Clipping comes before zoneout, and a clipped element has a gradient of zero; h of an LSTM is
      made of the clipped c. (As cuDNN's `cudnnRNNSetClip_v8`, and `cell_clip` of TensorFlow.)

    How it is done is for `route` to say. Lengths and masks on a GPU are waited for.

    Raises:
        TypeError, ValueError: for arguments that are not those of this batch.
        BackendError: if no backend, or not the one that was asked for, can run the call.
        RuntimeError: torch.nn's own errors for a malformed input or state.
    """
    if torch.compiler.is_compiling():
        # Dynamo cannot trace what follows; outside of a graph it runs as it does without Dynamo.
        torch._dynamo.graph_break()
    prepared = prepare(module, input, hx, lengths, reset_mask, reset_to, all_states)
    if prepared is None:
        return _plain(module, input, hx)
    call, extras, drawn = prepared
    packed = isinstance(input, PackedSequence)
    drop = module.dropout if module.training else 0.0
    with ranges.call(call.request.cell):
        taken = route(prepared)
        batch, episodes = call.request.batch, taken.episodes
        states, outputs, cells = _stack(taken, batch, module.num_layers, drop, drawn, extras)
        if episodes is not None:
            outputs = [episodes.put(output) for output in outputs[0 if all_states else -1 :]]
            cells = [episodes.put(every_c) for every_c in cells]
            states = [
                episodes.put_states(state, initial, call.request.directions)
                for state, initial in zip(states, (call.h_0, call.c_0), strict=False)
            ]

    def shown(steps: Tensor) -> Any:
        if packed:
            rows = steps.reshape(-1, steps.size(-1))
            return PackedSequence(
                rows, input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
        if input.dim() == 2:
            return steps.squeeze(1)
        return steps.transpose(0, 1) if module.batch_first else steps

    if packed and input.unsorted_indices is not None:
        states = [state.index_select(1, input.unsorted_indices) for state in states]
    elif not packed and input.dim() == 2:
        states = [state.squeeze(1) for state in states]
    hidden = states[0] if len(states) == 1 else tuple(states)
    output = shown(outputs[-1])
    if not all_states:
        return output, hidden
    every = AllStates(
        (*(shown(steps) for steps in outputs[:-1]), output), tuple(shown(c) for c in cells)
    )
    return output, hidden, every


compiled.leave_to_python(forward)
