"""One run on a machine with a GPU: is it right, how fast is it, what would the planner do better.

    python -m bench.gpu_session OUT_DIR [--minutes 8] [--part correctness|timing|tuning] [--quick]

It ends within its minutes whatever happens, and leaves OUT_DIR/gpu.json (everything) and gpu.md
(tables), written anew after every part and every few seconds. Needs torch, triton and the source
tree. Returns 0 if all that was checked was right, 1 if not, 2 without a GPU (and writes nothing).

This process keeps the time and the books; children do what touches the GPU (`gpu_workers`).

    gpu_checks   which calls are checked, how near is near    gpu_correctness  checking one
    gpu_grid     which cases are timed and tuned, in order    gpu_timing       timing one
    gpu_goals    what is asked of the times                   gpu_parts        its parts, plans
    gpu_report   the tables                                   gpu_machine      the machine
    gpu_inside   what is asked of the backend's insides
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import gpu_checks, gpu_grid, gpu_report
from bench.gpu_workers import Budget, Pool, Result, Task, serve

ROOT = Path(__file__).parent.parent

# Shares of the time of the parts that run, and what is kept for the last writing.
SHARES = {"correctness": 0.28, "timing": 0.5, "tuning": 0.22}
KEPT_SECONDS = 15.0
# The process is ended so long before its time, should everything else fail.
LAST_SECONDS = 4.0
WRITE_EVERY = 10.0

# Processes that check and compile side by side; times are taken by one alone.
JOBS = 10
TASK_SECONDS, GRACE_SECONDS = 75.0, 4.0
# So many cases are compiled, then timed; then the next.
CHUNK = 48

CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Children run in the source tree, not in an installed package.
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
}
# Without it torch warns about cuBLAS while algorithms must be deterministic. It may cost time, so
# those that take times do without.
CHECK_ENVIRONMENT = {**CHILD_ENVIRONMENT, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
SIDE_BY_SIDE = ("check", "warm", "warm_plan")


# The child's side ---------------------------------------------------------------------------------


def handler(device_name: str) -> tuple[Callable[[Task], Result], Callable[[], bool]]:
    """What a child does with a task, and whether its device still answers."""
    import torch

    from bench import gpu_correctness, gpu_machine, gpu_parts, gpu_timing
    from triton_rnn.kernels.plan import Plan

    device = torch.device("cuda", 0) if device_name == "cuda" else torch.device("cpu")

    def case(task: Task) -> gpu_grid.TimingCase:
        return gpu_grid.TimingCase(**task["case"])

    def point(task: Task) -> gpu_grid.TuningPoint:
        return gpu_grid.TuningPoint(**task["case"])

    handlers: dict[str, Callable[[Task], Result]] = {
        "machine": lambda task: gpu_machine.machine(device),
        "check": lambda task: gpu_correctness.check(gpu_checks.CheckCase(**task["case"]), device),
        "warm": lambda task: gpu_timing.warm(case(task), device),
        "time": lambda task: gpu_timing.measure(case(task), device),
        "phases": lambda task: gpu_parts.phases(case(task), device),
        "candidates": lambda task: gpu_parts.candidates(point(task), device),
        "warm_plan": lambda task: gpu_parts.warm_plan(point(task), Plan(**task["plan"]), device),
        "tune": lambda task: gpu_parts.tune(
            point(task), [Plan(**plan) for plan in task["plans"]], device
        ),
    }

    def is_alive() -> bool:
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                # What the failed task has left would be missed by the next one.
                gc.collect()
                torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    def handle(task: Task) -> Result:
        result = handlers[task["kind"]](task)
        if device.type == "cuda" and task["kind"] in SIDE_BY_SIDE:
            # The memory is shared with the other processes.
            gc.collect()
            torch.cuda.empty_cache()
        return result

    return handle, is_alive


# The parent's side --------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, meets the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Numbers that JSON has no word for as strings, long decimals cut."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


@dataclass
class Store:
    """Everything found so far, and the two files it goes to."""

    directory: Path
    data: dict[str, Any]
    clock: Callable[[], float] = time.monotonic
    written: float = field(default=-math.inf)

    def write(self, now: bool = True) -> None:
        """Write both files; unless `now`, only if the last time was some seconds ago."""
        if not now and self.clock() - self.written < WRITE_EVERY:
            return
        self.written = self.clock()
        self.directory.mkdir(parents=True, exist_ok=True)
        data = plain(self.data)
        write_atomically(self.directory / "gpu.json", json.dumps(data, indent=1) + "\n")
        try:
            text = gpu_report.markdown(data)
        except Exception as error:
            # The numbers are safe; a slip in a table must not end the run.
            text = f"The tables could not be made: {error!r}. The numbers are in gpu.json.\n"
        write_atomically(self.directory / "gpu.md", text)


@dataclass
class Session:
    """The parts of a run, on one budget."""

    store: Store
    budget: Budget
    device: str
    quick: bool
    pools: dict[bool, Pool] = field(default_factory=dict)

    @property
    def is_rehearsal(self) -> bool:
        return self.device == "cpu"

    def pool(self, side_by_side: bool) -> Pool:
        """The processes that work side by side, or the one that works alone."""
        if side_by_side not in self.pools:
            # A little more than is left: a child ends by itself only if this process is gone.
            seconds = self.budget.left + KEPT_SECONDS - LAST_SECONDS
            command = [sys.executable, "-m", "bench.gpu_session", ".", "--child", f"{seconds:.0f}"]
            command += ["--device", self.device]
            environment = CHECK_ENVIRONMENT if side_by_side else CHILD_ENVIRONMENT
            jobs = JOBS if side_by_side and not self.is_rehearsal else 1
            self.pools[side_by_side] = Pool(command, environment, ROOT, jobs, GRACE_SECONDS)
        return self.pools[side_by_side]

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()

    def run(
        self,
        part: dict[str, Any],
        tasks: Sequence[Task],
        budget: Budget,
        keep: Callable[[Task, Result], None] | None = None,
    ) -> None:
        """Run tasks; append each result to the part, or hand it to `keep`; name what is left."""
        if not tasks:
            return

        def done(task: Task, result: Result) -> None:
            if keep is None:
                part["results"].append({"id": task["id"], "case": task["case"], **result})
            else:
                keep(task, result)
            if result["status"] not in ("ok", "skipped"):
                print(f"{result['status']}: {task['id']}: {result.get('error', '')[:200]}")
            self.store.write(now=False)

        pool = self.pool(tasks[0]["kind"] in SIDE_BY_SIDE)
        left = pool.run(tasks, budget, done, TASK_SECONDS)
        if pool.start_failure:
            part.setdefault("start_failures", []).append(pool.start_failure)
            print(pool.start_failure[-2000:])
        if keep is None:
            part["not_reached"] += [task["id"] for task in left]

    # Each part is given its entry in the data, and its budget.

    def machine(self, part: dict[str, Any], budget: Budget) -> None:
        def keep(task: Task, result: Result) -> None:
            self.store.data["machine"] = result.pop("machine", {})
            part.update(result)

        task = {"kind": "machine", "id": "machine", "case": {}}
        self.run(part, [task], budget, keep)

    def correctness(self, part: dict[str, Any], budget: Budget) -> None:
        cases = gpu_checks.check_cases()
        cases = cases[:40] if self.quick else cases
        if self.is_rehearsal:
            cases = gpu_checks.rehearsal_cases()
        self.run(part, [_task("check", case) for case in cases], budget)

    def timing(self, part: dict[str, Any], budget: Budget) -> None:
        cases = gpu_grid.timing_cases(12 if self.quick else gpu_grid.TIMING_CASES)
        parts_of = gpu_grid.PHASE_CASES[: 2 if self.quick else None]
        if self.is_rehearsal:
            cases, parts_of = list(gpu_grid.REHEARSAL_CASES), gpu_grid.REHEARSAL_CASES[:1]
        own_cases, short_cases = gpu_grid.OWN_CASES, gpu_grid.SHORT_CASES
        if self.is_rehearsal:
            own_cases = gpu_grid.REHEARSAL_OWN_CASES
            short_cases = gpu_grid.REHEARSAL_SHORT_CASES
        phases, own, short = _empty_part(), _empty_part(), _empty_part()
        part.update(phases=phases, own=own, short=short)
        for first in range(0, len(cases), CHUNK):
            chunk = cases[first : first + CHUNK]
            if first > 0:
                self._time(part, chunk, self._compile(part, chunk, budget), budget)
                continue
            # After the anchors, the parts of a training step: soon done, and much is seen in them.
            also = [case for case in (*parts_of, *own_cases, *short_cases) if case not in chunk]
            failed = self._compile(part, [*chunk[:4], *also, *chunk[4:]], budget)
            self._time(part, chunk[:4], failed, budget)
            self.run(phases, [_task("phases", case) for case in parts_of], budget.part(0.25))
            self.run(own, [_task("time", case) for case in own_cases], budget.part(0.1))
            self.run(short, [_task("time", case) for case in short_cases], budget.part(0.1))
            self._time(part, chunk[4:], failed, budget)

    def _compile(
        self, part: dict[str, Any], cases: Sequence[gpu_grid.TimingCase], budget: Budget
    ) -> set[str]:
        """Compile side by side; what fails to compile or run is a result, and not to be timed."""
        compiled: dict[str, float] = part.setdefault("compile_s", {})
        failed: set[str] = set()

        def keep(task: Task, result: Result) -> None:
            if result["status"] == "ok":
                compiled[task["id"]] = result["compile_s"]
            else:
                failed.add(task["id"])
                part["results"].append({"id": task["id"], "case": task["case"], **result})

        self.run(part, [_task("warm", case) for case in cases], budget.part(0.35), keep)
        return failed

    def _time(
        self,
        part: dict[str, Any],
        cases: Sequence[gpu_grid.TimingCase],
        failed: set[str],
        budget: Budget,
    ) -> None:
        self.run(part, [_task("time", case) for case in cases if case.id not in failed], budget)

    def tuning(self, part: dict[str, Any], budget: Budget) -> None:
        points = gpu_grid.TUNING_POINTS[: 2 if self.quick else None]
        if self.is_rehearsal:
            points = gpu_grid.REHEARSAL_POINTS
        plans: dict[str, list[dict[str, Any]]] = {}
        good: dict[str, list[dict[str, Any]]] = {point.id: [] for point in points}
        bad: dict[str, list[dict[str, Any]]] = {point.id: [] for point in points}

        def found(task: Task, result: Result) -> None:
            plans[task["id"]] = result.get("plans", [])

        def warmed(task: Task, result: Result) -> None:
            if result["status"] == "ok":
                good[task["point"]].append(task["plan"])
            else:
                bad[task["point"]].append({"plan": task["plan"], **result})

        self.run(part, [_task("candidates", point) for point in points], budget, found)
        warm = [
            {**_task("warm_plan", point), "plan": plan, "point": point.id}
            | {"id": f"{point.id} plan {number}"}
            for point in points
            for number, plan in enumerate(plans.get(point.id, []))
        ]
        self.run(part, warm, budget.part(0.6), warmed)
        tasks = []
        for point in points:
            # In the planner's order again: the first is what the others are compared with.
            kept = [plan for plan in plans.get(point.id, []) if plan in good[point.id]]
            task = {**_task("tune", point), "plans": kept}
            if kept:
                tasks.append(task)
            elif bad[point.id]:
                broken = {"status": "error", "error": "none of its plans ran"}
                part["results"].append({"id": task["id"], "case": task["case"], **broken})
            else:
                part["not_reached"].append(point.id)
        self.run(part, tasks, budget)
        for result in part["results"]:
            own = plans[result["id"]]
            result.setdefault("plans", [])
            result["plans"] += bad[result["id"]]
            tried = [row["plan"] for row in result["plans"]]
            result["plans_not_reached"] = [plan for plan in own if plan not in tried]
            for row in result["plans"]:
                row["chosen"] = row["plan"] == own[0]


def _task(kind: str, case: Any) -> Task:
    return {"kind": kind, "id": case.id, "case": asdict(case)}


def _empty_part() -> dict[str, Any]:
    return {"results": [], "not_reached": []}


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_session", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out_dir", type=Path, help="where gpu.json and gpu.md go")
    parser.add_argument("--minutes", type=float, default=8.0, help="the run ends before (8)")
    parser.add_argument("--part", choices=list(SHARES), action="append", help="only this part")
    parser.add_argument("--quick", action="store_true", help="the first few cases of every part")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: a rehearsal on Triton's interpreter, with TRITON_INTERPRET=1 (cuda)",
    )
    # What the children are started with.
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def obstacle(device: str) -> str | None:
    """Why nothing can be measured here, or None."""
    import torch

    if device == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
        return None if interpreted else "a rehearsal on the CPU needs TRITON_INTERPRET=1"
    if not torch.cuda.is_available():
        return "no CUDA device is at hand, so there is nothing to measure"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    # A run that is cut off has printed what it found.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if options.child is not None:
        serve(*handler(options.device), seconds=options.child)
    reason = obstacle(options.device)
    if reason is not None:
        print(f"bench.gpu_session: {reason}", file=sys.stderr)
        return 2
    seconds = 60 * options.minutes
    faulthandler.dump_traceback_later(max(1.0, seconds - LAST_SECONDS), exit=True)
    # So that a polite kill ends the children and leaves the files whole.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    budget = Budget(seconds - KEPT_SECONDS)
    data: dict[str, Any] = {"finished": False, "quick": options.quick, "device": options.device}
    store = Store(options.out_dir, data)
    session = Session(store, budget, options.device, options.quick)
    try:
        run_parts(session, options.part or list(SHARES))
        data["finished"] = True
    finally:
        session.close()
        data["seconds"] = round(budget.spent, 1)
        store.write()
        print(gpu_report.summary(plain(data)))
        faulthandler.cancel_dump_traceback_later()
    return 0 if gpu_report.is_right(data) else 1


def run_parts(session: Session, names: Sequence[str]) -> None:
    """Each part on its share of what is left; what one leaves over is the next one's."""
    data, budget = session.store.data, session.budget
    part = data["measured_ceilings"] = _empty_part()
    session.machine(part, Budget(min(90.0, budget.left), budget.clock))
    session.store.write()
    names = [name for name in SHARES if name in names]
    for number, name in enumerate(names):
        share = SHARES[name] / sum(SHARES[other] for other in names[number:])
        part = data[name] = _empty_part()
        own = budget.part(share)
        getattr(session, name)(part, own)
        part["seconds"] = round(own.spent, 1)
        session.store.write()
        print(f"{name}: {len(part['results'])} results in {own.spent:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
