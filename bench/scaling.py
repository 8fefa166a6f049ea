"""``python -m bench scaling``: a DDP training step over one process and more.

The cores are divided among the processes: each has cores // processes threads. Strong scaling
divides one batch among the processes, weak scaling gives each a batch of that size. The efficiency
of n processes is the samples per second of all of them over n times those of one process *with as
many threads*, so that it tells what sharing the work and the gradients costs, and not what threads
do. Whether processes or threads make the better use of a machine, the samples per second tell: on
all cores, of one process with all threads and of several with fewer. One process alone trains
through DDP too.

Processes of one machine also share its memory and caches, so 100 % is not to be expected where a
step is bound by these.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

import triton_rnn
from bench.cases import Size
from bench.growth import save, thread_counts, usable_cores
from bench.machine import CommandError, check_place, describe_machine

ROOT = Path(__file__).parent.parent
CELLS = ("rnn", "gru", "lstm")
MODES = ("strong", "weak")

VOCABULARY = 96
WARM_UP_STEPS = 5
# Steps between two looks at the clock, which all processes take together.
BLOCK = 5
FEWEST_STEPS = 10
TIMEOUT = 300

Row = dict[str, Any]


@dataclass(frozen=True)
class Extent:
    """How much is measured: the size, seconds per batch of a start, and fresh starts."""

    size: Size
    seconds: float
    starts: int


# 48 rows divide among 1, 2, 3, 4, 6, 8, 12, 16, 24 and 48 processes.
FULL = Extent(Size(48, 100, 128, 128), 4.0, 3)
QUICK = Extent(Size(48, 16, 32, 32), 0.2, 1)


class Model(nn.Module):
    """Characters (T, N) to scores (T, N, VOCABULARY)."""

    def __init__(self, cell: str, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.input_size)
        layer_class = getattr(triton_rnn, cell.upper())
        self.recurrent = layer_class(size.input_size, size.hidden_size, size.layers)
        self.head = nn.Linear(size.hidden_size, VOCABULARY)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(self.embedding(characters))[0])


# In one of the processes ----------------------------------------------------------------------


def measure_steps(cell: str, size: Size, seconds: float) -> list[float]:
    """Seconds of every step of this process on ``size.batch`` rows of its own."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Model(cell, size))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    torch.manual_seed(dist.get_rank())
    characters = torch.randint(VOCABULARY, (size.seq_len, size.batch))
    following = characters.roll(-1, 0).flatten()

    def step() -> None:
        optimizer.zero_grad()
        scores = model(characters).flatten(0, 1)
        nn.functional.cross_entropy(scores, following).backward()
        optimizer.step()

    for _ in range(WARM_UP_STEPS):
        step()
    taken: list[float] = []
    begun = time.perf_counter()
    # All go on until the first process's clock has run out: one that stopped by its own clock
    # would leave the others waiting.
    going_on = torch.ones(1)
    while going_on:
        for _ in range(BLOCK):
            begin = time.perf_counter()
            step()
            taken.append(time.perf_counter() - begin)
        enough = len(taken) >= FEWEST_STEPS and time.perf_counter() - begun > seconds
        going_on.fill_(not enough)
        dist.broadcast(going_on, 0)
    return taken


def work(cell: str, sizes: Iterable[Size], threads: int, seconds: float, path: Path) -> None:
    """Measure every size; the first process writes the slowest process's median steps."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    medians = torch.tensor(
        [statistics.median(measure_steps(cell, size, seconds)) for size in sizes],
        dtype=torch.float64,
    )
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        path.write_text(json.dumps(medians.tolist()))
    # As in the demo: DDP's cycles must not be left until the interpreter's end.
    gc.collect()
    dist.destroy_process_group()


# In the one that was asked --------------------------------------------------------------------


def start(
    cell: str, sizes: Sequence[Size], processes: int, threads: int, seconds: float
) -> dict[int, float]:
    """Median seconds of a step by ``size.batch``, measured in fresh processes.

    Raises:
        RuntimeError: they failed, or took longer than TIMEOUT; carries their error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "medians.json"
        job = {
            "cell": cell,
            "sizes": [asdict(size) for size in sizes],
            "threads": threads,
            "seconds": seconds,
            "path": str(path),
        }
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        child = subprocess.Popen(
            [*launcher, f"--nproc-per-node={processes}", "-m", "bench.scaling", json.dumps(job)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, errors = child.communicate(timeout=TIMEOUT)
        except BaseException as error:
            # Not killed at once: torchrun ends its processes when it is asked to end.
            child.terminate()
            child.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"not done after {TIMEOUT} s") from error
            raise
        if child.returncode != 0:
            raise RuntimeError(errors)
        medians = json.loads(path.read_text())
    return {size.batch: median for size, median in zip(sizes, medians, strict=True)}


def plan(counts: Sequence[int], cores: int) -> list[tuple[int, int]]:
    """(processes, threads of each) to measure: those asked for, and what they are compared with."""
    asked = [(count, max(1, cores // count)) for count in counts]
    # One process first: without it there is no efficiency, and an interrupted run says little.
    return sorted(
        {*asked, *((1, threads) for _, threads in asked)}, key=lambda one: (one[0], -one[1])
    )


def rows(taken: Mapping[tuple[int, int, int], Sequence[float]], batch: int) -> list[Row]:
    """The runs as they are saved.

    Args:
        taken: seconds of a step, one for each start, by processes, threads and rows of each.
        batch: rows of one process alone.
    """
    found = []
    for mode in MODES:
        for (processes, threads, own), seconds in taken.items():
            if own != (batch // processes if mode == "strong" else batch):
                continue
            if (1, threads, batch) not in taken:
                # One process alone failed: nothing to compare with.
                continue
            step = statistics.median(seconds)
            rate = processes * own / step
            alone = batch / statistics.median(taken[1, threads, batch])
            found.append(
                {
                    "processes": processes,
                    "threads_per_process": threads,
                    "samples_per_second": rate,
                    "seconds_per_step": step,
                    "efficiency": rate / (processes * alone),
                    "mode": mode,
                }
            )
    return found


def table(found: Sequence[Row]) -> Table:
    """A row per mode and number of processes."""
    shown = Table(title="training step over processes")
    for name in ("mode", "processes", "threads of each", "samples/s", "ms a step", "efficiency"):
        shown.add_column(name, justify="left" if name == "mode" else "right")
    for row in found:
        shown.add_row(
            row["mode"],
            str(row["processes"]),
            str(row["threads_per_process"]),
            f"{row['samples_per_second']:.4g}",
            f"{1000 * row['seconds_per_step']:.4g}",
            f"{row['efficiency']:.1%}",
        )
    return shown


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", metavar="1,2", help="counts; without it 1, 2, 4, ... up to all cores"
    )
    parser.add_argument("--cell", choices=CELLS, default="gru", help="(default: gru)")
    parser.add_argument("--quick", action="store_true", help="a small model: does it run at all")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="rewritten at every start")


def _counts(asked: str | None, cores: int, batch: int) -> list[int]:
    if asked is None:
        return [count for count in thread_counts(cores) if batch % count == 0]
    counts = []
    for text in asked.split(","):
        if not text.strip().isascii() or not text.strip().isdigit() or int(text) == 0:
            raise CommandError(f"--processes {asked}: {text!r} is not a whole number above 0")
        counts.append(int(text))
        if counts[-1] > cores:
            raise CommandError(f"--processes {asked}: there are {cores} cores to run them on")
        if batch % counts[-1]:
            raise CommandError(f"--processes {asked}: a batch of {batch} cannot be divided so")
    return sorted(set(counts))


def run(options: argparse.Namespace) -> int:
    """Measure, save after every start, print; returns 1 if a start failed."""
    path: Path | None = options.save
    check_place(path)
    if not dist.is_available() or not dist.is_gloo_available():
        raise CommandError("this torch was built without torch.distributed or gloo")
    extent = QUICK if options.quick else FULL
    size, cores = extent.size, usable_cores()
    planned = plan(_counts(options.processes, cores, size.batch), cores)
    parameters = sum(one.numel() for one in Model(options.cell, size).parameters())
    taken: dict[tuple[int, int, int], list[float]] = {}
    document: dict[str, Any] = {
        "kind": "scaling",
        "schema": 1,
        "machine": describe_machine(),
        "model": {
            "cell": options.cell,
            "parameters": parameters,
            **asdict(size),
            "vocabulary": VOCABULARY,
            "backend": "gloo",
        },
        "runs": [],
    }
    failed = False
    try:
        for number in range(extent.starts):
            for processes, threads in planned:
                what = f"processes {processes}, threads of each {threads}"
                print(f"start {number + 1} of {extent.starts}: {what}", file=sys.stderr)
                # One process divides nothing: both modes are one.
                batches = sorted({size.batch // processes, size.batch})
                sizes = [replace(size, batch=batch) for batch in batches]
                try:
                    medians = start(options.cell, sizes, processes, threads, extent.seconds)
                except RuntimeError as error:
                    print(f"{error}\nfailed: {what}", file=sys.stderr)
                    failed = True
                    continue
                for batch, seconds in medians.items():
                    taken.setdefault((processes, threads, batch), []).append(seconds)
                document["runs"] = rows(taken, size.batch)
                save(document, path)
    finally:
        # What an interruption left is worth a look too.
        Console().print(table(document["runs"]))
    return 1 if failed else 0


def main(job: Mapping[str, Any]) -> None:
    """Be one of the processes that torchrun started."""
    sizes = [Size(**size) for size in job["sizes"]]
    work(job["cell"], sizes, job["threads"], job["seconds"], Path(job["path"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
