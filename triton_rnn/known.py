"""Calls of a kind that was seen before, which are not decided about anew.

`backends.native.calls` says what a call is known by, and does whole calls of some kinds.
"""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import dispatch
from triton_rnn.request import Call, Request

# Attributes that decide how a layer's call is done, a user's too.
DECIDING = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "training",
)

# Does a call like one before it; None until a backend that can do so has run one. See
# `backends.native.calls`.
_known: Callable[..., Any] | None = None


class Decided(NamedTuple):
    """How a call is done, which is the same for every call of its kind.

    Attributes:
        request: the first layer's.
        form: what input and results look like: "padded", "batch_first", "unbatched", "packed",
            "cell", "unbatched cell".
        layers: how many.
        drop: probability of the dropout between layers, 0 when not training.
    """

    request: Request
    backend: ModuleType
    form: str
    layers: int
    drop: float


def form_of(module: Any, input: Any) -> str:
    """The form of a layer's call: see `Decided`."""
    if isinstance(input, PackedSequence):
        return "packed"
    if input.dim() == 2:
        return "unbatched"
    return "batch_first" if module.batch_first else "padded"


def seen_before(
    module: Any, input: Any, hx: Any, kind: str, deciding: Sequence[str], names: Sequence[str]
) -> Any:
    """What is known of a call, as `known` of calls.c answers; None where nothing can be known.

    Args:
        kind: tells the module from others with the same attributes.
        deciding: its attributes that decide how the call is done.
        names: those of its weights.
    """
    if _known is None:
        return None
    return _known(module, input, hx, dispatch.requested(), kind, deciding, names)


def remember(key: bytes | None, decided: Decided, call: Call) -> None:
    """Spare the next call of this kind the deciding.

    Args:
        key: what the call is known by, if that was asked and can be said.
        call: one of the kind.
    """
    global _known
    if dispatch.capturing(decided.request.device):
        # No kernel is tried out meanwhile: the next call shall be decided about anew.
        return
    native = dispatch.backend_module("native")
    if key is not None:
        native.remember(key, decided, math.prod(call.input.shape[:-1]))
    elif decided.backend in (native, dispatch.backend_module("triton")) or (
        decided.request.device.type != "cpu"
    ):
        _known = native.known()


def again(decided: Decided, input: Any, hx: Any, weights: list[Tensor]) -> Call:
    """A call of a kind that was decided about, as `prepare` and `prepare_cell` would have it."""
    h_0, c_0 = hx if isinstance(hx, (tuple, list)) else (hx, None)
    form = decided.form
    batch_sizes: list[int] = []
    if form == "batch_first":
        input = input.transpose(0, 1)
    elif form == "unbatched":
        input = input.unsqueeze(1)
        h_0 = None if h_0 is None else h_0.unsqueeze(1)
        c_0 = None if c_0 is None else c_0.unsqueeze(1)
    elif form == "packed":
        sizes, order, input = input.batch_sizes, input.sorted_indices, input.data
        if decided.request.packed:
            batch_sizes = sizes.tolist()
        else:
            # Sequences of one length.
            input = input.reshape(decided.request.seq_len, decided.request.batch, -1)
        if order is not None:
            h_0 = None if h_0 is None else h_0.index_select(1, order)
            c_0 = None if c_0 is None else c_0.index_select(1, order)
    elif form != "padded":
        batch_sizes = [decided.request.batch]
        shape = (1, *batch_sizes, decided.request.hidden_size)
        input = input.unsqueeze(0) if form == "unbatched cell" else input
        h_0 = None if h_0 is None else h_0.view(shape)
        c_0 = None if c_0 is None else c_0.view(shape)
    return Call(decided.request, input, batch_sizes, h_0, c_0, weights)
