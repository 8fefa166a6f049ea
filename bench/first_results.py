"""Time to a first result, in fresh processes: imports, first calls, kernels compiled ahead of time.

    python -m bench.first_results start PROVIDER CELL MODE
    python -m bench.first_results triton

are the processes that are measured; each prints one JSON object. Neither torch nor triton_rnn is
imported at the top, for importing them is one of the things measured.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.cases import Size

ROOT = Path(__file__).parent.parent
OURS = "triton_rnn"
TORCH = "torch.nn"
# Names of packages: `import_module` finds the layers by them. Ours is the first.
PROVIDERS = (OURS, TORCH)
TIMEOUT = 300

KERNELS_CHIP = "H200"
KERNELS_NAME = "Triton kernels of an LSTM layer for sm_90"
LOOPS_NAME = "C loops"

Row = dict[str, Any]


def make_step(provider: str, cell: str, mode: str, size: Size) -> Callable[[], object]:
    """One inference or training step of a layer on padded input; it keeps no graph.

    In training, the input wants a gradient, as it does behind an embedding or another layer, and
    the gradient of the output is given, so that no loss is timed.
    """
    import torch

    package = importlib.import_module(provider)
    layer = getattr(package, cell.upper())(size.input_size, size.hidden_size, size.layers)
    data = torch.randn(size.seq_len, size.batch, size.input_size)
    if mode == "inference":

        def infer() -> object:
            with torch.no_grad():
                return layer(data)

        return infer

    data.requires_grad_()
    leaves = [data, *layer.parameters()]
    grad_output = torch.randn(size.seq_len, size.batch, size.hidden_size)

    def train() -> None:
        for leaf in leaves:
            leaf.grad = None
        output, _ = layer(data)
        output.backward(grad_output)

    return train


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def start(provider: str, cell: str, mode: str) -> dict[str, float]:
    """What the first call of a process costs, at a size where later ones take microseconds."""
    torch_import = _seconds(lambda: importlib.import_module("torch"))
    package_import = _seconds(lambda: importlib.import_module(provider))
    import torch

    from bench.cases import Size

    if mode == "training":
        # torch's own first backward imports many modules, whichever layer it goes through.
        linear = torch.nn.Linear(2, 2)
        linear(torch.ones(2)).backward(torch.ones(2))
    step = make_step(provider, cell, mode, Size(4, 10, 16, 16))
    first_call = _seconds(step)
    # Linux and others count the monotonic clock from one origin for all processes.
    finished = time.monotonic()
    return {
        "torch_import": torch_import,
        "package_import": package_import,
        "first_call": first_call,
        "second_call": _seconds(step),
        "finished": finished,
    }


def compile_kernels() -> dict[str, Any]:
    """Seconds to get the kernels of an LSTM layer's training step, compiled or from the cache."""
    import torch

    from bench import kernels

    chip = kernels.CHIPS[KERNELS_CHIP]
    half = (torch.float16,)
    # The last projection is the one for many columns, as a layer of 128 has.
    projections = [one for one in kernels.matmuls(chip, half) if one.name == "projection"]
    recurrences = [
        one
        for one in kernels.recurrences(chip, ("lstm",), half, (128,), (8,), (1,), (None,))
        if one.name == "backward" or "training" in one.what
    ]
    wanted = [projections[-1], *recurrences]
    seconds = _seconds(lambda: [kernels.compiled(one) for one in wanted])
    return {"seconds": seconds, "note": f"{len(wanted)} kernels, float16, {KERNELS_CHIP}"}


def compile_loops() -> dict[str, Any]:
    """Seconds to get the C loops for float32, compiled or from the cache.

    Raises:
        RuntimeError: they do not compile here.
    """
    import torch

    from triton_rnn.backends import native
    from triton_rnn.backends.native import build

    found: list[object] = []
    seconds = _seconds(lambda: found.append(native.library(torch.float32, "lstm")))
    if isinstance(found[0], str):
        raise RuntimeError(found[0])
    command = build.compiler() or [""]
    return {"seconds": seconds, "note": f"float32 LSTM forward, {Path(command[0]).name}"}


def run_process(*arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run this file in a fresh interpreter; returns what it printed, and when it was started.

    Raises:
        RuntimeError: it failed or took too long; the message is one line.
    """
    # Triton's interpreter compiles nothing.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    started = time.monotonic()
    try:
        found = subprocess.run(
            [sys.executable, "-m", "bench.first_results", *arguments],
            cwd=ROOT,
            env={**inherited, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {TIMEOUT} s") from error
    if found.returncode != 0:
        last = found.stderr.strip().splitlines()[-1:] or [f"exit code {found.returncode}"]
        raise RuntimeError(last[0])
    printed: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return {**printed, "started": started}


def row(name: str, seconds: float | None, note: str = "") -> Row:
    """One first result; without seconds where there are none, and the note says why."""
    return {"name": name, "seconds": seconds, "note": note}


def failed(rows: Iterable[Row]) -> bool:
    """Whether a process that should have measured something failed."""
    return any(found["note"].startswith("failed: ") for found in rows)


def _first_and_later(name: str, seconds: Sequence[float], note: str = "") -> Iterator[Row]:
    """The first start apart from the later ones, which find files in memory and on disk."""
    yield row(f"{name}, first start", seconds[0], note)
    if later := seconds[1:]:
        starts = f"median of {len(later)}, {min(later):.3g} to {max(later):.3g} s"
        yield row(f"{name}, later starts", statistics.median(later), starts)


def start_rows(
    cells: Sequence[str], modes: Sequence[str], providers: Sequence[str], starts: int
) -> Iterator[Row]:
    """Imports and first calls, each in ``starts`` fresh processes, one after the other."""
    imports_wanted = True
    for provider in providers:
        for cell in cells:
            for mode in modes:
                name = f"{provider} {cell} {mode}, first call"
                try:
                    found = [run_process("start", provider, cell, mode) for _ in range(starts)]
                except RuntimeError as error:
                    yield row(name, None, f"failed: {error}")
                    continue
                if imports_wanted and provider == OURS:
                    imports_wanted = False
                    yield from _first_and_later(
                        "import torch", [one["torch_import"] for one in found]
                    )
                    yield from _first_and_later(
                        "import triton_rnn after torch", [one["package_import"] for one in found]
                    )
                whole = statistics.median(one["finished"] - one["started"] for one in found)
                second = statistics.median(one["second_call"] for one in found)
                yield from _first_and_later(
                    name,
                    [one["first_call"] for one in found],
                    f"second call {second:.2g} s; from the start of Python {whole:.2g} s (medians)",
                )


def triton_rows(starts: int) -> Iterator[Row]:
    """The kernels of a layer, compiled into an empty cache and then taken from it, no GPU needed.

    Importing torch and Triton is not counted.
    """
    if importlib.util.find_spec("triton") is None:
        yield from _for_both(KERNELS_NAME, "skipped: there is no triton")
        return
    yield from _compiled_and_cached(KERNELS_NAME, "triton", "TRITON_CACHE_DIR", starts)


def native_rows(starts: int) -> Iterator[Row]:
    """The C loops for float32, compiled into an empty cache and then taken from it.

    Importing torch is not counted.
    """
    from triton_rnn.backends.native import build

    if build.compiler() is None:
        yield from _for_both(LOOPS_NAME, "skipped: there is no C compiler")
        return
    yield from _compiled_and_cached(LOOPS_NAME, "native", "TRITON_RNN_CACHE", starts)


def _for_both(name: str, note: str) -> Iterator[Row]:
    for which in ("compiled", "from the cache"):
        yield row(f"{name}, {which}", None, note)


def _compiled_and_cached(name: str, what: str, variable: str, starts: int) -> Iterator[Row]:
    """Pairs of processes that share a cache folder, named by an environment variable."""
    found: list[list[dict[str, Any]]] = []
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found.append([run_process(what, environment={variable: folder}) for _ in range(2)])
            except RuntimeError as error:
                yield from _for_both(name, f"failed: {error}")
                return
    for index, which in enumerate(("compiled", "from the cache")):
        seconds = [pair[index]["seconds"] for pair in found]
        note = f"{found[0][index]['note']}; median of {starts}"
        yield row(f"{name}, {which}", statistics.median(seconds), note)


def main(arguments: list[str]) -> None:
    what, *rest = arguments
    measurements: dict[str, Callable[..., dict[str, Any]]] = {
        "start": start,
        "triton": compile_kernels,
        "native": compile_loops,
    }
    print(json.dumps(measurements[what](*rest)))


if __name__ == "__main__":
    main(sys.argv[1:])
