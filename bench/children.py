"""Measurements that need a process of their own; each prints one JSON object.

    python -m bench.children memory PROVIDER CASE_ID
    python -m bench.children beyond NAME ours|theirs
    python -m bench.children import
    python -m bench.children first-call PROVIDER CELL MODE

triton_rnn is imported only by what measures it, for importing it is one of the things measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Freed tensors go back to the system at once, so that the peak is of memory in use. glibc otherwise
# keeps some, more or less of it by chance: equal runs then differ by a quarter.
RETURN_FREED = {
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_ARENA_MAX": "1",
}
TIMEOUT = 300


def run_child(*arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, object]:
    """Run this file in a fresh interpreter and return what it printed.

    Raises:
        RuntimeError: the child failed; carries its error output.
    """
    found = subprocess.run(
        [sys.executable, "-m", "bench.children", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if found.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {found.stderr}")
    printed: dict[str, object] = json.loads(found.stdout.splitlines()[-1])
    return printed


def _memory_kib(field: str) -> int:
    """A field of /proc/self/status.

    Not ``ru_maxrss``: a child starts with its parent's, so a large parent hides a small child.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


def peak_bytes(step: Callable[[], object], steps: int = 3) -> int:
    """Most resident bytes during ``step`` beyond those resident before it (Linux only)."""
    # Sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory_kib("VmRSS")
    for _ in range(steps):
        step()
    return (_memory_kib("VmHWM") - before) * 1024


def memory(provider: str, case_id: str) -> dict[str, object]:
    """Peak of a training step, forward and backward, its gradients included."""
    from dataclasses import replace

    from bench.cases import Size, case_by_id
    from bench.workload import Workload

    case = case_by_id(case_id)
    # What a first call sets up once (threads, libraries, compiled code) belongs to no step.
    tiny = Size(2, 3, 4, 5, case.size.layers, case.size.directions)
    Workload(replace(case, size=tiny), provider).step()
    step = Workload(case, provider).step
    return {"bytes": peak_bytes(lambda: step() and None)}


def beyond(name: str, side: str) -> dict[str, object]:
    """Peak of a step of one side of a pair of `bench.beyond`."""
    from bench.beyond import MEMORY_BATCH, SOURCES

    for source in SOURCES:
        for pair in source(MEMORY_BATCH):
            if pair[0] == name:
                step = pair[1 if side == "ours" else 2]
                # What a first call sets up once belongs to no step.
                step()
                return {"bytes": peak_bytes(step)}
    raise LookupError(name)


def import_cost() -> dict[str, object]:
    """Seconds of ``import triton_rnn`` after ``import torch``, and what it should not have done."""
    import torch

    had_triton = "triton" in sys.modules
    scripted: list[str] = []

    def recorder(name: str) -> Callable[..., object]:
        def record(*arguments: object, **options: object) -> object:
            scripted.append(name)
            return arguments[0] if arguments else None

        return record

    for name in ("script", "trace", "CompilationUnit"):
        setattr(torch.jit, name, recorder(name))
    start = time.perf_counter()
    import triton_rnn  # noqa: F401  (its import is what is timed)

    seconds = time.perf_counter() - start
    imported_triton = "triton" in sys.modules and not had_triton
    return {"seconds": seconds, "imported_triton": imported_triton, "scripted": scripted}


def first_call(provider: str, cell: str, mode: str) -> dict[str, object]:
    """Seconds of the first step in a process, of a size where the later ones take microseconds."""
    import torch

    from bench.cases import Case, Size
    from bench.workload import Workload

    # torch's own first backward imports half a thousand modules; with or without a recurrent layer.
    linear = torch.nn.Linear(2, 2)
    linear(torch.ones(2)).backward(torch.ones(2))
    step = Workload(Case(cell, mode, False, Size(4, 10, 16, 16)), provider).step
    start = time.perf_counter()
    step()
    return {"seconds": time.perf_counter() - start}


def main(arguments: list[str]) -> None:
    what, *rest = arguments
    measurements: dict[str, Callable[..., dict[str, object]]] = {
        "memory": memory,
        "beyond": beyond,
        "import": import_cost,
        "first-call": first_call,
    }
    print(json.dumps(measurements[what](*rest)))


if __name__ == "__main__":
    main(sys.argv[1:])
