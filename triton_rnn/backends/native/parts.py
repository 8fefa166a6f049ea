"""The functions of `recurrence.c` for one kind of cell and one type of numbers, in parts."""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch

from triton_rnn.backends import locks
from triton_rnn.backends.native import build, calls
from triton_rnn.request import Request

SOURCE = Path(__file__).with_name("recurrence.c")
TYPES = {torch.float32: "float", torch.float64: "double"}


class Function(NamedTuple):
    """A function of `recurrence.c`'s: to be called with bytes, and where it lies."""

    run: Callable[..., int]
    address: int

    @classmethod
    def of(cls, function: Any, records: int) -> "Function":
        # ctypes lets go of the GIL while a CDLL's function runs.
        function.argtypes = (ctypes.c_char_p,) * records
        function.restype = ctypes.c_int64
        return cls(function, ctypes.cast(function, ctypes.c_void_p).value or 0)


# What -DPART of call.h names: a forward, a backward, both for calls with Extras.
_PARTS = ("FORWARD", "BACKWARD", "EXTENDED")


def parts_of(request: Request) -> tuple[str, ...]:
    """The parts that a request's calls are made to."""
    if request.extras not in ((), ("layer_norm",)):
        return ("EXTENDED",)
    return ("FORWARD", "BACKWARD") if request.needs_grad else ("FORWARD",)


class Library:
    """The functions for one type of numbers and one kind of cell; each part compiled when needed.

    Args:
        extra, headers: as `build.library`; what a user's cell is, or layer normalization.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        kind: str,
        extra: Sequence[str] = (),
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._flags = (f"-DREAL={TYPES[dtype]}", f"-DONLY={kind}", *extra)
        self._headers = headers
        self._parts: dict[str, ctypes.CDLL | str] = {}
        self._building = locks.Once()

    def _build(self, part: str) -> "ctypes.CDLL | str":
        try:
            return build.library(SOURCE, (*self._flags, f"-DPART={part}"), self._headers)
        except build.BuildError as error:
            return str(error)

    def _build_all(self, parts: Sequence[str]) -> "list[ctypes.CDLL | str]":
        """Parts side by side, beside what every call goes through."""
        try:
            with ThreadPoolExecutor(1 + len(parts)) as pool:
                pool.submit(calls.functions)
                return list(pool.map(self._build, parts))
        except RuntimeError:
            # No thread can be begun: there are too many, or the interpreter is about to end.
            calls.functions()
            return [self._build(part) for part in parts]

    def need(self, parts: Sequence[str]) -> str | None:
        """Have parts compiled, side by side; why there are none, or None. Each is tried once."""
        if not all(part in self._parts for part in parts):
            with self._building.held():
                missing = [part for part in parts if part not in self._parts]
                self._parts.update(zip(missing, self._build_all(missing), strict=True))
        reasons = (found for found in map(self._parts.get, parts) if isinstance(found, str))
        return next(reasons, None)

    def _part(self, part: str) -> ctypes.CDLL:
        reason = self.need((part,))
        if reason is not None:
            raise RuntimeError(reason)
        found = self._parts[part]
        assert not isinstance(found, str)
        return found

    def _number(self, name: str, arguments: int) -> Callable[..., int]:
        """A function from numbers to a number, which all parts have."""
        at_hand = (part for part in _PARTS if isinstance(self._parts.get(part), ctypes.CDLL))
        function = getattr(self._part(next(at_hand, "FORWARD")), name)
        function.argtypes = (ctypes.c_int64,) * arguments
        function.restype = ctypes.c_int64
        return cast(Callable[..., int], function)

    # These take the bytes of a Call.

    @functools.cached_property
    def forward(self) -> Function:
        return Function.of(self._part("FORWARD").forward, 1)

    @functools.cached_property
    def backward(self) -> Function:
        return Function.of(self._part("BACKWARD").backward, 1)

    # And these those of an Extras too.

    @functools.cached_property
    def forward_extended(self) -> Function:
        return Function.of(self._part("EXTENDED").forward_extended, 2)

    @functools.cached_property
    def backward_extended(self) -> Function:
        return Function.of(self._part("EXTENDED").backward_extended, 2)

    @functools.cached_property
    def saved_numbers(self) -> Callable[..., int]:
        return self._number("saved_numbers", 5)

    @functools.cached_property
    def saved_numbers_extended(self) -> Callable[..., int]:
        return self._number("saved_numbers_extended", 7)

    @functools.cached_property
    def lanes(self) -> Callable[[], int]:
        return self._number("lanes", 0)

    @functools.cached_property
    def pointwise(self) -> Callable[..., None]:
        """Of a number of numbers the sigmoid (0) or the tanh (1), for tests."""
        function = self._part("FORWARD").pointwise
        function.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        function.restype = None
        return cast(Callable[..., None], function)
