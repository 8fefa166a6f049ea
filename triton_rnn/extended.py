"""A module's call with more than torch.nn's: lengths, resets, all states, regularization, clipping.

A door of its own beside `functional.forward`, which knows nothing of it. Random masks are drawn
here, from torch's generator and in one order for every backend, so that a seed gives the same
numbers on each: for every layer the mask of its input, those of W_hh of each direction, that of h,
those of a zoneout of h and of c, and after the layer that of `dropout`.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import autocast, compiled, functional, malformed, normalized, recompute, stacking
from triton_rnn.episodes import Episodes, check_reset_to, checked
from triton_rnn.extras import Extras
from triton_rnn.layer import layer
from triton_rnn.options import OFF, Options
from triton_rnn.profiling import ranges
from triton_rnn.request import Call, zero_states
from triton_rnn.route import Drawn, Prepared, Route, route


class AllStates(NamedTuple):
    """The third result of a call with `all_states=True`: what every layer made at every step.

    Attributes:
        outputs: of each layer its output, before any dropout, with what a residual connection adds
            to it; of the shape and form of the output.
        cells: of each layer of an LSTM c after every step, likewise, but of hidden_size for each
            direction also where the output is projected; empty for a cell without c.
    """

    outputs: tuple[Any, ...]
    cells: tuple[Any, ...]


def _drawn(module: torch.nn.RNNBase, options: Options) -> Drawn:
    layers, states = module.num_layers, 2 if module.mode == "LSTM" else 1
    each, zoneout = options.input_dropout, options.zoneout
    inputs = each if isinstance(each, tuple) else (each,) * layers
    zoneouts = zoneout if isinstance(zoneout, tuple) else (zoneout,) * states
    if not module.training:
        return Drawn((0.0,) * layers, 0.0, 0.0, zoneouts, False)
    return Drawn(inputs, options.recurrent_dropout, options.weight_dropout, zoneouts, True)


def _names_of(options: Options, drawn: Drawn) -> tuple[str, ...]:
    on = {
        "input_dropout": any(drawn.input_dropout),
        "recurrent_dropout": drawn.recurrent_dropout,
        "weight_dropout": drawn.weight_dropout,
        "zoneout": any(drawn.zoneout),
        "clip_hidden": options.clip_hidden,
        "clip_cell": options.clip_cell,
    }
    return tuple(name for name, value in on.items() if value)


def _locked(
    x: Tensor, p: float, batch: int, batch_sizes: Sequence[int], episodes: Episodes | None
) -> Tensor:
    """The input of a layer under one dropout mask for all steps of a sequence."""
    mask = dropout(x.new_ones(batch, x.size(-1)), p, True)
    if episodes is not None:
        mask = episodes.take_locked(mask)
    elif batch_sizes:
        mask = mask[torch.cat([torch.arange(size, device=x.device) for size in batch_sizes])]
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
    # Not in place, for which torch.vmap draws no numbers of each of its own.
    mask = torch.bernoulli(torch.empty((*rows, size), dtype=torch.bool, device=x.device), p)
    return mask if episodes is None else episodes.take(mask)


def _stack(
    taken: Route, batch: int, layers: int, drop: float, drawn: Drawn, extras: Extras
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Run all layers: final states, every layer's output, every layer's cells; time-major.

    Args:
        batch: N, for which masks are drawn, however the call is done.
    """
    _, backend, (request, x, batch_sizes, h_0, c_0, weights), named, episodes = taken
    home = walk = None
    if named is not None:
        home = importlib.import_module(named)
        if episodes is not None:
            extras = extras._replace(lengths=None, reset_mask=None)
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
        if hasattr(backend, "stack"):
            one = Call(request, x, batch_sizes, h, c, own)
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


def _plain(module: Any, input: Any, hx: Any) -> Any:
    """A call that asks for no more than the module's other keywords."""
    if getattr(module, "_normalized", False):
        return normalized.forward(module, input, hx)
    segment = _segment_of(module)
    if segment is None:
        result = functional.forward(module, input, hx)
    else:
        result = recompute.forward(module, input, hx, segment)
    return malformed.TORCHS[module.mode].forward(module, input, hx) if result is None else result


def _segment_of(module: Any) -> int | None:
    """Steps of a segment, 0 for any, where a backward is to go forward again; else None."""
    wanted = getattr(module, "_recompute", False)
    if wanted is False or not torch.is_grad_enabled():
        return None
    return 0 if wanted is True else int(wanted)


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
    options: Options = module._options or OFF
    drawn = _drawn(module, options)
    used = {
        "lengths": lengths is not None,
        "reset_mask": reset_mask is not None,
        "all_states": all_states,
    }
    check_reset_to(reset_to)
    names = tuple(name for name, value in used.items() if value) + _names_of(options, drawn)
    if not names:
        return None
    functional.refuse_unsafe(module, input, hx)
    kind = normalized if getattr(module, "_normalized", False) else functional
    call = kind.prepare(module, input, hx)
    if call is None:
        malformed.refuse(module, input, hx, names)
    request = call.request._replace(extras=names)
    given = checked(lengths, reset_mask, reset_to, module.batch_first, input, request)
    extras = given._replace(
        clip_hidden=options.clip_hidden or 0.0,
        clip_cell=options.clip_cell or 0.0,
        all_cells=all_states and request.cell.states == 2,
    )
    segment = _segment_of(module) if request.needs_grad else None
    return Prepared(call._replace(request=request), extras, drawn, segment)


def forward(
    module: Any,
    input: Any,
    hx: Any,
    lengths: Any,
    reset_mask: Any,
    reset_to: str,
    all_states: bool,
) -> Any:
    """What the module returns for an input, as torch.nn's does; keywords ask for more than that.

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
    more: tuple[Any, ...] = (lengths, reset_mask, reset_to, all_states)
    if autocast.applies(module, input):
        with autocast.off(input):
            return forward(*autocast.cast(module, input, hx), *more)
    if getattr(module, "_layered", False):
        return _by_layers(module, input, hx, more)
    prepared = prepare(module, input, hx, *more)
    if prepared is None:
        return _plain(module, input, hx)
    call, extras, drawn, _ = prepared
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


def _by_layers(module: Any, input: Any, hx: Any, more: tuple[Any, ...]) -> Any:
    """Where layers have sizes of their own, or residual connections: each is a call of its own."""
    *_, all_states = more
    cells: list[Any] = []

    def run(one: Any, x: Any, state: Any) -> Any:
        output, final, *every = forward(one, x, state, *more)
        for shown in every:
            cells.extend(shown.cells)
        return output, final

    output, hidden, outputs = stacking.each_layer(module, input, hx, run)
    if not all_states:
        return output, hidden
    return output, hidden, AllStates(tuple(outputs), tuple(cells))


compiled.leave_to_python(forward)
