"""What a call on the Triton kernels costs the processor, without a device: Python up to the launch.

`python -m bench host`: ours beside the same with every launch by Triton's own way, which works out
anew what its arguments are, timed in turn in one process. The driver starts nothing, and tensors
are the CPU's, so an allocation costs what it costs there, and so do the products after a backward:
they are one row. The sums on a GPU are others; what is left out is what the driver takes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

import triton_rnn
from bench.machine import CommandError, describe_machine, write
from bench.turns import QUICK_BUDGET, Budget, measure

HEADER = ("case", "ours, us", "Triton's way, us", "over ours")
CELLS = ("RNN", "GRU", "LSTM")
# Two steps of one sequence: what the processor really computes is next to nothing.
STEPS, BATCH, HIDDEN = 2, 1, 64


@dataclass(frozen=True)
class _Side:
    step: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


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
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise CommandError(f"cannot write {path}")
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
            # Somebody who listens to launches is told by Triton's way alone.
            sides = {
                "ours": _Side(step),
                "Triton's": _Side(
                    step, lambda: mock.patch.object(launcher, "_is_watched", return_value=True)
                ),
            }
            rounds = measure(sides, QUICK_BUDGET if options.quick else Budget())
            ours, theirs = (rounds.median(side) * 1e6 for side in sides)
            low, high = rounds.ratio_quartiles("ours", "Triton's")
            ratio = f"{theirs / ours:.2f} ({low:.2f}-{high:.2f})"
            rows.append((name, f"{ours:.0f}", f"{theirs:.0f}", ratio))
    table = Table(title="until a call's launches are made")
    for number, title in enumerate(HEADER):
        table.add_column(title, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if path is not None:
        facts = ", ".join(f"{name}: {value}" for name, value in describe_machine().items())
        lines = ["# Until a call's launches are made, with no device", "", facts, ""]
        lines += ["| " + " | ".join(row) + " |" for row in (HEADER, ("---",) * len(HEADER), *rows)]
        write(path, "\n".join(lines) + "\n")
    return 0
