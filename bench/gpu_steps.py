"""What the warps of a cooperative recurrence do with the time of a step, by clocks in its code.

    python -m bench.gpu_steps OUT_DIR

Leaves OUT_DIR/steps.json and steps.md, written anew after every plan; about a minute. Needs a GPU,
torch, triton and the source tree. Returns 2 without a GPU, and writes nothing.

The PTX that looks for what other programs send, and that which stores, is replaced by the same with
clocks: at each step a warp notes when it began to look, when all was there that it waited for, how
often it looked, and when it stored last. That costs some instructions and a store or two a step, so
the times of a step itself are those of `gpu_session`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench import gpu_inside, gpu_machine, gpu_report
from bench.gpu_grid import TuningPoint
from bench.gpu_parts import alone
from bench.gpu_session import plain, write_atomically
from bench.gpu_timing import Stopwatch
from bench.gpu_workers import failure
from triton_rnn.kernels import pieces
from triton_rnn.kernels.plan import Plan

POINTS = (
    TuningPoint("lstm", "float16", 768, 16, "forward", steps=1024, saving=False),
    TuningPoint("lstm", "float16", 768, 16, "backward", steps=1024),
    TuningPoint("lstm", "bfloat16", 128, 16, "forward", steps=1024, saving=False),
    TuningPoint("lstm", "float16", 768, 16, "forward", steps=1024),
    TuningPoint("lstm", "bfloat16", 128, 16, "backward", steps=1024),
    TuningPoint("rnn", "bfloat16", 1024, 16, "forward", steps=1024, saving=False),
    TuningPoint("gru", "bfloat16", 512, 64, "forward", steps=1024, saving=False),
)
PAUSES = (0, 200, 400)
# Steps that are not like the others, for the programs begin one after the other.
FIRST = 16
HEADER = (
    "point", "plan", "us", "step", "waiting, median warp", "last warp", "looks", "a look",
    "in vain", "work", "rest", "last of ten",
)  # fmt: skip


# Notes --------------------------------------------------------------------------------------------


class Notes:
    """What every warp notes at every step: when it began to look, had all, how often, last stored.

    Four words each, the last of them of the step before. They lie warp by warp, and ahead of those
    of a warp's first step is when it last stored.
    """

    def __init__(self, device: torch.device, warps: int, steps: int) -> None:
        # A backward has a step more.
        self.rows = steps + 2
        self.words = torch.zeros(warps, self.rows, 4, dtype=torch.int32, device=device)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Kernels that are compiled within take notes; there must be none from before."""
        look, store, own = pieces._look, pieces._store, self._own()

        def noted_look(tiles, pieces, padded, bits, near, pause, asked):  # type: ignore[no-untyped-def]
            text = look(tiles, pieces, padded, bits, near, pause, asked)
            if asked != "text":
                return text
            step = f"${tiles * (4 * pieces + 2) + 2}"
            return _around(
                text,
                [
                    ".reg .b32 began, had, times, stored;",
                    *own,
                    "ld.relaxed.gpu.global.b32 stored, [note];",
                    "mov.u32 began, %clock;",
                ],
                [
                    "bar.warp.sync 0xffffffff;",
                    "mov.u32 had, %clock;",
                    "add.u32 looks, looks, 1;",
                    "redux.sync.max.u32 times, looks, 0xffffffff;",
                    f"mad.lo.s64 note, {step}, 16, note;",
                    "@first st.global.v4.b32 [note], {began, had, times, stored};",
                ],
            )

        def noted_store(bits):  # type: ignore[no-untyped-def]
            now = ["mov.u32 now, %clock;", "@first st.relaxed.gpu.global.b32 [note], now;"]
            return _around(store(bits), [".reg .b32 now;", *own], now)

        try:
            pieces._look = triton.constexpr_function(noted_look)
            pieces._store = triton.constexpr_function(noted_store)
            yield
        finally:
            pieces._look, pieces._store = look, store

    def _own(self) -> list[str]:
        """PTX: `note` is where the warp's notes begin, and `first` is of its first thread.

        Where all notes are stands in the code, for no kernel has an argument for it.
        """
        return [
            ".reg .pred first;",
            ".reg .b32 thread, warp;",
            ".reg .b64 note;",
            "mov.u32 thread, %ntid.x;",
            "mov.u32 warp, %ctaid.x;",
            "mul.lo.u32 warp, warp, thread;",
            "mov.u32 thread, %tid.x;",
            "add.u32 warp, warp, thread;",
            "shr.u32 warp, warp, 5;",
            f"mul.wide.u32 note, warp, {16 * self.rows};",
            f"add.s64 note, note, {self.words.data_ptr()};",
            "and.b32 thread, thread, 31;",
            "setp.eq.u32 first, thread, 0;",
        ]

    def of(self, plan: Plan, steps: int) -> Tensor:
        """(programs, warps, steps, 4), on the CPU."""
        words = self.words[: plan.programs * plan.warps, 1 : steps + 1]
        return words.cpu().reshape(plan.programs, plan.warps, steps, 4)


@triton.constexpr_function
def _around(text: str, before: Sequence[str], behind: Sequence[str]) -> str:
    """PTX in braces with something put in front and at the end of what they hold."""
    head, inner = text.split("{", 1)
    inner, tail = inner.rsplit("}", 1)
    return "\n".join([head + "{", *before, inner, *behind, "}" + tail])


# What they say ------------------------------------------------------------------------------------


def summary(notes: Tensor) -> dict[str, float]:
    """Of `Notes.of`, in cycles: medians over programs and steps, but the first steps.

    A program's step is the time from one step's first look to the next one's. Of that are waiting:
    until its median and its last warp have all that they look for; work: from there on until the
    last has sent its own; the rest, until it looks again. The last of ten is the step that one of
    ten exceeds. A look is the time of one, of a warp; in vain are the looks beyond the first.
    """
    began, had, looks, stored = notes[:, :, FIRST:].unbind(-1)
    # Clocks have 32 bits, so it is differences that count; what a step stored is noted by the next.
    zero = began[:, :1, :1]
    began, had, sent = began - zero, had - zero, (stored - zero)[:, :, 1:]
    first = began.amin(1)
    step = first[:, 1:] - first[:, :-1]
    came = had.amax(1)
    waits = had - began
    done = sent.amax(1)

    def median(values: Tensor) -> float:
        return float(values.double().median())

    return {
        "step": median(step),
        "waiting_median_warp": median(waits.double().median(1).values),
        "waiting_last_warp": median(came - first),
        "looks": float(looks.double().mean()),
        "look": median(waits / looks),
        "in_vain": float((looks > 1).double().mean()),
        "work": median(done - came[:, :-1]),
        "rest": median(first[:, 1:] - done),
        "step_last_of_ten": float(step.double().quantile(0.9)) if step.numel() else float("nan"),
    }


# Measuring ----------------------------------------------------------------------------------------


def plans_of(point: TuningPoint, device: torch.device) -> list[Plan]:
    """The planner's choice, with a flag every pause; and forward the best plan of a cluster.

    None that waits several times a step: of those waits only the last would be noted.
    """
    found = gpu_inside.candidates(point, device)[:1]
    if found and found[0].exchange == "flag":
        found = [dataclasses.replace(found[0], pause=cycles) for cycles in PAUSES]
    if point.kernel == "forward":
        plans = gpu_inside.every_plan(gpu_inside.request_of(point, device), point.kernel)
        clusters = [plan for plan in plans if plan.exchange == "cluster"]
        found += sorted(clusters, key=lambda plan: plan.floor_us)[:1]
    return [
        plan
        for plan in found
        if plan.exchange in ("flag", "cluster") and gpu_inside.waits_once(point, plan, device)
    ]


def measure(point: TuningPoint, plan: Plan, notes: Notes, device: torch.device) -> dict[str, Any]:
    """Run one recurrence, by one plan, some times; the notes are of the last."""
    call = gpu_inside.recurrence(point, device)
    with gpu_inside.planned(plan):
        seconds = alone(lambda: call(False), Stopwatch(device))
    gpu_inside.raise_failed_wait(device)
    cycles = summary(notes.of(plan, point.steps))
    return {"status": "ok", "us_per_step": seconds * 1e6 / point.steps, "cycles": cycles}


def table_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    plan = row["plan"]
    shape = f"{plan['exchange']} {plan['block_h']}x{plan['block_n']} w{plan['warps']}"
    shape += f" pause {plan['pause']}" if plan["pause"] else ""
    if row["status"] != "ok":
        return (row["id"], shape, row["error"][:200], *[""] * (len(HEADER) - 3))
    cycles, names = row["cycles"], ("step", "waiting_median_warp", "waiting_last_warp")
    return (
        row["id"], shape, f"{row['us_per_step']:.2f}", *(f"{cycles[name]:.0f}" for name in names),
        f"{cycles['looks']:.2f}", f"{cycles['look']:.0f}", f"{cycles['in_vain']:.2f}",
        *(f"{cycles[name]:.0f}" for name in ("work", "rest", "step_last_of_ten")),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_steps", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out_dir", type=Path, help="where steps.json and steps.md go")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu_steps: no CUDA device is at hand", file=sys.stderr)
        return 2
    run(POINTS, torch.device("cuda", 0), options.out_dir)
    return 0


def run(points: Sequence[TuningPoint], device: torch.device, out_dir: Path) -> None:
    """Measure all plans of some points, and write what is known after each."""
    tasks = [(point, plan) for point in points for plan in plans_of(point, device)]
    # Clusters last: should they take the device with them, the rest is safe.
    tasks.sort(key=lambda task: task[1].exchange == "cluster")
    warps = max(plan.programs * plan.warps for _, plan in tasks)
    notes = Notes(device, warps, max(point.steps for point in points))
    data: dict[str, Any] = {"machine": gpu_machine.describe(device), "rows": []}
    out_dir.mkdir(parents=True, exist_ok=True)
    # Where the notes are is in the kernels, so no other run may find these.
    with tempfile.TemporaryDirectory() as cache, notes.taken(), triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        for point, plan in tasks:
            row = {"id": point.id, "plan": dataclasses.asdict(plan)}
            try:
                row.update(measure(point, plan, notes, device))
            except Exception as error:
                row.update(failure(error))
            data["rows"].append(row)
            print(*table_row(row), flush=True)
            write_atomically(out_dir / "steps.json", json.dumps(plain(data), indent=1) + "\n")
            write_atomically(out_dir / "steps.md", markdown(data))


def markdown(data: Mapping[str, Any]) -> str:
    table = gpu_report.table(HEADER, map(table_row, data["rows"]))
    return f"# A step, in cycles\n\n{gpu_report.machine_line(data)}\n\n{table}"


if __name__ == "__main__":
    sys.exit(main())
