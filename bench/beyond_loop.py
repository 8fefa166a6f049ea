"""Lengths, resets, all states, clipping and regularization beside loops of torch.nn's cells.

Pairs for a table of cases: a name, a training step of ours, one of the plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

import triton_rnn

STEPS, SIZE = 100, 128
P = 0.2
CLIP = 0.3
Pair = tuple[str, Callable[[], object], Callable[[], object]]


def _cell(kind: str, layer: torch.nn.RNNBase) -> torch.nn.RNNCellBase:
    """torch.nn's cell that shares the weights of a layer."""
    cell = getattr(torch.nn, f"{kind}Cell")(SIZE, SIZE)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(layer, f"{name}_l0"))
    return cell


def _states(kind: str, h: Tensor) -> tuple[Tensor, ...]:
    return (h, h) if kind == "LSTM" else (h,)


def _next(kind: str, cell: torch.nn.Module, x: Tensor, states: tuple[Tensor, ...]):
    return cell(x, states) if kind == "LSTM" else (cell(x, states[0]),)


def _by_lengths(kind: str, cell: torch.nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    states, outputs = _states(kind, x.new_zeros(x.size(1), SIZE)), []
    for t in range(STEPS):
        runs = (lengths > t).unsqueeze(1)
        new = _next(kind, cell, x[t], states)
        states = tuple(map(lambda a, b, runs=runs: torch.where(runs, a, b), new, states))
        outputs.append(new[0] * runs)
    return torch.stack(outputs)


def _by_resets(kind: str, cell: torch.nn.Module, x: Tensor, keeps: Tensor) -> Tensor:
    states, outputs = _states(kind, x.new_zeros(x.size(1), SIZE)), []
    for t in range(STEPS):
        states = tuple(state * keeps[t] for state in states)
        states = _next(kind, cell, x[t], states)
        outputs.append(states[0])
    return torch.stack(outputs)


def _all_states(kind: str, cell: torch.nn.Module, x: Tensor) -> Tensor:
    """Outputs beside every step's c."""
    states, steps = _states(kind, x.new_zeros(x.size(1), SIZE)), []
    for t in range(STEPS):
        states = _next(kind, cell, x[t], states)
        steps.append(torch.cat(states, 1))
    return torch.stack(steps)


def _clipped(kind: str, cell: torch.nn.Module, x: Tensor) -> Tensor:
    """h bounded after every step, and an LSTM's c, of which h is made."""
    states, outputs = _states(kind, x.new_zeros(x.size(1), SIZE)), []
    for t in range(STEPS):
        if kind == "LSTM":
            a = linear(x[t], cell.weight_ih, cell.bias_ih)
            i, f, g, o = (a + linear(states[0], cell.weight_hh, cell.bias_hh)).chunk(4, 1)
            c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
            c = c.clamp(-CLIP, CLIP)
            states = ((torch.sigmoid(o) * torch.tanh(c)).clamp(-CLIP, CLIP), c)
        else:
            states = (_next(kind, cell, x[t], states)[0].clamp(-CLIP, CLIP),)
        outputs.append(states[0])
    return torch.stack(outputs)


def _regularized(kind: str, cell: torch.nn.Module, x: Tensor) -> Tensor:
    """Locked dropout on input and state, dropout on W_hh, zoneout."""
    states, outputs = _states(kind, x.new_zeros(x.size(1), SIZE)), []
    mask_x, mask_h = (dropout(x.new_ones(x.size(1), SIZE), P) for _ in range(2))
    w_hh = dropout(cell.weight_hh, P)
    for t in range(STEPS):
        a = linear(x[t] * mask_x, cell.weight_ih, cell.bias_ih)
        b = linear(states[0] * mask_h, w_hh, cell.bias_hh)
        if kind == "LSTM":
            i, f, g, o = (a + b).chunk(4, 1)
            c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
            new = (torch.sigmoid(o) * torch.tanh(c), c)
        else:
            (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
            z = torch.sigmoid(az + bz)
            n = torch.tanh(an + torch.sigmoid(ar + br) * bn)
            new = (n + z * (states[0] - n),)
        states = tuple(
            torch.where(torch.rand_like(old) < P, old, now)
            for old, now in zip(states, new, strict=True)
        )
        outputs.append(states[0])
    return torch.stack(outputs)


def pairs(batch: int = 8) -> Iterator[Pair]:
    """A training step (forward, backward to input and weights) of each case, T=100 H=128."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    x = torch.randn(STEPS, batch, SIZE, generator=generator).requires_grad_()
    lengths = torch.randint(STEPS // 4, STEPS + 1, (batch,), generator=generator)
    resets = torch.rand(STEPS, batch, generator=generator) < 0.05
    keeps = (~resets).float().unsqueeze(2)
    for kind in ("GRU", "LSTM"):
        layer = getattr(triton_rnn, kind)(SIZE, SIZE)
        options = {"recurrent_dropout": P, "weight_dropout": P, "zoneout": P, "input_dropout": P}
        regular = getattr(triton_rnn, kind)(SIZE, SIZE, **options)
        clips = {"clip_hidden": CLIP} | ({"clip_cell": CLIP} if kind == "LSTM" else {})
        clipped = getattr(triton_rnn, kind)(SIZE, SIZE, **clips)
        cell, other, third = (_cell(kind, each) for each in (layer, regular, clipped))

        def states_of(layer: torch.nn.Module = layer) -> Tensor:
            _, _, every = layer(x, all_states=True)
            return torch.cat([*every.outputs, *every.cells], 2)

        def step(
            run: Callable[[], Tensor], module: torch.nn.Module = layer
        ) -> Callable[[], object]:
            def once() -> Tensor:
                x.grad = None
                module.zero_grad()
                output = run()
                output.sum().backward()
                return output.detach()

            return once

        yield (
            f"{kind} lengths",
            step(lambda layer=layer: layer(x, lengths=lengths)[0]),
            step(lambda kind=kind, cell=cell: _by_lengths(kind, cell, x, lengths)),
        )
        yield (
            f"{kind} resets",
            step(lambda layer=layer: layer(x, reset_mask=resets)[0]),
            step(lambda kind=kind, cell=cell: _by_resets(kind, cell, x, keeps)),
        )
        yield (
            f"{kind} all states",
            step(states_of),
            step(lambda kind=kind, cell=cell: _all_states(kind, cell, x)),
        )
        yield (
            f"{kind} clipping",
            step(lambda clipped=clipped: clipped(x)[0], clipped),
            step(lambda kind=kind, third=third: _clipped(kind, third, x), clipped),
        )
        yield (
            f"{kind} locked dropout, weight dropout, zoneout",
            step(lambda regular=regular: regular(x)[0], regular),
            step(lambda kind=kind, other=other: _regularized(kind, other, x), regular),
        )
