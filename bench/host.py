"""What a call on the Triton kernels costs the processor, without a device: Python up to the launch.

`python -m bench host`: ours beside the same with every launch by Triton's own way, which works out
anew what its arguments are, timed in turn in one process. The driver starts nothing, and tensors
are the CPU's, so an allocation costs what it costs there, and so do the products after a backward:
they are one row. The sums on a GPU are others; what is left out is what the driver takes.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

import triton_rnn
from bench.machine import CommandError, check_place, write
from bench.plain_table import show, to_markdown
from bench.turns import QUICK_BUDGET, Budget, Step, measure

HEADER = ("case", "ours, us", "Triton's way, us", "over ours")
CELLS = ("RNN", "GRU", "LSTM")
# Two steps of one sequence: what the processor really computes is next to nothing.
STEPS, BATCH, HIDDEN = 2, 1, 64


def _watched() -> bool:
    """As if somebody listened to launches: he is told by Triton's way alone."""
    return True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="short budgets")
    parser.add_argument("--save", type=Path, metavar="FILE.md", help="write the table too")


def _cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for cell in CELLS:
        for directions in (1, 2):
            module = getattr(triton_rnn, cell)(
                HIDDEN, HIDDEN, bidirectional=directions == 2, dtype=torch.float16
            )
            input = torch.randn(STEPS, BATCH, HIDDEN, dtype=torch.float16)
            grad = torch.ones(STEPS, BATCH, directions * HIDDEN, dtype=torch.float16)

            def inference(module: torch.nn.Module = module, input: torch.Tensor = input) -> None:
                with torch.no_grad():
                    module(input)

            def training(
                module: torch.nn.Module = module,
                input: torch.Tensor = input,
                grad: torch.Tensor = grad,
            ) -> None:
                module.zero_grad()
                module(input)[0].backward(grad)

            name = f"{cell}, {'one direction' if directions == 1 else 'two directions'}"
            yield f"{name}, forward", inference
            yield f"{name}, forward and backward", training


def run(options: argparse.Namespace) -> int:
    """Measure and print; the file is written at the end, whole."""
    path: Path | None = options.save
    check_place(path)
    try:
        from bench.no_device import no_device
        from triton_rnn.backends.triton import launcher
    except ImportError as error:
        raise CommandError(f"the kernels need triton: {error}") from None
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    with no_device(), triton_rnn.use_backend("triton"):
        for name, step in _cases():
            print(name, file=sys.stderr)
            step()
            # A function, not a mock's: that would cost as much as a launch.
            triton_way = functools.partial(mock.patch.object, launcher, "_is_watched", _watched)
            sides = {"ours": Step(step), "Triton's": Step(step, triton_way)}
            rounds = measure(sides, QUICK_BUDGET if options.quick else Budget())
            ours, theirs = (rounds.median(side) * 1e6 for side in sides)
            low, high = rounds.ratio_quartiles("ours", "Triton's")
            ratio = f"{theirs / ours:.2f} ({low:.2f}-{high:.2f})"
            rows.append((name, f"{ours:.0f}", f"{theirs:.0f}", ratio))
    show("until a call's launches are made", HEADER, rows)
    if path is not None:
        write(path, to_markdown("Until a call's launches are made, with no device", HEADER, rows))
    return 0
