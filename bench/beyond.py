"""What torch.nn does not have, beside what its users write for the same thing today.

`python -m bench beyond`: pairs of ours and theirs, timed in turn in one process, one table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench import beyond_cells, beyond_loop, beyond_norm, beyond_stream
from bench.children import RETURN_FREED, run_child
from bench.machine import CommandError, check_place, write
from bench.plain_table import show, to_markdown
from bench.turns import QUICK_BUDGET, Budget, Rounds, Step, measure

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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases with it in the name")
    parser.add_argument("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")
    parser.add_argument("--quick", action="store_true", help="short budgets")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="wall time, waited for on a GPU"
    )
    parser.add_argument(
        "--memory", action="store_true", help="peak memory too, in processes of their own"
    )
    parser.add_argument("--save", type=Path, metavar="FILE.md", help="write the table too")


def _waited_for(step: Callable[[], object]) -> Callable[[], object]:
    def whole() -> None:
        step()
        torch.cuda.synchronize()

    return whole


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


def run(options: argparse.Namespace) -> int:
    """Measure and print; the file is written at the end, whole."""
    path: Path | None = options.save
    check_place(path)
    if options.threads is not None:
        if options.threads < 1:
            raise CommandError(f"--threads {options.threads}: a number above 0")
        torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no GPU")
    if on_gpu and options.memory:
        raise CommandError("--memory is the process's: for the CPU alone")
    torch.manual_seed(0)
    budget = QUICK_BUDGET if options.quick else Budget()
    rows = []
    with torch.device(options.device):
        pairs = [pair for source in SOURCES for pair in source() if options.case in pair[0]]
    for name, *both in pairs:
        print(name, file=sys.stderr)
        sides = [_waited_for(step) if on_gpu else step for step in both]
        for step in sides:
            step()
        steps = {side: Step(step) for side, step in zip(("ours", "theirs"), sides, strict=True)}
        row = _row(name, measure(steps, budget))
        rows.append(row + (_peaks(name) if options.memory else ()))
    if not rows:
        raise CommandError(f"--case {options.case}: there is none")
    header = HEADER + (MEMORY_HEADER if options.memory else ())
    threads = f"{torch.get_num_threads()} threads"
    if on_gpu:
        threads = torch.cuda.get_device_name()
    show(threads, header, rows)
    if path is not None:
        write(path, to_markdown("Beyond torch.nn", header, rows, threads))
    return 0
