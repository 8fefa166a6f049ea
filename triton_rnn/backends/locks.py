"""A lock around what is made once: compiled loops."""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator


class Once:
    """A lock that its thread may take again, and that a forked child finds free.

    A signal's handler runs in the thread that it interrupts, perhaps while that one compiles. And a
    child has none of its parent's other threads: a lock that one of them held would never be free.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _every.add(self)

    def renew(self) -> None:
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        # The one that is taken is given back, whatever fork has put in its place.
        lock = self._lock
        with lock:
            yield


_every: "weakref.WeakSet[Once]" = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_every):
        lock.renew()


# Windows has no fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
