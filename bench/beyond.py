"""What torch.nn does not have, beside what its users write for the same thing today.

`python -m bench beyond`: pairs of ours and theirs, timed in turn in one process, one table.
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

import torch
from rich.console import Console
from rich.table import Table

from bench import beyond_cells, beyond_loop, beyond_norm, beyond_stream
from bench.children import RETURN_FREED, run_child
from bench.machine import CommandError, describe_machine, write
from bench.turns import QUICK_BUDGET, Budget, Rounds, measure

Pair = tuple[str, Callable[[], object], Callable[[], object]]
SOURCES: tuple[Callable[..., Iterator[Pair]], ...] = (
    beyond_stream.pairs,
    beyond_cells.pairs,
    beyond_loop.pairs,
    beyond_norm.pairs,
)
HEADER = ("case", "ours", "theirs", "theirs over ours")
MEMORY_BATCH = 256
MEMORY_HEADER = (f"peak of ours, N={MEMORY_BATCH}", "of theirs")


@dataclass(frozen=True)
class _Side:
    step: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases with it in the name")
    parser.add_argument("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")
    parser.add_argument("--quick", action="store_true", help="short budgets")
    parser.add_argument(
        "--memory", action="store_true", help="peak memory too, in processes of their own"
    )
    parser.add_argument("--save", type=Path, metavar="FILE.md", help="write the table too")


def _row(name: str, rounds: Rounds) -> tuple[str, ...]:
    low, high = rounds.ratio_quartiles("ours", "theirs")
    mine, other = (rounds.median(side) * 1e6 for side in ("ours", "theirs"))
    ratio = f"{rounds.ratio('ours', 'theirs'):.2f} ({low:.2f}-{high:.2f})"
    return name, f"{mine:,.0f} us", f"{other:,.0f} us", ratio


def _peaks(name: str) -> tuple[str, ...]:
    """Most memory during a step of either side, beyond what was there before.

    Of a large batch: only what is large goes back to the system at once, and small tensors were
    there before.
    """
    found = []
    for side in ("ours", "theirs"):
        printed = run_child("beyond", name, side, environment=RETURN_FREED)
        assert isinstance(printed["bytes"], int)
        found.append(f"{printed['bytes'] / 2**20:.1f} MiB")
    return tuple(found)


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    facts = ", ".join(f"{name}: {value}" for name, value in describe_machine().items())
    lines = ["# Beyond torch.nn", "", facts, f"{torch.get_num_threads()} threads", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> int:
    """Measure and print; the file is written at the end, whole."""
    path: Path | None = options.save
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise CommandError(f"cannot write {path}")
    if options.threads is not None:
        if options.threads < 1:
            raise CommandError(f"--threads {options.threads}: a number above 0")
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    budget = QUICK_BUDGET if options.quick else Budget()
    rows = []
    for source in SOURCES:
        for name, ours, theirs in source():
            if options.case not in name:
                continue
            print(name, file=sys.stderr)
            ours()
            theirs()
            row = _row(name, measure({"ours": _Side(ours), "theirs": _Side(theirs)}, budget))
            rows.append(row + (_peaks(name) if options.memory else ()))
    if not rows:
        raise CommandError(f"--case {options.case}: there is none")
    table = Table(title=f"{torch.get_num_threads()} threads")
    header = HEADER + (MEMORY_HEADER if options.memory else ())
    for number, title in enumerate(header):
        table.add_column(title, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if path is not None:
        write(path, _markdown(header, rows))
    return 0
