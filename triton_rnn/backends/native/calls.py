"""What stands between a module's call and the C loops: the functions of `calls.c`.

A call of a few steps is a microsecond of arithmetic, and working out what it is takes Python more
than ten. But what it is follows from a few facts: attributes of the module, shapes and types of
tensors, torch's switches. So what was decided about a call is kept by its facts (`learn`), and the
next one that has the same facts is known for what it is. Where all that is left to do is C's (a
call without a backward, on this backend), C does it at once. A call on a GPU is known too, but
Python's to do.
"""

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import dispatch, health
from triton_rnn.backends.native import build
from triton_rnn.obstacles import QUESTIONS

_SOURCE = Path(__file__).with_name("calls.c")

# `Known` and `Layer` of calls.c.
_KNOWN = struct.Struct("9q")
_LAYER = struct.Struct("q24s80s16s")
MOST_LAYERS = 8
# Beyond these the calls are forgotten, as a program may meet more lengths and batches than it will
# meet again.
_MOST_CALLS = 4096

# The forms of a call, as in calls.c.
PADDED, BATCH_FIRST, UNBATCHED, PACKED, CELL, UNBATCHED_CELL = range(6)

_calls: dict[bytes, Any] = {}


class Functions(NamedTuple):
    """The functions of `calls.c`; what they take stands there.

    Attributes:
        call: puts together the arguments of one layer and calls it.
        known: does a whole call that was learned, or tells what was decided about it.
    """

    call: Callable[..., int]
    known: Callable[..., Any]


def _has_gil() -> bool:
    ask: Callable[[], bool] | None = getattr(sys, "_is_gil_enabled", None)
    return ask is None or ask()


@functools.cache
def functions() -> Functions | None:
    """None where they cannot be had: Python does the same."""
    name = b"dlpack_exchange_api"
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or not _has_gil():
        # What calls.c borrows from the dictionary of calls is only safe with the GIL.
        return None
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.argtypes, pointer_of.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    exchange: int = pointer_of(capsule, name)
    # The record begins with its version; another major one is another record.
    if ctypes.c_uint32.from_address(exchange).value != 1:
        return None
    if hasattr(os, "register_at_fork"):
        # The child has other threads.
        os.register_at_fork(after_in_child=_calls.clear)
    return looking_by(exchange)


def looking_by(exchange: int) -> Functions | None:
    """The functions, which look at tensors by the exchange API at an address from now on."""
    flags = ("-Wl,-undefined,dynamic_lookup",) if sys.platform == "darwin" else ()
    try:
        found = build.library(_SOURCE, flags)
    except build.BuildError:
        return None
    # Which, unlike a CDLL, keeps the GIL.
    make = ctypes.PyDLL(found._name, handle=found._handle).functions
    make.argtypes, make.restype = (ctypes.c_void_p, *[ctypes.py_object] * 6), ctypes.py_object
    made = make(
        exchange,
        (Tensor, torch.nn.Parameter, PackedSequence, PackedSequence._make),
        QUESTIONS,
        (torch._C._get_mkldnn_enabled, torch.get_num_threads, health.failures),
        dispatch.float32_switches,
        torch.is_grad_enabled,
        _calls,
    )
    return Functions(*made)


def forget() -> None:
    """Let every call be decided anew; for tests that change the rules."""
    _calls.clear()


def learn(key: bytes, decided: Any) -> None:
    """Keep what was decided about a call.

    Args:
        key: what the call is known by, from `Functions.known`.
        decided: a `record`, for C to do the call; or what Python is to be told, with the weights.
    """
    if len(_calls) >= _MOST_CALLS:
        _calls.clear()
    _calls[key] = decided


def leave(key: bytes) -> None:
    """Keep that a call is not done here; as `learn`."""
    learn(key, b"")


def record(
    form: int,
    directions: int,
    weights: int,
    seq_len: int,
    batch: int,
    widths: tuple[int, int, int],
    layers: Sequence[tuple[int, bytes, bytes, bytes]],
) -> bytes:
    """How C does a call.

    Args:
        form: of input and results.
        weights: of a layer, how many.
        widths: of a row of the output, of h and of c, 0 without c.
        layers: of each the function's address, then fields of a Call: of the team, and those that
            calls share; and which weight is at each place.
    """
    parts = [_KNOWN.pack(form, len(layers), directions, weights, seq_len, batch, *widths)]
    for address, team, shared, places in layers:
        # As `struct Layer`, whose places are 16.
        parts.append(_LAYER.pack(address, team, shared, places.ljust(16, b"\x7f")))
    return b"".join(parts)
