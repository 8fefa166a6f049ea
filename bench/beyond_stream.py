"""Pairs of ours and theirs for streaming, recomputing, and layers of several sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

import triton_rnn

Pair = tuple[str, Callable[[], object], Callable[[], object]]


def one_step(kind: str, size: int = 128, batch: int = 1) -> Pair:
    """One step of a stream beside a call of torch.nn's module with its state, without gradients."""
    theirs = getattr(torch.nn, kind)(size, size)
    ours = triton_rnn.replace(getattr(torch.nn, kind)(size, size))
    ours.load_state_dict(theirs.state_dict())
    stream, chunk = triton_rnn.Stream(ours), torch.randn(1, batch, size)
    state = None

    def step_of_ours() -> object:
        with torch.no_grad():
            return stream(chunk)

    def step_of_theirs() -> object:
        nonlocal state
        with torch.no_grad():
            output, state = theirs(chunk, state)
            return output

    return f"{kind} stream, one step, H={size}", step_of_ours, step_of_theirs


def recomputing(kind: str, steps: int = 1000, batch: int = 32, size: int = 256) -> Pair:
    """Training with `recompute=True` beside training without, on one backend."""
    modules = [getattr(triton_rnn, kind)(size, size, recompute=value) for value in (True, False)]
    input = torch.randn(steps, batch, size)

    def trains(module: torch.nn.Module) -> Callable[[], object]:
        def run() -> object:
            with triton_rnn.use_backend("native"):
                return module(input)[0].sum().backward()

        return run

    ours, plain = (trains(module) for module in modules)
    return f"{kind} recomputing, T={steps} N={batch} H={size}", ours, plain


def pyramid(kind: str = "LSTM", sizes: tuple[int, ...] = (128, 128, 64), batch: int = 8) -> Pair:
    """Layers of several sizes with residual connections beside a loop over torch.nn's modules."""
    ours = getattr(triton_rnn, kind)(128, sizes, residual=True)
    widths = (128, *sizes)
    layers = [getattr(torch.nn, kind)(below, size) for below, size in itertools.pairwise(widths)]
    input = torch.randn(100, batch, 128)

    def theirs() -> object:
        x = input
        for number, layer in enumerate(layers):
            output = layer(x)[0]
            x = output + x if number and output.shape == x.shape else output
        return x.sum().backward()

    return f"{kind} of several sizes, residual", lambda: ours(input)[0].sum().backward(), theirs


def pairs(batch: int = 8) -> Iterator[Pair]:
    """All of them: a name, ours, theirs; the batch is that of layers of several sizes."""
    for kind in ("LSTM", "GRU"):
        for size in (32, 128):
            yield one_step(kind, size)
        yield recomputing(kind)
    yield pyramid(batch=batch)
