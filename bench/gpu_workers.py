"""Child processes that work a list of tasks off, so that a crash or a hang costs one task.

A GPU program that reads where it must not kills its process's context, and one that waits for ever
kills the run; so everything that touches the GPU runs in a child. The parent hands a child one task
at a time, as a line of JSON, and reads one line back.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Task = dict[str, Any]
Result = dict[str, Any]

# A child imports torch and meets its GPU before its first task.
START_SECONDS = 90.0
# So many children in a row may die before they are ready.
FAILED_STARTS = 3


@dataclass
class Budget:
    """How much time is left, by a clock that tests can turn."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    @property
    def spent(self) -> float:
        return self.clock() - self.begun

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    def part(self, share: float, keep: float = 0.0) -> Budget:
        """A budget over a share of what is left, `keep` seconds of which are not to be shared."""
        return Budget(max(0.0, (self.left - keep) * share), self.clock)


class _Child:
    """One process, and a thread that passes on what it writes."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path | None,
        lines: queue.Queue[tuple[_Child, str | None]],
    ) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `forget`)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **environment},
            cwd=cwd,
            text=True,
            # A group of its own, so that compilers it has started end with it.
            start_new_session=True,
        )
        self.task: Task | None = None
        self.ready = False
        # Has said that it ends: its context is dead.
        self.leaving = False
        self.since = 0.0
        self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._reader.start()

    def _read(self, lines: queue.Queue[tuple[_Child, str | None]]) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self._process.stdout:
                lines.put((self, line))
        lines.put((self, None))

    @property
    def is_free(self) -> bool:
        """Whether it can be given a task."""
        return self.ready and not self.leaving and self.task is None

    def give(self, task: Task, now: float) -> None:
        self.task, self.since = task, now
        assert self._process.stdin is not None
        # One that has just died is noticed at the end of its output.
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self, patience: float = 2.0) -> None:
        """Kill it, and do not wait for long: a process may be stuck in the driver."""
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=patience)
        self._reader.join(timeout=patience)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not self._reader.is_alive():
                with contextlib.suppress(OSError):
                    stream.close()

    def last_words(self) -> Result:
        """How it ended and the end of its error output."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 3000))
        text = self._errors.read().decode(errors="replace")
        return {"returncode": self._process.poll(), "traceback": text}

    def forget(self) -> None:
        self._errors.close()


@dataclass
class Pool:
    """Runs tasks on child processes that stay for the next tasks, until `close`.

    Attributes:
        command: starts a child that calls `serve`.
        environment: added to that of this process. cwd: where the children run.
        jobs: children at a time.
        grace: seconds that a running task is given to end when the time is over. A child that is
            killed has to be started anew.
        start_failure: why no more children were started in the last run, if so.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    jobs: int = 1
    grace: float = 0.0
    start_failure: str = field(default="", init=False)
    _children: list[_Child] = field(default_factory=list, init=False)
    _lines: queue.Queue[tuple[_Child, str | None]] = field(default_factory=queue.Queue, init=False)

    def run(
        self,
        tasks: Sequence[Task],
        budget: Budget,
        done: Callable[[Task, Result], None],
        task_seconds: float = 60.0,
    ) -> list[Task]:
        """Call `done` with every task and its result as they come; the tasks not reached.

        A task whose child died has the status "crashed", one that took longer than `task_seconds`
        "hung"; one that was running when the time was over counts as not reached.
        """
        waiting = list(tasks)
        failed_starts = 0
        self.start_failure = ""
        try:
            while not budget.is_over and (waiting or self._running()):
                if failed_starts < FAILED_STARTS:
                    self._start(len(waiting), budget)
                elif not self._children:
                    break
                for child in self._children:
                    if child.is_free and waiting:
                        child.give(waiting.pop(0), budget.clock())
                failed_starts = self._hear(budget, done, failed_starts)
                failed_starts += self._stop_hung(budget, done, task_seconds)
            last = Budget(self.grace, budget.clock)
            while self._running() and not last.is_over:
                self._hear(last, done, 0)
            return [*self._running(), *waiting]
        finally:
            self._end([child for child in self._children if not child.is_free])

    def close(self) -> None:
        """End the children."""
        self._end(list(self._children))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _running(self) -> list[Task]:
        return [child.task for child in self._children if child.task]

    def _start(self, waiting: int, budget: Budget) -> None:
        """Start children for tasks that wait, as many as may be."""
        idle = sum(child.task is None and not child.leaving for child in self._children)
        for _ in range(min(self.jobs - len(self._children), waiting - idle)):
            child = _Child(self.command, self.environment, self.cwd, self._lines)
            child.since = budget.clock()
            self._children.append(child)

    def _hear(self, budget: Budget, done: Callable[[Task, Result], None], failed: int) -> int:
        """Take in one line, or the end of a child; how many starts have failed in a row."""
        try:
            child, line = self._lines.get(timeout=min(0.5, max(0.01, budget.left)))
        except queue.Empty:
            return failed
        if child not in self._children:
            return failed
        if line is not None:
            self._said(child, line, done)
            return 0
        self._children.remove(child)
        self._buried(child, "crashed", done)
        return failed + (not child.ready)

    def _stop_hung(
        self, budget: Budget, done: Callable[[Task, Result], None], task_seconds: float
    ) -> int:
        """End children that take too long; how many of them had not even started."""
        failed = 0
        for child in list(self._children):
            limit = task_seconds if child.ready else START_SECONDS
            if (child.task or not child.ready) and budget.clock() - child.since > limit:
                self._children.remove(child)
                child.kill()
                self._buried(child, "hung", done)
                failed += not child.ready
        return failed

    def _end(self, children: Sequence[_Child]) -> None:
        for child in children:
            child.kill()
        for child in children:
            child.end(patience=0.5)
            child.forget()
            self._children.remove(child)

    def _said(self, child: _Child, line: str, done: Callable[[Task, Result], None]) -> None:
        if not child.ready:
            child.ready = True
            return
        task, child.task = child.task, None
        assert task is not None
        try:
            result: Result = json.loads(line)
        except ValueError:
            result = {"status": "error", "error": f"the child wrote {line[:200]!r}"}
        child.leaving = bool(result.pop("leaving", False))
        done(task, result)

    def _buried(self, child: _Child, status: str, done: Callable[[Task, Result], None]) -> None:
        words = child.last_words()
        child.end()
        child.forget()
        if child.task is not None:
            error = f"the process {status}, return code {words['returncode']}"
            done(child.task, {"status": status, "error": error, **words})
        elif not child.ready:
            self.start_failure = f"a child {status} before its first task: {words['traceback']}"


def failure(error: BaseException) -> Result:
    """An exception as a result."""
    text = "".join(traceback.format_exception(error))
    return {
        "status": "error",
        "error": f"{type(error).__name__}: {error}"[:500],
        "traceback": text[-3000:],
    }


def serve(handle: Callable[[Task], Result], is_alive: Callable[[], bool], seconds: float) -> None:
    """What a child does: tasks from standard input, results to standard output.

    Args:
        handle: does a task; what it raises becomes the result.
        is_alive: asked after a failure, whether this process can go on.
        seconds: after which the process ends, whatever it does.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    # Whatever else writes to standard output, a compiler say, must not come between the lines.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=out)
    for line in sys.stdin:
        alive = True
        try:
            result = handle(json.loads(line))
        except Exception as error:
            result = failure(error)
            alive = is_alive()
            result["leaving"] = not alive
        print(json.dumps(result), file=out)
        if not alive:
            break
    out.flush()
    # Without the clean-up of a context that may be dead.
    os._exit(0)
