"""All programs of a launch at once under Triton's interpreter, which runs one after the other.

Each program is a thread, but one thread at a time runs: it passes the turn on at memory operations,
as a schedule says. So runs repeat, a program's place in the grid can stay global state as the
interpreter has it, and the unkindest order of events is one that a test can ask for.
"""

import inspect
import random
import threading

import numpy as np
from triton.runtime import interpreter

# Of a test that hangs, not of one that is slow.
PATIENCE_S = 300


class InTurn:
    """After every memory operation the next program runs."""

    def next(self, program, others, operation, place):
        return min(others, key=lambda other: (other - program) % 1024)


class AtRandom:
    """After a memory operation, as often as not, any other program runs."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def next(self, program, others, operation, place):
        stays = operation != "end" and self._random.random() < 0.5
        return program if stays else self._random.choice(others)


class AsFarAsItCan:
    """A program runs until it looks at the same place twice in vain, then the next one does.

    Args:
        backwards: the next one is the one before.
        leave_after: operations after which it passes the turn on as well.
    """

    def __init__(self, backwards=False, leave_after=()):
        self._sign = -1 if backwards else 1
        self._leave_after = leave_after
        self._seen = {}

    def next(self, program, others, operation, place):
        seen = self._seen.setdefault(program, set())
        again = operation == "poll" and place in seen
        if operation != "poll" or again:
            seen.clear()
        else:
            # A look may be at several places, one after the other.
            seen.add(place)
        if not again and operation != "end" and operation not in self._leave_after:
            return program
        return min(others, key=lambda other: (other - program) * self._sign % 1024)


class _Stop(BaseException):
    """Ends a program because another one has failed."""


class _Turns:
    """The programs of one launch, and whose turn it is."""

    def __init__(self, schedule, programs, late):
        self._schedule = schedule
        self._alive = list(programs)
        self._late = [program for program in late if program in programs]
        self._may_run = {program: threading.Semaphore(0) for program in programs}
        self._index = {}
        self._current = None
        self.error = None

    def run(self, function, indices, arguments):
        self._index = indices
        threads = [
            threading.Thread(target=self._program, args=(program, function, arguments), daemon=True)
            for program in self._alive
        ]
        for thread in threads:
            thread.start()
        self._give(self._ready()[0])
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the programs of a launch never end"
        if self.error is not None:
            raise self.error

    def after(self, operation, place=None):
        """Called by the running program after each memory operation."""
        program = self._current
        others = [other for other in self._ready() if other != program]
        if others:
            chosen = self._schedule.next(program, others, operation, place)
            if chosen != program:
                self._give(chosen)
                self._wait(program)
        if self.error is not None:
            raise _Stop

    def _ready(self):
        return [p for p in self._alive if p not in self._late] or self._alive

    def _give(self, program):
        self._current = program
        interpreter.interpreter_builder.set_grid_idx(*self._index[program])
        self._may_run[program].release()

    def _wait(self, program):
        self._may_run[program].acquire()

    def _program(self, program, function, arguments):
        self._wait(program)
        try:
            if self.error is None:
                with np.errstate(all="ignore"):
                    function(**arguments)
        except _Stop:
            pass
        except BaseException as error:
            self.error = error
        self._alive.remove(program)
        ready = self._ready()
        if ready:
            self._give(self._schedule.next(program, ready, "end", None))


class _Together:
    """Stands for a kernel in the interpreter's loop over the grid: the last call runs them all."""

    def __init__(self, function, threads):
        self._function, self._threads = function, threads
        self._indices = {}
        # What the interpreter asks of a kernel.
        self.__name__ = function.__name__
        self.__globals__ = function.__globals__
        self.__annotations__ = function.__annotations__
        self.__signature__ = inspect.signature(function)

    def __call__(self, **arguments):
        builder = interpreter.interpreter_builder
        self._indices[len(self._indices)] = builder.grid_idx
        if len(self._indices) < np.prod(builder.grid_dim):
            return
        withheld = self._threads.withheld.get(self.__name__, ())
        programs = [program for program in self._indices if program not in withheld]
        late = self._threads.late.get(self.__name__, ())
        turns = _Turns(self._threads.schedule(), programs, late)
        self._threads.launches.append((self.__name__, len(programs)))
        self._threads.turns = turns
        try:
            turns.run(self._function, self._indices, arguments)
        finally:
            self._threads.turns = None


class Threads:
    """From its making to the end of the test, the recurrence's programs run side by side.

    Args:
        schedule: called for each launch; who runs after which operation.

    Attributes:
        withheld, late: by kernel, programs that never start, or only when all others have ended.
        launches: kernel and number of programs of every launch.
    """

    KERNELS = ("recurrence_forward", "recurrence_backward")

    def __init__(self, monkeypatch, schedule=AsFarAsItCan):
        self.schedule = schedule
        self.withheld, self.late = {}, {}
        self.launches = []
        self.turns = None
        threads = self

        class GridExecutor(interpreter.GridExecutor):
            def __init__(self, fn, *args, **kwargs):
                super().__init__(fn, *args, **kwargs)
                if fn.__name__ in threads.KERNELS:
                    self.fn = _Together(fn, threads)

        monkeypatch.setattr(interpreter, "GridExecutor", GridExecutor)
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store
        atomic = builder.create_atomic_rmw

        def masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
            result = load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)
            threads._after("poll" if is_volatile else "load", int(ptrs.data.flat[0]))
            return result

        def masked_store(self, ptrs, *args):
            result = store(self, ptrs, *args)
            threads._after("store", int(ptrs.data.flat[0]))
            return result

        def atomic_rmw(self, op, ptr, value, *args):
            result = atomic(self, op, ptr, value, *args)
            threads._after("arrive" if value.data.any() else "poll", int(ptr.data.flat[0]))
            return result

        monkeypatch.setattr(builder, "create_masked_load", masked_load)
        monkeypatch.setattr(builder, "create_masked_store", masked_store)
        monkeypatch.setattr(builder, "create_atomic_rmw", atomic_rmw)

    def _after(self, operation, place):
        if self.turns is not None:
            self.turns.after(operation, place)
