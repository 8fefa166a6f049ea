"""What stands between a module's call and the C loops: the functions of `calls.c`.

A call of a few steps is a microsecond of arithmetic, and working out what it is takes Python more
than ten. But what it is follows from a few facts: attributes of the module, shapes and types of
tensors, torch's switches. So a call that went through `functional.forward` is remembered by its
facts (`learn`), and C does the next one that has the same facts, without deciding anything. Only
calls without a backward are done so.
"""

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_rnn.backends.native import build
from triton_rnn.obstacles import QUESTIONS

_SOURCE = Path(__file__).with_name("calls.c")

# `Known` and `Layer` of calls.c.
_KNOWN = struct.Struct("9q")
_LAYER = struct.Struct("q24s72s16s")
_MOST_LAYERS = 8
# Beyond these the calls are forgotten, as a program may meet more lengths and batches than it will
# meet again.
_MOST_CALLS = 4096

# The forms of a call, as in calls.c.
PADDED, BATCH_FIRST, UNBATCHED, CELL, UNBATCHED_CELL = range(5)

_calls: dict[bytes, bytes] = {}


class Layer(NamedTuple):
    """How one layer of a known call is done: fields of `struct Call`, and where weights are."""

    address: int
    team: bytes
    shared: bytes
    places: bytes


class Functions(NamedTuple):
    """The functions of `calls.c`; what they take stands there.

    Attributes:
        call: puts together the arguments of one layer and calls it.
        known: does a whole call that was learned.
    """

    call: Callable[..., int]
    known: Callable[..., Any]


@functools.cache
def functions() -> Functions | None:
    """None where they cannot be had: Python does the same."""
    name = b"dlpack_exchange_api"
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.argtypes, pointer_of.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    exchange = pointer_of(capsule, name)
    # The record begins with its version; another major one is another record.
    if ctypes.c_uint32.from_address(exchange).value != 1:
        return None
    flags = ("-Wl,-undefined,dynamic_lookup",) if sys.platform == "darwin" else ()
    try:
        found = build.library(_SOURCE, flags)
    except build.BuildError:
        return None
    # Which, unlike a CDLL, keeps the GIL.
    make = ctypes.PyDLL(found._name, handle=found._handle).functions
    make.argtypes, make.restype = (ctypes.c_void_p, *[ctypes.py_object] * 5), ctypes.py_object
    if hasattr(os, "register_at_fork"):
        # The child has other threads.
        os.register_at_fork(after_in_child=_calls.clear)
    made = make(
        exchange,
        (Tensor, torch.nn.Parameter),
        QUESTIONS,
        (torch._C._get_mkldnn_enabled, torch.get_num_threads),
        torch.is_grad_enabled,
        _calls,
    )
    return Functions(*made)


def forget() -> None:
    """Let every call be decided anew; for tests that change the rules."""
    _calls.clear()


def _make_room() -> None:
    if len(_calls) >= _MOST_CALLS:
        _calls.clear()


def leave(key: bytes) -> None:
    """Remember that a call is not done here.

    Args:
        key: what the call is known by, from `Functions.known`.
    """
    _make_room()
    _calls[key] = b""


def learn(
    key: bytes,
    form: int,
    directions: int,
    seq_len: int,
    batch: int,
    widths: tuple[int, int, int],
    weights: int,
    layers: list[Layer],
) -> None:
    """Remember how a call is done.

    Args:
        key: what the call is known by, from `Functions.known`.
        form: of the results.
        widths: of a row of the output, of h and of c, 0 without c.
        weights: of a layer, how many.
    """
    if len(layers) > _MOST_LAYERS:
        return
    _make_room()
    record = _KNOWN.pack(form, len(layers), directions, weights, seq_len, batch, *widths)
    for layer in layers:
        places = layer.places.ljust(16, b"\x7f")
        record += _LAYER.pack(layer.address, layer.team, layer.shared, places)
    _calls[key] = record
